"""LRN806: a file calls a parameter what the model calls it."""

import copy
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule
from learnables.auditing.rules.not_restored import counterpart, tensors

KEEPS_NAMES = "_learnables_keeps_names"
"""True on a model whose ``save_pretrained`` sees to its names itself."""
_ALIKE = 0.5


@rule("LRN806", needs=Stage.MODEL)
def renamed_in_the_file(evidence: Evidence) -> Iterator[Finding]:
    """A parameter whose file has it under another name, so that loading passes it by.

    ## Why it matters

    Libraries rewrite names to keep old checkpoints readable, by patterns that meet other people's
    names too: `gamma` became `weight` and `beta` became `bias`; `save_pretrained` of a ViT in
    transformers 5 writes `layers_scale` as `encoder.layer.scale`. Loading finds the one missing,
    the other unexpected, and says so in a line among many.

    ## Example

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.ls_gamma = nn.Parameter(torch.full((4,), 0.1))

    model = Net()
    state = {key.replace("gamma", "weight"): value for key, value in Net().state_dict().items()}
    report = model.load_state_dict(state, strict=False)
    loaded = ln.Loaded(state_dict=state, report=report)
    ```

    ## Use instead

    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.ls_scale = nn.Parameter(torch.full((4,), 0.1))

    model = Net()
    state = {key.replace("gamma", "weight"): value for key, value in Net().state_dict().items()}
    report = model.load_state_dict(state)
    loaded = ln.Loaded(state_dict=state, report=report)
    ```

    With transformers: `class Net(learnables.integrations.transformers.Declared, ViTModel)`.

    ## When to silence it

    Two parameters of one shape have similar names by chance.
    """
    model: Any = evidence.model
    has_own_names = hasattr(model, "save_pretrained") and _library() is not None
    has_own_names = has_own_names and not getattr(model, KEEPS_NAMES, False)
    loaded = evidence.loaded
    state = tensors(loaded.state_dict) if loaded and loaded.state_dict is not None else None
    needed(state is not None or has_own_names or None, "loaded=ln.Loaded(state_dict=…)")
    entries = evidence.entries_of_model()
    if state is not None:
        keys = {entry: counterpart(entry, state) for entry in entries}
        others = [key for key in state if key not in set(keys.values())]
        for entry in (entry for entry, key in keys.items() if key is None):
            of_shape = [key for key in others if state[key].shape == entry.shape]
            likeness = {key: _likeness(key, entry.name) for key in of_shape}
            most = max(likeness.values(), default=0.0)
            alike = [key for key, much in likeness.items() if much == most]
            if most >= _ALIKE and len(alike) == 1:
                yield Finding(
                    what="the checkpoint has a parameter under another name",
                    where=list(entry.names),
                    found=f"{alike[0]!r} in the file",
                    wanted=f"{entry.name!r}",
                )
    if has_own_names:
        own = [entry for entry in entries if evidence.library_of(entry) != "transformers"]
        lost = names_lost_by_saving(model, [entry.name for entry in own])
        for entry in own:
            if entry.name in lost:
                yield Finding(
                    what="the name of a parameter does not survive save_pretrained",
                    where=list(entry.names),
                    found=f"written as {lost[entry.name]!r}, and not found again",
                    wanted="a name that the library's patterns leave alone",
                )


def _likeness(one: str, other: str) -> float:
    """Share of the words that two names have in common; "weight" and "bias" say nothing."""
    words = [re.split(r"[._]", name) for name in (one, other)]
    both = set(words[0]) & set(words[1]) - {"weight", "bias"}
    return len(both) / max(map(len, words))


def names_lost_by_saving(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """Parameter → its name in the file of ``save_pretrained``, where loading loses it.

    Args:
        model: A ``PreTrainedModel`` of transformers.
        names: Which parameters; all when not given.

    Returns:
        An empty dict where every name survives.
    """
    names = [name for name, _ in model.named_parameters()] if names is None else list(names)
    if not names:
        return {}
    forth = _conversions(model)
    back = [transform.reverse_transform() for transform in reversed(forth)]
    lost = {}
    for name in names:
        if any(_renamed(name, [c]) != name for c in back if _is_a(c, "WeightConverter")):
            continue
        saved = _renamed(name, [c for c in back if _is_a(c, "WeightRenaming")])
        if _renamed(saved, [c for c in forth if _is_a(c, "WeightRenaming")]) != name:
            lost[name] = saved
    return lost


def as_loaded(model: nn.Module, name: str) -> str:
    """What ``from_pretrained`` takes a name in a file for."""
    return _renamed(name, [c for c in _conversions(model) if _is_a(c, "WeightRenaming")])


def _library() -> Any:
    """The module of transformers that knows the patterns; not loaded where nobody needs it."""
    return sys.modules.get("transformers.conversion_mapping")


def _conversions(model: Any) -> list[Any]:
    known = getattr(model, "_weight_conversions", None)
    if known is not None:  # what it was loaded with; a copy, because each notes that it was used
        return copy.deepcopy(list(known))
    make = getattr(_library(), "get_model_conversion_mapping", None)
    found = make(model, add_legacy=False) if make is not None else []
    return [c for c in found if not _is_a(c, "PrefixChange")]


def _is_a(transform: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(transform).__mro__)


def _renamed(name: str, transforms: Iterable[Any]) -> str:
    for transform in transforms:
        name = transform.rename_source_key(name)[0]
    return name
