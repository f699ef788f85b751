"""Small differences to a parameter that is there: it stays what it was when training starts.

`ln.graft(model, name, delta, at=PARAMETER)` lets the forward read ``delta(parameter)``;
``handle.merge()`` writes the sum into the parameter.

Shapes: O rows, I columns, E banks, R rank, p × q one block, N blocks.
"""

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.fixed import zeros
from learnables.init.random import uniform
from learnables.nn.block_sparse_linear import BlockSparseLinear, Mask
from learnables.nn.component import Component
from learnables.sparse.layout import Block


@final
class LowRankDelta(Component):
    """A parameter plus a matrix of low rank, ``w + scale · up · down``, zero at the start.

    For parameters of any shape: a matrix; a bank of matrices, (E, O, I), each with a delta of its
    own; a kernel of a convolution, (O, I, k, k), as the matrix (O, I · k · k). For a vector, ``up``
    is the whole delta, and there is no ``down``.

    A parameter that holds several matrices side by side, such as a fused qkv, is cut by
    ``sections``; only the ``chosen`` sections are changed, each by factors of its own.

    Parameters:
        up (O, R): zeros, so that the model starts unchanged. Decays: toward the parameter.
        down (R, I): uniform in ±1/√I, as LoRA draws it. Decays likewise.

    Args:
        shape: Of the parameter: ``LowRankDelta(*weight.shape)``.
        rank: R, for each section.
        scale: Factor of the delta; α / rank of LoRA.
        sections: Into how many equal parts the rows are cut, or their sizes.
        chosen: Which of the sections change; all when None.
        dim: ``-2`` where rows are outputs, as in ``nn.Linear``; ``-1`` where columns are, as in the
            ``Conv1D`` of GPT-2: sections are cut along them.
        banks: How many leading dimensions count matrices; by default one where the shape has three
            dimensions, else none.
        init: Another initialiser for ``down``.

    Raises:
        ShapeError: No shape, a rank below 1, sections that do not fill the rows, or a section that
            does not exist.

    Source:
        Hu et al., *LoRA*, arXiv:2106.09685.

    Example:
        >>> import learnables as ln
        >>> delta = ln.nn.LowRankDelta(24, 8, rank=2, sections=3, chosen=(0, 2))
        >>> {name: tuple(p.shape) for name, p in delta.named_parameters()}
        {'up': (16, 2), 'down': (4, 8)}
        >>> weight = torch.randn(24, 8)
        >>> torch.equal(delta(weight), weight)
        True

    Cost:
        One product of (O, R) and (R, I) for each forward that reads the parameter; none once
        merged.
    """

    def __init__(
        self,
        *shape: int,
        rank: int = 4,
        scale: float = 1.0,
        sections: int | Sequence[int] | None = None,
        chosen: Sequence[int] | None = None,
        dim: int = -2,
        banks: int | None = None,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.scale, self.dim = torch.Size(shape), scale, dim
        self.banks = (1 if len(shape) == 3 else 0) if banks is None else banks
        matrix = self._matrix()
        self.sizes = _cut(matrix[0], sections)
        self.chosen = tuple(range(len(self.sizes)) if chosen is None else chosen)
        self._check(rank)
        leading, rows = shape[: self.banks], sum(self.sizes[i] for i in self.chosen)
        if matrix[1] is None:
            self.up = parameter(*leading, rows, init=zeros(), weight_decay=False, tags=("delta",))
            self.rank = 0
            return
        self.rank, columns = rank, matrix[1]
        self.up = parameter(*leading, rows, rank, init=zeros(), weight_decay=True, tags=("delta",))
        bound = 1 / math.sqrt(columns)
        self.down = parameter(
            *leading,
            rank * len(self.chosen),
            columns,
            init=init or uniform(-bound, bound),
            weight_decay=True,
            tags=("delta",),
        )

    def _matrix(self) -> tuple[int, int | None]:
        """Rows, along which sections are cut, and columns; None for a vector.

        Raises:
            ShapeError: There is no shape.
        """
        sizes = self.shape[self.banks :]
        if not sizes:
            raise ShapeError(
                "a delta needs the shape of its parameter",
                found=f"shape {tuple(self.shape)}, of which {self.banks} count banks",
                wanted="LowRankDelta(*parameter.shape)",
            )
        if len(sizes) == 1:
            return sizes[0], None
        if self.dim == -1:
            return sizes[-1], math.prod(sizes[:-1])
        return sizes[0], math.prod(sizes[1:])

    def _check(self, rank: int) -> None:
        wrong = [i for i in self.chosen if not 0 <= i < len(self.sizes)]
        if rank < 1 or wrong or len({*self.chosen}) != len(self.chosen) or not self.chosen:
            raise ShapeError(
                "there is no such delta",
                found=f"rank={rank}, chosen={self.chosen}",
                wanted=f"rank ≥ 1, sections of 0 … {len(self.sizes) - 1}, each once",
            )

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter, of ``shape`` → its value with the delta, in its own dtype.

        Raises:
            ShapeError: The parameter has another shape.
        """
        _check_fit(self.shape, weight)
        if len(self.chosen) == len(self.sizes) == 1:
            delta = self.up if self.rank == 0 else self.up @ self.down  # (…, O, I)
            return weight + self._as_weight(self.scale * delta).to(weight.dtype)
        axis = self._axis()
        parts = list(torch.split(weight, list(self.sizes), dim=axis))
        ups = torch.split(self.up, [self.sizes[i] for i in self.chosen], dim=self.banks)
        downs = torch.split(self.down, self.rank, dim=-2) if self.rank else (None,) * len(ups)
        for i, up, down in zip(self.chosen, ups, downs, strict=True):
            delta = self.scale * (up if down is None else up @ down)
            parts[i] = parts[i] + self._as_weight(delta, self.sizes[i]).to(weight.dtype)
        return torch.cat(parts, dim=axis)

    def _axis(self) -> int:
        """Which dimension of the parameter is cut into sections."""
        return len(self.shape) - 1 if self.rank and self.dim == -1 else self.banks

    def _as_weight(self, delta: Tensor, rows: int | None = None) -> Tensor:
        """(…, o, I), rows first, → the shape of the parameter with o entries along its axis."""
        if self.rank == 0:
            return delta
        shape = list(self.shape)
        shape[self._axis()] = delta.shape[-2] if rows is None else rows
        return (delta.mT if self.dim == -1 else delta).reshape(shape)

    def extra_repr(self) -> str:
        """Shape, rank and sections."""
        told = f", chosen={self.chosen} of {self.sizes}" if len(self.sizes) > 1 else ""
        return f"{tuple(self.shape)}, rank={self.rank}, scale={self.scale}{told}"


@final
class BlockSparseDelta(Component):
    """A matrix plus a few dense blocks, ``w + scale · S``, zero at the start.

    Unlike a delta of low rank it may have full rank, and it leaves most entries of the matrix
    exactly as they are. Which blocks there are is part of the state, so a file keeps them.

    Parameters:
        blocks.weight (N, p, q): zeros, so that the model starts unchanged. Decays: toward the
            parameter.

    Args:
        out_features: O, rows of the parameter.
        in_features: I, columns.
        block: (p, q), or one number for square blocks.
        density: Share of the blocks that change.
        mask: As in `ln.nn.BlockSparseLinear`; by default equally many blocks in each row and
            column, by chance.
        scale: Factor of the delta.

    Raises:
        LayoutError: As `ln.nn.BlockSparseLinear` says.

    Source:
        Guo, Rush, Kim, *Parameter-Efficient Transfer Learning with Diff Pruning* (structured),
        arXiv:2012.07463.

    Example:
        >>> import learnables as ln
        >>> delta = ln.nn.BlockSparseDelta(64, 32, block=16, density=0.25)
        >>> {name: tuple(p.shape) for name, p in delta.named_parameters()}
        {'blocks.weight': (2, 16, 16)}

    Cost:
        One sum of two (O, I) for each forward that reads the parameter; none once merged.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        block: Block = 16,
        density: float = 0.1,
        mask: Mask | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape, self.scale = torch.Size((out_features, in_features)), scale
        self.blocks = BlockSparseLinear(
            in_features, out_features, block, density, mask, bias=False, init=zeros()
        )

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """No change again; the blocks stay where they are."""
        self.blocks.reset_parameters(generator=generator)

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter, (O, I), → its value with the delta, in its own dtype.

        Raises:
            ShapeError: The parameter has another shape.
        """
        _check_fit(self.shape, weight)
        return weight + (self.scale * self.blocks.dense()).to(weight.dtype)

    def extra_repr(self) -> str:
        """Shape and scale."""
        return f"{tuple(self.shape)}, scale={self.scale}"


def _cut(rows: int, sections: int | Sequence[int] | None) -> tuple[int, ...]:
    if sections is None:
        return (rows,)
    if isinstance(sections, int):
        sizes = (rows // sections,) * sections if sections > 0 else ()
    else:
        sizes = tuple(sections)
    if sum(sizes) != rows or min(sizes, default=0) < 1:
        raise ShapeError(
            "the sections do not fill the rows of the parameter",
            found=f"sections {sizes or sections}, {sum(sizes)} rows",
            wanted=f"{rows} rows",
        )
    return sizes


def _check_fit(shape: torch.Size, weight: Tensor) -> None:
    if weight.shape != shape:
        raise ShapeError(
            "the delta has another shape than the parameter",
            found=f"delta {tuple(shape)}",
            wanted=f"parameter {tuple(weight.shape)}",
        )
