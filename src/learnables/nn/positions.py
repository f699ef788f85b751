"""Learned vectors that say where in a sequence, an image or a clip a token stands.

Shapes: B batch, N tokens, T frames, L levels, D dim, h × w grid.
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.random import trunc_normal
from learnables.nn.component import Component
from learnables.nn.resample import Grid, ResampleGrid, ResampleLine, ResizeRows, resample_grid


@final
class Positions1d(Component):
    """One learned vector for each place of a sequence, added to the tokens.

    A checkpoint of another length is resampled on load: cubic, anti-aliased, in fp32. That is meant
    for signals, whose length is a matter of sampling; for text, whose places are counted, load a
    slice instead.

    Parameters:
        table (1, N, D): ``trunc_normal(0.02)``. No decay.

    Args:
        length: N, the longest sequence.
        dim: D.
        init: Another initialiser, e.g. ``ln.init.sincos1d()``.

    Source:
        Gehring et al., *Convolutional Sequence to Sequence Learning*, arXiv:1705.03122.

    Example:
        >>> import learnables as ln
        >>> ln.nn.Positions1d(16, 8)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, length: int, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.length = length
        self.table = parameter(
            1,
            length,
            dim,
            init=init or trunc_normal(0.02),
            weight_decay=False,
            resize=ResampleLine(1),
            tags=("position",),
        )

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """(B, N, D) → the same with places ``start``, ``start + 1``, … added.

        Raises:
            ShapeError: The sequence reaches beyond the table.
        """
        end = start + x.shape[1]
        if start < 0 or end > self.length:
            raise ShapeError(
                "the sequence is longer than the table of positions",
                found=f"places {start} to {end}",
                wanted=f"at most {self.length}",
            )
        return x + self.table[:, start:end].to(x.dtype)


@final
class Positions2d(Component):
    """One learned vector for each place of a grid, added to the tokens.

    A checkpoint of another grid is resampled on load, by plain ``load_state_dict``: bicubic,
    anti-aliased, in fp32, rows of prefix tokens kept. The grid that a table was saved on is in the
    metadata of its state dict, which ``torch.save`` keeps and safetensors does not; without it the
    source is taken to be square or, where that is impossible, of this grid's aspect ratio.

    Parameters:
        table (1, prefix + h · w, D): ``trunc_normal(0.02)``. No decay.

    Args:
        grid: (h, w), or one number for a square.
        dim: D.
        prefix: Number of tokens in front of the grid that have a row of their own.
        source_grid: Grid of the checkpoints to come, where it cannot be told.
        init: Another initialiser.

    Source:
        Dosovitskiy et al., *An Image is Worth 16x16 Words*, arXiv:2010.11929.

    Example:
        >>> import learnables as ln
        >>> small, large = ln.nn.Positions2d(4, 8, prefix=1), ln.nn.Positions2d((6, 8), 8, prefix=1)
        >>> large.load_state_dict(small.state_dict())
        <All keys matched successfully>
        >>> large(torch.zeros(2, 1 + 6 * 8, 8)).shape
        torch.Size([2, 49, 8])
    """

    def __init__(
        self,
        grid: int | Grid,
        dim: int,
        prefix: int = 0,
        *,
        source_grid: int | Grid | None = None,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.prefix = _pair(grid), prefix
        source = None if source_grid is None else _pair(source_grid)
        # Before the parameter, whose own rule must find the table resampled already.
        self.register_load_state_dict_pre_hook(_read_grid)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_write_grid)  # type: ignore[no-untyped-call]
        self.table = parameter(
            1,
            prefix + self.grid[0] * self.grid[1],
            dim,
            init=init or trunc_normal(0.02),
            weight_decay=False,
            resize=ResampleGrid(self.grid, prefix, source),
            tags=("position",),
        )

    def forward(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        """(B, prefix + N, D) → the same with positions added, in the dtype of ``x``.

        Args:
            x: Prefix tokens, then the grid row by row.
            grid: (h, w) of ``x`` where it is another than the table's; resampled on the way.

        Raises:
            ShapeError: ``x`` has another number of tokens.
        """
        table: Tensor = self.table
        if grid is not None:
            table = resample_grid(table, self.grid, _pair(grid), prefix=self.prefix)
        if x.shape[1] != table.shape[1]:
            raise ShapeError(
                "the tokens do not fill the grid of positions",
                found=f"{x.shape[1]} tokens",
                wanted=f"{table.shape[1]}: {self.prefix} prefix and a grid {grid or self.grid}",
            )
        return x + table.to(x.dtype)


@final
class FactorizedPositions(Component):
    """One learned vector for each row and one for each column of a grid; a place gets their sum.

    h + w vectors instead of h · w, and any smaller grid, of any aspect ratio, uses the same ones.
    A checkpoint of another size is resampled on load along each axis: cubic, anti-aliased, in fp32.

    Parameters:
        rows (h, D): ``trunc_normal(0.02)``. No decay.
        columns (w, D): likewise.

    Args:
        grid: The largest (h, w), or one number for a square.
        dim: D.
        prefix: Number of tokens in front that get nothing.
        init: Another initialiser, for both.

    Source:
        Dehghani et al., *Patch n' Pack: NaViT*, arXiv:2307.06304.

    Example:
        >>> import learnables as ln
        >>> positions = ln.nn.FactorizedPositions(16, 8)
        >>> positions(torch.zeros(2, 12, 8), grid=(3, 4)).shape
        torch.Size([2, 12, 8])
    """

    def __init__(
        self, grid: int | Grid, dim: int, prefix: int = 0, *, init: Init | None = None
    ) -> None:
        super().__init__()
        self.grid, self.prefix = _pair(grid), prefix
        init = init or trunc_normal(0.02)
        self.rows = parameter(
            self.grid[0],
            dim,
            init=init,
            weight_decay=False,
            resize=ResampleLine(0),
            tags=("position",),
        )
        self.columns = parameter(
            self.grid[1],
            dim,
            init=init,
            weight_decay=False,
            resize=ResampleLine(0),
            tags=("position",),
        )

    def forward(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        """(B, prefix + h · w, D) → the same with positions added, in the dtype of ``x``.

        Args:
            x: Prefix tokens, then the grid row by row.
            grid: (h, w) of ``x`` where it is smaller than the largest.

        Raises:
            ShapeError: ``x`` does not fill the grid, or the grid is larger than the largest.
        """
        height, width = self.grid if grid is None else _pair(grid)
        fits = height <= self.grid[0] and width <= self.grid[1]
        if not fits or x.shape[1] != self.prefix + height * width:
            raise ShapeError(
                "the tokens do not fill the grid of positions",
                found=f"{x.shape[1]} tokens on a grid {(height, width)}",
                wanted=f"{self.prefix} + h · w tokens, at most {self.grid}",
            )
        table = (self.rows[:height, None] + self.columns[:width]).flatten(0, 1)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :] + table.to(x.dtype)], dim=1)


