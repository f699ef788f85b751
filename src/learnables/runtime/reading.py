"""Read the tensors of a file, whoever wrote it, without running anything that is in it."""

import json
import pickle
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from learnables._torch import storage_key
from learnables.errors import CheckpointError
from learnables.runtime.checkpoint import crc32, read_checkpoint
from learnables.runtime.untrusted import (
    GLANCE,
    header_text,
    instead_of_a_file,
    is_sealed,
    looks_like,
)

DELTA = "learnables_delta"
"""Key of the header under which a delta says what went where; see `ln.save_delta`."""

# Where training programs put a model's state dict; the first of them that is there counts.
_HELD_AT = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
    "ema",
)
_UNPACKED = 64 << 20  # bytes from which on an archive must not be a hundred times what lies there
_RATIO = 100


@dataclass(frozen=True)
class StateFile:
    """The named tensors of one file.

    Attributes:
        path: The file.
        kind: Who wrote it: ``"ln.save_checkpoint"``, ``"ln.save_delta"``, ``"safetensors"`` or
            ``"torch.save"``.
        state: Name in the file → tensor, on the CPU.
        ties: Name → the earlier name that has the same memory; a file of bare safetensors has none.
        about: What else the file says of itself, in words: step, where the state dict lay.
        added: What a delta adds to a model: names of the submodules.
    """

    path: Path
    kind: str
    state: dict[str, Tensor]
    ties: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()


def read_state(path: str | Path) -> StateFile:
    """Read the state dict of a file: of `ln.save_checkpoint`, any safetensors, or `torch.save`.

    A file of ``torch.save`` is read with ``weights_only=True``; whatever would have to be executed
    is refused.

    Raises:
        CheckpointError: There is no such file, it is none of these, damaged or hostile, or holds no
            named tensors.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "last.pt"
        >>> torch.save({"epoch": 3, "state_dict": nn.Linear(2, 1).state_dict()}, path)
        >>> file = read_state(path)
        >>> file.kind, list(file.state), file.about
        ('torch.save', ['weight', 'bias'], {'read from': "the key 'state_dict'", 'epoch': '3'})

    Cost:
        The file once in host memory.
    """  # noqa: DOC501 - _stranger and _damaged make it
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            "there is no checkpoint",
            where=str(path),
            found=instead_of_a_file(path),
            wanted="a safetensors or torch.save file",
        )
    with path.open("rb") as file:
        front = file.read(GLANCE)
    magic = front[:9]
    # The length of a safetensors header may begin with the byte of a pickle; JSON follows on it.
    says_length = int.from_bytes(magic[:8], "little") <= path.stat().st_size - 8
    is_safetensors = says_length and magic.endswith(b"{")
    if magic.startswith((b"PK\x03\x04", b"\x80")) and not is_safetensors:
        return _read_torch(path)
    if len(magic) == 9 and not magic.endswith(b"{"):  # no safetensors, not even a part of one
        raise _stranger(path, looks_like(front))
    try:
        header = header_text(path)
    except UnicodeDecodeError as error:
        raise _damaged(path, str(error)) from None
    if '"learnables"' in header[:64]:
        return _read_ours(path)
    return _read_safetensors(path)


def _read_ours(path: Path) -> StateFile:
    checkpoint = read_checkpoint(path)
    about = {} if checkpoint.step is None else {"step": str(checkpoint.step)}
    state = {name: x for name, x in checkpoint.model.items() if isinstance(x, Tensor)}
    return StateFile(path, "ln.save_checkpoint", state, dict(checkpoint.ties), about)


def _read_safetensors(path: Path) -> StateFile:
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if DELTA in about:
        told, added = _of_delta(path, about[DELTA])
        verify_delta(path, about, state)
        return StateFile(path, "ln.save_delta", _some(path, state), {}, told, added)
    return StateFile(path, "safetensors", _some(path, state), {}, about)


