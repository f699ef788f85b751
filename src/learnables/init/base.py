"""What every initialiser can do, and how one is run."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from learnables.errors import LearnablesError


class Initializer(ABC):
    """A way to fill a tensor: an immutable object that can be printed, pickled and compared.

    Called with a tensor it fills that tensor in place, like torch's own ``nn.init.*_``.
    """

    #: Whether two calls on one shape give the same values whatever the random state.
    deterministic: bool = False

    @abstractmethod
    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x``, a floating or complex strided tensor in at least 32 bits, in place."""

    @abstractmethod
    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """The standard deviation it aims at for ``shape``; None where none is meant."""

    def __call__(
        self, x: Tensor, *, role: str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Fill ``x`` in place and return it; half precision is computed in fp32 and rounded once.

        Args:
            x: Any floating or complex tensor.
            role: How the dimensions of ``x`` are meant, where its fans depend on it.
            generator: Source of randomness; torch's default generator when None.
        """
        with torch.no_grad():
            if x.device.type == "meta":
                return x
            if x.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
                self.fill_(x, role=role, generator=generator)
            else:
                wide = torch.complex64 if x.is_complex() else torch.float32
                filled = torch.empty(x.shape, dtype=wide, device=x.device)
                self.fill_(filled, role=role, generator=generator)
                x.copy_(filled)
        return x


Init: TypeAlias = Initializer | Callable[[Tensor], Tensor]


def initialise_(
    x: Tensor, init: Init, *, role: str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Run one of our initialisers, or a ``torch.nn.init`` function, on ``x`` in place.

    Raises:
        LearnablesError: A generator was given to a function that cannot take one.
    """
    if isinstance(init, Initializer):
        return init(x, role=role, generator=generator)
    with torch.no_grad():
        if generator is None:
            init(x)
            return x
        try:
            init(x, generator=generator)  # type: ignore[call-arg]
        except TypeError as error:
            raise LearnablesError(
                "this initialiser takes no generator",
                found=f"init={getattr(init, '__name__', init)!r} with generator=",
                wanted="one of ln.init.*, or a function with a generator keyword",
                mend="use ln.init.trunc_normal(0.02), or leave generator out",
            ) from error
    return x
