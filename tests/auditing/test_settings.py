"""What ``[tool.learnables]`` may say, and what it is told when it says something else."""

from pathlib import Path

import pytest

from learnables.auditing.settings import Settings, read_settings
from learnables.auditing.silence import silences
from learnables.errors import LearnablesError


def test_the_nearest_table_counts_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.learnables]\nselect = ["LRN2"]\nignore = ["no-gradient"]\nsteps = 6\n'
        'baseline = "known.json"\n[[tool.learnables.silence]]\n'
        'code = "LRN201"\nselector = "teacher.*"\nreason = "an average"\n'
    )
    deep = tmp_path / "src" / "pkg"
    deep.mkdir(parents=True)
    (tmp_path / "src" / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    found = read_settings(deep)
    assert found == Settings(
        select=("LRN2",),
        ignore=("no-gradient",),
        steps=6,
        baseline=tmp_path / "known.json",
        silence=({"code": "LRN201", "selector": "teacher.*", "reason": "an average"},),
        home=tmp_path,
    )
    before = silences()
    found.put_into_force()
    (new,) = silences()[len(before) :]
    assert (new.code, new.reason) == ("LRN201", "an average")
    new.remove()


def test_no_table_means_defaults(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.other]\n")
    found = read_settings(tmp_path)
    assert (found.select, found.ignore, found.steps, found.baseline) == (None, (), 4, None)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('selct = ["LRN2"]', "selct"),
        ('select = "LRN2"', "a list like"),
        ("ignore = [1]", "a list like"),
        ("steps = 0", "≥ 1"),
        ("steps = true", "≥ 1"),
        ("baseline = 1", "the name of a file"),
        ('silence = [{code = "LRN201"}]', "code, selector and reason"),
        ("select = [", "TOML"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, table: str, told: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.learnables]\n{table}\n")
    with pytest.raises(LearnablesError, match=told) as error:
        read_settings(tmp_path)
    assert "pyproject.toml" in str(error.value)
