"""Optimizer groups from the plans: complete, disjoint, named."""

from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import nn

from learnables.arguments import require_at_least_zero, require_number
from learnables.errors import PolicyError, SelectionError
from learnables.policy.depth import depths
from learnables.policy.kinds import is_hidden_matrix
from learnables.policy.resolve import Plan, Policy, resolve

Group = dict[str, Any]


@overload
def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    policy: Policy | None = None,
    layer_decay: float | None = None,
    split: None = None,
) -> list[Group]: ...


@overload
def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    policy: Policy | None = None,
    layer_decay: float | None = None,
    split: Literal["muon"],
) -> tuple[list[Group], list[Group]]: ...


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    policy: Policy | None = None,
    layer_decay: float | None = None,
    split: Literal["muon"] | None = None,
) -> list[Group] | tuple[list[Group], list[Group]]:
    """Groups for any torch optimizer: every trainable parameter once, with its names.

    Works on any model, bare or wrapped: what was declared with `ln.parameter` or `ln.annotate`
    counts; the rest gets the default of its kind (``ln.inventory(model)`` shows which, and why).

    Args:
        model: The model.
        lr: Base learning rate; may be left out where no parameter declares an ``lr_scale``.
        weight_decay: Coefficient for what decays.
        policy: Overrules everything: selector → fields, e.g. ``{"*.gamma": {"lr_scale": 5.0}}``.
        layer_decay: Learning rates fall by this factor from block to block toward the input, as in
            fine-tuning of BEiT and MAE: head and last norm at ``lr``, the last block at
            ``layer_decay · lr``, tokens, positions and patches lowest.
        split: ``"muon"`` returns two lists: hidden matrices for ``torch.optim.Muon``, and the rest
            for AdamW. A tag ``"muon"`` or ``"adamw"`` on a parameter overrules the routing.

    Returns:
        Dicts with ``params``, ``param_names``, ``weight_decay``, ``name``, and ``lr`` where given.
        A parameter that decays toward its initial value sits in a group with weight decay 0 and
        ``decay_toward_init``; `ln.attach` carries it out.

    Raises:
        ArgumentError: ``model`` is no module, or ``lr``, ``weight_decay`` or ``layer_decay`` no
            number.
        SelectionError: Nothing is trainable, or a selector of ``policy`` picks nothing.
        PolicyError: ``lr`` or ``weight_decay`` is negative or not finite, declarations disagree, an
            ``lr_scale`` or a ``layer_decay`` has no ``lr`` to scale, or ``layer_decay`` is not
            between 0 and 1 or finds no stacked blocks.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> for group in ln.param_groups(model, lr=1e-3, weight_decay=0.05):
        ...     print(group["name"], group["weight_decay"], group["param_names"])
        decay 0.05 ['0.weight']
        no decay 0.0 ['0.bias', '1.weight', '1.bias']
    """
    if lr is not None:
        require_at_least_zero(lr, "lr")
    require_at_least_zero(weight_decay, "weight_decay")
    if layer_decay is not None:
        require_number(layer_decay, "layer_decay")
    plans = [plan for plan in resolve(model, policy) if plan.entry.trainable]
    if not plans:
        raise SelectionError(
            "the model has no trainable parameter",
            found=f"{sum(1 for _ in model.parameters())} parameters, 0 with requires_grad",
            wanted="at least one",
        )
    factors = _layer_factors(model, plans, lr, layer_decay)
    if split is None:
        return _group(plans, lr, weight_decay, factors)
    if split != "muon":
        raise PolicyError("unknown split", found=f"split={split!r}", wanted="None or 'muon'")
    matrices = [plan for plan in plans if _for_muon(plan)]
    rest = [plan for plan in plans if not _for_muon(plan)]
    return _group(matrices, lr, weight_decay, factors), _group(rest, lr, weight_decay, factors)


