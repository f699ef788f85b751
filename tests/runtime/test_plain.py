import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables.errors import CheckpointError
from learnables.runtime.plain import flatten, unflatten

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.just("$")
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.dictionaries(st.integers(), st.integers()).map(Counter)
    ),
    max_leaves=20,
)


def there_and_back(value):
    import json

    tensors = {}
    text = json.dumps(flatten(value, tensors.__setitem__, "x"), allow_nan=False)
    return unflatten(json.loads(text), tensors)


@given(trees)
def test_plain_data_comes_back_as_it_was(tree):
    assert there_and_back(tree) == tree


def test_types_come_back_as_they_were():
    back = there_and_back({"a": (1, [2.5]), "b": Counter({3: 2}), "c": {0: "x"}})
    assert isinstance(back["a"], tuple)
    assert isinstance(back["b"], Counter)
    assert back["c"] == {0: "x"}
    assert math.isnan(there_and_back(math.nan))
    assert there_and_back([np.float64(0.5), np.int64(3)]) == [0.5, 3]


def test_tensors_come_back_from_the_pile():
    x = torch.arange(3.0)
    back = there_and_back({"deep": [(x,)]})
    assert back["deep"][0][0] is x


def test_an_object_that_could_only_be_pickled_is_refused_with_its_place():
    with pytest.raises(
        CheckpointError, match=r"where: x/a/0\n.*found: an object of type builtins.object"
    ):
        flatten({"a": [object()]}, lambda *_: None, "x")


@pytest.mark.parametrize(
    "forged", [{"$": "tensor", "is": "absent"}, {"$": "eval", "is": ["1"]}, {"$": "tuple", "is": 3}]
)
def test_json_that_we_did_not_write_is_refused(forged):
    with pytest.raises(CheckpointError, match="cannot hold"):
        unflatten(forged, {})
