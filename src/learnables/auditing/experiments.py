"""Experiments on request: does the loss follow the gradient, do samples mix, does a file keep all?

Watching alone cannot answer these. Each runs code of the user's again, so `audit` runs one only
where it was asked for, or was handed what it needs; everything is put back after each run.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from learnables._torch import halved_in, is_dtensor, is_uninitialised, on_optimizer_step
from learnables.arguments import require_names
from learnables.errors import LearnablesError

PROBES = ("gradient", "batch", "checkpoint")
_GROUP = 8  # parameters that are moved together
_WIDTH = 2e-3  # step as a share of a parameter's length
_TOLERANCE = 0.1  # of one parameter's slope
_IN_A_GROUP = 0.02  # of a group's, where each has an equal share
_UNSTEADY = 0.05  # two widths must agree to this, or the loss has a kink here: no verdict
_ROUND_OFF = 2e-6  # of the loss, in single precision, after sums over a batch


@dataclass(frozen=True)
class Slope:
    """How the loss changes along one direction of a parameter.

    Attributes:
        numeric: By central differences; NaN where the loss does as the gradient says.
        analytic: By the gradient that arrived; 0 where none did.
    """

    numeric: float
    analytic: float


@dataclass(frozen=True)
class Mixing:
    """An output that is another one for the same samples in other company.

    Attributes:
        difference: Largest |f(x)[some] − f(x[some])| ÷ largest |f(x)|; NaN where shapes differ.
        output: Which output, where there are several.
        shape: Its shape for the whole batch.
        of_some: Its shape for some of the samples.
    """

    difference: float
    output: str
    shape: tuple[int, ...]
    of_some: tuple[int, ...]


@dataclass(frozen=True)
class Experiments:
    """What the experiments found; None where one was not made.

    Attributes:
        slopes: Parameter → slope, for those whose slope could be told.
        mixing: The outputs that mix samples.
        lost: Name → what a round trip through ``state_dict`` makes of it.
        reasons: Probe → why it could not tell.
    """

    slopes: Mapping[Tensor, Slope] | None = None
    mixing: tuple[Mixing, ...] | None = None
    lost: Mapping[str, str] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


def check_probes(probes: Collection[str]) -> None:
    """Refuse a name that is no probe.

    Raises:
        ArgumentError: It is no list of names.
        LearnablesError: There is no such probe.
    """
    require_names(probes, "probes")
    unknown = [probe for probe in probes if probe not in PROBES]
    if unknown:
        raise LearnablesError(
            "there is no such probe", found=repr(unknown[0]), wanted=", ".join(PROBES)
        )


def experiment(
    probes: Collection[str],
    model: nn.Module,
    params: Sequence[Tensor],
    step: Callable[[], Any] | None,
    batch: Any,
    restore: Callable[[], Any],
) -> Experiments:
    """Make the experiments that were asked for, and the one over ``batch`` where there is one.

    Args:
        probes: Of `PROBES`.
        model: The model.
        params: The parameters that train.
        step: One complete iteration, for ``"gradient"``.
        batch: What the model is called with, for ``"batch"``: a tensor, or a tuple or dict of
            arguments, whose tensors have the samples along their first dimension.
        restore: Puts everything back that the audit can reach.
    """
    reasons: dict[str, str] = {}
    slopes = mixing = lost = None
    if "gradient" in probes:
        if step is None:
            reasons["gradient"] = "a step to run: pass step="
        else:
            slopes = _slopes(params, step, restore, reasons)
    if batch is not None:
        mixing = _mixing(model, batch, reasons)
        restore()
    elif "batch" in probes:
        reasons["batch"] = "a batch to call the model with: pass batch="
    if "checkpoint" in probes:
        lost = _round_trip(model, reasons)
        restore()
    return Experiments(slopes, mixing, lost, reasons)


# --- does the loss follow the gradient? ----------------------------------------------------------


class _Run:
    """One iteration: the value of each loss that was differentiated, before any optimizer stepped.

    Attributes:
        losses: In order.
        gradients: Parameter → gradient of each loss, only where ``params`` are watched.
        strange: Something was differentiated that is no scalar.
        halved: What computes in half precision on the way to a loss, where parameters are watched.
    """

    def __init__(self, params: Sequence[Tensor] = ()) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[Tensor, Tensor]] = []
        self.strange = False
        self.halved = ""
        self._open = True
        self._params = params

    @contextmanager
    def watching(self) -> Iterator[None]:
        original = torch.autograd.backward

        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **more: Any) -> None:
            roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            if self._open:
                simple = len(roots) == 1 and roots[0].numel() == 1 and grad_tensors is None
                self.strange |= not simple
                self.losses.append(float(roots[0].detach()) if simple else math.nan)
                self.gradients.append({})
                if self._params and simple and not self.halved:
                    self.halved = halved_in(roots[0])
            original(tensors, grad_tensors, *args, **more)

        def stepped(*_: Any) -> None:
            self._open = False

        hooks = [p.register_hook(self._keep(p)) for p in self._params]  # type: ignore[no-untyped-call]
        remove = on_optimizer_step(stepped, lambda *_: None)
        torch.autograd.backward = backward
        try:
            yield
        finally:
            torch.autograd.backward = original
            remove()
            for hook in hooks:
                hook.remove()

    def _keep(self, param: Tensor) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            if self._open and self.gradients:
                held = self.gradients[-1]
                value = gradient.detach()
                held[param] = held[param] + value if param in held else value.clone()

        return keep


def _slopes(
    params: Sequence[Tensor],
    step: Callable[[], Any],
    restore: Callable[[], Any],
    reasons: dict[str, str],
) -> dict[Tensor, Slope] | None:
    params = [p for p in params if _can_be_moved(p)]
    if not params:
        reasons["gradient"] = "parameters in single or double precision that are whole on a device"
        return None
    runs = []
    for watched in (params, ()):
        run = _Run(watched)
        restore()
        with run.watching():
            step()
        runs.append(run)
    first, again = runs
    if first.strange or not first.losses or not all(map(math.isfinite, first.losses)):
        reasons["gradient"] = "a scalar, finite loss that is differentiated before a step"
    elif first.halved:  # a step of a thousandth is rounded away, or is ten
        reasons["gradient"] = f"single precision up to the loss: {first.halved}"
    elif first.losses != again.losses:
        reasons["gradient"] = (
            f"a step that repeats: it gave {first.losses[0]:.8g}, then {again.losses[0]:.8g}"
        )
    if "gradient" in reasons:
        restore()
        return None

    gradients = {p: [held.get(p) for held in first.gradients] for p in params}
    drawn = torch.Generator().manual_seed(0)
    directions = {p: _direction(p, gradients[p], drawn) for p in params}
    promised = {p: max(map(abs, _products(gradients[p], directions[p]))) for p in params}
    silent = [p for p in params if not promised[p]]
    heard = sorted((p for p in params if promised[p]), key=promised.__getitem__)

    def analytic(group: Sequence[Tensor]) -> list[float]:
        rows = [_products(gradients[p], directions[p]) for p in group]
        return [sum(column) for column in zip(*rows, strict=True)]

    def losses_at(group: Sequence[Tensor], width: float) -> list[float]:
        restore()
        with torch.no_grad():
            for p in group:
                p.add_(directions[p], alpha=width)
        run = _Run()
        with run.watching():
            step()
        return run.losses

    def numeric(group: Sequence[Tensor], width: float) -> list[float] | None:
        up, down = losses_at(group, width), losses_at(group, -width)
        if len(up) != len(first.losses) or len(down) != len(first.losses):
            return None
        return [(a - b) / (2 * width) for a, b in zip(up, down, strict=True)]

    found: dict[Tensor, Slope] = {}

    def examine(group: Sequence[Tensor]) -> None:
        wanted, seen = analytic(group), numeric(group, _WIDTH)
        if seen is None:
            return
        k = _worst(wanted, seen, first.losses, _TOLERANCE if len(group) == 1 else _IN_A_GROUP)
        if k is None:
            found.update((p, Slope(math.nan, math.nan)) for p in group)  # as it should be
            return
        closer = numeric(group, _WIDTH / 2)
        if closer is None or _apart(closer[k], seen[k]) > _UNSTEADY:
            return
        if len(group) == 1:
            found[group[0]] = Slope(closer[k], wanted[k])
            return
        middle = len(group) // 2
        examine(group[:middle])
        examine(group[middle:])

    for part in (heard, silent):
        for i in range(0, len(part), _GROUP):
            group = part[i : i + _GROUP]
            for p in group[1:]:  # an equal share for each, or a large one would hide the others
                if promised[p]:
                    directions[p] = directions[p] * (promised[group[0]] / promised[p])
            examine(group)
    restore()
    return found


def _can_be_moved(p: Tensor) -> bool:
    return (
        p.dtype in (torch.float32, torch.float64)
        and p.requires_grad
        and p.numel() > 0
        and not p.is_meta
        and not is_dtensor(p)
        and not is_uninitialised(p)
    )


def _direction(p: Tensor, gradients: Sequence[Tensor | None], drawn: torch.Generator) -> Tensor:
    """As long as the parameter; along its gradient, so that what it promises is largest."""
    known = [g for g in gradients if g is not None and bool(g.any())]
    if known:
        along = known[-1].to_dense() if known[-1].layout is not torch.strided else known[-1]
    else:
        along = torch.randn(p.shape, generator=drawn, dtype=p.dtype).to(p.device)
    length = max(float(p.detach().norm()), 1e-2 * math.sqrt(p.numel()))
    return along * (length / max(float(along.norm()), 1e-30))


def _products(gradients: Sequence[Tensor | None], direction: Tensor) -> list[float]:
    """How much each loss should change along a direction."""
    wide = direction.double()
    return [0.0 if g is None else float((g.to_dense().double() * wide).sum()) for g in gradients]


def _worst(
    wanted: list[float], seen: list[float], losses: list[float], tolerance: float
) -> int | None:
    """Which loss changes most unlike what the gradients say; None where all follow them."""
    over = []
    for ours, theirs, loss in zip(wanted, seen, losses, strict=True):
        noise = _ROUND_OFF * abs(loss) / _WIDTH
        allowed = tolerance * max(abs(ours), abs(theirs)) + noise
        over.append(abs(ours - theirs) / allowed if allowed else 0.0)
    most = max(range(len(over)), key=over.__getitem__)
    return most if over[most] > 1 else None


def _apart(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


# --- do samples mix? -----------------------------------------------------------------------------


def _mixing(model: nn.Module, batch: Any, reasons: dict[str, str]) -> tuple[Mixing, ...] | None:
    sizes = {x.shape[0] for x in _tensors(batch).values() if x.ndim}
    size = max(sizes, default=0)
    if size < 2:
        reasons["batch"] = "a batch of two samples at least"
        return None
    some = torch.arange(size // 2, -1, -1)  # fewer of them, and in another order

    def chosen(x: Tensor) -> Tensor:
        return x[some.to(x.device)] if x.ndim and x.shape[0] == size else x

    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            plain = _tensors(_called(model, batch))
            changed = _tensors(_called(model, _map(batch, chosen)))
    except Exception as error:  # whatever the user's forward says to this batch
        reasons["batch"] = f"a batch that the model can be called with: {error}".splitlines()[0]
        return None
    finally:
        for module, flag in was_training.items():
            module.training = flag
    found = []
    for name, x in plain.items():
        y = changed.get(name)
        if y is None or not x.ndim or x.shape[0] != size or not x.is_floating_point():
            continue
        rows, difference = chosen(x), math.nan
        if rows.shape == y.shape:
            scale = max(float(x.abs().max()), 1e-12)
            difference = float((rows.float() - y.float()).abs().max()) / scale
            if difference <= max(1e-3, 10 * torch.finfo(x.dtype).eps):
                continue
        found.append(Mixing(difference, name, tuple(x.shape), tuple(y.shape)))
    return tuple(found)


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_map(item, change) for item in value]
    return value


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    return {n: x for key, item in items for n, x in _tensors(item, f"{name}[{key!r}]").items()}


# --- does a file keep all? -----------------------------------------------------------------------


def _round_trip(model: nn.Module, reasons: dict[str, str]) -> dict[str, str] | None:
    """Fill a copy of the model with other values, load the state dict into it, compare."""
    try:
        twin = copy.deepcopy(model)
        state = {k: copy.deepcopy(v) for k, v in model.state_dict().items()}
        for x in {id(x): x for x in _named(twin).values() if _has_values(x)}.values():
            _change_(x)  # what is not loaded would look as if it were
    except Exception as error:  # a tensor with a graph, a lock, a file: not everything is copied
        reasons["checkpoint"] = f"a model that can be copied: {error}".splitlines()[0]
        return None
    with torch.no_grad():
        try:
            twin.load_state_dict(state)
        except Exception as error:  # the user's own hooks may refuse too
            return {"": f"load_state_dict refuses it: {error}".splitlines()[0]}
    lost = {}
    loaded = _named(twin)
    for name, x in _named(model).items():
        y = loaded.get(name)
        if y is None:
            lost[name] = "is not there after loading"
        elif _has_values(x) and not _equal(x, y):
            lost[name] = "another value after loading" if name in state else "is not in the file"
    return lost


def _named(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _change_(x: Tensor) -> None:
    """Change each byte: there is no arithmetic in some dtypes, and a bool stays one."""
    with torch.no_grad():
        flat = (_bytes(x) ^ 1).view(x.dtype)
        x.copy_(flat.view(x.shape))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)


def _has_values(x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and x.layout is torch.strided
        and not x.is_meta
        and not is_uninitialised(x)
        and not is_dtensor(x)
    )
