"""At home in timm: any of its optimizers over our groups.

```python
optimizer = create_optimizer(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
```
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from learnables.errors import need_extra
from learnables.integrations.building import build_optimizer
from learnables.policy.resolve import Policy


def create_optimizer(
    model: nn.Module,
    opt: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    policy: Policy | None = None,
    layer_decay: float | None = None,
    **options: Any,
) -> Optimizer:
    """``timm.optim.create_optimizer_v2`` over `ln.param_groups`, with `ln.attach` done.

    timm takes its list of undecayed names from the outermost module by exact match, so a wrapper, a
    compiled model or a grafted parameter loses it; ours come from the parameters themselves. Its
    ``layer_decay`` acts only through its own schedulers; here the learning rates are in the groups,
    and every scheduler keeps their ratios.

    Args:
        model: The model, bare, wrapped or compiled.
        opt: A name that timm knows: ``timm.optim.list_optimizers()``.
        lr: Base learning rate.
        weight_decay: Coefficient for what decays.
        policy: As in `ln.param_groups`.
        layer_decay: Likewise.
        options: Handed to timm's factory: ``momentum``, ``betas``, …

    Returns:
        The optimizer.

    Raises:
        MissingExtraError: timm is not installed.
    """  # noqa: DOC501 - need_extra makes it
    try:
        from timm.optim import create_optimizer_v2
    except ImportError as error:
        raise need_extra("timm", "timm", "create_optimizer") from error

    def make(groups: list[dict[str, Any]], lr: float, **more: Any) -> Optimizer:
        made: Optimizer = create_optimizer_v2(groups, opt=opt, lr=lr, weight_decay=0.0, **more)
        return made

    return build_optimizer(
        model,
        make,
        lr=lr,
        weight_decay=weight_decay,
        policy=policy,
        layer_decay=layer_decay,
        **options,
    )
