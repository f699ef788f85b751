"""Replace a file as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in the place of ``path``.

    Whenever the process dies, the disk fills up or the power fails, ``path`` is afterwards either
    what it was or what was written: the data is on the disk before the name points to it, and the
    name is on the disk before this returns.

    Args:
        path: The file to replace or make; its folder is made too.
        write: Called with the path of the temporary file.

    Raises:
        OSError: As raised by the operating system; the temporary file is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        write(partial)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)  # noqa: PTH105 - the call whose atomicity is meant
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    for left in path.parent.glob(f".{path.name}.*.partial"):  # by processes that were killed
        left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
