"""LRN641: what the optimizer adds to a parameter is not rounded away."""

from collections.abc import Iterator

import torch
from torch import Tensor

from learnables._torch import dtype_name
from learnables.auditing.evidence import Evidence, Look, Stage
from learnables.auditing.rule import Finding, rule
from learnables.entries import Entry
from learnables.policy.attach import attachment_of

# Bits of the mantissa.
MANTISSA = {
    torch.bfloat16: 7,
    torch.float16: 10,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
}
_LARGEST_STEP = 1.5  # times the learning rate; Adam's step is about 1
_SHARE = 0.5


@rule("LRN641", needs=Stage.STEP, severity="warning")
def update_lost_in_rounding(evidence: Evidence) -> Iterator[Finding]:
    """A parameter in 16 or 8 bits whose larger entries no step can change.

    ## Why it matters

    Near 1 the bfloat16 numbers are 0.0078 apart. A step of 0.001 is less than half of that, so the
    sum is rounded back to where it was, at this step and at every other: scales and gates that
    begin at 1 never move, weight decay does not decay, averaged copies do not follow. Entries near
    0 do move, so the loss falls and nothing looks wrong.

    ## Example

    ```python
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)
            self.gamma = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 0.01], dtype=torch.bfloat16))

        def forward(self, x):
            return self.fc(x.float() * self.gamma)

    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    ```

    ## Use instead

    ```python
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)
            self.gamma = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 0.01], dtype=torch.bfloat16))

        def forward(self, x):
            return self.fc(x.float() * self.gamma)

    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    ln.attach(model, optimizer, rounding="kahan")
    ```

    ## When to silence it

    The optimizer rounds by itself: stochastically, with compensation, or from a copy in float32.
    """
    for entry in evidence.trainable():
        first, last = evidence.first.get(entry.param), evidence.last.get(entry.param)
        steps = [look for look in evidence.looks_at(entry) if _is_full_step(look)]
        if entry.dtype not in MANTISSA or first is None or last is None or not steps:
            continue
        if first.shape != last.shape or first.numel() == 0 or is_rounded(evidence, entry):
            continue
        bound = _LARGEST_STEP * max(_largest_step(evidence, entry, look) for look in steps)
        stuck = (half_unit(first, MANTISSA[entry.dtype]) > bound) & (first == last)
        share = float(stuck.float().mean())
        if share < _SHARE:
            continue
        dtype = dtype_name(entry.dtype)
        yield Finding(
            what="steps are smaller than what the parameter's dtype can add",
            where=list(entry.names),
            found=f"{share:.0%} of its entries stay where they are, in {len(steps)} of "
            f"{len(steps)} steps of at most {bound:.1e}; half a unit of {dtype} at the largest is "
            f"{float(half_unit(first, MANTISSA[entry.dtype]).max()):.1e}",
            wanted="no step that is lost: stochastic rounding, a carried error or a float32 copy",
            mend="ln.attach(model, optimizer, rounding='kahan')",
        )


def is_rounded(evidence: Evidence, entry: Entry) -> bool:
    """Whether `ln.attach` sees to it that no step of the parameter is lost."""
    handles = [attachment_of(seen.optimizer) for seen in evidence.optimizers]
    return any(handle is not None and id(entry.param) in handle.rounded for handle in handles)


def half_unit(x: Tensor, mantissa: int) -> Tensor:
    """Half the distance to the neighbour toward 0; less cannot be taken away from ``x``."""
    fraction, exponent = torch.frexp(x.float())
    power = exponent - 2 - mantissa - (fraction.abs() == 0.5).int()
    units = torch.ldexp(torch.ones(x.shape, device=x.device), power)
    return torch.where(x.float() == 0, 0.0, units)


def _largest_step(evidence: Evidence, entry: Entry, look: Look) -> float:
    adaptive = any("betas" in group.options for group in evidence.groups_of(entry))
    gradient = look.gradient.absmax if look.gradient is not None else 0.0
    return (look.lr or 0.0) * (1.0 if adaptive else gradient)


def _is_full_step(look: Look) -> bool:
    gradient = look.gradient
    return bool(look.stepped and gradient and not gradient.is_zero and look.lr)
