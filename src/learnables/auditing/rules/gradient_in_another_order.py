"""LRN622: the gradient that a step consumes is laid out like its parameter."""

from collections.abc import Iterator

from torch import Tensor

from learnables.auditing.evidence import Evidence, Look, Stage
from learnables.auditing.rule import Finding, rule
from learnables.strides import is_dense, wanted_strides


@rule("LRN622", needs=Stage.BACKWARD)
def gradient_in_another_order(evidence: Evidence) -> Iterator[Finding]:
    """A gradient with other strides than its parameter, under a fused optimizer or under DDP.

    ## Why it matters

    Fused optimizers on a CPU walk parameter and gradient in memory order: each element is updated
    with the gradient of another one, and nothing raises. `backward()` lays gradients out like their
    parameters; `torch.autograd.grad`, `torch.func.grad` and hooks that assign `.grad` do not.

    Along dimensions of size 1 not even `backward()` does, which is harmless but for DDP: it copies
    such a gradient in every step and warns that "grad strides do not match bucket view strides".

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.eye(3, 4))

        def forward(self, x):
            return torch.einsum("bi,oi->bo", x, self.mix)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    x = torch.randn(8, 4)

    def step():
        loss = (model(x) + 1).square().mean()
        (model.mix.grad,) = torch.autograd.grad(loss, [model.mix])  # strides (1, 3), not (4, 1)
        optimizer.step()
        return loss
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.eye(3, 4))

        def forward(self, x):
            return torch.einsum("bi,oi->bo", x, self.mix)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    x = torch.randn(8, 4)

    def step():
        loss = (model(x) + 1).square().mean()
        (gradient,) = torch.autograd.grad(loss, [model.mix])
        model.mix.grad = torch.empty_like(model.mix).copy_(gradient)  # as backward() lays it out
        optimizer.step()
        return loss
    ```

    ## When to silence it

    Under a fused optimizer never. Under DDP where the parameter is small, so that a copy is too.
    """
    for entry in evidence.strided:
        x = entry.param
        if not _differs(x, evidence.looks_at(entry)):
            continue
        on_cpu = x.device.type == "cpu"
        fused = on_cpu and any(g.options.get("fused") for g in evidence.groups_of(entry))
        for look in evidence.looks_at(entry):
            consumed, delivered = look.consumed_strides, look.delivered_strides
            if fused and consumed is not None and _is_another_order(x, consumed):
                yield Finding(
                    what="a fused optimizer applies the gradient to other elements",
                    where=list(entry.names),
                    found=f"shape {tuple(x.shape)}, gradient with strides {consumed}",
                    wanted=f"a gradient with the strides of its parameter, {tuple(x.stride())}",
                )
                break
            if id(x) in evidence.reduced and delivered not in (None, _strides_in_bucket(x)):
                yield Finding(
                    severity="warning",
                    what="DDP warns of a gradient that is laid out otherwise, and copies it",
                    where=list(entry.names),
                    found=f"shape {tuple(x.shape)}, gradient with strides {delivered}",
                    wanted=f"a gradient with the strides of its parameter, {_strides_in_bucket(x)}",
                )
                break


def _differs(x: Tensor, looks: tuple[Look, ...]) -> bool:
    """Whether any gradient has not just the strides of its parameter; mostly none has."""
    usual = (None, x.stride())
    return any(
        look.consumed_strides not in usual or look.delivered_strides not in usual for look in looks
    )


def _is_another_order(x: Tensor, strides: tuple[int, ...]) -> bool:
    if len(strides) != x.ndim:  # the parameter has got another shape since
        return False
    pairs = zip(x.shape, strides, x.stride(), strict=True)
    return any(size > 1 and a != b for size, a, b in pairs)


def _strides_in_bucket(x: Tensor) -> tuple[int, ...]:
    """Those of DDP's view for its gradient: the parameter's, but row-major where it has gaps."""
    return tuple(x.stride()) if is_dense(x) else wanted_strides(x.shape)
