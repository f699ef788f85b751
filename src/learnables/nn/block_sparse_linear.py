"""A linear layer that stores and multiplies only some blocks of its matrix.

Shapes: B samples, O out features, I in features, p × q one block, R × C the grid of blocks, E
stored blocks.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import is_dtensor, local, replace_data_, shared_as
from learnables.arguments import optimizers_in
from learnables.declare import parameter
from learnables.errors import CheckpointError, LayoutError, ShapeError
from learnables.init.base import Init
from learnables.nn.component import Component
from learnables.notes import notes_of, put_note
from learnables.sparse import masks
from learnables.sparse.fan_in import real_fan_in
from learnables.sparse.layout import Block, Index, Layout, grid_of, layout_from_index
from learnables.sparse.product import apply
from learnables.sparse.topology import source_of

Mask: TypeAlias = str | Tensor | Sequence[object]

MASKS: dict[str, Callable[[int, int, float, torch.Generator | None], Tensor]] = {
    "random": lambda R, C, density, generator: masks.random(R, C, density, generator=generator),
    "banded": lambda R, C, density, _: masks.banded(R, C, density),
    "butterfly": lambda R, C, density, _: masks.butterfly(R, C, density),
    "2:4": lambda R, C, _, generator: masks.n_of_m(R, C, 2, 4, generator=generator),
}


@final
class BlockSparseLinear(Component):
    """y = x · Wᵀ + b where W has blocks of zeros that are neither stored nor multiplied.

    Parameters, gradients, optimizer state and arithmetic are those of the stored blocks: at a
    density of 10 %, a tenth of a dense layer's. The weight is an ordinary dense Parameter of shape
    (E, p, q), so every optimizer, clipping, ``deepcopy``, DDP, FSDP2 and safetensors take it.

    Parameters:
        weight (E, p, q): the stored blocks, row by row; uniform ±1/√n with n the inputs that the
            output really sees. Decays, as a matrix does.
        bias (O): uniform likewise. No decay.

    Buffers, int64: ``row_starts`` (R + 1) and ``columns`` (E) are saved and say which blocks these
    are; ``column_starts`` (C + 1), ``rows`` (E), ``order`` (E) are the same by columns and follow
    from them. Loading a checkpoint takes over its blocks.

    Args:
        in_features: I; needs no multiple of the block.
        out_features: O; likewise.
        block: (p, q), or one number for square blocks.
        density: Share of the blocks that are stored, in (0, 1].
        mask: ``"random"`` (equally many blocks in each row and column; the default), ``"banded"``,
            ``"butterfly"``, ``"2:4"``, or (R, C) booleans, whose density then counts.
        bias: Whether there is a bias.
        init: Another initialiser for the weight.
        generator: Source of randomness for mask and values, on the CPU for the mask.
        device: Where it lives; torch's default device when None.
        dtype: Of weight and bias; torch's default dtype when None.

    Raises:
        LayoutError: The density is outside (0, 1], a block exceeds the matrix, a mask of NaN or of
            an unknown name.
        ShapeError: The mask has another shape than the grid of blocks.

    Example:
        >>> layer = ln.nn.BlockSparseLinear(96, 64, block=16, density=0.25)
        >>> layer.weight.shape
        torch.Size([6, 16, 16])
        >>> layer(torch.zeros(2, 7, 96)).shape
        torch.Size([2, 7, 64])

    Cost:
        Forward and backward about density × that of ``nn.Linear``; figures in docs/en/sparse.md.

    Source:
        Gray, Radford, Kingma, *GPU kernels for block-sparse weights*, OpenAI, 2017.
    """

    row_starts: Tensor
    columns: Tensor
    column_starts: Tensor
    rows: Tensor
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: Block = 64,
        density: float = 0.25,
        mask: Mask | None = None,
        bias: bool = True,
        *,
        init: Init | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        grid = grid_of(out_features, in_features, block)
        layout = Layout(out_features, in_features, block, mask_of(mask, grid, density, generator))
        self.block = layout.block
        device = torch.get_default_device() if device is None else torch.device(device)
        for name, part in layout.index._asdict().items():
            saved = name in ("row_starts", "columns")
            self.register_buffer(name, part.to(device), persistent=saved)
        self._remember(layout)
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        on_device = generator if generator is None or generator.device == device else None
        self.weight = parameter(
            *layout.weight_shape,
            init=init or real_fan_in(layout),
            weight_decay=True,
            generator=on_device,
            tags=("block_sparse",),
            **made,
        )
        self.bias = (
            parameter(
                out_features,
                init=real_fan_in(layout),
                weight_decay=False,
                generator=on_device,
                **made,
            )
            if bias
            else None
        )
        self.register_load_state_dict_pre_hook(_take_saved_layout)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_follow_loaded_layout)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), in the dtype of x, or of autocast.

        Raises:
            ShapeError: x has another number of features.
            LearnablesError: x has another dtype or device than the weight.
            LayoutError: The index buffers were overwritten with what describes no layout.
        """
        return apply(x, self.weight, self._index(), self.out_features, self.in_features, self.bias)

    @property
    def layout(self) -> Layout:
        """Which blocks are stored, as the index buffers say now."""
        if self.columns.device.type != "meta" and self._read_at != self._buffer_versions():
            self._remember(
                layout_from_index(
                    self.out_features, self.in_features, self.block, self.row_starts, self.columns
                )
            )
        return self._layout

    @property
    def density(self) -> float:
        """Share of the matrix entries that are stored."""
        return self.layout.density

    @torch.no_grad()
    def rewire(
        self, mask: "Tensor | Sequence[object]", optimizer: "Optimizer | Iterable[Optimizer]" = ()
    ) -> None:
        """Store other blocks from now on; those that stay keep everything to the bit.

        Values, gradient and optimizer state move with their block; what is new starts at zero.
        The Parameter stays the same object. With as many blocks as before it is written in place,
        also where DDP or FSDP2 wrapped the layer, on every rank alike; with more or fewer it
        changes its shape, which they do not allow.

        Args:
            mask: (R, C), the blocks to store.
            optimizer: Whose state to move along; one or several.

        Raises:
            ShapeError: The mask has another shape than the grid.
            LayoutError: A mask of NaN, another number of blocks of a weight that is sharded, or an
                optimizer whose state is not kept by blocks and could not follow.

        Example:
            >>> layer = ln.nn.BlockSparseLinear(8, 8, block=4, mask=[[1, 0], [0, 1]])
            >>> kept = layer.weight[0].clone()
            >>> layer.rewire([[1, 1], [0, 0]])
            >>> torch.equal(layer.weight[0], kept), layer.weight[1].abs().max().item()
            (True, 0.0)
        """
        old = self.layout
        new = old.with_mask(mask)
        same = new.num_blocks == old.num_blocks
        if is_dtensor(self.weight) and not same:
            raise LayoutError(
                "a sharded weight cannot change its number of blocks",
                found=f"{new.num_blocks} blocks",
                wanted=f"{old.num_blocks}, as before",
                mend="evolve with scope='layer' and SET or RigL, or prune before fully_shard",
            )
        source = source_of(old, new)
        optimizers = optimizers_in(optimizer)
        for state, name in self._states_by_block(optimizers):
            state[name] = _move(state[name], source, in_place=same)
        grad = self.weight.grad
        moved = _move(self.weight.data, source, in_place=same)
        if not same:
            replace_data_(self.weight, moved)
        self.weight.grad = None if grad is None else _move(grad, source, in_place=same)
        self._write_index(new)
        self._follow_in_notes(source, new)

    def dense(self) -> Tensor:
        """The matrix, (O, I), zeros where nothing is stored; differentiable."""
        (E, p, q), R, C = self.weight.shape, len(self.row_starts) - 1, len(self.column_starts) - 1
        row_of = torch.repeat_interleave(
            torch.arange(R, device=self.columns.device), self.row_starts.diff(), output_size=E
        )
        grid = self.weight.new_zeros(R * C, p, q).index_add(
            0, row_of * C + self.columns, self.weight
        )
        whole = grid.view(R, C, p, q).transpose(1, 2).reshape(R * p, C * q)
        return whole[: self.out_features, : self.in_features]

    @classmethod
    def from_dense(
        cls,
        dense: nn.Linear | Tensor,
        block: Block = 64,
        keep: "float | Tensor | Sequence[object]" = 0.25,
        bias: Tensor | None = None,
    ) -> "BlockSparseLinear":
        """A layer that keeps some blocks of a dense matrix, with their values.

        Args:
            dense: A Linear, whose bias is taken over, or a matrix (O, I).
            block: (p, q), or one number for square blocks.
            keep: Share of the blocks, those with the largest Frobenius norm; or a mask (R, C).
            bias: (O), with a matrix.

        Raises:
            ShapeError: Not a matrix, or the mask has another shape than the grid.
            LayoutError: A share outside (0, 1], a block larger than the matrix, or a mask of NaN.

        Example:
            >>> linear = nn.Linear(64, 64)
            >>> layer = ln.nn.BlockSparseLinear.from_dense(linear, block=16, keep=1.0)
            >>> torch.equal(layer.dense(), linear.weight)
            True
        """
        matrix = dense.weight if isinstance(dense, nn.Linear) else dense
        if isinstance(dense, nn.Linear) and bias is None:
            bias = dense.bias
        if matrix.ndim != 2:
            raise ShapeError(
                "a block-sparse layer is made from a matrix",
                found=f"{tuple(matrix.shape)}",
                wanted="(out_features, in_features)",
            )
        O, I = matrix.shape  # noqa: E741 - as in the legend
        blocks = _cut(matrix.detach(), block, grid_of(O, I, block))
        if isinstance(keep, (int, float)):
            keep = masks.largest(blocks.float().square().sum((2, 3)), keep)
        layout = Layout(O, I, block, keep)
        return cls._holding(layout, blocks[layout.mask.to(blocks.device)], bias)

    @classmethod
    def from_bsr(cls, matrix: Tensor, bias: Tensor | None = None) -> "BlockSparseLinear":
        """A layer with the blocks of a ``torch.sparse_bsr`` matrix (O, I).

        Raises:
            ShapeError: Not one matrix in this layout.
            LayoutError: Its indices are out of range or repeated.
        """
        if matrix.layout is not torch.sparse_bsr or matrix.ndim != 2 or matrix.dense_dim():
            raise ShapeError(
                "the blocks are taken from one sparse matrix",
                found=f"{matrix.layout}, shape {tuple(matrix.shape)}",
                wanted="torch.sparse_bsr, (out_features, in_features)",
                mend="BlockSparseLinear.from_dense(matrix), or matrix.to_sparse_bsr((64, 64))",
            )
        values = matrix.values().detach()
        layout = layout_from_index(
            matrix.shape[0],
            matrix.shape[1],
            (values.shape[1], values.shape[2]),
            matrix.crow_indices().long(),
            matrix.col_indices().long(),
        )
        return cls._holding(layout, values, bias)

    def to_bsr(self) -> Tensor:
        """The matrix as a ``torch.sparse_bsr`` tensor that shares the weight's memory; detached.

        Raises:
            ShapeError: The matrix is no whole number of blocks, which torch's layout cannot say.
        """
        shape = (self.out_features, self.in_features)
        if shape[0] % self.block[0] or shape[1] % self.block[1]:
            raise ShapeError(
                "torch's BSR layout holds whole blocks only",
                found=f"matrix {shape} in blocks {self.block}",
                wanted="sizes that are multiples of the block",
                mend="layer.dense()",
            )
        with warnings.catch_warnings():  # "Sparse BSR tensor support is in beta state"
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_bsr_tensor(
                self.row_starts, self.columns, self.weight.detach(), size=shape
            )

    def extra_repr(self) -> str:
        """Sizes, block and density, as ``print(model)`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block={self.block}, density={self.layout.density:.3g}, bias={self.bias is not None}"
        )

    @classmethod
    def _holding(cls, layout: Layout, blocks: Tensor, bias: Tensor | None) -> "BlockSparseLinear":
        made = cls(
            layout.in_features,
            layout.out_features,
            layout.block,
            mask=layout.mask,
            bias=bias is not None,
            device=blocks.device,
            dtype=blocks.dtype,
        )
        with torch.no_grad():
            made.weight.copy_(blocks)
            if bias is not None and made.bias is not None:
                made.bias.copy_(bias)
        return made

    def _index(self) -> Index:
        held: dict[str, Any] = self._buffers  # five attributes of a module take 5 µs
        return Index(
            held["row_starts"], held["columns"], held["column_starts"], held["rows"], held["order"]
        )

    def _states_by_block(self, optimizers: Iterable[Optimizer]) -> list[tuple[dict[str, Any], str]]:
        """Which entries of whose state have a part for each block, as factored moments do too.

        Raises:
            LayoutError: One has several numbers, but none for each block.
        """
        blocks, ndim, found = self.weight.shape[0], self.weight.ndim, []
        for state in (o.state[self.weight] for o in optimizers if self.weight in o.state):
            for name, value in state.items():
                if not isinstance(value, Tensor) or value.numel() <= 1:
                    continue
                if value.ndim != ndim or value.shape[0] != blocks:
                    raise LayoutError(
                        "the optimizer keeps state that could not move along with the blocks",
                        where=name,
                        found=f"shape {tuple(value.shape)}",
                        wanted=f"({blocks}, …), {ndim} dimensions: a part for each block",
                        mend="an optimizer whose state has the shape of the parameter, as AdamW",
                    )
                found.append((state, name))
        return found

    def _remember(self, layout: Layout) -> None:
        self._layout, self._read_at = layout, self._buffer_versions()

    def _buffer_versions(self) -> tuple[object, ...]:
        """Changes whenever the saved index buffers are replaced or written to."""
        return tuple(
            (id(t), object() if t.is_inference() else t._version)
            for t in (self.row_starts, self.columns)
        )

    def _write_index(self, layout: Layout) -> None:
        device = self.columns.device
        if device.type == "meta":
            return
        for name, part in layout.index._asdict().items():
            held = getattr(self, name)
            if held.device == device and held.shape == part.shape:
                held.copy_(part)
            else:
                setattr(self, name, part.to(device))
        self._remember(layout)

    def _follow_in_notes(self, source: Tensor, layout: Layout) -> None:
        """The initialiser and the value to decay toward speak of the blocks that are there now."""
        for local_name, note in notes_of(self).items():
            if local_name == "weight" and note.initial is not None:
                same = len(source) == len(note.initial)
                note = replace(note, initial=_move(note.initial, source, in_place=same))
            init = note.get("init")
            if note.declared is not None and isinstance(init, real_fan_in):
                fields = {**note.declared.fields, "init": replace(init, layout=layout)}
                note = replace(note, declared=replace(note.declared, fields=fields))
            put_note(self, local_name, note)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "BlockSparseLinear":
        # to_empty() and a move from the meta device leave arbitrary memory in the index buffers.
        layout = self.layout
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._write_index(layout)
        return self


def _move(value: Tensor, source: Tensor, *, in_place: bool) -> Tensor:
    """Blocks of ``value`` in a new order, (E, p, q) → (E', p, q); zeros where source is -1."""
    whole: Tensor = value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]
    source = source.to(whole.device)
    stays = source >= 0
    moved = whole.new_zeros(len(source), *whole.shape[1:])
    moved[stays] = whole[source[stays]]
    if not in_place:
        return moved
    local(value).copy_(local(shared_as(moved, value)))
    return value