def _for_muon(plan: Plan) -> bool:
    if "muon" in plan["tags"] and plan.entry.param.ndim != 2:
        raise PolicyError(
            "Muon takes matrices only",
            where=plan.name,
            found=f"tag 'muon' on {plan.entry.looks}",
            wanted="a parameter with two dimensions",
        )
    return "adamw" not in plan["tags"] and ("muon" in plan["tags"] or is_hidden_matrix(plan.entry))


def _layer_factors(
    model: nn.Module, plans: list[Plan], lr: float | None, layer_decay: float | None
) -> dict[str, float]:
    """What the depth of each parameter multiplies its learning rate by.

    Raises:
        PolicyError: There is nothing to scale, or the factor means nothing.
    """
    if layer_decay is None:
        return {}
    if lr is None or not 0 < layer_decay <= 1:
        raise PolicyError(
            "layer-wise decay needs a learning rate and a factor between 0 and 1",
            found=f"lr={lr}, layer_decay={layer_decay}",
            mend="ln.param_groups(model, lr=1e-3, layer_decay=0.75)",
        )
    depth, last = depths(model, [plan.entry for plan in plans])
    if last == 0:
        raise PolicyError(
            "layer-wise decay needs a model with stacked blocks",
            found=f"{type(model).__name__}: no module with numbered children of one class",
            wanted="e.g. self.blocks = nn.ModuleList(…)",
            mend="ln.param_groups(model, lr=1e-3, policy={'encoder.*': {'lr_scale': 0.1}})",
        )
    return {plan.name: layer_decay ** (last - depth[plan.entry]) for plan in plans}


def _group(
    plans: list[Plan], lr: float | None, weight_decay: float, factors: Mapping[str, float]
) -> list[Group]:
    groups: dict[tuple[float, float, float], Group] = {}
    for plan in plans:
        decay, toward = _coefficients(plan, weight_decay)
        if lr is None and plan.lr_scale != 1.0:
            raise PolicyError(
                "a learning-rate scale needs a learning rate to scale",
                where=plan.name,
                found=f"{plan.decisions['lr_scale']}, lr=None",
                wanted="a base learning rate",
                mend="ln.param_groups(model, lr=1e-3)",
            )
        key = (decay, toward, plan.lr_scale * factors.get(plan.name, 1.0))
        if key not in groups:
            groups[key] = _new_group(key, lr)
        groups[key]["params"].append(plan.entry.param)
        groups[key]["param_names"].append(plan.name)
    _assert_complete_and_disjoint(plans, list(groups.values()))
    return _with_unique_names(list(groups.values()))


def _coefficients(plan: Plan, weight_decay: float) -> tuple[float, float]:
    """(toward zero, toward the initial value)."""
    said = plan.weight_decay
    if said == "init":
        return 0.0, weight_decay
    if isinstance(said, bool):
        return (weight_decay if said else 0.0), 0.0
    return float(said), 0.0


def _new_group(key: tuple[float, float, float], lr: float | None) -> Group:
    decay, toward, scale = key
    name = "decay toward init" if toward else "decay" if decay else "no decay"
    group: Group = {"params": [], "param_names": [], "weight_decay": decay}
    if lr is not None:
        group["lr"] = lr * scale
    if toward:
        group["decay_toward_init"] = toward
    group["name"] = name if scale == 1.0 else f"{name}, lr x{scale:g}"
    return group


def _with_unique_names(groups: list[Group]) -> list[Group]:
    seen: dict[str, int] = {}
    for group in groups:
        count = seen[group["name"]] = seen.get(group["name"], 0) + 1
        if count > 1:
            group["name"] += f" {group['weight_decay']:g}"
    return groups


def _assert_complete_and_disjoint(plans: list[Plan], groups: list[Group]) -> None:
    given = [id(p) for group in groups for p in group["params"]]
    assert len(given) == len(set(given)), "a parameter is in two groups"
    assert set(given) == {id(plan.entry.param) for plan in plans}, "a parameter is in no group"
