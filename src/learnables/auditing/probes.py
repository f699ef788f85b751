"""Probes: small experiments that answer what watching alone cannot.

They run code of the user's, so none runs unless `audit` decides that it is cheap or is asked to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnables.auditing.trace import Trace


def derivative_error(kind: Any, inputs: Sequence[Any]) -> tuple[float | None, ...]:
    """How far the backward of a custom Function is from the derivative of its forward.

    The derivative is taken in float64 along one random direction per input, with one random
    weight on each output, by central differences with two step widths.

    Args:
        kind: The ``torch.autograd.Function``.
        inputs: What it was applied to; tensors are copied.

    Returns:
        For each input |numeric − analytic| ÷ |numeric|; None where nothing can be said: not a
        differentiable tensor, no gradient given back, a forward that does not run in float64, that
        is random, that hands its input on unchanged (its backward then replaces the gradient on
        purpose), or that is constant around this point (a straight-through estimator).
    """
    wide = [
        x.detach().to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    return tuple(
        _error_along(kind, wide, i)
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
        else None
        for i, x in enumerate(wide)
    )


def _error_along(kind: Any, inputs: list[Any], i: int) -> float | None:
    generator = torch.Generator().manual_seed(0)
    x: Tensor = inputs[i]
    along = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)

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
            if start is None or not start.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(start, leaf, allow_unused=True)
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            return None
        analytic = float((gradient.double() * along).sum())
        with torch.no_grad():
            again, slopes = value(x), []
            if again is None or float(again) != float(start.detach()):
                return None
            for width in (1e-4, 1e-5):
                up, down = value(x + width * along), value(x - width * along)
                if up is None or down is None:
                    return None
                slopes.append(float(up - down) / (2 * width))
    except Exception:  # whatever the user's forward does not accept: no verdict
        return None
    numeric = slopes[1]
    steady = abs(slopes[0] - slopes[1]) <= 1e-3 * abs(numeric) + 1e-8
    if not steady or abs(numeric) < 1e-8:
        return None
    return abs(numeric - analytic) / abs(numeric)


def check_functions(
    trace: Trace,
) -> list[tuple[type, str | None, list[tuple[Tensor, ...]], tuple[float | None, ...]]]:
    """Probe every custom Function that a trace has seen: (class, line, parameters, errors)."""
    results = []
    for kind, ((inputs, owners), at) in trace.functions.items():
        params = [tuple(p for i, p in enumerate(trace.params) if bits >> i & 1) for bits in owners]
        results.append((kind, at, params, derivative_error(kind, inputs)))
    return results
