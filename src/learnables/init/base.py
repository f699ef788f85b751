"""What every initialiser can do, and how one is run."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from learnables._torch import is_dtensor
from learnables.arguments import require_as_annotated
from learnables.errors import LearnablesError

if TYPE_CHECKING:
    from typing_extensions import Self

_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Initializer(ABC):
    """A way to fill a tensor: an immutable object that can be printed, pickled and compared.

    Called with a tensor it fills that tensor in place, like torch's own ``nn.init.*_``.
    """

    #: Whether two calls on one shape give the same values whatever the random state.
    deterministic: bool = False

    def __new__(cls, *args: object, **kwargs: object) -> "Self":
        """Refuse an argument of another kind here, before a model is half built."""
        require_as_annotated(cls, args, kwargs)
        return super().__new__(cls)

    @abstractmethod
    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x``, a contiguous floating or complex tensor in at least 32 bits, in place."""

    @abstractmethod
    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """The standard deviation it aims at for ``shape``; None where none is meant.

        A complex tensor has it as a whole: each of its two parts has 1/√2 of it.
        """

    def __call__(
        self, x: Tensor, *, role: str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Fill ``x`` in place and return it; half precision is computed in fp32 and rounded once.

        The values depend on shape, role and random state only: not on the dtype (up to rounding),
        not on the memory format, and not on the sharding. A DTensor gets the values that rank 0
        drew for the whole, which each rank holds for the length of the call.

        Args:
            x: Any floating or complex tensor.
            role: How the dimensions of ``x`` are meant, where its fans depend on it.
            generator: Source of randomness; torch's default generator when None.
        """
        return _run(
            x,
            lambda whole: self.fill_(whole, role=role, generator=generator),
            direct=x.dtype in _WIDE and x.is_contiguous(),
        )

    def __repr__(self) -> str:
        """As one would type it: every value up to the last that differs from its default."""
        if not is_dataclass(self):
            return object.__repr__(self)
        mine = fields(self)
        while len(mine) > 1 and getattr(self, mine[-1].name) == mine[-1].default:
            mine = mine[:-1]
        return f"{type(self).__name__}({', '.join(_typed(self, one) for one in mine)})"


def _typed(init: Initializer, one: "Field[object]") -> str:
    value = getattr(init, one.name)
    if not one.repr:
        return "…"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


Init: TypeAlias = Initializer | Callable[[Tensor], Tensor]


def initialise_(
    x: Tensor, init: Init, *, role: str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Run one of our initialisers, or a ``torch.nn.init`` function, on ``x`` in place.

    Raises:
        LearnablesError: ``init`` is a family rather than an initialiser of it, or a generator was
            given to a function that cannot take one.
    """
    if isinstance(init, Initializer):
        return init(x, role=role, generator=generator)
    if isinstance(init, type) or getattr(init, "__module__", "").startswith("learnables.init"):
        name = getattr(init, "__name__", "")
        raise LearnablesError(
            "an initialiser is made by a call",
            found=f"init=ln.init.{name}",
            wanted=f"init=ln.init.{name}(…)",
            mend=f"put parentheses behind ln.init.{name}",
        )
    return _run(x, lambda whole: _call(init, whole, generator), direct=x.dtype in _WIDE)


def _run(x: Tensor, fill: Callable[[Tensor], object], *, direct: bool) -> Tensor:
    """Let ``fill`` work on ``x`` or, where that is not ``direct``, on a wide copy of the whole."""
    with torch.no_grad():
        if x.device.type == "meta":
            return x
        if direct and not is_dtensor(x):
            fill(x)
            return x
        wide = torch.complex64 if x.is_complex() else torch.float32
        whole = torch.empty(x.shape, dtype=x.dtype if x.dtype in _WIDE else wide, device=x.device)
        fill(whole)
        if is_dtensor(x):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(x, DTensor)
            x.copy_(distribute_tensor(whole.to(x.dtype), x.device_mesh, x.placements))
        else:
            x.copy_(whole)
    return x


def _call(init: Callable[..., object], x: Tensor, generator: torch.Generator | None) -> None:
    if generator is None:
        init(x)
        return
    try:
        init(x, generator=generator)
    except TypeError as error:
        raise LearnablesError(
            "this initialiser takes no generator",
            found=f"init={getattr(init, '__name__', init)!r} with generator=",
            wanted="one of ln.init.*, or a function with a generator keyword",
            mend="use ln.init.trunc_normal(0.02), or leave generator out",
        ) from error
