"""The block-sparse product with its gradients, as operators that torch.compile keeps whole.

Shapes: B samples, O out features, I in features, p × q one block, E stored blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from learnables._torch import in_forward_mode, is_watched, own_view
from learnables.errors import LearnablesError, ShapeError
from learnables.sparse import kernels
from learnables.sparse.layout import Index, Layout


def block_sparse_linear(
    x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None = None
) -> Tensor:
    """X · Wᵀ + bias, where W consists of the blocks ``weight`` at the places that ``layout`` says.

    As ``F.linear``, at a cost of ``layout.density`` times its cost, forward and backward: to x, to
    the stored blocks and to the bias. Differentiable as often as you like. Under autocast, computed
    in autocast's dtype.

    Args:
        x: (…, I), in the dtype and on the device of the weight.
        weight: (E, p, q), the stored blocks, row by row; see `Layout.weight_shape`.
        layout: Which blocks these are.
        bias: (O), or None.

    Returns:
        (…, O), in the dtype of x, or of autocast.

    Raises:
        ShapeError: Shapes do not fit each other.
        LearnablesError: Dtypes or devices differ.

    Example:
        >>> layout = Layout(4, 4, 2, [[1, 0], [0, 1]])
        >>> weight = torch.ones(layout.weight_shape)
        >>> block_sparse_linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), weight, layout)
        tensor([[3., 3., 7., 7.]])

    Cost:
        2·B·E·p·q flop forward, twice that backward; nothing of size (O, I) is formed where blocks
        are of 16 × 16 or more and half of them are left out. See benchmarks/sparse.py.
    """
    if tuple(weight.shape) != layout.weight_shape:
        raise ShapeError(
            "the weight holds another number or size of blocks than the layout",
            found=f"weight of shape {tuple(weight.shape)}",
            wanted=f"{layout.weight_shape} for {layout}",
        )
    index = layout.index
    if weight.device.type != "cpu":
        index = Index(*(part.to(weight.device) for part in index))
    return apply(x, weight, index, layout.out_features, layout.in_features, bias)


def apply(
    x: Tensor,
    weight: Tensor,
    index: Index,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`block_sparse_linear` with the index tensors where the weight is.

    Raises:
        ShapeError: x has another number of features, or the bias another shape.
        LearnablesError: Dtypes or devices differ.
    """
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ShapeError(
            "the input has another number of features than the layer",
            found=f"input of shape {tuple(x.shape)}",
            wanted=f"(…, {in_features})",
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ShapeError(
            "the bias has one entry for each output",
            found=f"bias of shape {tuple(bias.shape)}",
            wanted=f"({out_features},)",
        )
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        lower = torch.get_autocast_dtype(kind)
        x, weight = x.to(lower), weight.to(lower)
        bias = None if bias is None else bias.to(lower)
    given = [x, weight] if bias is None else [x, weight, bias]
    dtype, device = x.dtype, x.device
    alike = weight.dtype == dtype and weight.device == device
    if not alike or (bias is not None and (bias.dtype != dtype or bias.device != device)):
        raise LearnablesError(
            "input, weight and bias are not of one dtype on one device",
            found=", ".join(f"{t.dtype} on {t.device}" for t in given),
            wanted="the same for all",
            mend="x.to(layer.weight), or torch.autocast for mixed precision",
        )
    y: Tensor = _calls_for(given).product(
        x.reshape(-1, in_features), weight, bias, *index, out_features
    )
    return y if x.ndim == 2 else own_view(y, *x.shape[:-1], out_features)


# The three products close over each other under differentiation, so one backward of each is all
# there is, to any order. Each exists three times: as a torch.library operator, which torch.compile
# takes as one node of known output; as an autograd.Function, which costs 15 µs to call where the
# operator costs 65; and bare, for a call that no graph is recorded of, as nearly all in a backward.


Saved: TypeAlias = tuple[Tensor, ...]


class _Calls(NamedTuple):
    product: Callable[..., Any]
    transposed: Callable[..., Any]
    sampled: Callable[..., Any]


def _calls_for(tensors: Sequence[Tensor]) -> _Calls:
    if torch.compiler.is_compiling():
        return _OPERATORS
    if in_forward_mode():
        return _FUNCTIONS  # which know no tangents, and say so
    if is_watched(tensors):
        return _OPERATORS
    if torch.is_grad_enabled():
        for t in tensors:
            if t.requires_grad:
                return _FUNCTIONS
    return _BARE


def _run_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    order: Tensor,
    out_features: int,
) -> Tensor:
    index = Index(row_starts, columns, column_starts, rows, order)
    return kernels.product(x, weight, index, out_features, bias)


