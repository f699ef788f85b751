"""The gradient that an optimizer is about to consume, read from inside its ``step``."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learnables.arguments import describe
from learnables.errors import ArgumentError, LearnablesError
from learnables.stats import by_kernel, require_values


@dataclass(frozen=True)
class Consumption:
    """What is between ``.grad`` and the number that the optimizer uses.

    Attributes:
        scale: A fused optimizer divides by it; None where ``.grad`` is consumed as it is.
        overflow: Not 0 where a fused optimizer will skip the step; None where it always steps.
        stage: The words that are written beside the numbers.
    """

    scale: Tensor | None
    overflow: Tensor | None
    stage: str


def consumption(optimizer: Optimizer) -> Consumption:
    """How ``optimizer`` will use the gradients; to be called in its step pre-hook.

    `torch.amp.GradScaler` leaves unscaling and skipping to optimizers that can do both in their
    kernel (``fused=True``): it sets ``grad_scale`` and ``found_inf`` on them for the length of the
    step. Then ``.grad`` is still multiplied by the scale, and the hooks run even when nothing will
    be updated. For all others it unscales before, and on overflow does not call ``step``.
    """
    scale = getattr(optimizer, "grad_scale", None)
    overflow = getattr(optimizer, "found_inf", None)
    stage = "step" if scale is None else "step, divided by the scale"
    return Consumption(scale, overflow, stage)


def consumed(gradients: Sequence[Tensor], how: Consumption) -> list[Tensor]:
    """The gradients as the optimizer uses them; new tensors where it divides, else the same."""
    if how.scale is None:
        return list(gradients)
    return [gradient / how.scale.to(gradient.device) for gradient in gradients]


def steppable(optimizer: Any) -> Optimizer:
    """The torch optimizer whose hooks run: ``optimizer`` itself, or what a wrapper holds.

    Raises:
        ArgumentError: No such optimizer is found.
        LearnablesError: An engine steps it by itself.
    """
    inner, engine = optimizer, None
    for _ in range(4):
        engine = next((k for k in type(inner).__mro__ if _is_engine(k)), None)
        if engine or "_optimizer_step_pre_hooks" in getattr(inner, "__dict__", {}):
            break
        inner = getattr(inner, "optimizer", None)
    if engine or not isinstance(inner, Optimizer):
        kind = LearnablesError if engine else ArgumentError
        raise kind(
            "the gradient that this optimizer consumes cannot be seen",
            where="optimizer",
            found=f"{type(inner).__module__}.{type(inner).__qualname__}, an engine that keeps "
            "gradients in buffers of its own and runs no optimizer hooks"
            if engine
            else f"{describe(optimizer)}, and no torch.optim.Optimizer in it",
            wanted="a torch.optim.Optimizer, or a wrapper that holds one as .optimizer",
            mend="ln.watch(model, optimizer)",
        )
    return inner


_ENGINES = ("deepspeed", "megatron", "colossalai")  # their optimizers step copies of parameters


def _is_engine(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _ENGINES


def learning_rates(optimizer: Optimizer) -> dict[Tensor, float]:
    """Parameter → learning rate of its group; nan where reading it would wait for a device."""
    rates: dict[Tensor, float] = {}
    for group in optimizer.param_groups:
        rate = group.get("lr", float("nan"))
        if isinstance(rate, Tensor):
            rate = rate.item() if rate.device.type == "cpu" else float("nan")
        rates.update((p, float(rate)) for p in group["params"])
    return rates


_SMALL = 1 << 19  # elements: below, copying them together is cheaper than an operation for each


def squares_and_faults(*lists: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    """Of each list the sum of squares, float64, 0-dim, and which tensors hold a non-finite value.

    Where there is one the sum is not finite.

    Raises:
        LearnablesError: No tensor has values here: under fake tensors.
    """
    seen = by_kernel(list(chain(*lists)), histogram=False) if any(lists) else None
    if seen is None:
        require_values()
        return [_square_and_faults(tensors) for tensors in lists]
    found, at = [], 0
    for tensors in lists:
        here = slice(at, at := at + len(tensors))
        faults = seen.nonfinite[here].nonzero().flatten().tolist()
        square = seen.sum_of_squares[here].sum()
        found.append((square + torch.inf if faults else square, faults))
    return found


def _square_and_faults(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    square = sum_of_squares(tensors)
    if square.isfinite():
        return square, []
    return square, (~norms(tensors).isfinite()).nonzero().flatten().tolist()


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares of all elements, float64, 0-dim; non-finite where an element is."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if sum(map(Tensor.numel, tensors)) <= _SMALL:
        try:
            together = torch.cat([t.reshape(-1) for t in tensors])
            norm: Tensor = torch.linalg.vector_norm(together, dtype=_wide(together.dtype))
            return norm.double().square()
        except (RuntimeError, NotImplementedError):  # sparse, complex, or on several devices
            pass
    return norms(tensors).double().square().sum()


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms in float32, shape (len(tensors),); non-finite where an element is."""
    if not tensors:
        return torch.zeros(0)
    if _alike(tensors):
        # dtype: a norm in float16 overflows where no element does.
        found = torch._foreach_norm(list(tensors), 2, dtype=_wide(tensors[0].dtype))
        return torch.stack(list(found)).float()
    home = tensors[0].device
    return torch.stack([torch.linalg.vector_norm(_plain(t)).float().to(home) for t in tensors])


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all are strided, of one floating dtype and on one device."""
    return len({(t.device, t.dtype, t.layout) for t in tensors}) <= 1 and all(
        t.layout is torch.strided and t.dtype in _FLOATING for t in tensors[:1]
    )


_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _plain(x: Tensor) -> Tensor:
    x = x.coalesce().values() if x.layout is torch.sparse_coo else x
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.to(_wide(x.dtype))
