"""LRN642: an averaged copy follows the parameter."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learnables._torch import dtype_name, without_wrappers
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.auditing.rules.copy_is_an_alias import tensors_of
from learnables.auditing.rules.update_lost_in_rounding import MANTISSA, half_unit
from learnables.entries import Entry

_SHARE = 0.5


@rule("LRN642", needs=Stage.STEP, severity="warning")
def average_lost_in_rounding(evidence: Evidence) -> Iterator[Finding]:
    """An averaged copy in 16 bits that stays where it is while its parameter moves away.

    ## Why it matters

    An average with a decay of 0.999 goes a thousandth of the way to the parameter at each update.
    In bfloat16 that is rounded away until the parameter is half a unit times a thousand away, four
    times its own value: the average remains what it was when it was made. It is evaluated and
    exported all the same, and its entries near 0 do follow, so that it looks like a bad average
    rather than none.

    ## Example

    ```python
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    model = nn.Linear(4, 1, dtype=torch.bfloat16)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.999))
    average.n_averaged += 1  # the first update copies
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()

    def step():
        optimizer.zero_grad()
        loss = (model(x).float() + 1).square().mean()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        return loss
    ```

    ## Use instead

    ```python
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    model = nn.Linear(4, 1, dtype=torch.bfloat16)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.999)).float()
    average.n_averaged += 1  # the first update copies
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()

    def step():
        optimizer.zero_grad()
        loss = (model(x).float() + 1).square().mean()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        return loss
    ```

    `multi_avg_fn=get_ema_multi_avg_fn(…)` wants both in one dtype; `avg_fn=` does not, and neither
    does timm's `ModelEmaV3(model).float()`.

    ## When to silence it

    The decay is so small that the average follows within a few units of its dtype.
    """
    for average in _averages(evidence):
        stuck = sum(int(part.stuck.sum()) for part in average.parts)
        behind = sum(int(part.behind.sum()) for part in average.parts)
        if not average.is_updated or stuck < _SHARE * behind or not stuck:
            continue
        worst = max(average.parts, key=lambda part: int(part.stuck.sum()))
        dtype = dtype_name(worst.copied.dtype)
        unit = float(half_unit(worst.copied, MANTISSA[worst.copied.dtype]).max())
        yield Finding(
            what=f"an averaged copy in {dtype} does not follow its parameters",
            where=[part.entry.name for part in average.parts if bool(part.stuck.any())],
            found=f"{average.name}: of {behind} elements that are not where the parameter is, "
            f"{stuck} did not change in {evidence.n_of_n}; {dtype} adds no less than {unit:.1e} "
            f"at the largest of {worst.entry.name}",
            wanted=f"an average in float32: {average.name}.float(), once it is made",
        )


@dataclass(frozen=True)
class _Part:
    """One parameter and its average: which elements should have moved, and which did not."""

    entry: Entry
    copied: Tensor
    behind: Tensor
    stuck: Tensor


@dataclass
class _Average:
    """Copies of parameters under one name.

    Attributes:
        is_updated: Whether anybody is seen to update it: else it may be a snapshot, which is meant
            to stay.
    """

    name: str
    is_updated: bool = False
    parts: list[_Part] = field(default_factory=list)


def _averages(evidence: Evidence) -> list[_Average]:
    trained = [e for e in evidence.trainable() if evidence.ever(e, "stepped")]
    found: dict[str, _Average] = {}
    for name, tensor, entry in _pairs(evidence, trained):
        first, last = evidence.first.get(tensor), evidence.last.get(tensor)
        online = evidence.last.get(entry.param)
        if first is None or last is None or online is None or tensor.dtype not in MANTISSA:
            continue
        average = found.setdefault(name, _Average(name))
        average.is_updated |= id(tensor) in evidence.written or not torch.equal(first, last)
        behind = online.to(torch.float32) != last.to(torch.float32)
        average.parts.append(_Part(entry, last, behind, behind & (first == last)))
    for held in evidence.held:  # torch counts the updates of an AveragedModel
        name, _, last_name = held.name.rpartition(".")
        if last_name == "n_averaged" and name in found:
            found[name].is_updated |= any(look.changes for look in evidence.looks_at(held))
    return list(found.values())


def _pairs(evidence: Evidence, trained: list[Entry]) -> Iterator[tuple[str, Tensor, Entry]]:
    """Name of the copy, a tensor in it, and the parameter that it is one of."""
    own = {id(entry.param) for entry in trained}
    named = {name: entry for entry in trained for name in entry.plain_names}
    given = {name: tensors_of(copied) for name, copied in evidence.copies.items()}
    ids = {id(x) for tensors in given.values() for x in tensors.values()}
    for name, module in evidence.modules.items():
        given[name] = {k: x for k, x in tensors_of(module).items() if id(x) not in ids}
    for name, tensors in given.items():
        for key, tensor in tensors.items():
            entry = named.get(key) or named.get(without_wrappers(key))
            if entry is not None and id(tensor) not in own and tensor.shape == entry.shape:
                yield name, tensor, entry
