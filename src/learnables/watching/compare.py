"""Which parameters of two runs differ, and since when."""

from dataclasses import dataclass

import numpy as np

from learnables.arguments import require_kind
from learnables.watching.observation import MOMENTS, QUANTITIES, Observation
from learnables.watching.run import Run


@dataclass(frozen=True)
class Difference:
    """How one parameter differs between two runs.

    Attributes:
        name: Qualified name.
        what: ``"only in A"``, ``"only in B"``, ``"shape"``, ``"dtype"`` or the quantity that
            differed first: ``"weight"``, ``"gradient"``, ``"update"``.
        since: The first common step at which it differed; None where it is not a matter of steps.
        norms: ‖weight‖ in A and in B at the last common step.
    """

    name: str
    what: str
    since: int | None = None
    norms: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common and what not.

    Attributes:
        steps: The steps at which both were looked at.
        differences: Parameters that differ, those that differ first at the front.
        scalars: Name → last number in A and in B, where both have it.
        alike: How many parameters are equal at every common step, in every recorded number.
    """

    steps: tuple[int, ...]
    differences: tuple[Difference, ...]
    scalars: dict[str, tuple[float, float]]
    alike: int


def compare(a: Run, b: Run) -> Comparison:
    """Compare all numbers of two runs at the steps that both looked at.

    Raises:
        ArgumentError: One of them is no run.

    Example:
        >>> from tempfile import mkdtemp
        >>> def train(seed):
        ...     torch.manual_seed(seed)
        ...     model = nn.Linear(2, 1)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     with ln.watch(model, optimizer, to=mkdtemp(), budget=None) as watcher:
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        ...     return watcher.run()
        >>> compare(train(0), train(0)).differences
        ()
        >>> [(d.name, d.what, d.since) for d in compare(train(0), train(1)).differences]
        [('weight', 'weight', 1), ('bias', 'weight', 1)]
    """
    for run, name in ((a, "a"), (b, "b")):
        require_kind(run, name, Run, wanted="a Run", mend='compare(Run("runs/a"), Run("runs/b"))')
    in_a, in_b = ({p.name: p for p in run.parameters} for run in (a, b))
    seen_b = {o.step: o for o in b.observations}
    pairs = [(o, seen_b[o.step]) for o in a.observations if o.step in seen_b]
    found: list[Difference] = []
    for name in {**in_a, **in_b}:
        if name not in in_a or name not in in_b:
            found.append(Difference(name, "only in A" if name in in_a else "only in B"))
        elif in_a[name].shape != in_b[name].shape:
            found.append(Difference(name, "shape"))
        elif in_a[name].dtype != in_b[name].dtype:
            found.append(Difference(name, "dtype"))
        else:
            difference = _since(name, pairs)
            found += [] if difference is None else [difference]
    order = {name: i for i, name in enumerate({**in_a, **in_b})}
    found.sort(key=lambda d: (-1 if d.since is None else d.since, order[d.name]))
    scalars = {
        name: (float(series.values[-1]), float(b.scalars[name].values[-1]))
        for name, series in a.scalars.items()
        if name in b.scalars
    }
    steps = tuple(o.step for o, _ in pairs)
    return Comparison(steps, tuple(found), scalars, len(order) - len(found))


def _since(name: str, pairs: list[tuple[Observation, Observation]]) -> Difference | None:
    norms = None
    first: tuple[str, int] | None = None
    for one, other in pairs:
        if name not in one.names or name not in other.names:
            continue
        i, j = one.names.index(name), other.names.index(name)
        if "weight" in one.rows and "weight" in other.rows:
            norms = (float(one.rows["weight"].norm[i]), float(other.rows["weight"].norm[j]))
        if first is None:
            quantity = next((q for q in QUANTITIES if not _equal(one, i, other, j, q)), None)
            first = None if quantity is None else (quantity, one.step)
    return None if first is None else Difference(name, *first, norms)


def _equal(one: Observation, i: int, other: Observation, j: int, quantity: str) -> bool:
    if quantity not in one.rows or quantity not in other.rows:
        return (quantity in one.rows) == (quantity in other.rows)
    mine, theirs = one.rows[quantity].moments, other.rows[quantity].moments
    return all(np.array_equal(mine[m][i], theirs[m][j], equal_nan=True) for m in MOMENTS)
