"""The numbers behind the pictures, as one compressed text that a browser unpacks by itself."""

import base64
import gzip
from typing import Any, final

import numpy as np

from learnables.watching.encoding import Array

_KINDS = {"|u1": "u1", "<u2": "u2", "<f4": "f4"}


@final
class Figures:
    """Arrays by number. On the page: a list of ``[offset, kind, length]`` and one base64 text.

    Example:
        >>> figures = Figures()
        >>> figures.add(np.array([1.0, 2.0], "<f4"))
        0
        >>> figures.index
        [[0, 'f4', 2]]
    """

    def __init__(self) -> None:
        self.index: list[list[Any]] = []
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, array: Array) -> int:
        """Keep an array of uint8, uint16 or float32; return its number."""
        kind = _KINDS[array.dtype.str]
        raw = np.ascontiguousarray(array).tobytes()
        raw += b"\0" * (-len(raw) % 4)  # typed arrays in a browser begin at multiples of their size
        self.index.append([self._size, kind, int(array.size)])
        self._parts.append(raw)
        self._size += len(raw)
        return len(self.index) - 1

    def text(self) -> str:
        """All bytes, gzipped, in base64."""
        return base64.b64encode(gzip.compress(b"".join(self._parts), 9, mtime=0)).decode()
