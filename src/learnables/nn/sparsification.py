"""Make the linear layers of an existing model block-sparse."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from learnables.entries import Entry, entries
from learnables.errors import LayoutError, SelectionError, ShapeError
from learnables.nn.block_sparse_linear import BlockSparseLinear, mask_of
from learnables.notes import note_of, put_note
from learnables.select import Selector, select
from learnables.sparse.layout import Block, grid_of


def sparsify(
    model: nn.Module,
    selector: Selector,
    *,
    block: Block = 64,
    density: float = 0.25,
    mask: "str | Tensor | Sequence[object]" = "largest",
    draw: bool = False,
) -> dict[str, BlockSparseLinear]:
    """Put a `BlockSparseLinear` in the place of each ``nn.Linear`` whose weight is selected.

    Before the optimizer is built: the weights are new Parameters. What was said about weight and
    bias with `ln.annotate` goes over to them. Nothing is changed when any layer is refused.

    Args:
        model: The model; the layers are replaced in it.
        selector: Which parameters; of those, the weights of ``nn.Linear`` are taken, and subclasses
            of it left alone, whose owners read the weight themselves.
        block: (p, q), or one number for square blocks.
        density: Share of the blocks of each layer, in (0, 1].
        mask: ``"largest"`` keeps the blocks of the largest norm, for a trained model; otherwise as
            in `BlockSparseLinear`.
        draw: Draw new values, scaled by the real fan-in: to train from the start. False keeps the
            values the stored blocks have now.

    Returns:
        The new layers by name.

    Raises:
        SelectionError: The selector picks no ``nn.Linear``, or one whose weight is tied.
        LayoutError: A density outside (0, 1], a block larger than a layer, an unknown mask.
        ShapeError: A given mask does not fit the grid of a layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> list(ln.sparsify(model, "*", block=16, density=0.1))
        ['0', '2']
        >>> sum(p.numel() for p in model.parameters())  # of 33088
        3392
    """
    picked = [entry for entry in select(entries(model), selector) if _is_weight_of_linear(entry)]
    if not picked:
        raise SelectionError(
            "the selector picks no weight of an nn.Linear inside the model",
            found=f"{selector!r}",
            wanted="at least one",
            mend='ln.sparsify(model, "*")',
        )
    made: dict[str, BlockSparseLinear] = {}
    for entry in picked:
        if len(entry.places) > 1:
            raise SelectionError(
                "a tied weight cannot become block-sparse in one place only",
                where=", ".join(entry.names),
                found=f"{len(entry.places)} names",
                wanted="one",
                mend="untie it, or leave it out of the selector",
            )
        linear = entry.owner
        assert isinstance(linear, nn.Linear)
        try:
            layer = _as_block_sparse(linear, block, density, mask, draw)
        except (LayoutError, ShapeError) as error:
            raise type(error)(
                error.what,
                where=entry.name,
                found=error.found,
                wanted=error.wanted,
                mend="leave it out of the selector, or another block",
            ) from error
        made[entry.name.removesuffix(".weight")] = layer
    for name, layer in made.items():
        parent_name, _, local_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, local_name, layer)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # its fused inference path reads dense weights
    return made


def _is_weight_of_linear(entry: Entry) -> bool:
    return type(entry.owner) is nn.Linear and entry.local_name == "weight" and "." in entry.name


def _as_block_sparse(
    linear: nn.Linear,
    block: Block,
    density: float,
    mask: "str | Tensor | Sequence[object]",
    draw: bool,
) -> BlockSparseLinear:
    grid = grid_of(linear.out_features, linear.in_features, block)
    if isinstance(mask, str) and mask != "largest":
        mask = mask_of(mask, grid, density, None)
    keep: Any = density if isinstance(mask, str) else mask
    layer = BlockSparseLinear.from_dense(linear, block, keep)
    if draw:
        layer.reset_parameters()
    layer.train(linear.training)
    for local_name, param in linear.named_parameters(recurse=False):
        new = layer.get_parameter(local_name)
        new.requires_grad_(param.requires_grad)
        said = note_of(linear, local_name).annotated
        put_note(layer, local_name, replace(note_of(layer, local_name), annotated=said))
    return layer
