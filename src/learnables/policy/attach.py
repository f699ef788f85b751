"""What optimizer groups cannot carry, done around each optimizer step."""

from collections.abc import Iterable, Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import from_rank_0, pull_together_
from learnables.errors import PolicyError
from learnables.policy.resolve import Plan, resolve
from learnables.sets.apply import Enforcement, enforce

_attached: "WeakKeyDictionary[Optimizer, Attachment]" = WeakKeyDictionary()


def attach(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> "Attachment":
    """Carry out, from now on, everything declared that groups cannot: call it once.

    * ``weight_decay="init"``: before each step θ ← θ − lr · λ · (θ − θ₀), decoupled as in AdamW,
      with the group's current learning rate and λ = ``decay_toward_init`` of the group.
    * ``constraint=``: the value is projected now, and after each step in one batched call.

    Under DDP and FSDP2 every rank calls it: the initial values are those of rank 0.

    A step that ``torch.amp.GradScaler`` skips changes nothing, also with fused optimizers, whose
    hooks run on skipped steps too; no value is read by the host.

    Args:
        model: The model.
        optimizer: The optimizer, or all of them.

    Returns:
        A handle; ``handle.remove()`` ends it. Attaching an optimizer again replaces the old handle.

    Raises:
        PolicyError: A parameter that needs it is in none of the optimizers, or its initial value
            is not known (built on the meta device from random values).
        ConstraintError: A constrained parameter is in none of the optimizers, or its set does not
            fit it.

    Example:
        >>> class Colour(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.matrix = ln.parameter(torch.eye(3), weight_decay="init")
        >>> model = Colour()
        >>> groups = ln.param_groups(model, lr=0.1, weight_decay=0.5)
        >>> optimizer = torch.optim.SGD(groups)
        >>> handle = ln.attach(model, optimizer)
        >>> _ = model.matrix.data.zero_()
        >>> model.matrix.grad = torch.zeros(3, 3)
        >>> optimizer.step()
        >>> model.matrix.diagonal().tolist()
        [0.05..., 0.05..., 0.05...]

    Cost:
        Decay: three multi-tensor operations per group with such parameters. Constraints: see
        `ln.constrain`. Nothing where there are none.

    Source:
        Decoupled decay: Loshchilov and Hutter, *Decoupled weight decay regularization*,
        arXiv:1711.05101. Toward the initial value: Xuhong et al., *Explicit inductive bias for
        transfer learning* (L2-SP), arXiv:1802.01483.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    plans = [plan for plan in resolve(model) if plan.entry.trainable]
    pulls = {opt: _pulls(plans, opt) for opt in optimizers}
    _require_all_held(plans, optimizers)
    for opt in optimizers:
        if opt in _attached:
            _attached[opt].remove()
    handle = Attachment(pulls, enforce(model, optimizers))
    for opt in optimizers:
        _attached[opt] = handle
    return handle


def attachment_of(optimizer: Optimizer) -> "Attachment | None":
    """The live handle of ``optimizer``, if any; the audit asks."""
    return _attached.get(optimizer)


class _Pull:
    """The parameters of one group that decay toward their initial values."""

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter], to: list[Tensor]) -> None:
        self.group, self.params, self.to = group, params, to

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer) -> None:
        rate = self.group["lr"] * self.group["decay_toward_init"]
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):  # a fused optimizer is about to skip where it is 1
            rate = rate * (1 - found_inf.to(self.params[0].device))
        # A parameter without gradient is not stepped, hence not decayed: as torch's optimizers do.
        live = [(p, t) for p, t in zip(self.params, self.to, strict=True) if p.grad is not None]
        if not live:
            return
        pull_together_([p for p, _ in live], [t for _, t in live], rate)


@final
class Attachment:
    """The hooks of one `ln.attach`; also a context manager that removes them at its end."""

    def __init__(self, pulls: dict[Optimizer, list[_Pull]], constraints: Enforcement) -> None:
        self._pulls, self._constraints = pulls, constraints
        self._hooks = [opt.register_step_pre_hook(self._before_step) for opt in pulls]

    @property
    def attached(self) -> frozenset[int]:
        """The ids of the parameters that it takes care of."""
        pulled = {id(p) for pulls in self._pulls.values() for pull in pulls for p in pull.params}
        return self._constraints.attached | pulled

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        for pull in self._pulls[optimizer]:
            pull(optimizer)

    def remove(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()
        self._constraints.remove()
        for optimizer in self._pulls:
            if _attached.get(optimizer) is self:
                del _attached[optimizer]

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _pulls(plans: Iterable[Plan], optimizer: Optimizer) -> list[_Pull]:
    wanting = {id(p.entry.param): p for p in plans if p.weight_decay == "init"}
    pulls = []
    for group in optimizer.param_groups:
        here = [wanting[id(p)] for p in group["params"] if id(p) in wanting]
        if not here:
            continue
        if "decay_toward_init" not in group:
            raise PolicyError(
                "a parameter that decays toward its initial value sits in a group without a "
                "coefficient for it",
                where=here[0].name,
                found=f"group keys {sorted(k for k in group if k != 'params')}",
                wanted="groups made by ln.param_groups",
                mend="torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.05))",
            )
        pulls.append(_Pull(group, [p.entry.param for p in here], [_initial(p) for p in here]))
    return pulls


def _initial(plan: Plan) -> Tensor:
    param, kept = plan.entry.param, plan.entry.initial
    if kept is None or kept.device.type == "meta" or kept.shape != param.shape:
        raise PolicyError(
            "the initial value to decay toward is not known",
            where=plan.name,
            found="it was built on the meta device" if kept is not None else "none was kept",
            wanted="a value of shape " + str(tuple(param.shape)),
            mend="ln.init.reset_(model)",
        )
    return from_rank_0(kept, param)


def _require_all_held(plans: Iterable[Plan], optimizers: list[Optimizer]) -> None:
    held = {id(p) for opt in optimizers for group in opt.param_groups for p in group["params"]}
    for plan in plans:
        if plan.weight_decay == "init" and id(plan.entry.param) not in held:
            raise PolicyError(
                "a parameter that needs ln.attach is in none of the optimizers",
                where=plan.name,
                found=f"{plan.entry.looks}; in 0 of {len(optimizers)} optimizers",
                wanted="an optimizer that holds it",
                mend="torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.05))",
            )
