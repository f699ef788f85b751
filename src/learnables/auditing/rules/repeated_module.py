"""LRN702: a list of layers holds different layers."""

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.intent import means
from learnables.auditing.rule import Finding, rule


@rule("LRN702", needs=Stage.MODEL, severity="warning")
def repeated_module(evidence: Evidence) -> Iterator[Finding]:
    """A `ModuleList` or `Sequential` that holds one module with parameters several times in a row.

    ## Why it matters

    `[block] * n` repeats the reference, not the block: a stack of n layers silently has the
    capacity of one, and its gradient is the sum over all places.

    ## Example

    ```python
    model = nn.Sequential(*[nn.Linear(4, 4)] * 3)
    ```

    ## Use instead

    ```python
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    ```

    ## When to silence it

    Layers are shared on purpose, as in ALBERT; `intent=ln.Intent(tied=[…])` says so.
    """
    roots = {"": evidence.model, **evidence.modules}
    reported: set[int] = set()
    for prefix, root in roots.items():
        for name, stack in root.named_modules(prefix=prefix):
            if not isinstance(stack, (nn.ModuleList, nn.Sequential)):
                continue
            items = list(stack)
            for before, after in pairwise(items):
                if not _is_one(before, after) or id(after) in reported:
                    continue
                family = set(map(id, after.modules()))
                held = [e for e in evidence.entries if any(id(p.owner) in family for p in e.places)]
                names = [n for e in held for n in e.names]
                if not held or _is_meant(evidence, names):
                    continue
                reported.add(id(after))
                yield Finding(
                    what="one module stands several times in a row in a list of modules",
                    where=names,
                    found=f"{sum(_is_one(m, after) for m in items)} of {len(items)} items of "
                    f"{name or 'the model'} are the same {type(after).__name__}",
                    wanted="a module for each place",
                    severity="note" if all(map(evidence.library_of, held)) else None,
                )


def _is_one(a: nn.Module, b: nn.Module) -> bool:
    """The same module, or a shallow copy of it, which shares the registry of its Parameters."""
    return a is b or (bool(a._parameters) and a._parameters is b._parameters)


def _is_meant(evidence: Evidence, names: list[str]) -> bool:
    tied = evidence.intent.tied or ()
    return any(all(any(means(p, n) for p in group) for n in names) for group in tied)
