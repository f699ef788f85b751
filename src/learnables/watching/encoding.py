"""Named arrays as bytes and back: what the blobs of a run database hold.

A blob is zlib over: a 4-byte little-endian header length, a JSON header ``{name: [dtype, shape]}``
in the order of the arrays, and the arrays' bytes one after the other. The bytes of each array are
laid out by plane (all lowest bytes, then all second bytes, ...), which compresses about a third
better. dtypes are numpy's, always little-endian: ``<f4``, ``<u2``, ...
"""

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from learnables.errors import RunError

Array = npt.NDArray[Any]

_LARGEST = 1 << 30  # bytes: a blob that claims more is damaged or hostile


def pack(arrays: Mapping[str, Array], level: int = 1) -> bytes:
    """The arrays as one compressed blob.

    Cost:
        About 1 ms per 100 kB at level 1.
    """
    header: dict[str, list[object]] = {}
    planes: list[bytes] = []
    for name, given in arrays.items():
        array = np.ascontiguousarray(given).reshape(-1)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        header[name] = [array.dtype.str, list(np.shape(given))]
        planes.append(array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes())
    text = json.dumps(header).encode()
    return zlib.compress(b"".join([struct.pack("<I", len(text)), text, *planes]), level)


def unpack(blob: bytes) -> dict[str, Array]:
    """The arrays that `pack` was given.

    Raises:
        RunError: The bytes are not such a blob.
    """
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(blob, _LARGEST)
        arrays, end = _split(raw)
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, zlib.error) as error:
        raise RunError("a blob of the run database cannot be read", found=str(error)) from error
    if not inflater.eof or end != len(raw):
        raise RunError("a blob of the run database is cut off, too long or larger than 1 GiB")
    return arrays


def _split(raw: bytes) -> tuple[dict[str, Array], int]:
    """The arrays, and where the last one ends.

    Raises:
        RunError: An array is of a kind that is no number.
    """
    (length,) = struct.unpack_from("<I", raw)
    header = json.loads(raw[4 : 4 + length])
    arrays, at = {}, 4 + length
    for name, (kind, shape) in header.items():
        dtype = np.dtype(kind)
        if dtype.kind not in "biuf":
            raise RunError("a blob of the run database holds no numbers", found=kind)
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        planes = np.frombuffer(raw, np.uint8, size, at).reshape(dtype.itemsize, -1)
        arrays[name] = np.ascontiguousarray(planes.T).reshape(-1).view(dtype).reshape(shape)
        at += size
    return arrays, at
