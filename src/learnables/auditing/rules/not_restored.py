"""LRN801: what the checkpoint holds is what the model has."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from learnables._torch import without_wrappers
from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.entries import Entry


@rule("LRN801", needs=Stage.MODEL)
def not_restored(evidence: Evidence) -> Iterator[Finding]:
    """A parameter whose value in the checkpoint did not arrive in the model.

    ## Why it matters

    `strict=False` turns a prefix that does not match, `module.`, `model.`, `_orig_mod.`, or a
    renamed key into silence: nothing is loaded, and training starts from scratch. Loaders that
    rename `gamma` to `weight` lose every LayerScale called so.

    ## Example

    ```python
    trained, model = nn.Linear(4, 4), nn.Linear(4, 4)
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    report = model.load_state_dict(state, strict=False)
    loaded = ln.Loaded(state_dict=state, report=report)
    ```

    ## Use instead

    ```python
    trained, model = nn.Linear(4, 4), nn.Linear(4, 4)
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    report = model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    loaded = ln.Loaded(state_dict=state, report=report)
    ```

    ## When to silence it

    The parameter was initialised anew on purpose, a classifier for other classes for instance.
    """
    state = checkpoint(evidence)
    for entry in evidence.entries_of_model():
        value = evidence.first.get(entry.param)
        key = counterpart(entry, state)
        if value is None or key is None or state[key].shape != value.shape:
            continue
        saved = state[key].to(value.device)
        rounding = max(_eps(saved.dtype), _eps(value.dtype))
        if not torch.allclose(value.double(), saved.double(), rtol=4 * rounding, atol=1e-12):
            gap = float((value.double() - saved.double()).abs().max())
            exact = key in entry.plain_names or key in entry.names
            yield Finding(
                what="a value of the checkpoint did not arrive in the model",
                where=list(entry.names),
                found=f"differs from {key!r} of the checkpoint by up to {gap:.2g}"
                + ("" if exact else "; the names do not match"),
                wanted="the value of the checkpoint",
            )


def checkpoint(evidence: Evidence) -> dict[str, Tensor]:
    """The tensors of the checkpoint that was loaded; the rule is skipped where nobody has it."""
    loaded = needed(evidence.loaded, "loaded=ln.Loaded(state_dict=…)")
    return tensors(needed(loaded.state_dict, "loaded=ln.Loaded(state_dict=…)"))


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict that may be nested one level, as trainers write it."""
    for inner in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(inner), Mapping):
            state = state[inner]
    return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}


def counterpart(entry: Entry, state: Mapping[str, Tensor]) -> str | None:
    """The key of ``state`` that means ``entry``: equal, or equal up to one prefix, if unique."""
    for name in (*entry.names, *entry.plain_names):
        if name in state:
            return name
    for name in entry.plain_names:
        same = [
            key
            for key in state
            if (bare := without_wrappers(key)) == name
            or bare.endswith(f".{name}")
            or name.endswith(f".{bare}")
        ]
        if len(same) == 1:
            return same[0]
    return None


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
