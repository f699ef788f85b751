"""LRN306: the backward of a custom Function is the derivative of its forward."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule

_TOLERANCE = 1e-2


@rule("LRN306", needs=Stage.BACKWARD)
def wrong_gradient(evidence: Evidence) -> Iterator[Finding]:
    """A custom autograd Function whose backward is not the derivative of its forward.

    ## Why it matters

    A wrong sign, a missing factor or a missing term: the parameter moves at every step, in a wrong
    direction. The audit compares with differences in float64. A Function that hands its input on
    unchanged, or is constant around the point (rounding), replaces the gradient on purpose and is
    not judged.

    ## Example

    ```python
    class Sharpen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * (1 - w)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * (1 - w), (g * x).sum(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((4,), 0.5))

        def forward(self, x):
            return Sharpen.apply(x, self.w).sum(1)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ```

    ## Use instead

    ```python
    class Sharpen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * (1 - w)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * (1 - w), -(g * x).sum(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((4,), 0.5))

        def forward(self, x):
            return Sharpen.apply(x, self.w).sum(1)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ```

    ## When to silence it

    The gradient is a surrogate on purpose; `ln.Intent(surrogate=[...])` says so too.
    """
    meant = set(map(id, evidence.meant(evidence.intent.surrogate)))
    for seen in evidence.functions:
        for params, error in zip(seen.params, seen.verdict, strict=True):
            if error is None or error < _TOLERANCE:
                continue
            for param in params:
                entry = evidence.entry_of.get(id(param))
                if entry is not None and id(entry) not in meant:
                    yield Finding(
                        what=f"{seen.kind.__name__}.backward is not the derivative of its forward",
                        where=list(entry.names),
                        found=f"relative error {error:.1e} against differences in float64",
                        wanted=f"< {_TOLERANCE:g}",
                        location=seen.location,
                    )
