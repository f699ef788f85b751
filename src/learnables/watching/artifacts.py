"""What a run keeps besides numbers over steps: arrays, images, documents; as bytes."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from learnables.errors import LearnablesError, ShapeError
from learnables.watching.encoding import Array, pack


def table(array: "Array | Tensor") -> bytes:
    """An array of numbers, of any shape, as one blob with the array ``values``.

    Raises:
        LearnablesError: It holds something else.
    """
    values = _array(array)
    if values.dtype.kind not in "biuf":
        raise LearnablesError("a table holds numbers", found=f"dtype {values.dtype}")
    return pack({"values": values}, level=6)


def images(array: "Array | Tensor", labels: Sequence[str]) -> bytes:
    """Images and a label for each, as one blob with ``pixels`` and ``labels``.

    Raises:
        ShapeError: They are not uint8 of shape (N, H, W, 1 or 3), or the labels are not N.
    """
    pixels = _array(array)
    good = pixels.ndim == 4 and pixels.shape[3] in (1, 3) and pixels.dtype == np.uint8
    if not good or len(labels) != len(pixels):
        raise ShapeError(
            "images are uint8 of shape (N, H, W, C) with C 1 or 3, and one label for each",
            found=f"{pixels.dtype}, shape {pixels.shape}, {len(labels)} labels",
        )
    text = json.dumps([str(label) for label in labels]).encode()
    return pack({"pixels": pixels, "labels": np.frombuffer(text, np.uint8)}, level=6)


def labels_of(arrays: dict[str, Array]) -> list[str]:
    """The labels that `images` was given."""
    found: list[str] = json.loads(arrays["labels"].tobytes())
    return found


def document(value: object) -> bytes:
    """A JSON value as bytes; text that is JSON already is kept."""
    if isinstance(value, (str, bytes)):
        raw = value.encode() if isinstance(value, str) else value
        try:
            json.loads(raw)
        except ValueError:
            return json.dumps(value if isinstance(value, str) else value.decode()).encode()
        return raw
    return json.dumps(value, default=str).encode()


def _array(given: "Array | Tensor") -> Array:
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype is torch.bfloat16 else given
        return given.numpy()
    return np.asarray(given)
