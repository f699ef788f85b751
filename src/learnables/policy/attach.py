"""What optimizer groups cannot carry, done around each optimizer step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import (
    add_all_,
    after_pre_hooks,
    from_rank_0,
    make_first_post_hook,
    toward_all,
)
from learnables.arguments import optimizers_in
from learnables.errors import PolicyError
from learnables.policy.resolve import Plan, resolve
from learnables.policy.rounding import MODES, ROUNDED, Mode, Rounded, Rounding
from learnables.sets.apply import Enforcement, enforce

_attached: "WeakKeyDictionary[Optimizer, Attachment]" = WeakKeyDictionary()


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    rounding: Mode | None = None,
    state_dtype: torch.dtype = torch.bfloat16,
) -> "Attachment":
    """Carry out, from now on, everything declared that groups cannot: call it once.

    * ``weight_decay="init"``: before each step θ ← θ − lr · λ · (θ − θ₀), decoupled as in AdamW,
      with the group's current learning rate and λ = ``decay_toward_init`` of the group. Also
      where the step is given a closure: its gradient is that of θ, and none pulls nothing.
    * ``constraint=``: the value is projected now, and after each step in one batched call.
    * ``rounding=``, of parameters stored in 16 or 8 bits: for the time of the step the optimizer
      is given float32 copies, which are rounded back so that no update is lost.

    Under DDP and FSDP2 every rank calls it: the initial values are those of rank 0.

    A step that ``torch.amp.GradScaler`` skips changes nothing, also with fused optimizers, whose
    hooks run on skipped steps too; no value is read by the host.

    Args:
        model: The model.
        optimizer: The optimizer, or all of them; any subclass of ``torch.optim.Optimizer``.
        rounding: For all parameters in bfloat16, float16 or float8 for which nothing else is
            declared. ``"kahan"`` carries what the rounding cuts off to the next step, 2 bytes per
            parameter; in bfloat16 it is the lower half of a float32, so nothing is lost at all.
            ``"stochastic"`` rounds up or down so that the mean is right, 0 bytes. ``"master"``
            keeps a float32 copy, 4 bytes.
        state_dtype: What the optimizer's state of a rounded parameter's shape is kept in between
            steps: ``torch.bfloat16``, rounded stochastically so that averages do not stall, or
            ``torch.float32``.

    Returns:
        A handle; ``handle.remove()`` ends it. Attaching an optimizer again replaces the old handle.

    Raises:
        PolicyError: A parameter that needs it is in none of the optimizers, or its initial value
            is not known (built on the meta device from random values); ``rounding`` or
            ``state_dtype`` is none of those above.
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
        `ln.constrain`. Rounding: see ``docs/en/precision.md``; float32 copies of value, gradient
        and state live while the step runs. Nothing where there are none.

    Source:
        Decoupled decay: Loshchilov and Hutter, *Decoupled weight decay regularization*,
        arXiv:1711.05101. Toward the initial value: Xuhong et al., *Explicit inductive bias for
        transfer learning* (L2-SP), arXiv:1802.01483. Rounding: Zamirai et al., *Revisiting BFloat16
        training*, arXiv:2010.06192.
    """
    check_rounding(rounding, state_dtype)
    optimizers = optimizers_in(optimizer)
    plans = [plan for plan in resolve(model) if plan.entry.trainable]
    pulls = {opt: _pulls(plans, opt) for opt in optimizers}
    _require_all_held(plans, optimizers)
    for opt in optimizers:
        if opt in _attached:
            _attached[opt].remove()
    roundings = {
        opt: Rounding(opt, some, state_dtype)
        for opt in optimizers
        if (some := _rounded(plans, opt, rounding))
    }
    options = {"rounding": rounding, "state_dtype": state_dtype}
    handle = Attachment(pulls, enforce(model, optimizers), roundings, options)
    for opt in optimizers:
        _attached[opt] = handle
    return handle


def attachment_of(optimizer: Optimizer) -> "Attachment | None":
    """The live handle of ``optimizer``, if any; the audit asks."""
    return _attached.get(optimizer)


class _Pull:
    """The parameters of one group that decay toward their initial values."""

    def __init__(self, index: int, params: list[nn.Parameter], to: list[Tensor]) -> None:
        self.index, self.params, self.to = index, params, to
        self._after: tuple[list[nn.Parameter], list[Tensor]] = [], []

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, rounding: Rounding | None, evaluates: bool) -> None:
        """Pull now; where the step evaluates a closure, reckon from now and pull in `after_step`.

        Which parameters get a gradient, and what it is, is known only behind the closure; LBFGS
        evaluates several, and others move parameters before they do.
        """
        # Looked up each time: load_state_dict makes new dicts, in the same order.
        group = optimizer.param_groups[self.index]
        rate = group["lr"] * group["decay_toward_init"]
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):  # a fused optimizer is about to skip where it is 1
            rate = rate * (1 - found_inf.to(self.params[0].device))
        pairs = [
            (p, p if rounding is None else rounding.working(p), t)
            for p, t in zip(self.params, self.to, strict=True)
            if evaluates or _is_stepped(p)
        ]
        xs = [x for _, x, _ in pairs]
        away = toward_all(xs, [t.to(x.dtype) for _, x, t in pairs], rate)
        self._after = [], []  # of a step that raised
        if evaluates:
            self._after = [p for p, _, _ in pairs], away
        else:
            add_all_(xs, away)

    @torch.no_grad()
    def after_step(self, rounding: Rounding | None) -> None:
        """What was put off."""
        (params, away), self._after = self._after, ([], [])
        some = [(p, x) for p, x in zip(params, away, strict=True) if _is_stepped(p)]
        xs = [p if rounding is None else rounding.working(p) for p, _ in some]
        add_all_(xs, [x for _, x in some])


def _is_stepped(param: Tensor) -> bool:
    """Without gradient it is not stepped, hence not decayed: as torch's optimizers do."""
    return param.grad is not None


