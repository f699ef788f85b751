"""LRN805: what a checkpoint lacks has been given a value."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.auditing.rules.not_restored import counterpart, tensors
from learnables.entries import Entry
from learnables.init.base import initialise_

_LOADED = "_is_hf_initialized"  # transformers marks with it what it has read from a file
_NEVER_MEANT = 1e4


@rule("LRN805", needs=Stage.MODEL)
def filled_by_nobody(evidence: Evidence) -> Iterator[Finding]:
    """A parameter that the checkpoint lacks, and that holds what lay in memory.

    ## Why it matters

    Large models are built on the meta device and get memory when the checkpoint is read. What it
    lacks is filled by the library's own initialiser, which knows the library's layers:
    `from_pretrained` of transformers leaves a bare Parameter of a subclass uninitialised, zeros one
    day and 1e36 the next.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = ln.parameter(4, init=ln.init.constant(0.5))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.prompt)

    state = nn.Linear(4, 1).state_dict(prefix="fc.")
    with torch.device("meta"):
        model = Net()
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    loaded = ln.Loaded(state_dict=state)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = ln.parameter(4, init=ln.init.constant(0.5))
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x * self.prompt)

    state = nn.Linear(4, 1).state_dict(prefix="fc.")
    with torch.device("meta"):
        model = Net()
    model.to_empty(device="cpu")
    ln.init.reset_(model, "prompt")
    model.load_state_dict(state, strict=False)
    loaded = ln.Loaded(state_dict=state)
    ```

    With transformers: `class Net(learnables.integrations.transformers.Declared, ViTModel)`.

    ## When to silence it

    The value was written after loading, and by chance it looks like memory.
    """
    absent = needed(_absent(evidence), "loaded=ln.Loaded(state_dict=…), or from_pretrained")
    for entry in absent:
        value = evidence.first.get(entry.param)
        if value is None or not value.is_floating_point() or not value.numel():
            continue
        init = next((i for p in entry.places if (i := p.note.get("init")) is not None), None)
        if init is not None:
            if not _could_be(value.cpu(), *_drawn(entry, value)):
                yield Finding(
                    what="a parameter that the checkpoint lacks does not have its initial value",
                    where=list(entry.names),
                    found=_range(value),
                    wanted=f"{init!r}, as declared",
                    mend=f"ln.init.reset_(model, {entry.name!r})",
                )
        elif _looks_like_memory(value) and not _is_filled_by_its_model(evidence.model, entry):
            yield Finding(
                what="a parameter that the checkpoint lacks was never given a value",
                where=list(entry.names),
                found=_range(value),
                wanted="a value from its constructor, an initialiser or the checkpoint",
            )


def _absent(evidence: Evidence) -> list[Entry] | None:
    """What was not read from a file; None where nothing is known to have been."""
    entries = evidence.entries_of_model()
    loaded = evidence.loaded
    if loaded is not None and loaded.state_dict is not None:
        state = tensors(loaded.state_dict)
        return [entry for entry in entries if counterpart(entry, state) is None]
    marked = [entry for entry in entries if getattr(entry.param, _LOADED, False)]
    return [entry for entry in entries if entry not in marked] if marked else None


def _drawn(entry: Entry, value: Tensor) -> tuple[Tensor, Tensor]:
    """What the declared initialiser gives, twice."""
    note = next(p.note for p in entry.places if p.note.get("init") is not None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        one, other = (nn.Parameter(torch.empty_like(value, device="cpu")) for _ in range(2))
        for param in (one, other):
            initialise_(param, note.get("init"), role=note.get("role"))
    return one.detach(), other.detach()


def _could_be(value: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether an initialiser that draws ``one`` and ``other`` could have drawn ``value``."""
    if torch.equal(one, other):
        return torch.allclose(value, one, rtol=1e-3, atol=1e-6)
    most = float(torch.maximum(one.abs(), other.abs()).max())
    return (
        bool(value.isfinite().all()) and bool(value.any()) and float(value.abs().max()) < 100 * most
    )


def _looks_like_memory(value: Tensor) -> bool:
    size = value.abs()
    odd = size[(size > 0) & (size < torch.finfo(value.dtype).smallest_normal)]
    return not bool(value.isfinite().all()) or float(size.max()) > _NEVER_MEANT or odd.numel() > 0


def _range(value: Tensor) -> str:
    return f"values from {float(value.min()):.3g} to {float(value.max()):.3g}"


def _is_filled_by_its_model(model: nn.Module, entry: Entry) -> bool:
    return any(fills(model, *_split(place.name)) for place in entry.places)


def _split(name: str) -> tuple[str, str]:
    path, _, local_name = name.rpartition(".")
    return path, local_name


def fills(model: nn.Module, path: str, local_name: str) -> bool:
    """Whether ``_init_weights`` of the model around ``path`` writes this parameter.

    Tried on a copy of the parameter's owner that holds NaN and has no children, so that nothing of
    the model itself can be written. Where that is not enough to tell, it is taken as not written.
    """
    judge: Any = None
    owner = model
    for part in ["", *path.split(".")] if path else [""]:
        owner = getattr(owner, part) if part else owner
        judge = owner if hasattr(owner, "_init_weights") else judge
    if judge is None:
        return False
    trial = copy.copy(owner)
    trial.__dict__ = {k: v for k, v in vars(owner).items() if k != _LOADED}
    trial.__dict__["_modules"] = {}
    trial.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in owner._buffers.items()
    }
    trial.__dict__["_parameters"] = {
        name: None if param is None else nn.Parameter(torch.full_like(param, math.nan))
        for name, param in owner._parameters.items()
    }
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            judge._init_weights(trial)
    except (AttributeError, KeyError):  # it looks for a child
        return False
    written = trial._parameters[local_name]
    return written is not None and not bool(written.isnan().any())
