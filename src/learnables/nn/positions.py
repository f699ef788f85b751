"""Learned vectors that say where in a sequence, an image or a clip a token stands.

Shapes: B batch, N tokens, D dim.
"""

from typing import Any, final

from torch import Tensor, nn

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.random import trunc_normal
from learnables.nn.component import Component
from learnables.nn.resample import Grid, ResampleGrid, resample_grid


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
