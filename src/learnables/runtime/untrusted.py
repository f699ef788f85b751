"""A checkpoint of unknown origin, looked at before any parser is let near it.

Nothing in a checkpoint can be executed, for nothing in it is code. What is left to a hostile file
is to fill the memory or the time of whoever opens it: by a header that claims more than there is,
by text that grows when it is parsed, by a file that is mostly holes. So the first look costs no
more than reading the header, and what does not look like a header of ours goes no further.
"""

import json
import os
import re
import zlib
from codecs import getincrementaldecoder
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from learnables.errors import CheckpointError

FORMAT = 1
FOLDER_OF_SHARDS = re.compile(r"[^/\\\0]+\.shards-[0-9a-f]{16}")
FILE_OF_SHARDS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_LENGTH = 8  # bytes at the front of a safetensors file: how long its header is
GLANCE = 120  # bytes that tell text from what is none
_HEADER = 8 << 20  # a header may always be so long: about 25 000 tensors
_SHARE = 4  # of a larger file this part may be header
_PARSED = 96 << 20  # bytes that our part of the header may take once it is parsed
_ENTRY = 40  # characters: less than the shortest that safetensors can say of one tensor
_DIMS = 64  # dimensions: as many as torch has
_HOLES = 64 << 20  # from this size on a file must not be eight times larger than what it holds
_TOO_MANY_DIMS = re.compile(rf"\[(?:\s*\d+\s*,){{{_DIMS}}}")
_OPENING = '{"__metadata__":{'
_KNOWN = {  # what people take for a checkpoint, by its first bytes
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a pickle",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database, as ln.watch writes",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"#!": "a script",
}


