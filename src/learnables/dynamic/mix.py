"""The product of each sample with its own mixture of matrices: y_b = x_b · Σ_k h_bk A_k.

Shapes: B samples, T rows of each, I in features, O out features, K matrices to mix.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from learnables.dynamic.cost import FORMS, by_samples, chunk_of, quickest, samples_of, tile_of
from learnables.errors import ShapeError

_HALF = (torch.bfloat16, torch.float16)
_remembered = functools.lru_cache(1024)(quickest)  # a tenth of the time of the smallest products


def mix(
    h: Tensor, bank: Tensor, x: Tensor, *, form: str | None = None, forms: tuple[str, ...] = FORMS
) -> Tensor:
    """y_b = x_b · Σ_k h_bk A_k, each sample with its own matrix, which need not come into being.

    Three exact forms, equal but for rounding:

    * ``"materialised"``: the (I, O) matrix of each sample, then one batched product. Keeps all B
      matrices for the backward pass.
    * ``"chunked"``: the same, a few rows of all matrices or a few whole ones at a time, made again
      in the backward pass. Keeps h, A and x only.
    * ``"reassociated"``: (h_b ⊗ x_b) · A, with A as one (K·I, O) matrix. Keeps h, A and x only. As
      many flop as the product with K dense matrices, hence for few rows of each sample.

    Args:
        h: (B, K), the coefficients of each sample.
        bank: (K, I, O), the matrices A.
        x: (B, T, I).
        form: One of these; by `quickest` when None.
        forms: What to choose from when ``form`` is None.

    Returns:
        (B, T, O), in the dtype of x. Differentiable as often as you like; gradients of gradients
        are computed without care for cost.

    Raises:
        ShapeError: Shapes do not fit each other.

    Example:
        >>> h, bank, x = torch.rand(2, 3), torch.rand(3, 4, 5), torch.rand(2, 1, 4)
        >>> y = torch.einsum("bk,kio,bti->bto", h, bank, x)
        >>> torch.allclose(mix(h, bank, x, form="reassociated"), y)
        True
    """
    if h.ndim != 2 or bank.ndim != 3 or x.ndim != 3:
        raise ShapeError(
            "coefficients, matrices and input have two, three and three dimensions",
            found=f"{tuple(h.shape)}, {tuple(bank.shape)}, {tuple(x.shape)}",
            wanted="(B, K), (K, I, O), (B, T, I)",
        )
    (B, K), (_, I, O), T = h.shape, bank.shape, x.shape[1]  # noqa: E741 - as in the legend
    if tuple(x.shape) != (B, T, I) or bank.shape[0] != K:
        raise ShapeError(
            "coefficients, matrices and input do not fit each other",
            found=f"{tuple(h.shape)}, {tuple(bank.shape)}, {tuple(x.shape)}",
            wanted="(B, K), (K, I, O), (B, T, I)",
        )
    if form is None:
        choose = quickest if torch.compiler.is_compiling() else _remembered
        form = choose(forms, B, T, I, O, K)
    if form == "materialised":
        return torch.bmm(x, (h @ bank.reshape(K, I * O)).view(B, I, O))
    call = _operator if torch.compiler.is_compiling() else _Product.apply
    y: Tensor = call(h, bank, x, form)
    return y


# Both forms exist as an autograd.Function for eager use and as torch.library operators, which
# torch.compile takes as one node each instead of unrolling their loops.


def _run(h: Tensor, bank: Tensor, x: Tensor, form: str) -> Tensor:
    return (_chunked if form == "chunked" else _reassociated)(h, bank.contiguous(), x)


def _run_gradients(
    h: Tensor,
    bank: Tensor,
    x: Tensor,
    g: Tensor,
    form: str,
    wants_h: bool,
    wants_bank: bool,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to h, bank and x; an empty tensor for each that is not wanted."""
    gradients = _chunked_gradients if form == "chunked" else _reassociated_gradients
    gh = torch.empty_like(h) if wants_h else h.new_empty(0)
    gbank = torch.empty_like(bank, memory_format=torch.contiguous_format)
    gbank = gbank if wants_bank else bank.new_empty(0)
    gx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else x.new_empty(0)
    gradients(h, bank.contiguous(), x, g, gh, gbank, gx)
    return gh, gbank, gx


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.form = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, call: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = call(*ctx.saved_tensors, g, ctx.form, *wanted)
    return *(one if want else None for one, want in zip(gradients, wanted, strict=True)), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        return _run(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            h, bank, x = ctx.saved_tensors
            return *_differentiable_gradients(h, bank, x, g), None
        return _backward(ctx, _run_gradients, g)


_operator: Any = torch.library.custom_op("learnables::generated_product", _run, mutates_args=())
_operator.register_fake(lambda h, bank, x, form: x.new_empty(*x.shape[:2], bank.shape[2]))
_gradients_operator: Any = torch.library.custom_op(
    "learnables::generated_product_gradients", _run_gradients, mutates_args=()
)


_gradients_operator.register_fake(
    lambda h, bank, x, g, form, *wanted: tuple(
        t.new_empty(t.shape if want else 0) for t, want in zip((h, bank, x), wanted, strict=True)
    )
)
_operator.register_autograd(
    lambda ctx, g: _backward(ctx, _gradients_operator, g), setup_context=_save
)


def _chunked(h: Tensor, bank: Tensor, x: Tensor) -> Tensor:
    (K, I, O), (B, T, _) = bank.shape, x.shape  # noqa: E741
    flat = bank.view(K, I * O)
    if by_samples(B, T, I, O, K):
        y = x.new_empty(B, T, O)
        for part in _pieces(B, samples_of(B, I, O)):
            torch.bmm(x[part], (h[part] @ flat).view(-1, I, O), out=y[part])
        return y
    y = x.new_zeros(B, T, O, dtype=_wide(x))
    for part in _pieces(I, chunk_of(B, I, O)):
        weight = (h @ flat[:, part.start * O : part.stop * O]).view(B, part.stop - part.start, O)
        if y.dtype == x.dtype:
            y.baddbmm_(x[:, :, part], weight)
        else:
            y += torch.bmm(x[:, :, part], weight)
    return y.to(x.dtype)


def _chunked_gradients(
    h: Tensor, bank: Tensor, x: Tensor, g: Tensor, gh: Tensor, gbank: Tensor, gx: Tensor
) -> None:
    (K, I, O), (B, T, _) = bank.shape, x.shape  # noqa: E741
    if by_samples(B, T, I, O, K):
        _gradients_by_samples(h, bank, x, g, gh, gbank, gx)
        return
    flat = bank.view(K, I * O)
    sum_gh = torch.zeros_like(gh, dtype=_wide(gh))
    for part in _pieces(I, chunk_of(B, I, O)):
        flat_part = slice(part.start * O, part.stop * O)
        if gx.numel():
            weight = (h @ flat[:, flat_part]).view(B, part.stop - part.start, O)
            gx[:, :, part] = torch.bmm(g, weight.mT)
        if not gh.numel() and not gbank.numel():
            continue
        gweight = torch.bmm(x[:, :, part].mT, g).flatten(1)
        if gbank.numel():
            torch.mm(h.mT, gweight, out=gbank.view(K, I * O)[:, flat_part])
        if gh.numel():
            sum_gh += gweight @ flat[:, flat_part].mT
    gh.copy_(sum_gh)


def _gradients_by_samples(
    h: Tensor, bank: Tensor, x: Tensor, g: Tensor, gh: Tensor, gbank: Tensor, gx: Tensor
) -> None:
    K, I, O = bank.shape  # noqa: E741
    flat, B = bank.view(K, I * O), len(x)
    sum_gbank = torch.zeros_like(gbank, dtype=_wide(gbank)).view(-1, I * O)
    for part in _pieces(B, samples_of(B, I, O)):
        if gx.numel():
            gx[part] = torch.bmm(g[part], (h[part] @ flat).view(-1, I, O).mT)
        if not gh.numel() and not gbank.numel():
            continue
        gweight = torch.bmm(x[part].mT, g[part]).flatten(1)
        if gbank.numel() and sum_gbank.dtype == gweight.dtype:
            sum_gbank.addmm_(h[part].mT, gweight)
        elif gbank.numel():
            sum_gbank += h[part].mT @ gweight
        if gh.numel():
            gh[part] = gweight @ flat.mT
    gbank.copy_(sum_gbank.view(gbank.shape))


def _pieces(size: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, size)) for at in range(0, size, step)]


