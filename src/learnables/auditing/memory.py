"""Remember everything an audit can reach, and put it back bit for bit.

Containers and instances are remembered shallowly, one by one, so that identities come back too;
tensors by the bytes of their storage, so that views and shared memory come back as they were.
"""

import io
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables._torch import is_uninitialised, parts_of, storage_key
from learnables.auditing.reach import LARGEST_CONTAINER, Found, has_open_dict, reach

BUDGET = 4 << 30
_REGISTRIES = ("_parameters", "_buffers", "_modules")  # nobody types these


class Memory:
    """The state of everything below some roots at the moment it was made.

    Args:
        roots: Name → model, optimizer, function, state dict, anything.
        budget: Bytes that may be copied for tensors that belong to no model and no optimizer
            (data sets in closures); larger ones are only checked, and listed if they changed.
    """

    def __init__(self, roots: dict[str, Any], budget: int = BUDGET) -> None:
        self._undo: list[Callable[[], None]] = []
        self._tensors: dict[int, _Tensor] = {}
        self._storages: dict[tuple[str, int], _Storage] = {}
        self._unchecked: list[Callable[[], str | None]] = []
        self._lazy: dict[int, Callable[[], str | None]] = {}
        self._budget = budget
        self._random = random_states()
        for name, root in roots.items():
            owned = isinstance(root, (nn.Module, Optimizer))
            for found in reach(root, name, internals=True):
                path = tuple(part for part in found.path if part not in _REGISTRIES)
                self._remember(replace(found, path=path), owned=owned)

    def restore(self) -> list[str]:
        """Put everything back; returns what could not be, in words.

        Containers first, then tensors, then random states: each needs the one before.
        """
        for undo in self._undo:
            undo()
        for tensor in self._tensors.values():
            tensor.restore()
        lost = [text for storage in self._storages.values() if (text := storage.restore())]
        for tensor in self._tensors.values():
            tensor.restore_grad()
        lost += [text for check in [*self._unchecked, *self._lazy.values()] if (text := check())]
        restore_random_states(self._random)
        return lost

    def _remember(self, found: Found, *, owned: bool) -> None:
        value = found.value
        if isinstance(value, Tensor):
            self._remember_tensor(value, found.name, owned=owned)
        elif isinstance(value, (dict, list, set, deque)):
            self._remember_container(value, found.name)
        elif isinstance(value, types.CellType):
            self._remember_cell(value)
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: _discard(value.set_state(state)))
        elif isinstance(value, random.Random):
            drawn = value.getstate()
            self._undo.append(lambda: value.setstate(drawn))
        elif _is_numpy(value):
            self._remember_numpy(value)
        elif isinstance(value, io.IOBase):
            self._unchecked.append(_file_check(value, found.name))
        elif isinstance(value, Iterator):
            self._remember_iterator(value, found.name)
        elif isinstance(value, nn.Module) or has_open_dict(value):
            self._undo.append(_undo_dict(vars(value)))

    def _remember_tensor(self, x: Tensor, name: str, *, owned: bool) -> None:
        if id(x) in self._tensors:
            return
        if is_uninitialised(x):
            self._lazy.setdefault(id(x), _lazy_check(x, name))
            return
        self._tensors[id(x)] = _Tensor(x)
        for part in parts_of(x):
            key = storage_key(part)
            if part.device.type != "meta" and key not in self._storages:
                size = part.untyped_storage().nbytes()
                copied = owned or size <= self._budget
                if copied and not owned:
                    self._budget -= size
                self._storages[key] = _Storage(part, name, copied=copied)
        if x.is_leaf and x.grad is not None:
            self._remember_tensor(x.grad, f"{name}.grad", owned=owned)

    def _remember_container(self, value: Any, name: str) -> None:
        if len(value) > LARGEST_CONTAINER:
            size = len(value)
            self._unchecked.append(
                lambda: None if len(value) == size else f"{name}: {len(value) - size:+d} items"
            )
        elif isinstance(value, dict):
            self._undo.append(_undo_dict(value))
        else:
            before = list(value)

            def undo() -> None:
                if len(before) != len(value) or any(
                    a is not b for a, b in zip(before, value, strict=True)
                ):
                    value.clear()
                    (value.update if isinstance(value, set) else value.extend)(before)

            self._undo.append(undo)

    def _remember_cell(self, cell: types.CellType) -> None:
        try:
            contents = cell.cell_contents
        except ValueError:  # empty
            return

        def undo() -> None:
            if cell.cell_contents is not contents:
                cell.cell_contents = contents

        self._undo.append(undo)

    def _remember_numpy(self, value: Any) -> None:
        if hasattr(value, "bit_generator"):
            state = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", state))
        elif hasattr(value, "get_state"):
            drawn = value.get_state()
            self._undo.append(lambda: value.set_state(drawn))
        elif value.nbytes <= self._budget and value.flags.writeable:
            self._budget -= value.nbytes
            copy = value.copy()
            self._undo.append(lambda: value.__setitem__(..., copy))

    def _remember_iterator(self, value: Iterator[Any], name: str) -> None:
        if isinstance(value, types.GeneratorType):
            at = value.gi_frame.f_lasti if value.gi_frame else None

            def moved() -> str | None:
                now = value.gi_frame.f_lasti if value.gi_frame else None
                return None if now == at else f"{name}: a generator that was advanced"

            self._unchecked.append(moved)
            return
        kind = type(value).__qualname__
        hint = getattr(value, "__length_hint__", None)
        if hint is None:
            self._unchecked.append(lambda: f"{name}: a {kind}; whatever it gave is consumed")
            return
        left = hint()
        self._unchecked.append(
            lambda: None if hint() == left else f"{name}: a {kind}, {left - hint()} items consumed"
        )


