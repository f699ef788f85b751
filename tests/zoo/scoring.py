"""Run the audit on one program of the zoo, and say what it found."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import learnables as ln
from learnables.auditing.report import Report
from learnables.auditing.rule import Finding

CASES = Path(__file__).parent / "cases"
ACTORS = ("optimizers", "modules", "scaler", "scheduler", "ddp", "batch")
INTENT = ("trainable", "frozen", "frozen_rows", "tied", "lr", "weight_decay", "masks")
INTENT += ("pretrained", "max_norm", "surrogate")
SETS = {
    "unit norm rows": "Sphere",
    "non-negative": "NonNegative",
    "rows inside the unit ball": "Ball",
}


@dataclass(frozen=True)
class Outcome:
    """What an audit of one build of one program said.

    Attributes:
        report: The report.
        loud: Its findings of severity warning or error.
        hits: Those of them that name a culprit.
    """

    report: Report
    loud: tuple[Finding, ...]
    hits: tuple[Finding, ...]


def cases(prefix: str = "") -> list[Path]:
    """The programs, in order; ``prefix`` "b" for the bugs, "n" for the healthy ones."""
    return sorted(CASES.glob(f"{prefix or '[bn]'}[0-9][0-9][0-9]_*.py"))


def load(path: Path) -> ModuleType:
    """Import a program afresh."""
    spec = importlib.util.spec_from_file_location(f"zoo_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(path: Path, build: str, *, blind: bool = False) -> Outcome:
    """Audit ``build`` of a program; ``blind`` tells it nothing but (model, optimizer, step)."""
    case = load(path)
    model, optimizer, step = getattr(case, build)()
    extras = case.extras() if hasattr(case, "extras") else {}
    try:
        report = ln.audit(model, optimizer, step, **({} if blind else told(extras)))
    finally:
        extras.get("close", lambda: None)()
    loud = tuple(f for f in report.findings if f.severity != "note")
    culprits = getattr(case, "PARAMETERS", [])
    hits = tuple(f for f in loud if any(is_same(w, c) for w in f.where for c in culprits))
    return Outcome(report, loud, hits)


def told(extras: Mapping[str, Any]) -> dict[str, Any]:
    """What a user who knows the program would hand to `ln.audit` as keywords."""
    keywords = {key: extras[key] for key in ACTORS if key in extras}
    copies = {key: extras[key] for key in ("ema", "snapshot") if key in extras}
    if copies:
        keywords["copies"] = copies
    intent = {key: extras[key] for key in INTENT if key in extras}
    if "constraints" in extras:
        chosen = extras["constraints"].items()
        intent["constraints"] = {name: getattr(ln.sets, SETS[what])() for name, what in chosen}
    if intent:
        keywords["intent"] = ln.Intent(**intent)
    loaded = {
        "state_dict": extras.get("checkpoint"),
        "report": extras.get("report"),
        "optimizer_state": extras.get("optimizer_checkpoint"),
        "param_names": extras.get("param_names"),
    }
    loaded = {key: value for key, value in loaded.items() if value is not None}
    if loaded:
        keywords["loaded"] = ln.Loaded(**loaded)
    return keywords


def is_same(found: str, culprit: str) -> bool:
    """Whether two dotted paths are equal up to a prefix of one of them."""
    a = [part.strip("'\"") for part in found.replace("[", ".").replace("]", "").split(".") if part]
    b = culprit.split(".")
    return a[-len(b) :] == b or b[-len(a) :] == a