def _run_transposed(
    g: Tensor,
    weight: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    order: Tensor,
    in_features: int,
) -> Tensor:
    index = Index(row_starts, columns, column_starts, rows, order)
    return kernels.transposed_product(g, weight, index, in_features)


def _run_sampled(
    g: Tensor,
    x: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    order: Tensor,
    p: int,
    q: int,
) -> Tensor:
    index = Index(row_starts, columns, column_starts, rows, order)
    return kernels.sampled_product(g, x, index, (p, q))


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, *index, _ = inputs
    ctx.save_for_backward(x, weight, *index)


def _save_pair(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    first, second, *index = inputs[:7]
    ctx.save_for_backward(first, second, *index)


def _differentiate_product(ctx: Any, saved: Saved, calls: _Calls, g: Tensor) -> tuple[Any, ...]:
    x, weight, *index = saved
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    gx = calls.transposed(g, weight, *index, x.shape[1]) if wants_x else None
    gw = calls.sampled(g, x, *index, *weight.shape[1:]) if wants_weight else None
    return gx, gw, g.sum(0) if wants_bias else None, *[None] * 6


def _differentiate_transposed(
    ctx: Any, saved: Saved, calls: _Calls, ggx: Tensor
) -> tuple[Any, ...]:
    g, weight, *index = saved
    wants_g, wants_weight = ctx.needs_input_grad[:2]
    gg = calls.product(ggx, weight, None, *index, g.shape[1]) if wants_g else None
    gw = calls.sampled(g, ggx, *index, *weight.shape[1:]) if wants_weight else None
    return gg, gw, *[None] * 6


def _differentiate_sampled(ctx: Any, saved: Saved, calls: _Calls, ggw: Tensor) -> tuple[Any, ...]:
    g, x, *index = saved
    wants_g, wants_x = ctx.needs_input_grad[:2]
    gg = calls.product(x, ggw, None, *index, g.shape[1]) if wants_g else None
    gx = calls.transposed(g, ggw, *index, x.shape[1]) if wants_x else None
    return gg, gx, *[None] * 7


def _as_function(
    name: str,
    run: Callable[..., Tensor],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        save(ctx, inputs, None)
        return run(*inputs)

    def backward(ctx: Any, g: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing makes them anew each time
        return differentiate(ctx, saved, _calls_for((g, *saved[:2])), g)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    apply_it: Callable[..., Any] = function.apply
    return apply_it


def _as_operator(
    name: str,
    run: Callable[..., Tensor],
    shape: Callable[..., Tensor],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    operator = torch.library.custom_op(f"learnables::{name}", run, mutates_args=())
    operator.register_fake(shape)
    operator.register_autograd(
        lambda ctx, g: differentiate(ctx, ctx.saved_tensors, _OPERATORS, g), setup_context=save
    )
    return operator


_BARE = _Calls(_run_product, _run_transposed, _run_sampled)
_FUNCTIONS = _Calls(
    _as_function("BlockSparseProduct", _run_product, _save_product, _differentiate_product),
    _as_function(
        "BlockSparseTransposedProduct", _run_transposed, _save_pair, _differentiate_transposed
    ),
    _as_function("BlockSparseSampledProduct", _run_sampled, _save_pair, _differentiate_sampled),
)
_OPERATORS = _Calls(
    _as_operator(
        "block_sparse_product",
        _run_product,
        lambda x, *rest: x.new_empty(x.shape[0], rest[-1]),
        _save_product,
        _differentiate_product,
    ),
    _as_operator(
        "block_sparse_transposed_product",
        _run_transposed,
        lambda g, *rest: g.new_empty(g.shape[0], rest[-1]),
        _save_pair,
        _differentiate_transposed,
    ),
    _as_operator(
        "block_sparse_sampled_product",
        _run_sampled,
        lambda g, x, row_starts, columns, *rest: x.new_empty(columns.shape[0], *rest[-2:]),
        _save_pair,
        _differentiate_sampled,
    ),
)
