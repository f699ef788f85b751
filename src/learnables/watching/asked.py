"""What `learnables.watch` is asked for: what has no meaning is refused by the argument's name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from learnables.arguments import describe, require_flag, require_kind, require_path
from learnables.errors import ArgumentError, LearnablesError
from learnables.watching.observation import QUANTITIES


def check_where(to: object, sinks: object, resume: object) -> None:
    """Refuse a place that is none.

    Raises:
        ArgumentError: One of them is of another kind; the message names the argument.
        LearnablesError: There is nothing to resume.
    """
    if to is not None:
        mend = 'ln.watch(model, optimizer, to="runs/name")'
        require_path(to, "to", wanted="a folder, or None for no run database", mend=mend)
    require_flag(resume, "resume")
    if resume and to is None:
        raise LearnablesError(
            "there is no run to go on with",
            where="resume",
            found="resume=True with to=None",
            wanted="the folder of the run",
            mend='ln.watch(model, optimizer, to="runs/name", resume=True)',
        )
    mend = 'sinks=[ln.watching.sinks.TensorBoard("runs/events")]'
    wanted = "a list of sinks, as in learnables.watching.sinks"
    require_kind(sinks, "sinks", list, tuple, wanted=wanted, mend=mend)
    assert isinstance(sinks, (list, tuple))
    for sink in sinks:
        if isinstance(sink, type) or not all(callable(getattr(sink, x, None)) for x in _SINK):
            raise ArgumentError(
                "something among the sinks is none",
                where="sinks",
                found=describe(sink),
                wanted=wanted,
                mend=mend,
            )


_SINK = ("observation", "scalars", "alarm", "close")


def check_what(
    quantities: object, histogram: object, budget: Any, on_alarm: object, scaler: object
) -> None:
    """Refuse to watch what there is not, or at a price that is none.

    Raises:
        ArgumentError: One of them is of another kind; the message names the argument.
        LearnablesError: There is no such quantity, or the budget is not positive.
    """
    alone = isinstance(quantities, str) and quantities in QUANTITIES
    mend = f"quantities={(quantities,) if alone else QUANTITIES!r}"
    wanted = f"some of {QUANTITIES!r}"
    require_kind(quantities, "quantities", list, tuple, set, wanted=wanted, mend=mend)
    assert isinstance(quantities, (list, tuple, set))
    if not quantities or any(quantity not in QUANTITIES for quantity in quantities):
        raise LearnablesError(
            "there is no such quantity to watch",
            where="quantities",
            found=f"quantities={tuple(quantities)!r}",
            wanted=wanted,
            mend=mend,
        )
    require_flag(histogram, "histogram")
    is_number = _number(budget) is not None and not isinstance(budget, bool)
    if budget is not None and not (is_number and budget > 0):
        kind = LearnablesError if is_number else ArgumentError
        raise kind(
            "a budget is a positive share of the training time, or None",
            where="budget",
            found=f"budget={budget!r}",
            wanted="a float; 0.01 for one per cent",
            mend="budget=0.01",
        )
    if on_alarm not in (None, "stop") and not callable(on_alarm):
        raise ArgumentError(
            "on_alarm cannot be called",
            where="on_alarm",
            found=describe(on_alarm),
            wanted="a function of an alarm, 'stop' or None",
            mend="on_alarm=print",
        )
    if scaler is not None and not callable(getattr(scaler, "step", None)):
        raise ArgumentError(
            "what was handed over as scaler has no step",
            where="scaler",
            found=f"{type(scaler).__module__}.{type(scaler).__qualname__}",
            wanted="a torch.amp.GradScaler, or what is called like one; timm's NativeScaler has "
            "it as ._scaler",
            mend="scaler=None",
        )


def plain_numbers(values: Mapping[str, float]) -> dict[str, float]:
    """Plain floats by name.

    Raises:
        ArgumentError: There is something else among them, which is named.
    """
    mend = 'watcher.log_scalars(watcher.step, {"loss": loss.item()})'
    wanted = "a mapping from names to numbers"
    require_kind(values, "values", Mapping, wanted=wanted, mend=mend)
    plain: dict[str, float] = {}
    for name, value in values.items():
        number = _number(value)
        if number is None or not isinstance(name, str):
            raise ArgumentError(
                "what is to be logged is no number" if number is None else "a name is no text",
                where=f"values[{name!r}]",
                found=describe(value if number is None else name),
                wanted="a float, or a tensor of one" if number is None else "a str",
                mend=mend,
            )
        plain[name] = number
    return plain


def _number(value: Any) -> float | None:
    several = isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex())
    if several or isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
