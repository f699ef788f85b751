"""Run the examples of a rule's page; the tests hold every rule to its page with it."""

import linecache
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from learnables.auditing.report import Report
from learnables.auditing.rule import Rule
from learnables.auditing.run import audit

_KEYWORDS = (
    "optimizers",
    "modules",
    "scaler",
    "scheduler",
    "ddp",
    "copies",
    "batch",
    "loaded",
    "intent",
    "probes",
)


def run_example(rule: Rule, heading: str) -> Report:
    """Audit what the Python block under ``## heading`` builds.

    The block defines ``model`` and, if it likes, ``optimizer``, ``step`` and any keyword of
    `ln.audit` by its name. Where it defines an optimizer and no ``step``, a step with inputs of
    shape (8, 4) and a mean-square loss is run; ``step = None`` leaves it out. The names ``torch``,
    ``nn``, ``F`` and ``ln`` are there.
    """
    scope = example_scope(rule, heading)
    optimizer = scope.get("optimizer")
    keywords = {name: scope[name] for name in _KEYWORDS if name in scope}
    return audit(scope["model"], optimizer, scope["step"], **keywords)


def example_scope(rule: Rule, heading: str) -> dict[str, Any]:
    """The names that the block under ``## heading`` defines, with its ``step``."""
    torch.manual_seed(0)
    code, file = rule.example(heading), f"{rule.code}-{heading.replace(' ', '-').lower()}.py"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "ln": import_module("learnables")}
    scope["__name__"] = "__main__"
    exec(compile(code, file, "exec"), scope)
    if "step" not in scope:
        scope["step"] = _step(scope) if "optimizer" in scope else None
    return scope


def _step(scope: dict[str, Any]) -> Any:
    model, optimizer = scope["model"], scope["optimizer"]

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        loss: torch.Tensor = (model(torch.randn(8, 4, dtype=dtype)).float() + 1).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return step