def verify_delta(path: Path, told: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Compare what a delta holds with the checksums in its header.

    Args:
        path: The file.
        told: The text under each key of its header.
        tensors: Its tensors, on the CPU.

    Raises:
        CheckpointError: Some bytes are not those that were written.
    """  # noqa: DOC501 - _damaged makes it
    if not is_sealed(told, DELTA):
        raise _damaged(path, "the checksum of its header is wrong")
    if json.loads(told[DELTA]).get("crc32") != {name: crc32(x) for name, x in tensors.items()}:
        raise _damaged(path, "the checksum of a tensor is wrong")


def _of_delta(path: Path, text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    # What the header says, in words, and the names of what the delta adds.
    try:
        meta = json.loads(text)
        told = {"format": str(meta["format"]), "learnables": str(meta.get("learnables", "?"))}
        for graft in meta["grafts"]:
            at = [str(place) for place in graft["at"]]
            places = at[0] if len(at) == 1 else f"{at[0]} … {at[-1]} ({len(at)} modules)"
            how = f"{graft['component']['class']} at {places or 'the whole model'!r}"
            told[f"graft {graft['name']}"] = f"{how}, where={graft['where']!r}"
        names, values = (int(meta["base"][part]) for part in ("names", "values"))
        told["base"] = f"names and shapes {names:08x}, values {values:08x}"
        return told, tuple(str(graft["name"]) for graft in meta["grafts"])
    except (LookupError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise _damaged(path, f"its header says nothing right about grafts: {error}") from error


def _read_torch(path: Path) -> StateFile:
    _refuse_others_and_bombs(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an unusual pickle protocol
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the file could only be read by executing what is in it",
            where=str(path),
            found=_reason(error),
            wanted="tensors, numbers, strings and containers of them",
            mend="safetensors.torch.save_file(model.state_dict(), 'model.safetensors'), where the "
            "file comes from",
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, _reason(error)) from None
    state, about = _found_in(held)
    ties: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, x in state.items():
        if x.layout is torch.strided and x.numel():
            same = (storage_key(x), x.storage_offset(), x.shape, x.stride(), x.dtype)
            other = first.setdefault(same, name)
            if other != name:
                ties[name] = other
    return StateFile(path, "torch.save", _some(path, state), ties, about)


def _refuse_others_and_bombs(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if not any(part.filename.endswith("data.pkl") for part in parts):
        raise _stranger(path, "a zip archive, without what torch.save puts into one")
    whole = sum(part.file_size for part in parts)
    size = path.stat().st_size
    if whole > max(_UNPACKED, _RATIO * size):
        raise _damaged(path, f"{size:,} bytes that claim to be {whole:,}")


def _found_in(held: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict in what ``torch.save`` was given, and the plain facts beside it."""
    if not isinstance(held, Mapping):
        return {}, {}
    about = {
        str(key): str(value)
        for key, value in held.items()
        if isinstance(value, (int, float, str, bool)) and len(str(value)) < 80
    }
    own = _tensors(held)
    for key in _HELD_AT:
        inside = held.get(key)
        if not own and isinstance(inside, Mapping) and (found := _tensors(inside)):
            return found, {"read from": f"the key {key!r}", **about}
    if not own:
        for key, inside in held.items():
            own |= {f"{key}.{name}": x for name, x in _tensors(inside).items()}
    return own, about


def _tensors(held: Any) -> dict[str, Tensor]:
    if not isinstance(held, Mapping):
        return {}
    return {str(key): x.detach() for key, x in held.items() if isinstance(x, Tensor)}


def _some(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not state:
        raise CheckpointError(
            "the file holds no named tensors",
            where=str(path),
            wanted="a state dict, or a dict that has one under 'state_dict' or 'model'",
        )
    return state


def _stranger(path: Path, kind: str) -> CheckpointError:
    return CheckpointError(
        "this file is no checkpoint",
        where=str(path),
        found=kind or f"{path.stat().st_size:,} bytes of no kind that is known here",
        wanted="a file of ln.save_checkpoint, of ln.save_delta, of safetensors or of torch.save",
        mend=f"learnables run {shlex.quote(str(path))}" if path.suffix == ".py" else "",
    )


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "the file is damaged, or no checkpoint",
        where=str(path),
        found=found,
        wanted="a file of ln.save_checkpoint, of safetensors or of torch.save",
    )


def _reason(error: BaseException) -> str:
    """The line of an error that says why; torch's advice to read the file in spite of it is cut."""
    text = str(error).strip()
    for line in text.splitlines():
        if "WeightsUnpickler error:" in line:
            return line.partition("WeightsUnpickler error:")[2].strip().split(". ")[0]
    return text.splitlines()[0] if text else type(error).__name__