def read_meta(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote into the header beside the tensors; checked in form.

    Raises:
        CheckpointError: There is no such file, it is damaged, hostile, too new or not ours.

    Cost:
        Reads the header only: time and memory in proportion to its length, at most 8 MiB for
        files below 32 MiB and a quarter of the file above.
    """
    if not path.is_file():  # a folder, a pipe and a device are no files
        raise CheckpointError(
            "there is no checkpoint",
            where=str(path),
            found=instead_of_a_file(path),
            wanted="a file of ln.save_checkpoint",
        )
    try:
        text = _meta_text(path, header_text(path))
        meta = json.loads(text, parse_constant=_no_number)
    except OSError as error:
        refuse(path, str(error))
    except (ValueError, RecursionError) as error:  # also text that is no UTF-8
        refuse(path, f"its header is no JSON that we write: {str(error) or 'nested too deep'}")
    _check_format(path, meta)
    return _check_form(path, meta)


def refuse(path: Path, found: str) -> NoReturn:
    """Say that the file is not as `save_checkpoint` wrote it.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(
        "the checkpoint is damaged",
        where=str(path),
        found=found,
        wanted="the bytes that ln.save_checkpoint wrote",
        mend="take an older checkpoint, or train anew",
    )


def instead_of_a_file(path: Path) -> str:
    """What is at ``path`` where no plain file is, in words."""
    return "a folder" if path.is_dir() else "no plain file" if path.exists() else "no such file"


def header_text(path: Path) -> str:
    """The header of a safetensors file, of which no more was read than such a file may have.

    Raises:
        CheckpointError: It is no such file, or claims more than there is.
    """
    status = path.stat()
    size = status.st_size
    held = getattr(status, "st_blocks", 0) * 512  # 0 where a file system does not tell
    if held and size > _HOLES and held < size / 8:
        refuse(path, f"{size:,} bytes, of which {held:,} are there: the rest are holes")
    memory = _memory()
    if memory and size > memory:
        raise CheckpointError(
            "the checkpoint is larger than the memory of this machine",
            where=str(path),
            found=f"{size:,} bytes",
            wanted=f"at most {memory:,} bytes",
            mend="load it on a larger machine, or save the model alone: ln.save_checkpoint(path, "
            "model)",
        )
    with path.open("rb") as file:
        front = file.read(_LENGTH)
        length = int.from_bytes(front, "little")
        if len(front) < _LENGTH or length > size - _LENGTH:
            kind = looks_like(front + file.read(GLANCE))
            claimed = f"a header of {length:,} bytes in a file of {size:,}"
            refuse(path, f"this looks like {kind}" if kind else claimed)
        if length > max(_HEADER, size // _SHARE):
            refuse(path, f"{length:,} of its {size:,} bytes are header")
        return file.read(length).decode("utf-8")


def looks_like(front: bytes) -> str:
    """What a file is that begins like this, in words; empty where its bytes say nothing.

    Example:
        >>> looks_like(b"import torch")
        "text, which begins with 'import torch'"
    """
    for magic, kind in _KNOWN.items():
        if front.startswith(magic):
            return kind
    try:
        text = getincrementaldecoder("utf-8")().decode(front)  # its last letter may be cut in two
    except UnicodeDecodeError:
        return ""
    if text and all(letter.isprintable() or letter in "\t\n\r\f" for letter in text):
        begins = next((line.strip() for line in text.splitlines() if line.strip()), "")
        return f"text, which begins with {begins[:40]!r}"
    return ""


def _meta_text(path: Path, header: str) -> str:
    """Our text in the header; the rest of which can only be a list of tensors.

    Raises:
        CheckpointError: It is not there, or not whole, or the rest is something else.
    """
    said: dict[str, str] = {}
    at = 0
    if header.startswith(_OPENING):
        at = len(_OPENING)
        while header[at : at + 1] == '"' and len(said) < 4:
            key, at = _string(header, at)
            if header[at : at + 2] != ':"':
                break
            said[key], at = _string(header, at + 1)
            at += header[at : at + 1] == ","
    text = said.get("learnables")
    if text is None:
        raise CheckpointError(
            "this safetensors file is no checkpoint of learnables",
            where=str(path),
            found="no header of ours",
            wanted="a file of ln.save_checkpoint",
            mend="model.load_state_dict(safetensors.torch.load_file(path))",
        )
    if header[at : at + 1] != "}":
        refuse(path, "its header says more than ours do")
    if not is_sealed(said, "learnables"):
        refuse(path, "the checksum of the header is wrong")
    tensors = header[at + 1 :]
    number = tensors.count("{")
    if number * _ENTRY > len(tensors) or tensors.count("[") > 2 * number:
        refuse(path, "its header lists tensors in less text than they take")
    if _TOO_MANY_DIMS.search(tensors):
        refuse(path, f"a tensor of more than {_DIMS} dimensions")
    json.loads("{" + tensors.removeprefix(","), object_pairs_hook=_different)
    parsed = 240 * text.count("{") + 80 * text.count("[") + 64 * text.count(",") + len(text)
    if parsed > _PARSED + 24 * len(tensors):
        refuse(path, f"its header would take {parsed:,} bytes once it is parsed")
    return text


def sealed(key: str, text: str) -> dict[str, str]:
    """What a header says under ``key``, and its checksum beside it."""
    crc = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    return {key: text, f"{key}_crc32": str(crc)}


def is_sealed(said: Mapping[str, str], key: str) -> bool:
    """Whether the checksum beside what is under ``key`` is right."""
    seal = f"{key}_crc32"
    return said.get(seal) == sealed(key, said[key])[seal]


def _string(text: str, at: int) -> tuple[str, int]:
    value, end = json.JSONDecoder().raw_decode(text, at)
    return str(value), end


def _different(pairs: list[tuple[str, object]]) -> None:
    """Nothing is kept of what is parsed; the names of one object must differ.

    Raises:
        ValueError: They do not: the parsers of this world do not agree which of the two counts.
    """
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands there twice")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _memory() -> int:
    """Bytes of physical memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def _check_format(path: Path, meta: Any) -> None:
    number = meta.get("format") if isinstance(meta, dict) else None
    if type(number) is not int or number < 1:
        refuse(path, "its header does not say which format it has")
    if number > FORMAT:
        raise CheckpointError(
            "the checkpoint was written by a newer version of learnables",
            where=str(path),
            found=f"format {number}",
            wanted=f"format ≤ {FORMAT}",
            mend="pip install -U learnables",
        )


def _check_form(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Every part is there and of its kind; what is in ``other``, ``extra`` … is for `unflatten`."""

    def part(of: Any, key: str, kind: "type | tuple[type, ...]", what: str) -> Any:
        if not isinstance(of, dict) or key not in of or not isinstance(of[key], kind):
            refuse(path, f"its header has no right {what}{key!r}")
        return of[key]

    def names(of: Any, key: str, what: str) -> None:
        found = part(of, key, (list, dict), what)
        values = found if isinstance(found, list) else found.values()
        if not all(isinstance(name, str) for name in values):
            refuse(path, f"its header has no right {what}{key!r}: not all are names")

    step = meta.get("step")
    if not (step is None or type(step) is int):
        refuse(path, "its header has no right 'step'")
    model = part(meta, "model", dict, "")
    names(model, "ties", "model: ")
    part(model, "other", dict, "model: ")
    part(model, "metadata", dict, "model: ")
    names(meta, "initial", "")
    names(meta, "complex128", "")
    part(meta, "also", dict, "")
    part(meta, "extra", dict, "")
    if not all(type(crc) is int for crc in part(meta, "crc32", dict, "").values()):
        refuse(path, "its header has no right 'crc32'")
    for name, fields in part(meta, "policy", dict, "").items():
        names({name: fields}, name, "policy: ")
    for saved in part(meta, "optimizers", list, ""):
        part(saved, "class", str, "optimizer: ")
        part(saved, "state", dict, "optimizer: ")
        for group in part(saved, "groups", list, "optimizer: "):
            names(group, "names", "group: ")
            part(group, "options", dict, "group: ")
    if "shards" in meta and not _are_shards(meta["shards"]):
        refuse(path, "its header has no right 'shards'")
    return meta


def _are_shards(said: Any) -> bool:
    """Whether a folder beside the file and files in it are named, and nothing elsewhere."""

    def numbers(of: Any) -> bool:
        return isinstance(of, list) and all(type(n) is int and n >= 0 for n in of)

    if not isinstance(said, dict) or set(said) != {"folder", "files", "tensors"}:
        return False
    files, tensors = said["files"], said["tensors"]
    return (
        isinstance(said["folder"], str)
        and FOLDER_OF_SHARDS.fullmatch(said["folder"]) is not None
        and isinstance(files, dict)
        and all(
            FILE_OF_SHARDS.fullmatch(n) and numbers(f) and len(f) == 2 for n, f in files.items()
        )
        and isinstance(tensors, dict)
        and all(
            isinstance(t, list) and len(t) == 2 and isinstance(t[0], str) and numbers(t[1])
            for t in tensors.values()
        )
    )
