"""The page of every rule tells the truth: its example is found, and its mending is not."""

import re

import pytest

from learnables.auditing.example import example_scope, run_example
from learnables.auditing.rule import FAMILIES, SEVERITIES, Rule, load_rules
from learnables.auditing.run import audit

pytestmark = pytest.mark.filterwarnings("ignore")  # torch itself warns of some of the examples
RULES = list(load_rules().values())
SECTIONS = ["Why it matters", "Example", "Use instead", "When to silence it"]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)


@each_rule
def test_example_is_found_and_its_mending_is_not(rule: Rule) -> None:
    found = run_example(rule, "Example")
    assert rule.code in found.codes, (found, found.skipped)
    mended = run_example(rule, "Use instead")
    assert rule.code not in mended.codes, mended
    assert rule.code not in mended.skipped, mended.skipped


@each_rule
def test_mending_raises_no_alarm_of_another_rule(rule: Rule) -> None:
    mended = run_example(rule, "Use instead")
    assert [f for f in mended.findings if f.severity != "note"] == []


@each_rule
def test_page_has_its_sections_in_order(rule: Rule) -> None:
    assert re.findall(r"^## (.*)$", rule.page, re.MULTILINE) == SECTIONS
    assert rule.title.endswith(".")


@each_rule
def test_file_function_and_rule_share_the_name(rule: Rule) -> None:
    assert rule.check.__module__.rpartition(".")[2] == rule.check.__name__
    assert rule.name == rule.check.__name__.replace("_", "-")
    assert re.fullmatch(r"LRN[1-9]\d\d", rule.code)
    assert rule.code[3] in FAMILIES
    assert rule.severity in SEVERITIES


@each_rule
def test_typing_each_mend_empties_the_list(rule: Rule) -> None:
    scope = example_scope(rule, "Example")
    names = ("optimizers", "modules", "scaler", "scheduler", "ddp", "copies", "loaded", "intent")
    keywords = {name: scope[name] for name in names if name in scope}

    def findings() -> list[object]:
        report = audit(scope["model"], scope.get("optimizer"), scope["step"], **keywords)
        return [f for f in report.findings if f.code == rule.code]

    mends = [f.mend for f in findings() if f.mend]
    for mend in mends:  # typed in as it stands, with these free names only
        free = {key: scope.get(key) for key in ("model", "optimizer")}
        exec(mend, {**free, **{key: scope[key] for key in ("torch", "nn", "ln")}})
    if mends:
        assert len(findings()) == 0
