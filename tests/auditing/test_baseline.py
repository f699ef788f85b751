"""A baseline takes away exactly what it knows, parameter by parameter."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnables.auditing.baseline import gone, read_baseline, without_known, write_baseline
from learnables.auditing.report import Report
from learnables.auditing.rule import Finding
from learnables.errors import LearnablesError

NAMES = ["a", "b", "blocks.0.scale", "\n", "é"]


def a_report(by_code: dict[str, set[str]], prefix: str = "") -> Report:
    return Report(
        [
            Finding(
                code=code,
                severity="error",
                what="wrong",
                where=[prefix + name for name in sorted(names)],
                mend="\n".join(f"mend({prefix + name!r})" for name in sorted(names)),
            )
            for code, names in by_code.items()
            if names
        ]
    )


found = st.dictionaries(st.sampled_from(["LRN201", "LRN301"]), st.sets(st.sampled_from(NAMES)))


@given(before=found, after=found, wrapped=st.booleans())
def test_only_what_is_new_is_left(
    before: dict[str, set[str]], after: dict[str, set[str]], wrapped: bool, tmp_path_factory
) -> None:
    file = tmp_path_factory.mktemp("baseline") / "known.json"
    write_baseline(a_report(before), file)
    known = read_baseline(file)
    prefix = "module." if wrapped else ""
    now = a_report(after, prefix)
    left = without_known(now, known, "known.json")
    new = {c: names - before.get(c, set()) for c, names in after.items()}
    assert {f.code: {n.removeprefix(prefix) for n in f.where} for f in left.findings} == {
        code: names for code, names in new.items() if names
    }
    for finding in left.findings:
        assert finding.mend == "\n".join(f"mend({name!r})" for name in finding.where)
    counted = [len(f.where) for f in (*left.findings, *(f for f, _ in left.silenced))]
    assert sum(counted) == sum(map(len, after.values()))
    assert all(why == "in the baseline known.json" for _, why in left.silenced)
    old = {f"{c} {n}" for c, names in before.items() for n in names - after.get(c, set())}
    assert set(gone(now, known, {"LRN201", "LRN301"})) == old
    assert gone(now, known, set()) == []


def test_a_finding_about_no_parameter_is_known_by_what_it_says(tmp_path: Path) -> None:
    loop = Finding(code="LRN402", severity="warning", what="gradients are never cleared", where=[])
    other = Finding(code="LRN402", severity="warning", what="cleared too often", where=[])
    write_baseline(Report([loop]), tmp_path / "b.json")
    left = without_known(Report([loop, other]), read_baseline(tmp_path / "b.json"), "b.json")
    assert left.findings == [other]
    assert [f for f, _ in left.silenced] == [loop]


def test_the_file_is_sorted_with_one_parameter_a_line(tmp_path: Path) -> None:
    file = tmp_path / "known.json"
    assert write_baseline(a_report({"LRN301": {"b", "a"}, "LRN201": {"b"}}), file) == 3
    assert json.loads(file.read_text())["findings"] == {"LRN201": ["b"], "LRN301": ["a", "b"]}
    assert sum('"a"' in line or '"b"' in line for line in file.read_text().splitlines()) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2, "findings": {}}', "\x00"])
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(LearnablesError, match="baseline"):
        read_baseline(tmp_path / "b.json")


def test_a_missing_baseline_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(LearnablesError, match="--write-baseline"):
        read_baseline(tmp_path / "none.json")
