"""The zoo of real bugs under the tools that can be installed today, beside our audit.

    python benchmarks/zoo_peers.py

The tools are installed into a temporary folder by exact version, and run as their own documents
say: three iterations of each program's own step under each of them. torchtest owns the training
step; it is given the program's. A bug is *named* when a tool names one of the parameters that the
program lists as culprits; a healthy program or mended twin is *accused* when a tool says anything
of it. A tool runs in a process of its own; where a program takes that down, it has said nothing.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import save
from tests.zoo.scoring import cases, is_same, load, outcome

ROOT = Path(__file__).parents[1]
INSTALLED = ("torcheck==1.0.1", "torchtest==0.5", "torch-audit==0.3.0", "TorchFix==0.7.0")
STEPS = 3
Build = Callable[[], tuple[Any, Any, Callable[[], Any]]]


def prints(build: Build) -> list[str]:
    """The three prints of the article: is there a gradient, and has the value changed?"""
    model, _, step = build()
    before = {n: whole(p).clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(STEPS):
        step()
    now = dict(model.named_parameters())
    return [
        name
        for name, value in before.items()
        if name in now and (now[name].grad is None or same(whole(now[name]), value))
    ]


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def graph_walk(build: Build) -> list[str]:
    """Which parameters the loss does not reach, as mmengine's detect_anomalous_params walks."""
    model, _, step = build()
    loss = step()
    seen: set[Any] = set()
    leaves: set[int] = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in leaves]


def torcheck(build: Build) -> list[str]:
    try:
        return _torcheck(build, finite=True)
    except TypeError:  # its output hook takes no model that returns several tensors
        return _torcheck(build, finite=False)


def _torcheck(build: Build, *, finite: bool) -> list[str]:
    from torcheck.registry import Registry

    model, optimizer, step = build()
    registry = Registry()
    try:
        registry.register(optimizer)
        registry.add_module(
            model, module_name="model", changing=True, check_nan=finite, check_inf=finite
        )
    except RuntimeError:  # it stops at the first parameter that no optimizer holds
        held = registry.tensor_to_optimizer
        return [n for n, p in model.named_parameters() if p not in held][:1]
    try:
        for _ in range(STEPS):
            step()
    except RuntimeError as error:
        named = [n for n, _ in model.named_parameters() if f"'s {n} " in str(error)]
        return named or ["something"]
    return []


def torchtest(build: Build) -> list[str]:
    from torchtest import torchtest as tool

    model, optimizer, step = build()
    tool._train_step = lambda *_, **__: step()
    try:
        tool.assert_vars_change(model, None, optimizer, None, "cpu")
    except tool.VariablesChangeException as error:
        return [str(error).split(" ")[0]]
    return []


def torch_audit(build: Build) -> list[str]:
    from torch_audit import autopatch
    from torch_audit.core import Severity

    model, optimizer, step = build()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        auditor = autopatch(model, optimizer=optimizer, every_n_steps=1)
        for _ in range(STEPS):
            step()
        auditor.unpatch()
    loud = [f for f in auditor.findings if f.severity >= Severity.WARN]
    return [f"{f.module_path or ''}.{f.entity or ''} {f.message}".strip(". ") for f in loud]


def anomaly(build: Build) -> list[str]:
    """torch.autograd.set_detect_anomaly; it names an operation, which is counted as a culprit."""
    _, _, step = build()
    try:
        with torch.autograd.set_detect_anomaly(True):
            for _ in range(STEPS):
                step()
    except RuntimeError as error:
        return [str(error)]
    return []


TOOLS: dict[str, Callable[[Build], list[str]]] = {
    "the article's three prints": prints,
    "torcheck 1.0.1": torcheck,
    "torchtest 0.5": torchtest,
    "torch-audit 0.3.0, warnings": torch_audit,
    "walk over the graph (mmengine)": graph_walk,
    "torch's detect_anomaly": anomaly,
}


