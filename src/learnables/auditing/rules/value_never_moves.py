"""LRN401: what the optimizer steps with a gradient does change."""

from collections.abc import Iterable, Iterator

from learnables.auditing.evidence import Evidence, Look, Stage
from learnables.auditing.rule import Finding, rule
from learnables.auditing.rules.update_lost_in_rounding import is_rounded
from learnables.entries import Entry
from learnables.policy.rounding import ROUNDED


@rule("LRN401", needs=Stage.STEP, subsumes=("LRN641",))
def value_never_moves(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that is stepped with a gradient and yet keeps its value, bit for bit.

    ## Why it matters

    Everything looks right, the gradient, the group, the learning rate, and nothing is learned.
    Usually the update is smaller than half a unit in the last place of a bfloat16 or float16
    value, or the optimizer's kernel does not write.

    ## Example

    ```python
    model = nn.Linear(4, 1).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ```

    ## When to silence it

    The parameter has converged and its update rounds to nothing.
    """
    for entry in evidence.trainable():
        looks = [look for look in evidence.looks_at(entry) if _is_full_step(look)]
        if looks and not any("step" in look.changes for look in looks):
            largest = _largest(looks)
            if largest < _ROUND_OFF * _largest_of_siblings(evidence, entry):
                continue  # a gradient that cancels: another rule's matter
            if is_rounded(evidence, entry):
                continue  # what is lost now is carried on
            eps = _eps(evidence, entry)
            yield Finding(
                what="the optimizer steps a parameter and its value does not change",
                where=list(entry.names),
                found=f"change 0 in {len(looks)} of {len(looks)} steps, "
                f"gradient up to {largest:.1e}, learning rate {looks[-1].lr:g}"
                + (f"; the optimizer's eps {eps:g} outweighs it" if largest < eps else ""),
                wanted="a change in at least one of them",
                mend="ln.attach(model, optimizer, rounding='kahan')"
                if entry.dtype in ROUNDED
                else "",
                # Behind a LayerScale of 1e-5, as CaiT begins, that is no fault by itself.
                severity="note" if largest < eps and entry.dtype.itemsize >= 4 else None,
            )


def _eps(evidence: Evidence, entry: Entry) -> float:
    """What Adam and its kin add to the root of the second moment; 0 for others."""
    options = [group.options.get("eps") for group in evidence.groups_of(entry)]
    return max((float(eps) for eps in options if isinstance(eps, (int, float))), default=0.0)


_ROUND_OFF = 1e-5


def _largest(looks: Iterable[Look]) -> float:
    return max((look.gradient.absmax for look in looks if look.gradient), default=0.0)


def _largest_of_siblings(evidence: Evidence, entry: Entry) -> float:
    """The largest gradient of the parameters of the same module."""
    siblings = [other for other in evidence.trainable() if other.owner is entry.owner]
    return max(_largest(evidence.looks_at(other)) for other in siblings)


def _is_full_step(look: Look) -> bool:
    gradient = look.gradient
    return bool(look.stepped and gradient and not gradient.is_zero and look.lr)