@final
class Attachment:
    """The hooks of one `ln.attach`; also a context manager that removes them at its end."""

    def __init__(
        self,
        pulls: dict[Optimizer, list[_Pull]],
        constraints: Enforcement,
        roundings: dict[Optimizer, Rounding],
        options: dict[str, Any],
    ) -> None:
        self._pulls, self._constraints, self._roundings = pulls, constraints, roundings
        self.options = options
        """What `ln.attach` was told; to do it again."""
        self._waiting: dict[Optimizer, Callable[[], None]] = {}
        self._befores = {opt: opt.register_step_pre_hook(self._before_step) for opt in pulls}
        self._hooks = list(self._befores.values())
        for opt in (opt for opt in pulls if pulls[opt] or opt in roundings):
            after = opt.register_step_post_hook(self._after_step)
            make_first_post_hook(opt, after)  # others are to see the parameters, not their copies
            self._hooks.append(after)

    @property
    def attached(self) -> frozenset[int]:
        """The ids of the parameters that it takes care of."""
        pulled = {id(p) for pulls in self._pulls.values() for pull in pulls for p in pull.params}
        rounded = {key for rounding in self._roundings.values() for key in rounding.rounded}
        return self._constraints.attached | pulled | rounded

    @property
    def rounded(self) -> dict[int, Rounded]:
        """The parameters whose steps are rounded, by identity."""
        return {
            k: one for rounding in self._roundings.values() for k, one in rounding.rounded.items()
        }

    def full_precision(self) -> dict[str, Tensor]:
        """Name → value in float32 of each rounded parameter, as it is before it is rounded.

        Exact with ``"master"``, and with ``"kahan"`` in bfloat16; what is carried in 8 bits of
        mantissa more with ``"kahan"`` otherwise; the parameter itself with ``"stochastic"``.
        """
        return {
            one.name: rounding.full(one)
            for rounding in self._roundings.values()
            for one in rounding.rounded.values()
        }

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        undo = self._waiting.pop(optimizer, None)
        if undo is not None:  # a hook raised, so that a step never began
            undo()
        if optimizer in self._roundings:  # hooks of others are to see parameters, not their copies
            waits = after_pre_hooks(optimizer, self._befores[optimizer], self._begin_step)
            if waits is not None:
                self._waiting[optimizer] = waits
                return None
        return self._begin_step(optimizer, args, kwargs)

    def _begin_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        self._waiting.pop(optimizer, None)
        rounding = self._roundings.get(optimizer)
        changed = None if rounding is None else rounding.before_step(args, kwargs)
        evaluates = callable(kwargs.get("closure", args[1] if len(args) > 1 else None))
        for pull in self._pulls[optimizer]:
            pull.before_step(optimizer, rounding, evaluates)
        return changed

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        rounding = self._roundings.get(optimizer)
        for pull in self._pulls[optimizer]:
            pull.after_step(rounding)
        if rounding is not None:
            rounding.after_step()

    def remove(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._constraints.remove()
        for rounding in self._roundings.values():
            rounding.remove()
        for optimizer in self._pulls:
            if _attached.get(optimizer) is self:
                del _attached[optimizer]

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def check_rounding(rounding: object, state_dtype: object) -> None:
    """Nothing where `attach` takes these two.

    Raises:
        PolicyError: It does not.
    """
    if rounding is not None and rounding not in MODES:
        raise PolicyError(
            "there is no such rounding",
            found=f"rounding={rounding!r}",
            wanted=f"one of {', '.join(map(repr, MODES))}, or None",
        )
    if state_dtype not in (torch.bfloat16, torch.float32):
        raise PolicyError(
            "the state of an optimizer cannot be kept like that",
            found=f"state_dtype={state_dtype!r}",
            wanted="torch.bfloat16, whose numbers reach as far as float32's, or torch.float32",
        )


def _rounded(plans: Iterable[Plan], optimizer: Optimizer, rounding: Mode | None) -> list[Rounded]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        Rounded(plan.name, plan.entry.param, mode)
        for plan in plans
        if id(plan.entry.param) in held
        and plan.entry.dtype in ROUNDED
        and (mode := plan["rounding"] or rounding) is not None
    ]


def _pulls(plans: Iterable[Plan], optimizer: Optimizer) -> list[_Pull]:
    wanting = {id(p.entry.param): p for p in plans if p.weight_decay == "init"}
    pulls = []
    for index, group in enumerate(optimizer.param_groups):
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
        pulls.append(_Pull(index, [p.entry.param for p in here], [_initial(p) for p in here]))
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