def mask_of(
    mask: Mask | None,
    grid: tuple[int, int],
    density: float,
    generator: torch.Generator | None,
) -> "Tensor | Sequence[object]":
    """The mask of a named family, or the one that was given.

    Raises:
        LayoutError: There is no family of this name, or the density is outside (0, 1].
    """
    if mask is not None and not isinstance(mask, str):
        return mask
    family = MASKS.get(mask or "random")
    if family is None:
        raise LayoutError(
            "there is no family of masks of this name",
            found=f"mask={mask!r}",
            wanted=f"one of {', '.join(map(repr, MASKS))}, or booleans of shape {grid}",
        )
    on_cpu = generator if generator is not None and generator.device.type == "cpu" else None
    return family(*grid, density, on_cpu)


def _cut(matrix: Tensor, block: Block, grid: tuple[int, int]) -> Tensor:
    """The blocks of a dense matrix: (O, I) → (R, C, p, q), zeros beyond its edge."""
    (R, C), (p, q) = grid, (block, block) if isinstance(block, int) else block
    whole = matrix.new_zeros(R * p, C * q)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    return whole.view(R, p, C, q).transpose(1, 2)


def _take_saved_layout(
    layer: BlockSparseLinear, state: dict[str, Any], prefix: str, *_: object
) -> None:
    """Before loading: check the saved index, and make room where it holds more or fewer blocks.

    Raises:
        CheckpointError: The index is damaged, or the weight does not have the blocks it lists.
    """
    parts = [state.get(prefix + name) for name in ("row_starts", "columns", "weight")]
    starts, columns, weight = parts
    if starts is None or columns is None or columns.device.type == "meta":
        return
    try:
        layout = layout_from_index(
            layer.out_features, layer.in_features, layer.block, starts, columns
        )
    except LayoutError as error:
        raise CheckpointError(
            "the index of a block-sparse weight is damaged, or of another matrix",
            where=f"{prefix}row_starts, {prefix}columns",
            found=error.found,
            wanted=error.wanted,
        ) from error
    if weight is None:
        return
    fits = layout.weight_shape == tuple(layer.weight.shape)
    if tuple(weight.shape) != layout.weight_shape or (is_dtensor(layer.weight) and not fits):
        raise CheckpointError(
            "a block-sparse weight does not have the blocks that its index lists",
            where=f"{prefix}weight",
            found=f"shape {tuple(weight.shape)}, layer {tuple(layer.weight.shape)}",
            wanted=f"{layout.weight_shape}",
        )
    if fits:
        return
    layer.columns = columns.to(layer.columns)
    replace_data_(layer.weight, layer.weight.data.new_empty(layout.weight_shape))


def _follow_loaded_layout(layer: BlockSparseLinear, _: object) -> None:
    """After loading: the tensors by columns follow from those by rows."""
    if layer.columns.device.type != "meta":
        layer._write_index(layer.layout)