class _Tensor:
    """One tensor object: which memory it looks at, its gradient, its flags."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.alias = x.detach() if x.layout is torch.strided else None
        self.requires_grad = x.requires_grad
        self.grad = x.grad if x.is_leaf else None

    def restore(self) -> None:
        x, alias = self.x, self.alias
        if alias is not None and _geometry(x) != _geometry(alias):
            x.data = alias
        if x.is_leaf and x.requires_grad != self.requires_grad:
            x.requires_grad_(self.requires_grad)

    def restore_grad(self) -> None:
        if self.x.is_leaf and self.x.grad is not self.grad:
            self.x.grad = self.grad


class _Storage:
    """The bytes of one storage, or, beyond the budget, only a checksum of them."""

    def __init__(self, x: Tensor, name: str, *, copied: bool) -> None:
        self.name = name
        self.storage = x.untyped_storage()
        self.size = self.storage.nbytes()
        self.copy = _copy_of(self.storage) if copied else None
        self.sum = None if copied else checksum(self.storage)

    def restore(self) -> str | None:
        if self.copy is not None:
            if self.storage.nbytes() != self.size:
                self.storage.resize_(self.size)
            self.storage.copy_(self.copy)
            return None
        if checksum(self.storage) == self.sum:
            return None
        return f"{self.name}: {self.size / 1e9:.1f} GB changed; too large to be remembered"


def _copy_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copy: torch.UntypedStorage = torch.UntypedStorage(storage.nbytes())  # type: ignore[no-untyped-call]
    return copy.copy_(storage)


def _discard(_: object) -> None:
    """Make a call that returns something fit where None is expected."""


def checksum(storage: torch.UntypedStorage) -> int:
    """A position-dependent 64-bit sum over the bytes; equal bytes give equal sums."""
    raw = torch.tensor([], dtype=torch.uint8, device=storage.device).set_(storage)
    words = raw[: raw.numel() // 8 * 8].view(torch.int64)
    total = int(raw[words.numel() * 8 :].sum())
    for i, chunk in enumerate(torch.split(words, 1 << 22)):
        place = torch.arange(chunk.numel(), device=chunk.device, dtype=torch.int64) * 2 + 1
        total = (total * 31 + int((chunk * place).sum()) + i) & 0xFFFFFFFFFFFFFFFF
    return total


def _geometry(x: Tensor) -> tuple[Any, ...]:
    return (storage_key(x), x.shape, x.stride(), x.storage_offset(), x.dtype, x.device)


def _undo_dict(live: dict[Any, Any]) -> Callable[[], None]:
    before = dict(live)

    def undo() -> None:
        same = len(before) == len(live) and all(
            a is b and live[a] is before[a] for a, b in zip(before, live, strict=True)
        )
        if not same:
            live.clear()
            live.update(before)

    return undo


def _lazy_check(x: Tensor, name: str) -> Callable[[], str | None]:
    def check() -> str | None:
        return None if is_uninitialised(x) else f"{name}: was uninitialised, now has a shape"

    return check


def _file_check(file: io.IOBase, name: str) -> Callable[[], str | None]:
    def position() -> int | None:
        try:
            return file.tell()
        except (OSError, ValueError):
            return None

    at = position()
    return lambda: None if position() == at else f"{name}: a file, read or written"


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState)
    )


def random_states() -> dict[str, Any]:
    """The global random states of torch on every device in use, numpy and Python."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set what `random_states` returned."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