@final
class FramePositions(Component):
    """One learned vector for each frame of a clip, added to all tokens of that frame.

    A checkpoint of another number of frames is resampled on load: cubic, anti-aliased, in fp32.

    Parameters:
        table (T, D): ``trunc_normal(0.02)``; Flamingo ports draw with std 1. No decay.

    Args:
        num_frames: T, the longest clip.
        dim: D.
        init: Another initialiser.

    Source:
        Alayrac et al., *Flamingo*, arXiv:2204.14198.

    Example:
        >>> import learnables as ln
        >>> ln.nn.FramePositions(8, 16)(torch.zeros(2, 4, 9, 16)).shape
        torch.Size([2, 4, 9, 16])
    """

    def __init__(self, num_frames: int, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.table = parameter(
            num_frames,
            dim,
            init=init or trunc_normal(0.02),
            weight_decay=False,
            resize=ResampleLine(0),
            tags=("position",),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, …, D) → the same with positions added, in the dtype of ``x``.

        Raises:
            ShapeError: More frames than the table has.
        """
        frames = x.shape[1]
        if frames > self.num_frames:
            raise ShapeError(
                "the clip is longer than the table of positions",
                found=f"{frames} frames",
                wanted=f"at most {self.num_frames}",
            )
        table = self.table[:frames].to(x.dtype)
        return x + table.view(frames, *[1] * (x.ndim - 3), -1)


@final
class LevelEmbedding(Component):
    """One learned vector for each level, view, segment or type, added to its tokens.

    A checkpoint with another number of levels loads: surplus ones are left out, missing ones keep
    a fresh draw.

    Parameters:
        table (L, D): ``trunc_normal(0.02)``; Deformable DETR draws with std 1. No decay.

    Args:
        num_levels: L.
        dim: D.
        init: Another initialiser.

    Source:
        Zhu et al., *Deformable DETR*, arXiv:2010.04159.

    Example:
        >>> import learnables as ln
        >>> levels = ln.nn.LevelEmbedding(3, 8)
        >>> levels(torch.zeros(2, 5, 8), 1).shape
        torch.Size([2, 5, 8])
        >>> levels(torch.zeros(2, 3, 8), torch.tensor([0, 2, 2])).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, num_levels: int, dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        init = init or trunc_normal(0.02)
        self.table = parameter(
            num_levels,
            dim,
            init=init,
            weight_decay=False,
            resize=ResizeRows(0, init),
            tags=("position",),
        )

    def forward(self, x: Tensor, level: int | Tensor) -> Tensor:
        """(B, N, D) → the same with the vector of its level added, in the dtype of ``x``.

        Args:
            x: Tokens.
            level: One level for all tokens, or integers of shape (N) or (B, N).
        """
        return x + self.table[level].to(x.dtype)


def _pair(grid: int | Grid) -> Grid:
    return (grid, grid) if isinstance(grid, int) else (int(grid[0]), int(grid[1]))


def _write_grid(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    assert isinstance(module, Positions2d)
    metadata["grid"] = module.grid


def _read_grid(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    *_: object,
) -> None:
    """Resample by the grid that the state dict says, even where the number of rows is equal."""
    assert isinstance(module, Positions2d)
    source, key = metadata.get("grid"), f"{prefix}table"
    if source is not None and isinstance(state.get(key), Tensor) and source != module.grid:
        rule = ResampleGrid(module.grid, module.prefix, _pair(source))
        state[key] = rule(state[key], module.table.shape)
