"""What a run keeps besides numbers over steps: arrays, images, documents; as bytes."""

import json
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from learnables.arguments import describe, require_kind
from learnables.errors import ArgumentError, ShapeError
from learnables.watching.encoding import Array, pack


def table(array: "Array | Tensor") -> bytes:
    """An array of numbers, of any shape, as one blob with the array ``values``.

    Raises:
        ArgumentError: It holds something else.
    """
    values = _array(array)
    if values.dtype.kind not in "biuf":
        raise ArgumentError(
            "a table holds numbers",
            where="array",
            found=f"dtype {values.dtype}" if isinstance(array, np.ndarray) else describe(array),
            wanted="an array or a tensor of real numbers",
            mend='watcher.log_table("confusion", torch.eye(3), watcher.step)',
        )
    return pack({"values": values}, level=6)


def images(array: "Array | Tensor", labels: Sequence[str]) -> bytes:
    """Images and a label for each, as one blob with ``pixels`` and ``labels``.

    Raises:
        ArgumentError: The labels are no list.
        ShapeError: They are not uint8 of shape (N, H, W, 1 or 3), or the labels are not N.
    """
    pixels = _array(array)
    wanted, mend = "one text for each image", f"labels=[''] * {len(pixels) if pixels.ndim else 1}"
    require_kind(labels, "labels", Sequence, np.ndarray, wanted=wanted, mend=mend)
    good = pixels.ndim == 4 and pixels.shape[3] in (1, 3) and pixels.dtype == np.uint8
    if not good or len(labels) != len(pixels):
        raise ShapeError(
            "images are uint8 of shape (N, H, W, C) with C 1 or 3, and one label for each",
            where="array",
            found=f"{pixels.dtype}, shape {pixels.shape}, {len(labels)} labels",
            wanted="uint8, shape (N, H, W, C), N labels",
        )
    text = json.dumps([str(label) for label in labels]).encode()
    return pack({"pixels": pixels, "labels": np.frombuffer(text, np.uint8)}, level=6)


def labels_of(arrays: dict[str, Array]) -> list[str]:
    """The labels that `images` was given."""
    found: list[str] = json.loads(arrays["labels"].tobytes())
    return found


def document(value: object) -> bytes:
    """A JSON value as bytes; text that is JSON already is kept.

    Raises:
        ArgumentError: JSON has no words for it.
    """
    try:
        if isinstance(value, (str, bytes)):
            return _text(value)
        return json.dumps(value, default=str).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            "a document is a JSON value",
            where="value",
            found=f"{describe(value)}: {error}",
            wanted="texts, numbers, lists, and dicts whose keys are texts",
            mend="str(value)",
        ) from error


def _text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    try:
        json.loads(raw)
    except ValueError:
        return json.dumps(raw.decode()).encode()
    return raw


def _array(given: "Array | Tensor") -> Array:
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        narrow = given.dtype.is_floating_point and given.dtype.itemsize <= 2
        return (given.float() if narrow else given.resolve_neg().resolve_conj()).numpy()
    try:
        return np.asarray(given)
    except ValueError:  # a list of lists of different lengths
        return np.asarray(None)
