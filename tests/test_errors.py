"""The five-part sentence: what is in it, and what a name in it may not do to a terminal."""

import pickle

import pytest

from learnables.errors import ArgumentError, LearnablesError, LearnablesWarning, lay_out, warn

HOSTILE = "blocks.\x1b[31mred\x1b[0m\u202e\x07.weight"


def test_each_part_has_its_line_and_an_empty_one_has_none():
    text = lay_out("it broke", where="a.weight", found="3", wanted="", mend="mend()")
    assert text == "it broke\n  where: a.weight\n  found: 3\n  mend: mend()"


def test_a_name_commands_no_terminal():
    error = LearnablesError("it broke", where=HOSTILE, found=f"the value of {HOSTILE}")
    spelt = r"blocks.\x1b[31mred\x1b[0m\u202e\x07.weight"
    assert str(error) == f"it broke\n  where: {spelt}\n  found: the value of {spelt}"
    assert error.where == HOSTILE  # for programs it is as it was
    with pytest.warns(LearnablesWarning) as caught:
        warn("it may break", where=HOSTILE)
    assert str(caught[0].message) == f"it may break\n  where: {spelt}"


def test_an_error_crosses_process_borders_whole():
    error = ArgumentError("no number", where=HOSTILE, found="x", wanted="a float", mend="lr=0.1")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ArgumentError
    assert vars(again) == vars(error)
    assert str(again) == str(error)
