"""Replace a file as a whole or not at all."""

import glob
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in the place of ``path``.

    Whenever the process dies, the disk fills up or the power fails, ``path`` is afterwards either
    what it was or what was written: the data is on the disk before the name points to it, and the
    name is on the disk before this returns.

    Args:
        path: The file to replace or make; its folder is made too.
        write: Called with the path of the temporary file. That lies in a folder of its own, since
            some writers (safetensors) make further files beside theirs; all goes with the folder.

    Raises:
        OSError: As raised by the operating system; the temporary file is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    room = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        room.mkdir(exist_ok=True)
        partial = room / path.name
        write(partial)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)  # noqa: PTH105 - the call whose atomicity is meant
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    sync_folder(path.parent)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # of killed ones too
        shutil.rmtree(left, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