def _reassociated(h: Tensor, bank: Tensor, x: Tensor) -> Tensor:
    (K, I, O), (B, T, _) = bank.shape, x.shape  # noqa: E741
    flat = bank.view(K * I, O)
    y = x.new_empty(B, T, O)
    step = tile_of(T, I, K)
    for at in range(0, B, step):
        part = slice(at, at + step)
        torch.mm(_outer(h[part], x[part]), flat, out=y[part].view(-1, O))
    return y


def _reassociated_gradients(
    h: Tensor, bank: Tensor, x: Tensor, g: Tensor, gh: Tensor, gbank: Tensor, gx: Tensor
) -> None:
    (K, I, O), (B, T, _) = bank.shape, x.shape  # noqa: E741
    flat = bank.view(K * I, O)
    tiles = [slice(at, at + tile_of(T, I, K)) for at in range(0, B, tile_of(T, I, K))]
    wide = _wide(bank) if len(tiles) > 1 else bank.dtype
    sum_gbank = gbank.view(K * I, O) if gbank.numel() and wide == bank.dtype else None
    if gbank.numel() and sum_gbank is None:
        sum_gbank = bank.new_empty(K * I, O, dtype=wide)
    if sum_gbank is not None and not tiles:
        sum_gbank.zero_()
    for number, part in enumerate(tiles):
        rows = g[part].reshape(-1, O)
        if sum_gbank is not None:
            outer = _outer(h[part], x[part])
            if wide != outer.dtype:
                more = (outer.mT @ rows).to(wide)
                sum_gbank.copy_(more) if number == 0 else sum_gbank.add_(more)
            elif number == 0:
                torch.mm(outer.mT, rows, out=sum_gbank)
            else:
                sum_gbank.addmm_(outer.mT, rows)
        if not gh.numel() and not gx.numel():
            continue
        gouter = (rows @ flat.mT).view(-1, K, I)  # (b·T, K, I)
        if gx.numel():
            each = h[part].repeat_interleave(T, 0).unsqueeze(1)
            gx[part] = torch.bmm(each, gouter).view(gx[part].shape)
        if gh.numel():
            each = x[part].reshape(-1, I, 1)
            gh[part] = torch.bmm(gouter, each).view(-1, T, K).sum(1) if T else 0.0
    if sum_gbank is not None and wide != bank.dtype:
        gbank.copy_(sum_gbank.view(K, I, O))


def _outer(h: Tensor, x: Tensor) -> Tensor:
    """h_b ⊗ x_bt: (b, K), (b, T, I) → (b·T, K·I)."""
    return (h[:, None, :, None] * x[:, :, None, :]).view(-1, h.shape[1] * x.shape[2])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALF else x.dtype


def _differentiable_gradients(
    h: Tensor, bank: Tensor, x: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients by operations that autograd records, for gradients of gradients."""
    return (
        torch.einsum("kio,bti,bto->bk", bank, x, g),
        torch.einsum("bk,bti,bto->kio", h, x, g),
        torch.einsum("bk,kio,bto->bti", h, bank, g),
    )
