"""The parts of sharded tensors, each written by the rank that holds it, and read by any number.

torch's distributed checkpoint (DCP) cuts and moves the bytes. It writes safetensors files, because
its own format is a pickle. Which files there are, how long each is and what its bytes add up to
stands in the checkpoint's own file, which is replaced last: so a crash leaves the old parts or the
new ones, and a part that is missing or damaged is noticed before anything is loaded.
"""

import contextlib
import json
import math
import re
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from learnables._torch import dtype_name, is_dtensor, local, rank_and_world, sharded_as
from learnables.collectives import gather_texts
from learnables.errors import CheckpointError
from learnables.runtime.atomic import sync_folder
from learnables.runtime.untrusted import header_text

_CHUNK = 1 << 20


# --- write ---------------------------------------------------------------------------------------


def write_shards(path: Path, shards: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the parts of DTensors into a new folder beside ``path``; a collective call.

    Args:
        path: The checkpoint that will say which folder it is.
        shards: Key → DTensor; the same keys on all ranks.

    Returns:
        What the checkpoint has to know: folder, files with their sizes and checksums, and the
        dtype and shape of each tensor.

    Raises:
        CheckpointError: A rank could not write; on all ranks alike, and the folder is gone.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    rank, _ = rank_and_world()
    name = _all_say(f"{path.name}.shards-{secrets.token_hex(8)}")[0]
    room, files, said = path.parent / name, {}, ""
    if not shards:
        return {"folder": name, "files": {}, "tensors": {}}
    try:
        room.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = str(error)
    agree(path, said)
    try:
        writer = HuggingFaceStorageWriter(str(room), save_distributed=True)
        save({key: x.detach() for key, x in shards.items()}, storage_writer=writer)
        for file in room.glob(f"shard-{rank + 1:05d}-*"):
            files[file.name] = [file.stat().st_size, _crc32(file)]
        sync_folder(room)
    except (OSError, CheckpointException, RuntimeError) as error:
        said = str(error)
    everyones = [json.loads(text) for text in _all_say(json.dumps([files, said]))]
    if any(complaint for _, complaint in everyones):
        if rank == 0:
            shutil.rmtree(room, ignore_errors=True)
        agree(path, said)
    return {
        "folder": name,
        "files": {file: facts for files, _ in everyones for file, facts in files.items()},
        "tensors": {key: [dtype_name(x.dtype), list(x.shape)] for key, x in shards.items()},
    }


def agree(path: Path, said: str) -> None:
    """Nothing where no rank complains; a collective call in a process group.

    Raises:
        CheckpointError: One does; on all ranks alike.
    """
    complaints = {rank: text for rank, text in enumerate(_all_say(said)) if text}
    if complaints:
        ranks, text = ", ".join(map(str, complaints)), next(iter(complaints.values()))
        raise CheckpointError(
            "the parts of the checkpoint cannot be written",
            where=f"{path}, rank{'s' * (len(complaints) > 1)} {ranks}",
            found=" ".join(text.split())[:500],
            wanted="a folder that every rank sees and can write to, with enough space",
            mend="make room and save again; the checkpoint that was there before is untouched",
        )


def sweep(path: Path, keep: str | None) -> None:
    """Delete the folders of parts that no checkpoint at ``path`` speaks of any more.

    What cannot be deleted stays: the checkpoint is whole already.
    """
    pattern = re.compile(re.escape(path.name) + r"\.shards-[0-9a-f]{16}")
    with contextlib.suppress(OSError):
        for folder in path.parent.glob("*.shards-*"):
            if folder.name != keep and pattern.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def discard(path: Path, said: Mapping[str, Any]) -> None:
    """Delete the parts that a checkpoint was to speak of, which could not be written."""
    shutil.rmtree(path.parent / said["folder"], ignore_errors=True)


def _all_say(text: str) -> list[str]:
    """What each rank says; this one alone without a process group."""
    if rank_and_world()[1] == 1:
        return [text]
    nccl = "nccl" in str(torch.distributed.get_backend())
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    return gather_texts(text, device)


def _crc32(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


# --- read ----------------------------------------------------------------------------------------


@final
class Shards:
    """The parts that one checkpoint speaks of.

    Until `fill` has read them, a tensor of the meta device stands in the place of each.

    Args:
        path: The checkpoint.
        said: What `write_shards` returned, as it stands in the checkpoint.
    """

    def __init__(self, path: Path, said: Mapping[str, Any]) -> None:
        self.path, self.folder = path, path.parent / said["folder"]
        self._files: dict[str, list[int]] = said["files"]
        self._is_verified = False
        self.stands_for: dict[int, str] = {}
        self.places: dict[str, Tensor] = {}
        for key, (word, shape) in said["tensors"].items():
            dtype = getattr(torch, word, None)
            if not isinstance(dtype, torch.dtype):
                self._refuse(f"{key}: there is no dtype {word!r}")
            self.places[key] = place = torch.empty(shape, dtype=dtype, device="meta")
            self.stands_for[id(place)] = key

    def key_of(self, x: object) -> str | None:
        """The key of the tensor that ``x`` stands for."""
        return self.stands_for.get(id(x))

    def fill(self, likes: Mapping[str, Tensor | None], *, together: bool) -> dict[str, Tensor]:
        """Key → its values, cut as ``like`` is where that is a DTensor of the shape; else whole.

        Args:
            likes: What is to be read, and after what it is to be cut.
            together: Whether all ranks call, which then share the work of looking at the files.

        Raises:
            CheckpointError: A file is missing or damaged, or the files do not hold the whole; where
                ``together``, on all ranks alike.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        together = together and rank_and_world()[1] > 1
        self.verify(together=together)
        made = {key: _room_for(self.places[key], like) for key, like in likes.items()}
        with warnings.catch_warnings():  # that without a group one process is meant
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single proc")
            try:
                load(dict(made), storage_reader=self._reader(), no_dist=not together)
            except CheckpointException as error:  # raised on all ranks, and no Exception
                self._refuse(" ".join(str(error).split())[:500])
        return made

    def verify(self, *, together: bool) -> None:
        """Look at all files, once; see `fill`, which does it too.

        Raises:
            CheckpointError: As `fill` does.
        """
        together = together and rank_and_world()[1] > 1
        if self._is_verified or not self.places:
            return
        rank, world = rank_and_world() if together else (0, 1)
        said = _complaint(lambda: self._look(rank, world))
        said = said or _complaint(lambda: self._covered(self._reader().read_metadata()))
        everyones = _all_say(said) if together else [said]
        first = next(filter(None, everyones), "")
        if first:
            self._refuse(first)
        self._is_verified = True

    def _reader(self) -> Any:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        return HuggingFaceStorageReader(str(self.folder))

    def _look(self, rank: int, world: int) -> None:
        """All files are looked at by every rank, and each is read by one."""
        there = {file.name for file in self.folder.glob("*")} if self.folder.is_dir() else set()
        missing, strange = sorted(set(self._files) - there), sorted(there - set(self._files))
        if missing:
            names = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
            self._refuse(f"{len(missing)} of {len(self._files)} parts are missing: {names}")
        if strange:
            self._refuse(f"parts that it does not speak of: {', '.join(strange[:8])}")
        for number, (name, (size, total)) in enumerate(sorted(self._files.items())):
            file = self.folder / name
            if file.stat().st_size != size:
                self._refuse(f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
            header_text(file)
            if number % world == rank and _crc32(file) != total:
                self._refuse(f"the checksum of {name} is wrong")

    def _covered(self, found: Any) -> None:
        """The files hold each element of each tensor exactly once, by what their headers say."""
        held = found.state_dict_metadata
        if set(held) != set(self.places):
            odd = sorted(set(held) ^ set(self.places))
            self._refuse(f"the parts are of other tensors: {', '.join(odd[:8])}")
        for key, place in self.places.items():
            boxes = [(tuple(c.offsets), tuple(c.sizes)) for c in held[key].chunks]
            inside = all(
                len(at) == len(size) == place.ndim
                and all(
                    a >= 0 and a + n <= m for a, n, m in zip(at, size, place.shape, strict=True)
                )
                for at, size in boxes
            )
            volume = sum(math.prod(size) for _, size in boxes)
            same = held[key].properties.dtype == place.dtype
            if not (inside and same and volume == place.numel()) or any(_overlaps(boxes)):
                self._refuse(f"the parts of {key} do not make a {tuple(place.shape)} {place.dtype}")

    def _refuse(self, found: str) -> None:
        raise CheckpointError(
            "the parts of the checkpoint are not as they were written",
            where=str(self.folder),
            found=found,
            wanted=f"the {len(self._files)} files that ln.save_checkpoint wrote, beside "
            f"{self.path.name}",
            mend="copy the whole folder, or take an older checkpoint",
        )


def _complaint(look: Callable[[], None]) -> str:
    """What is wrong, or nothing; the other ranks wait to hear it."""
    try:
        look()
    except CheckpointError as error:
        return error.found
    except Exception as error:  # whatever a damaged header makes of a parser
        return f"{type(error).__name__}: {error}"
    return ""


def _overlaps(boxes: "list[tuple[tuple[int, ...], tuple[int, ...]]]") -> Iterator[bool]:
    for i, (at, size) in enumerate(boxes):
        for other, extent in boxes[:i]:
            yield all(
                a < b + m and b < a + n for a, n, b, m in zip(at, size, other, extent, strict=True)
            )


def _room_for(place: Tensor, like: Tensor | None) -> Tensor:
    if like is None or not is_dtensor(like) or like.shape != place.shape:
        return torch.empty(place.shape, dtype=place.dtype)
    return sharded_as(torch.empty_like(local(like), dtype=place.dtype, requires_grad=False), like)
