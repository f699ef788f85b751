import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnables.errors import CheckpointError
from learnables.runtime.renaming import Renaming

NAMES = ["encoder.0.weight", "encoder.0.bias", "encoder.head.weight", "scale"]


@pytest.mark.parametrize(
    ("rename", "new"),
    [
        (None, NAMES),
        ({"scale": "gain"}, [*NAMES[:3], "gain"]),
        (
            {"encoder.*": "trunk.*"},
            ["trunk.0.weight", "trunk.0.bias", "trunk.head.weight", "scale"],
        ),
        (
            {"encoder.*": "trunk.*", "encoder.head.*": "head.*"},  # the longest counts
            ["trunk.0.weight", "trunk.0.bias", "head.weight", "scale"],
        ),
        ({"encoder.*": "*"}, ["0.weight", "0.bias", "head.weight", "scale"]),
        ({"*": "net.*"}, [f"net.{name}" for name in NAMES]),
        ({"*": "net.*", "scale": "scale"}, [*(f"net.{name}" for name in NAMES[:3]), "scale"]),
        (str.upper, [name.upper() for name in NAMES]),
    ],
)
def test_names_are_renamed(rename, new):
    assert [Renaming(NAMES, [], rename)(name) for name in NAMES] == new


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"encodr.*": "trunk.*"}, "rename names what the checkpoint does not hold"),
        ({"scales": "gain"}, "nearest: scale"),
        ({"encoder.*": "trunk"}, "a prefix is renamed to a prefix"),
        ({"scale": "encoder.0.bias"}, "two names of the checkpoint become one"),
        (lambda name: "x", "two names of the checkpoint become one"),
    ],
)
def test_what_cannot_be_meant_is_refused(rename, message):
    with pytest.raises(CheckpointError, match=message):
        Renaming(NAMES, [], rename)


def test_the_prefix_of_a_lightning_module_is_understood_both_ways():
    bare, held = ["0.weight", "0.bias"], ["model.0.weight", "model.0.bias"]
    assert Renaming(held, bare).changed == dict(zip(held, bare, strict=True))
    assert Renaming(bare, held).changed == dict(zip(bare, held, strict=True))


def test_a_prefix_is_guessed_only_where_no_name_fits():
    assert not Renaming(["model.a", "b"], ["a", "b"]).changed
    assert not Renaming(["model.a"], ["c"]).changed


@given(st.sets(st.text("ab.", min_size=1), min_size=1), st.text("ab", min_size=1))
def test_a_prefix_put_before_all_and_taken_away_again_changes_nothing(names, prefix):
    there = {name: Renaming(names, [], {"*": f"{prefix}.*"})(name) for name in names}
    back = Renaming(set(there.values()), [], {f"{prefix}.*": "*"})
    assert {back(new) for new in there.values()} == names
