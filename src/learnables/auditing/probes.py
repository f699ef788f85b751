"""Probes: small experiments that answer what watching alone cannot.

They run code of the user's, so none runs unless `audit` decides that it is cheap or is asked to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from learnables.auditing.trace import Trace


def derivative_error(kind: Any, inputs: Sequence[Any]) -> tuple[float | None, ...]:
    """How far the backward of a custom Function is from the derivative of its forward.

    The derivative is taken in float64, with one random weight on each output, by central
    differences of two widths, at up to 16 entries of each input.

    Args:
        kind: The ``torch.autograd.Function``.
        inputs: What it was applied to; tensors are copied.

    Returns:
        For each input the largest |numeric − analytic| ÷ |numeric| over these entries; None where
        nothing can be said: not a differentiable tensor, no gradient given back, a forward that
        does not run in float64 or is random. None for all inputs where the backward replaces the
        derivative on purpose: the forward hands an input on unchanged (gradient reversal), or is
        constant where the backward is not 0 (rounding, clamping, straight-through estimators).
    """
    wide = [
        x.detach().to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    slopes = [
        _slopes(kind, wide, i)
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
        else None
        for i, x in enumerate(wide)
    ]
    if any(pairs == _ON_PURPOSE for pairs in slopes):
        return (None,) * len(wide)
    return tuple(
        max((abs(n - a) / abs(n) for n, a in pairs if n), default=None) if pairs else None
        for pairs in slopes
    )


_ON_PURPOSE: list[tuple[float, float]] = [(float("inf"), 0.0)]


def _slopes(kind: Any, inputs: list[Any], i: int) -> list[tuple[float, float]] | None:
    """(numeric, analytic) at some entries of input ``i``."""
    x: Tensor = inputs[i]

    def value(at: Tensor) -> Tensor | None:
        out = kind.apply(*inputs[:i], at, *inputs[i + 1 :])
        outs = [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]
        outs = [o for o in outs if o.is_floating_point()]
        if not outs or any(o.shape == x.shape and torch.equal(o, at) for o in outs):
            return None
        weights = torch.Generator().manual_seed(1)
        total = torch.zeros((), dtype=torch.float64)
        for o in outs:
            weight = torch.randn(o.shape, generator=weights, dtype=torch.float64)
            total = total + (o.double() * weight.to(o.device)).sum().cpu()
        return total

    try:
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            start = value(leaf)
            if start is None:
                return _ON_PURPOSE
            if not start.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(start, leaf, allow_unused=True)
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            return None
        with torch.no_grad():
            again = value(x)
            if again is None or float(again) != float(start.detach()):
                return None
            return _at_entries(x, gradient, value)
    except Exception:  # whatever the user's forward does not accept: no verdict
        return None


def _at_entries(
    x: Tensor, gradient: Tensor, value: Callable[[Tensor], Tensor | None]
) -> list[tuple[float, float]] | None:
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    pairs = []
    for j in order[:16].tolist():
        slopes = []
        for width in (1e-4, 1e-5):
            moved = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
            moved[j] = width
            up, down = value(x + moved.view_as(x)), value(x - moved.view_as(x))
            if up is None or down is None:
                return _ON_PURPOSE
            slopes.append(float(up - down) / (2 * width))
        wide, numeric = slopes
        analytic = float(gradient.flatten()[j])
        if numeric == wide == 0 and analytic != 0:
            return _ON_PURPOSE
        if abs(wide - numeric) <= 1e-4 * abs(numeric) + 1e-9 and abs(numeric) > 1e-6:
            pairs.append((numeric, analytic))
    return pairs


def check_functions(
    trace: Trace,
) -> list[tuple[type, str | None, list[tuple[Tensor, ...]], tuple[float | None, ...]]]:
    """Probe every custom Function that a trace has seen: (class, line, parameters, errors)."""
    results = []
    for kind, ((inputs, owners), at) in trace.functions.items():
        params = [tuple(p for i, p in enumerate(trace.params) if bits >> i & 1) for bits in owners]
        results.append((kind, at, params, derivative_error(kind, inputs)))
    return results