def names_culprit(tool: str, said: list[str], culprits: list[str]) -> bool:
    if tool == "torch's detect_anomaly":
        return bool(said)
    words = [word for text in said for word in re.findall(r"[\w.]+", text)]
    return any(is_same(word.strip("."), culprit) for word in words for culprit in culprits if word)


def builds() -> Iterator[tuple[Path, str]]:
    for path in cases("b"):
        yield from ((path, "build"), (path, "build_fixed"))
    yield from ((path, "build") for path in cases("n"))


def work(tool: str, first: int) -> None:
    """In a process of its own: one line of JSON for each program from number ``first`` on."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number, (path, build) in enumerate(builds()):
        if number < first:
            continue
        case = load(path)
        try:
            said = TOOLS[tool](getattr(case, build))
        except Exception:  # the tool or the program raised: it has said nothing
            said = []
        if hasattr(case, "extras"):
            with contextlib.suppress(Exception):
                case.extras().get("close", lambda: None)()
        hit = names_culprit(tool, said, getattr(case, "PARAMETERS", []))
        print("\n" + json.dumps([path.stem, build, bool(said), hit]), flush=True)


def run(tool: str, environment: dict[str, str]) -> dict[tuple[str, str], tuple[bool, bool]]:
    every = list(builds())
    said: dict[tuple[str, str], tuple[bool, bool]] = {}
    first = 0
    while first < len(every):
        command = [sys.executable, __file__, "work", tool, str(first)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if line.startswith('["') and line.endswith("]"):
                stem, build, fired, hit = json.loads(line)
                said[stem, build] = (fired, hit)
                first += 1
        if first < len(every):  # this program took the process down
            path, build = every[first]
            said[path.stem, build] = (False, False)
            first += 1
    return said


def torchfix(folder: str) -> dict[tuple[str, str], tuple[bool, bool]]:
    """A linter: it reads the file, so it says the same of a bug and of its twin beside it."""
    command = [sys.executable, "-m", "torchfix", "--select=ALL", str(ROOT / "tests/zoo/cases")]
    environment = {**os.environ, "PYTHONPATH": folder}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    flagged = set(re.findall(r"([bn]\d{3}_\w+)\.py:\d+", done.stdout))
    return {
        (path.stem, build): (path.stem in flagged, path.stem in flagged) for path, build in builds()
    }


def counted(said: dict[tuple[str, str], tuple[bool, bool]]) -> dict[str, int]:
    bugs = [key for key in said if key[0].startswith("b") and key[1] == "build"]
    healthy = [key for key in said if key not in bugs]
    return {
        "named": sum(said[key][1] for key in bugs),
        "bugs": len(bugs),
        "alarms": sum(said[key][0] for key in healthy),
        "healthy": len(healthy),
    }


def ours(*, blind: bool) -> dict[tuple[str, str], tuple[bool, bool]]:
    said = {}
    for path, build in builds():
        told = outcome(path, build, blind=blind)
        said[path.stem, build] = (bool(told.loud), bool(told.hits))
    return said


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
        done = subprocess.run([*pip, "--no-deps", *INSTALLED[:3]], capture_output=True, text=True)
        done = done if done.returncode else subprocess.run([*pip, INSTALLED[3]], text=True)
        if done.returncode:
            sys.exit(f"the tools cannot be installed here:\n{done.stderr}")
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        every = {tool: run(tool, environment) for tool in TOOLS}
        every["TorchFix 0.7.0"] = torchfix(folder)
    together = {
        key: (any(e[key][0] for e in every.values()), any(e[key][1] for e in every.values()))
        for key in next(iter(every.values()))
    }
    every["all of these together"] = together
    every["learnables, told nothing"] = ours(blind=True)
    every["learnables, told the intent"] = ours(blind=False)
    rows = {tool: counted(said) for tool, said in every.items()}
    for tool, row in rows.items():
        print(
            f"{tool:32} {row['named']:4} of {row['bugs']} named"
            f" {row['alarms']:4} of {row['healthy']} healthy accused"
        )
    save("zoo_peers", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main()
