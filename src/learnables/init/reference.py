"""Initialisers that start from a tensor that is there."""

from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from learnables.errors import LearnablesError, ShapeError
from learnables.init.base import Initializer


@final
@dataclass(frozen=True, repr=False, eq=False)
class like(Initializer):  # noqa: N801 - named after what it does
    """Start as another tensor does: with its values, or with new ones that look like its own.

    Args:
        reference: The tensor; a copy is kept.
        how: ``"values"`` copies it (shapes must agree up to leading ones). ``"moments"`` draws from
            a normal with its mean and standard deviation, for each feature of the last dimension
            where that dimension agrees, else over all: a new token that looks like the embedding
            table's, for instance.

    Raises:
        LearnablesError: ``how`` is neither.

    Example:
        >>> like(torch.tensor([1.0, 2.0]))(torch.empty(1, 2))
        tensor([[1., 2.]])
        >>> table = torch.full((100, 4), 3.0)
        >>> like(table, how="moments")(torch.empty(1, 1, 4))
        tensor([[[3., 3., 3., 3.]]])
    """

    reference: Tensor = field(repr=False)
    how: Literal["values", "moments"] = "values"

    def __post_init__(self) -> None:
        if self.how not in ("values", "moments"):
            raise LearnablesError(
                "no such likeness", found=f"how={self.how!r}", wanted="'values' or 'moments'"
            )
        object.__setattr__(self, "reference", self.reference.detach().clone())

    def fill_(self, x: Tensor, *, role: str | None, generator: torch.Generator | None) -> None:
        """Fill ``x`` in place.

        Raises:
            ShapeError: The values of another shape were asked for.
        """
        there = self.reference.to(device=x.device, dtype=x.dtype)
        if self.how == "values":
            if _without_ones(there.shape) != _without_ones(x.shape):
                raise ShapeError(
                    "the values of another shape cannot be copied",
                    found=f"reference of shape {tuple(there.shape)}",
                    wanted=f"{tuple(x.shape)}",
                    mend='ln.init.like(reference, how="moments")',
                )
            x.copy_(there.reshape(x.shape))
        else:
            mean, std = _moments(there, x.shape)
            x.normal_(generator=generator).mul_(std).add_(mean)

    def wanted_std(self, shape: torch.Size, *, role: str | None = None) -> float | None:
        """That of the reference."""
        return float(self.reference.to(torch.float32).std(correction=0))


def _moments(there: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    by_feature = there.ndim > 1 and len(shape) > 0 and there.shape[-1] == shape[-1]
    rows = there.reshape(-1, there.shape[-1]) if by_feature else there.reshape(-1, 1)
    return rows.mean(0), rows.std(0, correction=0).to(there.dtype)


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        del sizes[0]
    return tuple(sizes)
