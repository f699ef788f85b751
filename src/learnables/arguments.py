"""What a caller handed over is what was asked for; said before anything is done with it."""

from collections.abc import Iterable
from numbers import Real

from torch import Tensor, nn
from torch.optim import Optimizer

from learnables.errors import ArgumentError


def require_module(model: object, name: str = "model") -> None:
    """Refuse what is no module, such as a list of modules, a class, or a state dict.

    Raises:
        ArgumentError: It is no ``nn.Module``; the message names the argument.
    """
    if isinstance(model, nn.Module):
        return
    raise ArgumentError(
        f"{name} is no module",
        where=name,
        found=describe(model),
        wanted="a torch.nn.Module",
        mend=_towards_a_module(model),
    )


def require_text(value: object, name: str) -> None:
    """Refuse what is no text where a name is asked for.

    Raises:
        ArgumentError: It is no ``str``; the message names the argument.
    """
    if not isinstance(value, str):
        raise ArgumentError(
            f"{name} is no text", where=name, found=describe(value), wanted="a name, as a str"
        )


def require_number(value: object, name: str) -> None:
    """Refuse what is no number; YAML, for one, reads ``1e-3`` as text.

    Raises:
        ArgumentError: It is neither a real number nor a tensor of one; the argument is named.
    """
    is_one = isinstance(value, Tensor) and value.numel() == 1
    if not is_one and not isinstance(value, Real):
        raise ArgumentError(
            f"{name} is no number",
            where=name,
            found=describe(value),
            wanted="a float",
            mend=f"{name}=float({value!r})" if isinstance(value, str) else "",
        )


def optimizers_in(optimizer: "Optimizer | Iterable[Optimizer] | None") -> list[Optimizer]:
    """The optimizers of an argument that takes one, several or none.

    Raises:
        ArgumentError: There is something among them that is no optimizer.
    """
    if optimizer is None:
        return []
    several = isinstance(optimizer, Iterable) and not _is_optimizer(optimizer)
    found: list[Optimizer] = list(optimizer) if several else [optimizer]  # type: ignore[arg-type,list-item]
    for one in found:
        if not _is_optimizer(one):
            raise ArgumentError(
                "what was handed over as optimizer is none",
                where="optimizer",
                found=describe(optimizer),
                wanted="a torch.optim.Optimizer, or several",
                mend="optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3))",
            )
    return found


def describe(value: object) -> str:
    """What ``value`` is, in a few words: ``a list of Linear``, ``the class Linear``, ``None``."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    kind = type(value).__qualname__
    if isinstance(value, (list, tuple, set)):
        kinds = list(dict.fromkeys(type(item).__qualname__ for item in value))
        return f"a {kind} of {', '.join(kinds[:3])}" if kinds else f"an empty {kind}"
    short = repr(value) if isinstance(value, (str, int, float, bytes)) else ""
    return f"{short[:40]}, of type {kind}" if short else f"of type {kind}"


def _is_optimizer(value: object) -> bool:
    # An engine's optimizer need not inherit from torch's; its groups are what we read.
    return isinstance(value, Optimizer) or hasattr(value, "param_groups")


def _towards_a_module(value: object) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"model = {value.__name__}(…)"
    modules = isinstance(value, (list, tuple)) and all(isinstance(m, nn.Module) for m in value)
    return "model = nn.ModuleList(model)" if modules and value else ""
