"""State as plain data: a JSON value and named tensors, and back. Nothing is ever executed."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from learnables.errors import CheckpointError


def flatten(value: Any, put: Callable[[str, Tensor], None], path: str) -> Any:
    """``value`` as JSON; its tensors are handed to ``put`` under names that begin with ``path``.

    Dicts, Counters, lists, tuples, strings, numbers, None and tensors come back from `unflatten`
    as what they were.

    Raises:
        CheckpointError: Something else is in there; it could only be pickled.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$": "float", "is": str(value)}
    if isinstance(value, Tensor):
        put(path, value)
        return {"$": "tensor", "is": path}
    if isinstance(value, (list, tuple)):
        items = [flatten(item, put, f"{path}/{i}") for i, item in enumerate(value)]
        return {"$": "tuple", "is": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        if not isinstance(value, Counter) and all(isinstance(k, str) and k != "$" for k in value):
            return {key: flatten(item, put, f"{path}/{key}") for key, item in value.items()}
        pairs = [
            [flatten(key, put, f"{path}/key{i}"), flatten(item, put, f"{path}/{i}")]
            for i, (key, item) in enumerate(value.items())
        ]
        return {"$": "counter" if isinstance(value, Counter) else "pairs", "is": pairs}
    raise CheckpointError(
        "this state is not plain data, and a checkpoint never pickles",
        where=path,
        found=f"an object of type {type(value).__module__}.{type(value).__qualname__}",
        wanted="tensors, numbers, strings, None, and dicts, lists and tuples of them",
        mend="leave it out of the state_dict and build it anew when resuming",
    )


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given.

    Raises:
        CheckpointError: The JSON was not written by `flatten`, or a tensor of it is missing.
    """
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind, inner = value.get("$"), value.get("is")
    if kind is None:
        return {key: unflatten(item, tensors) for key, item in value.items()}
    if kind == "tensor" and str(inner) in tensors:
        return tensors[str(inner)]
    if kind == "float":
        return float(str(inner))
    if isinstance(inner, list):
        if kind == "tuple":
            return tuple(unflatten(item, tensors) for item in inner)
        if kind in ("pairs", "counter"):
            pairs = {unflatten(k, tensors): unflatten(item, tensors) for k, item in inner}
            return pairs if kind == "pairs" else Counter(pairs)
    raise CheckpointError("the checkpoint holds a value that it cannot hold", found=f"{value!r}")
