"""How deep in a model a parameter lies, for learning rates that decay toward the input."""

from collections.abc import Mapping, Sequence

from torch import nn

from learnables.entries import Entry
from learnables.policy.kinds import kind_of

_INPUTS = frozenset({"token", "position", "prompt", "marker", "colour transform", "embedding"})


def depths(model: nn.Module, entries: Sequence[Entry]) -> tuple[Mapping[Entry, int], int]:
    """Depth of each entry, and the greatest depth there is.

    A block is a member of a uniform stack: a `ModuleList`, `Sequential` or other module whose
    children are numbered and of one class, at least two of them; stacks in stacks count too, as in
    Swin. What is registered before the first block (patches, tokens, positions) has depth 0, the
    blocks follow one by one, and everything behind them (norm, head) has the greatest depth. What
    the model owns itself is an input where its kind says so, and else belongs to the end.
    """
    stacks = {name for name, module in model.named_modules() if _is_stack(module)}
    found: dict[Entry, int] = {}
    blocks: dict[tuple[str, ...], int] = {}
    for entry in entries:
        block = _block_of(entry.name, stacks)
        if block:
            found[entry] = blocks.setdefault(block, len(blocks) + 1)
        elif "." not in entry.plain_names[0] and kind_of(entry).name not in _INPUTS:
            found[entry] = -1
        else:
            found[entry] = -1 if blocks and not _is_of_stack(entry.name, stacks) else 0
    last = len(blocks) + 1 if blocks else 0
    return {entry: last if depth == -1 else depth for entry, depth in found.items()}, last


def _is_stack(module: nn.Module) -> bool:
    children = list(module.named_children())
    numbered = all(name.isdigit() for name, _ in children)
    return len(children) > 1 and numbered and len({type(child) for _, child in children}) == 1


def _block_of(name: str, stacks: set[str]) -> tuple[str, ...]:
    """The paths of all blocks around a parameter, outermost first; of nested ones the inner too."""
    parts = name.split(".")
    return tuple(
        ".".join(parts[: i + 1])
        for i, part in enumerate(parts[:-1])
        if part.isdigit() and ".".join(parts[:i]) in stacks
    )


def _is_of_stack(name: str, stacks: set[str]) -> bool:
    """Whether the stack itself owns the parameter, as a prompt that is put on ``blocks``."""
    return name.rpartition(".")[0] in stacks
