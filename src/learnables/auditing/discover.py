"""Find the models and optimizers that are alive, for loops that hand nothing over."""

import gc
from collections.abc import Iterable
from dataclasses import replace
from typing import final

from torch import nn
from torch.optim import Optimizer

from learnables.auditing.evidence import Evidence, Held
from learnables.entries import Entry, Place


def optimizers_alive() -> list[Optimizer]:
    """Every optimizer in memory that holds parameters, oldest first."""
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and o.param_groups]


def roots_alive() -> list[nn.Module]:
    """Every module in memory that no other module holds."""
    modules = [
        m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in vars(m)
    ]
    holders = [m for m in modules if type(m) is not Everything]
    children = {id(c) for m in holders for c in m._modules.values() if c is not None}
    return [m for m in holders if id(m) not in children]


@final
class Everything(nn.Module):
    """Stands for all models of a program at once; holds them by the names it gives them."""

    @classmethod
    def alive(cls, optimizers: Iterable[Optimizer]) -> "Everything":
        """All models that may train: an optimizer holds a parameter, or one asks for a gradient."""
        held = _held_by([*optimizers, *optimizers_alive()])
        everything = cls()
        for root in roots_alive():
            if any(p.requires_grad or id(p) in held for p in root.parameters()):
                everything.add_module(f"{type(root).__name__}_{len(everything._modules)}", root)
        return everything

    def narrow(self, evidence: Evidence) -> Evidence:
        """Only what took part: models that an optimizer stepped, and the optimizers that did.

        An optimizer of such a model took part too where it had no occasion to step, because no
        gradient reached what it holds: optimizers that step inside the backward are like that.

        Where an optimizer steps nothing of any model, so that it may hold what a model once had,
        the models that gradients reach took part too.

        Where that is one model, names lose the prefix that told several apart.
        """
        stepping = {id(event.subject) for event in evidence.happened("step", "scaler_step")}
        stepping |= {id(e.details.get("optimizer")) for e in evidence.happened("scaler_step")}
        optimizers = tuple(
            seen for seen in evidence.optimizers if seen.given or id(seen.optimizer) in stepping
        )
        held = _held_by([seen.optimizer for seen in optimizers])
        modules = {name: module for name, module in self._modules.items() if module is not None}
        of = {name: {id(p) for p in module.parameters()} for name, module in modules.items()}
        names = {name for name, params in of.items() if params & held}
        trained = set().union(*(of[name] for name in names))
        reached_ids = {id(e.param) for e in evidence.entries if evidence.ever(e, "reached")}
        optimizers += tuple(
            seen
            for seen in evidence.optimizers
            if all(seen is not o for o in optimizers)
            and (its := _held_by([seen.optimizer])) & trained
            and not its & reached_ids
        )
        if any(not _held_by([seen.optimizer]) & set().union(*of.values()) for seen in optimizers):
            reached = [entry for entry in evidence.entries if evidence.ever(entry, "reached")]
            names |= {name.partition(".")[0] for entry in reached for name in entry.names}
        children = {name: module for name, module in modules.items() if name in names}
        alone = f"{next(iter(children))}." if len(children) == 1 else ""
        renamed = {
            old: Entry(
                old.param,
                tuple(Place(p.owner, p.local_name, p.name.removeprefix(alone)) for p in places),
                old.index,
            )
            for old in evidence.entries
            if (places := [p for p in old.places if p.name.partition(".")[0] in children])
        }
        kept = {
            old: replace(old, name=old.name.removeprefix(alone))
            for old in evidence.held
            if old.name.partition(".")[0] in children
        }
        looks: dict[Entry | Held, Entry | Held] = dict(renamed.items())
        looks.update(kept.items())
        return replace(
            evidence,
            model=next(iter(children.values())) if alone else self,
            entries=tuple(renamed.values()),
            held=tuple(kept.values()),
            optimizers=optimizers,
            looks={new: evidence.looks[old] for old, new in looks.items() if old in evidence.looks},
            endings={renamed[old]: end for old, end in evidence.endings.items() if old in renamed},
        )


def _held_by(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
