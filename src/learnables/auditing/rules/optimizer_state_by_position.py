"""LRN803: loaded optimizer state belongs to the parameter it was saved for."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN803", needs=Stage.OPTIMIZER)
def optimizer_state_by_position(evidence: Evidence) -> Iterator[Finding]:
    """Moments that were saved for one parameter and loaded into another.

    ## Why it matters

    `Optimizer.load_state_dict` matches by position. A model whose parameters stand in another
    order, or that has one more in front, gets the moments of its neighbours, as long as the shapes
    allow it, without a word. `ln.save_checkpoint` keeps optimizer state by name.

    ## Example

    ```python
    old = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    before = torch.optim.Adam(old.parameters())
    (old["b"](old["a"](torch.ones(2, 4)))).square().sum().backward()
    before.step()
    saved = before.state_dict()

    model = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(saved)
    names = [name for name, _ in old.named_parameters()]
    loaded = ln.Loaded(optimizer_state=saved, param_names=names)
    step = None
    ```

    ## Use instead

    ```python
    old = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    before = torch.optim.Adam(old.parameters())
    (old["b"](old["a"](torch.ones(2, 4)))).square().sum().backward()
    before.step()
    saved = before.state_dict()

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(saved)
    names = [name for name, _ in old.named_parameters()]
    loaded = ln.Loaded(optimizer_state=saved, param_names=names)
    step = None
    ```

    ## When to silence it

    A parameter was renamed and kept its place.
    """
    what = "loaded=ln.Loaded(optimizer_state=…, param_names=…)"
    loaded = needed(evidence.loaded, what)
    state = needed(loaded.optimizer_state, what)
    names = list(needed(loaded.param_names, what))
    saved: Mapping[Any, Any] = state.get("state", {})
    order = [i for group in state.get("param_groups", ()) for i in group["params"]]
    of_name = dict(zip(names, order, strict=False))
    for entry in evidence.entries:
        mine = next((of_name[n] for n in (*entry.names, *entry.plain_names) if n in of_name), None)
        for seen in evidence.optimizers:
            now = seen.optimizer.state.get(entry.param)
            if not now:
                continue
            from_index = _source(now, saved)
            if mine is not None and _same(now, saved.get(mine, {})):
                continue
            if from_index is not None and from_index != mine:
                index = order.index(from_index)
                yield Finding(
                    what="a parameter was given the optimizer state of another",
                    where=list(entry.names),
                    found=f"the state saved for {names[index] if index < len(names) else index!r}",
                    wanted=f"the state saved for {entry.name!r}"
                    if mine is not None
                    else "no state: the checkpoint has none for it",
                )


def _source(now: Mapping[str, Any], saved: Mapping[Any, Any]) -> Any:
    return next((index for index, state in saved.items() if _same(now, state)), None)


def _same(now: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Equal in every tensor that is not a mere step count."""
    compared = 0
    for key, value in saved.items():
        if not isinstance(value, Tensor) or value.numel() < 2:
            continue
        mine = now.get(key)
        if not isinstance(mine, Tensor) or mine.shape != value.shape:
            return False
        if not torch.equal(mine.to(value), value):
            return False
        compared += 1
    return compared > 0
