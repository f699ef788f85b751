"""Make the evidence of a rank that holds shards the evidence of the whole.

Where a parameter is a DTensor, each rank observes its own part: a part may be empty, or have a zero
gradient, while the parameter is well. Before anything is judged, the ranks put together what they
saw, so that all of them reach the one verdict that a single process would reach.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from learnables._torch import is_dtensor, local, own_share, whole_of
from learnables.auditing.evidence import PHASES, Amount, Event, Evidence, Look, Phase
from learnables.collectives import gather_texts, reduce_over
from learnables.entries import Entry
from learnables.errors import LearnablesError

_Row: TypeAlias = list[float]
_ABSENT: _Row = [0.0, 0.0, 0.0, 0.0, -math.inf]  # is there, sum of squares, not finite, count, max


def together(evidence: Evidence, budget: int) -> Evidence:
    """``evidence`` with whole parameters in the place of shards; itself where nothing is sharded.

    A collective call then: all ranks that train together must make it. Where a step raised, each
    rank keeps what it saw, since the others may never arrive.

    Args:
        evidence: What this rank saw.
        budget: Bytes of whole first and last values to keep; values beyond are left out, as
            large values are on one process.

    Raises:
        LearnablesError: The ranks observed different things.

    Cost:
        Four collectives, and two more for each sharded parameter whose values are kept.
    """
    sharded = [entry for entry in evidence.entries if is_dtensor(entry.param)]
    if not sharded or evidence.crash is not None or not _many_ranks():
        return evidence
    backwards = [event for event in evidence.events if event.kind == "backward"]
    _demand_alike(evidence, sharded, backwards)
    counts = {entry.param: _counts_here(entry.param) for entry in sharded}
    rows = list(_rows(evidence, sharded, backwards, counts))
    merged = iter(_merge(rows, local(sharded[0].param).device))
    looks = dict(evidence.looks)
    for entry in sharded:
        looks[entry] = tuple(_look(look, merged) for look in evidence.looks_at(entry))
    events = list(evidence.events)
    for event in backwards:
        amounts = {entry.param: _amount(next(merged)) for entry in sharded}
        whole: dict[Tensor, Amount] = {p: a for p, a in amounts.items() if a is not None}
        cleared = [entry.param for entry in sharded if _all_say(next(merged))]
        events[event.index] = replace(
            event,
            arrived={**event.arrived, **whole},
            details={**event.details, "cleared_before": (*_cleared_wholes(event), *cleared)},
        )
    return replace(
        evidence,
        events=tuple(events),
        looks=looks,
        first=_wholes(evidence.first, sharded, budget),
        last=_wholes(evidence.last, sharded, budget),
    )


def _many_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _demand_alike(evidence: Evidence, sharded: list[Entry], backwards: list[Event]) -> None:
    mine = f"{evidence.iterations} iterations, {len(backwards)} backwards, {len(sharded)} shards"
    said = gather_texts(mine, local(sharded[0].param).device)
    other = next((rank for rank, text in enumerate(said) if text != said[0]), None)
    if other is not None:
        raise LearnablesError(
            "the ranks did different things while they were observed",
            where=f"rank {other}",
            found=f"{said[other]}; on rank 0: {said[0]}",
            wanted="the same iterations on every rank",
        )


def _counts_here(param: Tensor) -> bool:
    """Whether this rank's part counts, and is no copy of another rank's."""
    return own_share(param).numel() == local(param).numel()


def _rows(
    evidence: Evidence, sharded: list[Entry], backwards: list[Event], counts: dict[Any, bool]
) -> Iterator[_Row]:
    for entry in sharded:
        here = counts[entry.param]
        for look in evidence.looks_at(entry):
            for amount in (look.gradient, look.accumulated, look.value):
                yield _row(amount, here)
            for phase in PHASES:
                yield _row(look.changes.get(phase), here)
            moved = bool(look.changes)
            yield [float(look.back_at_start), float(moved and not look.back_at_start), 0, 0, 0]
    for event in backwards:
        for entry in sharded:
            yield _row(event.arrived.get(entry.param), counts[entry.param])
        cleared = {id(param) for param in event.details.get("cleared_before", ())}
        for entry in sharded:
            yield [float(id(entry.param) in cleared), 1.0, 0.0, 0.0, -math.inf]


def _all_say(row: _Row) -> bool:
    """Whether each rank saw it; the gradient of an empty part looks cleared at any time."""
    return row[0] == row[1]


def _cleared_wholes(event: Event) -> tuple[Tensor, ...]:
    return tuple(p for p in event.details.get("cleared_before", ()) if not is_dtensor(p))


def _row(amount: Amount | None, counts: bool) -> _Row:
    if amount is None:
        return _ABSENT
    if not counts:
        return [1.0, 0.0, 0.0, 0.0, -math.inf]
    return [1.0, amount.norm**2, amount.nonfinite, amount.count, amount.absmax]


def _merge(rows: list[_Row], device: torch.device) -> list[_Row]:
    kind = torch.float32 if device.type == "mps" else torch.float64
    table = torch.tensor(rows, dtype=kind, device=device).view(-1, 5)
    packed = torch.cat([table[:, :4].reshape(-1), table[:, 4]])
    reduce_over([None], packed, 4 * len(rows))
    sums, largest = packed[: 4 * len(rows)].view(-1, 4), packed[4 * len(rows) :, None]
    merged: list[_Row] = torch.cat([sums, largest], dim=1).tolist()
    return merged


def _amount(row: _Row) -> Amount | None:
    present, squares, nonfinite, count, absmax = row
    if not present:
        return None
    # NaN is a change that was seen by its checksum only.
    largest = absmax if absmax > -math.inf else 0.0
    return Amount(math.sqrt(squares), largest, round(nonfinite), round(count))


def _look(look: Look, merged: Iterator[_Row]) -> Look:
    gradient, accumulated, value = (_amount(next(merged)) for _ in range(3))
    changes: dict[Phase, Amount] = {}
    for phase in PHASES:
        amount = _amount(next(merged))
        if amount is not None:
            changes[phase] = amount
    back, elsewhere, *_ = next(merged)
    return replace(
        look,
        gradient=gradient,
        accumulated=accumulated,
        value=value,
        changes=changes,
        back_at_start=bool(back) and not elsewhere,
    )


def _wholes(
    values: Mapping[Tensor, Tensor], sharded: list[Entry], budget: int
) -> dict[Tensor, Tensor]:
    kept = dict(values)
    for entry in sharded:
        part = kept.pop(entry.param, None)
        size = entry.param.numel() * entry.param.element_size()
        if size <= budget and _all_have(part, entry.param):
            budget -= size
            kept[entry.param] = whole_of(cast(Tensor, part), entry.param)
    return kept


def _all_have(part: Tensor | None, param: Tensor) -> bool:
    """Whether every rank kept its part: one with a larger part may have run out of memory."""
    lacking = torch.tensor([float(part is None)], device=local(param).device)
    torch.distributed.all_reduce(lacking)
    return not bool(lacking)
