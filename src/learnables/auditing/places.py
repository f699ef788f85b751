"""Which line of the user's code is running."""

import sys
import traceback
from pathlib import Path
from types import FrameType

import torch

_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_SKIPPED_ENDS = ("contextlib.py", "functools.py")


def is_users(filename: str) -> bool:
    """Whether a file is neither torch's nor the audit's own; notebook cells are the user's."""
    if filename.startswith(_SKIPPED) or filename.endswith(_SKIPPED_ENDS):
        return False
    return not filename.startswith("<") or filename.startswith("<ipython")


def users_line(frame: FrameType | None = None) -> str | None:
    """``file:line`` of the innermost frame of the user's code."""
    at = frame or sys._getframe(1)
    while at is not None:
        if is_users(at.f_code.co_filename):
            return f"{at.f_code.co_filename}:{at.f_lineno}"
        at = at.f_back  # type: ignore[assignment]
    return None


def line_of(error: BaseException) -> str | None:
    """``file:line`` of the innermost frame of the user's code in a traceback."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{line}"
    return None


def shown(location: str | None) -> str:
    """A location as people know it: relative to the working folder; ``In[3]:2`` in a notebook."""
    if not location:
        return ""
    file, _, line = location.rpartition(":")
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cell = None if shell is None else shell.compile.format_code_name(file)
    if cell:
        return f"{cell[1]}:{line}"
    try:
        return f"{Path(file).relative_to(Path.cwd())}:{line}"
    except ValueError:
        return location


def library_of(kind: type) -> str | None:
    """The installed package that defines a class: its name, ``""`` for torch, None for the user."""
    top = kind.__module__.partition(".")[0]
    if top == "torch":
        return ""
    if top == "__main__":  # a script or a notebook, whoever runs it
        return None
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return top if "site-packages" in file or "dist-packages" in file else None
