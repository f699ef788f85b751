"""Which parameters of two runs differ, and since when."""

from dataclasses import dataclass

import numpy as np

from learnables.arguments import require_kind
from learnables.watching.encoding import Array
from learnables.watching.observation import MOMENTS, QUANTITIES, Observation
from learnables.watching.run import Run


@dataclass(frozen=True)
class Difference:
    """How one parameter differs between two runs.

    Attributes:
        name: Qualified name.
        what: ``"only in A"``, ``"only in B"``, ``"shape"``, ``"dtype"`` or what differed first:
            ``"weight"``, ``"gradient"``, ``"update"``, or a column such as ``"lr"``.
        since: The first common step at which it differed; None where it is not a matter of steps.
        norms: ‖weight‖ in A and in B, at the last look of each.
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
    first: dict[str, tuple[str, int]] = {}
    for one, other in pairs:
        for name, what in _differing(one, other).items():
            first.setdefault(name, (what, one.step))
    norms = (_norms(a), _norms(b))
    found: list[Difference] = []
    for name in {**in_a, **in_b}:
        if name not in in_a or name not in in_b:
            found.append(Difference(name, "only in A" if name in in_a else "only in B"))
        elif in_a[name].shape != in_b[name].shape:
            found.append(Difference(name, "shape"))
        elif in_a[name].dtype != in_b[name].dtype:
            found.append(Difference(name, "dtype"))
        elif name in first:
            both = (norms[0][name], norms[1][name]) if all(name in n for n in norms) else None
            found.append(Difference(name, *first[name], both))
    order = {name: i for i, name in enumerate({**in_a, **in_b})}
    found.sort(key=lambda d: (-1 if d.since is None else d.since, order[d.name]))
    scalars = {
        name: (float(series.values[-1]), float(b.scalars[name].values[-1]))
        for name, series in a.scalars.items()
        if name in b.scalars
    }
    steps = tuple(o.step for o, _ in pairs)
    return Comparison(steps, tuple(found), scalars, len(order) - len(found))


def _norms(run: Run) -> dict[str, float]:
    """‖weight‖ by name, at the last look that has one."""
    found: dict[str, float] = {}
    for o in run.observations:
        if "weight" in o.rows:
            found.update(zip(o.names, o.rows["weight"].norm.tolist(), strict=True))
    return found


def _differing(one: Observation, other: Observation) -> dict[str, str]:
    """Of two looks, the parameters in which any recorded number differs, and the first such one."""
    at = {name: i for i, name in enumerate(other.names)}
    names = [name for name in one.names if name in at]
    i = np.array([k for k, name in enumerate(one.names) if name in at], np.intp)
    j = np.array([at[name] for name in names], np.intp)
    found: dict[str, str] = {}

    def note(what: str, same: Array) -> None:
        for k in np.flatnonzero(~same):
            found.setdefault(names[k], what)

    for quantity in QUANTITIES:
        mine, theirs = one.rows.get(quantity), other.rows.get(quantity)
        if mine is None or theirs is None:
            note(quantity, np.full(len(names), mine is theirs))
            continue
        same = np.ones(len(names), bool)
        for moment in MOMENTS:
            same &= _equal(mine.moments[moment][i], theirs.moments[moment][j])
        if mine.histogram is not None and theirs.histogram is not None:
            same &= (mine.histogram[i] == theirs.histogram[j]).all(axis=1)
        note(quantity, same)
    for column in sorted({*one.columns} & {*other.columns}):
        note(column, _equal(one.columns[column][i], other.columns[column][j]))
    return found


def _equal(x: Array, y: Array) -> Array:
    """Which numbers are the same; NaN is itself."""
    return np.asarray((x == y) | ((x != x) & (y != y)))
