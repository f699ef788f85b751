"""How deep in a model a parameter lies, for learning rates that decay toward the input."""

from collections.abc import Mapping, Sequence

from torch import nn

from learnables.entries import Entry
from learnables.policy.kinds import kind_of

_INPUTS = frozenset({"token", "position", "prompt", "marker", "colour transform", "embedding"})


def depths(model: nn.Module, entries: Sequence[Entry]) -> tuple[Mapping[Entry, int], int]:
    """Depth of each entry, and the greatest depth there is.

    A block is a member of a uniform stack: a module whose children are numbered (``0``, ``1``, … or
    ``b1``, ``b2``, …) and of one class, at least two of them; stacks in stacks count too, as in
    Swin. What is registered before the first block (patches, tokens, positions) has depth 0, the
    blocks follow one by one, what lies between two has the depth of the former, and everything
    behind them (norm, head) has the greatest depth. What the model owns itself is an input where
    its kind says so, and else belongs to the end.

    The greatest depth is 0 where the model has no such stack.
    """
    stacks = {name for name, module in model.named_modules() if _is_stack(module)}
    found: dict[Entry, int] = {}
    blocks: dict[tuple[str, ...], int] = {}
    outside: list[Entry] = []
    for entry in entries:
        block = _block_of(entry.name, stacks)
        if block:
            found[entry] = blocks.setdefault(block, len(blocks) + 1)
        else:
            found[entry] = len(blocks)
            outside.append(entry)
    last = len(blocks) + 1 if blocks else 0
    for entry in outside:
        is_own = "." not in entry.plain_names[0] and kind_of(entry).name not in _INPUTS
        is_behind = found[entry] == len(blocks) and not _is_of_stack(entry.name, stacks)
        if blocks and (is_own or is_behind):
            found[entry] = last
    return found, last


def _is_stack(module: nn.Module) -> bool:
    children = list(module.named_children())
    prefixes = {name.rstrip("0123456789") for name, _ in children}
    numbered = len(prefixes) == 1 and all(name[-1:].isdigit() for name, _ in children)
    return len(children) > 1 and numbered and len({type(child) for _, child in children}) == 1


def _block_of(name: str, stacks: set[str]) -> tuple[str, ...]:
    """The paths of all blocks around a parameter, outermost first; of nested ones the inner too."""
    parts = name.split(".")
    return tuple(
        ".".join(parts[: i + 1])
        for i, part in enumerate(parts[:-1])
        if part[-1:].isdigit() and ".".join(parts[:i]) in stacks
    )


def _is_of_stack(name: str, stacks: set[str]) -> bool:
    """Whether the stack itself owns the parameter, as a prompt that is put on ``blocks``."""
    return name.rpartition(".")[0] in stacks
