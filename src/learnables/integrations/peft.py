"""Side by side with PEFT: parameters of one's own in a model that ``get_peft_model`` has wrapped.

PEFT freezes everything but its adapters, and saves nothing else: ``modules_to_save`` takes modules,
and the name of a bare Parameter there is accepted and does nothing.

```python
model.prompt = ln.parameter(1, 8, 768, weight_decay=False)
model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
train_declared(model)
...
save_pretrained(model, "adapter")
```
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from learnables.entries import Entry, entries
from learnables.errors import CheckpointError, SelectionError
from learnables.select import Selector, select

FILE = "learnables.safetensors"
"""Beside PEFT's own files in the folder of an adapter."""


def train_declared(model: nn.Module, selector: "Selector | None" = None) -> tuple[str, ...]:
    """Let parameters train again that PEFT froze because they are no adapters.

    Args:
        model: What ``get_peft_model`` or ``inject_adapter_in_model`` returned.
        selector: Which; when not given, all that were made by `ln.parameter` with
            ``requires_grad`` or named in an `ln.annotate`.

    Returns:
        The names of what trains now beside the adapters.

    Raises:
        SelectionError: Nothing was declared, or the selector picks nothing.
    """
    if selector is not None:
        chosen = select(entries(model), selector)
    else:
        chosen = tuple(entry for entry in entries(model) if _is_declared(entry))
    if not chosen:
        raise SelectionError(
            "no parameter of this model was declared",
            found=f"{sum(1 for _ in model.parameters())} parameters, none by ln.parameter",
            wanted="a selector, or parameters made by ln.parameter",
            mend="train_declared(model, '*prompt*')",
        )
    for entry in chosen:
        entry.param.requires_grad_(True)
    return tuple(entry.name for entry in chosen)


def save_pretrained(model: Any, folder: "str | Path", **options: Any) -> Path:
    """``model.save_pretrained`` and, beside it, everything that trains and is no adapter.

    Args:
        model: The ``PeftModel``.
        folder: Where to; made if it is not there.
        options: Handed to PEFT.

    Returns:
        The file with our part: names as in the bare model, so that another adapter can be put in.
    """
    from safetensors.torch import save_file

    model.save_pretrained(str(folder), **options)
    own = {_bare(entry.name): entry.param.detach().contiguous() for entry in _own(model)}
    path = Path(folder) / FILE
    save_file(own, path, metadata={"format": "pt"})
    return path


def load_pretrained_(model: Any, folder: "str | Path") -> tuple[str, ...]:
    """Put into ``model`` what `save_pretrained` wrote beside the adapter, and let it train.

    Args:
        model: What ``PeftModel.from_pretrained(base, folder)`` returned.
        folder: That folder.

    Returns:
        The names that were loaded.

    Raises:
        CheckpointError: There is no such file, the model lacks a parameter of it, or has another
            shape for it.
    """
    from safetensors.torch import load_file

    file = Path(folder) / FILE
    if not file.is_file():
        raise CheckpointError(
            "nothing of ours lies beside this adapter",
            where=str(file),
            wanted="a folder that save_pretrained of learnables.integrations.peft wrote",
            mend="from learnables.integrations.peft import save_pretrained; "
            f"save_pretrained(model, {str(folder)!r})",
        )
    state = load_file(file)
    there = {_bare(name): entry for entry in entries(model) for name in entry.names}
    for name, value in state.items():
        entry = there.get(name)
        if entry is None or entry.param.shape != value.shape:
            raise CheckpointError(
                "a parameter beside the adapter does not fit the model",
                where=name,
                found="no such parameter" if entry is None else f"shape {entry.shape}",
                wanted=f"shape {tuple(value.shape)}, as in {FILE}",
            )
    with torch.no_grad():
        for name, value in state.items():
            there[name].param.copy_(value)
            there[name].param.requires_grad_(True)
    return tuple(there[name].name for name in state)


def _own(model: Any) -> list[Entry]:
    """What trains, and PEFT's own state dict lacks."""
    from peft import get_peft_model_state_dict

    adapters = {value.data_ptr() for value in get_peft_model_state_dict(model).values()}
    return [e for e in entries(model) if e.trainable and e.param.data_ptr() not in adapters]


def _is_declared(entry: Entry) -> bool:
    return any(p.note.declared is not None or p.note.annotated for p in entry.places)


def _bare(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("base_model.")
