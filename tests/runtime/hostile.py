"""Files that somebody hands over as a checkpoint: damaged, forged, or made to harm the reader."""

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import learnables as ln

CANARY = "executed"


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / CANARY)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """What the files are loaded into."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.start = ln.parameter(torch.randn(4), weight_decay="init")
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=0.1))
    (model(torch.ones(1, 3)).sum() + model.start.sum()).backward()
    optimizer.step()
    return model, optimizer


class Forge:
    """A whole checkpoint, taken apart; `pack` puts it together again with right checksums."""

    def __init__(self, folder: Path) -> None:
        model, optimizer = build()
        path = folder / "whole"
        ln.save_checkpoint(path, model, optimizer, step=1, extra={"note": "x"})
        self.whole = path.read_bytes()
        path.unlink()
        (length,) = struct.unpack("<Q", self.whole[:8])
        header = json.loads(self.whole[8 : 8 + length])
        self.meta = json.loads(header.pop("__metadata__")["learnables"])
        self.tensors, self.data = header, self.whole[8 + length :]

    def meta_with(self, **parts: Any) -> bytes:
        """With other values in our part of the header; None takes a part out."""
        meta = {**self.meta, **parts}
        return self.pack(meta={k: v for k, v in meta.items() if v is not None})

    def without(self, part: str) -> bytes:
        return self.pack(meta={k: v for k, v in self.meta.items() if k != part})

    def tensors_with(self, change: Callable[[dict[str, Any]], Any]) -> bytes:
        """With another list of tensors."""
        tensors = json.loads(json.dumps(self.tensors))
        changed = change(tensors)
        return self.pack(tensors=tensors if changed is None else changed)

    def pack(
        self, meta: Any = None, tensors: Any = None, text: str = "", data: Any = None
    ) -> bytes:
        text = text or json.dumps(self.meta if meta is None else meta)
        ours = {"learnables": text, "learnables_crc32": str(zlib.crc32(text.encode()))}
        listed = self.tensors if tensors is None else tensors
        rest = listed if isinstance(listed, str) else json.dumps(listed)[1:]
        header = f'{{"__metadata__":{json.dumps(ours, separators=(",", ":"))},{rest}'
        return self.raw(header.encode(), self.data if data is None else data)

    @staticmethod
    def raw(header: bytes, data: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    def flattened(self, value: Any) -> bytes:
        """With a value in ``extra`` that has to be taken apart."""
        return self.meta_with(extra={"x": value})


def _pickles(folder: Path) -> Iterator[tuple[str, bytes]]:
    evil = Evil(folder)
    for protocol in (0, 2, 4, 5):
        yield f"a pickle of protocol {protocol}", pickle.dumps(evil, protocol)
    for name, zipped in (("torch.save", True), ("torch.save, old format", False)):
        buffer = io.BytesIO()
        torch.save({"weight": evil}, buffer, _use_new_zipfile_serialization=zipped)
        yield name, buffer.getvalue()
    yield "a pickle behind a length", Forge.raw(pickle.dumps(evil))
    array = io.BytesIO()
    np.save(array, np.array([evil], dtype=object), allow_pickle=True)
    yield "a numpy file of objects", array.getvalue()


def _archives() -> Iterator[tuple[str, bytes]]:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50 << 20))
        archive.writestr("../../escaped", b"x")
    yield "a zip bomb", bomb.getvalue()
    yield "a gzip bomb", gzip.compress(bytes(50 << 20))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../escaped"))
    yield "a tar with a path upwards", tar.getvalue()


def _fronts(forge: Forge) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "seven bytes", b"1234567"
    yield "a length and nothing", struct.pack("<Q", 100)
    yield "a length of 0", struct.pack("<Q", 0) + forge.data
    yield "a length of 2^63", struct.pack("<Q", 1 << 63) + forge.data
    yield "a length of 2^64 - 1", b"\xff" * 8 + forge.data
    yield "a length one too long", struct.pack("<Q", len(forge.whole) - 7) + forge.whole[8:]
    yield "text", b"hello, this is no checkpoint at all"
    yield "a script", b"#!/bin/sh\ntouch executed\n"
    yield "noise", random.Random(0).randbytes(5000)
    yield "JSON without a length", json.dumps(forge.meta).encode()
    yield "half a header", forge.whole[:200]
    yield "half its data", forge.whole[: -len(forge.data) // 2]
    yield "one byte too few", forge.whole[:-1]
    yield "one byte too many", forge.whole + b"\0"
    yield "another checkpoint behind it", forge.whole + forge.whole
    yield "a header that is no UTF-8", Forge.raw(b'{"__metadata__":{"\xff\xfe":"x"}}')
    yield "a header in UTF-16", Forge.raw('{"__metadata__":{}}'.encode("utf-16"))
    yield "a header of zeros", Forge.raw(bytes(4000))
    yield "a header that is a list", Forge.raw(b"[1,2,3]")


def _tensors(forge: Forge) -> Iterator[tuple[str, bytes]]:
    def entry(**parts: Any) -> Callable[[dict[str, Any]], None]:
        return lambda tensors: tensors["weight"].update(parts)

    offsets = forge.tensors["weight"]["data_offsets"]
    for name, value in {
        "offsets that overlap": [max(0, offsets[0] - 8), offsets[1] - 8],
        "offsets in reverse": offsets[::-1],
        "offsets behind the end": [len(forge.data), len(forge.data) + 24],
        "negative offsets": [-24, 0],
        "offsets that are fractions": [0.0, 24.5],
        "offsets that are no numbers": [float("nan"), float("nan")],
        "offsets beyond 64 bits": [0, 1 << 70],
        "three offsets": [*offsets, 9],
    }.items():
        yield name, forge.tensors_with(entry(data_offsets=value))
    for name, shape in {
        "a shape that is too large": [300, 2],
        "a shape beyond 64 bits": [1 << 40, 1 << 40],
        "a shape that wraps around": [1 << 63, 2],
        "a negative shape": [-3, -2],
        "a shape that is no number": [float("nan"), 2],
        "an infinite shape": [float("inf")],
        "a shape of text": ["3", "2"],
        "another shape of the same bytes": [3, 2],
        "a hundred thousand dimensions": [1] * 100_000 + [6],
        "forty dimensions": [1] * 38 + [2, 3],
    }.items():
        yield name, forge.tensors_with(entry(shape=shape))
    for dtype in ("F99", "I32", "U32", "O", "object", "", None, 7):
        yield f"the dtype {dtype!r}", forge.tensors_with(entry(dtype=dtype))
    yield (
        "half the width and twice the values",
        forge.tensors_with(entry(dtype="F16", shape=[4, 3])),
    )
    yield "a tensor less", forge.tensors_with(lambda t: t.pop("weight") and None)
    yield (
        "a tensor more",
        forge.tensors_with(
            lambda t: t.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
        ),
    )
    yield "a tensor of another name", forge.tensors_with(lambda t: t.update(W=t.pop("weight")))
    twice = json.dumps({"weight": forge.tensors["weight"]})[1:-1]
    yield "a name twice", forge.pack(tensors=f"{twice},{json.dumps(forge.tensors)[1:]}")
    flipped = bytearray(forge.data)
    flipped[offsets[0]] ^= 1
    yield "a flipped bit in a tensor", forge.pack(data=bytes(flipped))
    yield "data of zeros", forge.pack(data=bytes(len(forge.data)))


def _floods(forge: Forge) -> Iterator[tuple[str, bytes]]:
    size = 7 << 20
    small = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    yield (
        "a hundred thousand tensors",
        forge.pack(tensors=",".join(small % i for i in range(100_000)) + "}"),
    )
    yield "seven megabytes of braces", forge.pack(tensors='"a":' + "{" * size)
    yield "seven megabytes of brackets", forge.pack(tensors='"a":' + "[" * size)
    yield "a header that nests", Forge.raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    yield (
        "half a million notes",
        Forge.raw(
            b'{"__metadata__":{' + b",".join(b'"%d":"x"' % i for i in range(500_000)) + b"}}"
        ),
    )
    yield "our text nests", forge.pack(text='{"a":' * 50_000 + "1" + "}" * 50_000)
    yield "our text nests brackets", forge.pack(text="[" * 100_000 + "]" * 100_000)
    yield "our text is objects", forge.pack(text="[" + "{}," * (size // 3) + "{}]")
    yield "our text is lists", forge.pack(text="[" + "[]," * (size // 3) + "[]]")
    yield (
        "our text is small strings",
        forge.pack(text="[" + ",".join(f'"{i}"' for i in range(700_000)) + "]"),
    )
    yield "our text is numbers", forge.pack(text="[" + "1.5," * (size // 4) + "1]")
    yield "a number of a million digits", forge.pack(text="9" * 1_000_000)
    nested: Any = 1
    for _ in range(300):
        nested = [nested]
    yield "extra that nests", forge.flattened({"$": "tuple", "is": [{"$": "eval", "is": nested}]})


def _meta(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for part in ("format", "model", "initial", "policy", "optimizers", "also", "extra", "crc32"):
        yield f"without {part}", forge.without(part)
    yield "our text is a list", forge.pack(meta=[])
    yield "our text is a number", forge.pack(text="1")
    yield "our text has NaN", forge.pack(text=json.dumps({**forge.meta, "step": float("nan")}))
    whole = forge.whole.replace(b'"learnables_crc32":"', b'"learnables_crc32":"1')
    yield "a wrong checksum of our text", struct.pack("<Q", forge_length(whole) + 1) + whole[8:]
    for number in (0, -1, True, "1", 1.5, 99):
        yield f"format {number!r}", forge.meta_with(format=number)
    for step in ("1", [1], 1.5):
        yield f"step {step!r}", forge.meta_with(step=step)
    model = forge.meta["model"]
    yield "a tie to nobody", forge.meta_with(model={**model, "ties": {"a": "nobody"}})
    yield "a tie to a number", forge.meta_with(model={**model, "ties": {"a": 1}})
    yield "ties in a list", forge.meta_with(model={**model, "ties": [[1]]})
    yield "an initial value that is not there", forge.meta_with(initial=["nobody"])
    yield "a complex number of three parts", forge.meta_with(complex128=["weight"])
    yield "a checksum that is text", forge.meta_with(crc32={**forge.meta["crc32"], "weight": "1"})
    (saved,) = forge.meta["optimizers"]
    yield "optimizers that are none", forge.meta_with(optimizers=[1])
    yield "groups that are none", forge.meta_with(optimizers=[{**saved, "groups": [1]}])
    yield (
        "a name that is a list",
        forge.meta_with(optimizers=[{**saved, "groups": [{"names": [["weight"]], "options": {}}]}]),
    )
    yield "a state that is none", forge.meta_with(optimizers=[{**saved, "state": {"weight": 3}}])
    values = {
        "a value to evaluate": {"$": "eval", "is": ["__import__('os')"]},
        "a tuple of no list": {"$": "tuple", "is": "abc"},
        "a key that is a list": {"$": "pairs", "is": [[[1], 2]]},
        "a pair of three": {"$": "pairs", "is": [[1, 2, 3]]},
        "a tensor that is not there": {"$": "tensor", "is": "nobody"},
        "a tensor by a list": {"$": "tensor", "is": ["weight"]},
        "a float of words": {"$": "float", "is": "__import__('os')"},
    }
    for name, value in values.items():
        yield name, forge.flattened(value)
    yield "extra that is a tuple", forge.meta_with(extra={"$": "tuple", "is": []})


def _loads(forge: Forge) -> Iterator[tuple[str, bytes]]:
    """Well-formed and checked, and yet not to be loaded."""
    yield (
        "another sort of numbers",
        forge_tensors(forge, weight=torch.zeros(2, 3, dtype=torch.int64)),
    )
    yield "complex numbers", forge_tensors(forge, weight=torch.zeros(2, 3, dtype=torch.complex64))
    yield "another shape", forge_tensors(forge, weight=torch.zeros(7, 7))
    for path in ("../../../etc/passwd", "/etc/passwd", "a\0b", "weight\n", "__class__"):
        yield f"a tensor called {path!r}", forge_tensors(forge, **{path: torch.zeros(1)})
    random_states = forge.meta["random"]
    wrong = {
        "a random state of Python that is none": {**random_states, "python": [1]},
        "a random state of numpy that is none": {
            **random_states,
            "numpy": {"$": "tuple", "is": []},
        },
        "a random state that is a weight": {
            **random_states,
            "torch": {"$": "tensor", "is": "weight"},
        },
        "no random state": {},
        "a random state that is text": "x",
    }
    for name, states in wrong.items():
        yield name, forge.meta_with(random=states)
    (saved,) = forge.meta["optimizers"]
    for option, value in {"lr": "0.1", "betas": [0.9], "weight_decay": {"a": 1}}.items():
        groups = [{**g, "options": {**g["options"], option: value}} for g in saved["groups"]]
        yield f"{option} = {value!r}", forge.meta_with(optimizers=[{**saved, "groups": groups}])
    yield (
        "groups of other parameters",
        forge.meta_with(optimizers=[{**saved, "groups": [{"names": ["x"], "options": {}}]}]),
    )
    yield "no optimizer", forge.meta_with(optimizers=[])


def forge_length(raw: bytes) -> int:
    return int(struct.unpack("<Q", raw[:8])[0])


def forge_tensors(forge: Forge, **tensors: torch.Tensor) -> bytes:
    """The whole checkpoint with other tensors in it, written by safetensors, checksums right."""
    from safetensors.torch import load, save

    from learnables.runtime.checkpoint import _crc32

    held = {**load(forge.whole), **tensors}
    meta = {**forge.meta, "crc32": {key: _crc32(x) for key, x in held.items()}}
    text = json.dumps(meta)
    return save(held, {"learnables": text, "learnables_crc32": str(zlib.crc32(text.encode()))})


def contents(folder: Path) -> dict[str, bytes]:
    """What the file is → its bytes."""
    forge = Forge(folder)
    found: dict[str, bytes] = {}
    for some in (
        _pickles(folder),
        _archives(),
        _fronts(forge),
        _tensors(forge),
        _floods(forge),
        _meta(forge),
        _loads(forge),
    ):
        for name, content in some:
            assert name not in found, name
            found[name] = content
    return found


def places(folder: Path) -> dict[str, Path]:
    """What is no plain file, or a file that could not be written out."""
    forge = Forge(folder)
    paths = {name: folder / f"place{i}" for i, name in enumerate(_PLACES)}
    paths["a folder"].mkdir()
    os.mkfifo(paths["a pipe that nobody writes to"])
    paths["a link to itself"].symlink_to(paths["a link to itself"])
    paths["a link to a device without end"].symlink_to("/dev/zero")
    for name, size in (("a terabyte of holes", 1 << 40), ("ninety megabytes of holes", 90 << 20)):
        with paths[name].open("wb") as file:
            file.write(forge.whole)
            file.truncate(size)
    with paths["a header of holes"].open("wb") as file:
        file.write(struct.pack("<Q", 60 << 20))
        file.truncate(70 << 20)
    return paths


_PLACES = (
    "nothing there",
    "a folder",
    "a pipe that nobody writes to",
    "a link to itself",
    "a link to a device without end",
    "a terabyte of holes",
    "ninety megabytes of holes",
    "a header of holes",
)
