"""What every benchmark shares: the machine it ran on, interleaved timing, one JSON file.

Scripts here are run as ``python benchmarks/NAME.py``, which puts this folder first on the path:
NAME must not be that of a module of the standard library.
"""

import datetime as dt
import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """How long one task took, beside the baseline of the same rounds.

    Attributes:
        median: Seconds.
        best: Seconds, of the quickest round.
        ratio: Median over the rounds of task / baseline, each within its round.
        low: Lower quartile of those ratios.
        high: Upper quartile of those ratios.
        best_ratio: Quickest round of the task / quickest round of the baseline.
        rounds: How many rounds were timed.
    """

    median: float
    best: float
    ratio: float
    low: float
    high: float
    best_ratio: float
    rounds: int


def environment() -> dict[str, Any]:
    """Versions, processor, threads, load and date, for the JSON file beside every number."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": load,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def paired(
    baseline: Callable[[], object],
    tasks: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 10.0,
    clock: Callable[[], float] = time.process_time,
    prepare: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time every task against ``baseline``, in turns, so that noise hits both alike.

    A task's rounds follow one another, each with the baseline just before it; the baseline's
    own row is called ``"baseline"``.

    Args:
        baseline: What the ratios are taken to.
        tasks: Name → function without arguments. Each is run once untimed.
        rounds: Rounds of each task.
        seconds: A task stops early, after three rounds at least, once it took this long.
        clock: ``time.process_time`` counts the CPU seconds of all threads and is blind to
            waiting: right for one thread on a busy machine. Use ``time.perf_counter`` for
            several threads, processes and disks.
        prepare: Called untimed before every run, of the baseline too: puts values back.
    """
    timings: dict[str, Timing] = {}
    bases: list[float] = []
    baseline()
    for name, task in tasks.items():
        task()
        pairs: list[tuple[float, float]] = []
        spent = 0.0
        gc.collect()
        while len(pairs) < rounds and (len(pairs) < 3 or spent < seconds):
            pair = (_time(baseline, clock, prepare), _time(task, clock, prepare))
            pairs.append(pair)
            spent += sum(pair)
        bases += [base for base, _ in pairs]
        timings[name] = _timing(pairs)
    best = min(bases)
    timings = {name: _against(timing, best) for name, timing in timings.items()}
    return {"baseline": _timing([(base, base) for base in bases]), **timings}


def save(name: str, rows: Any, **more: Any) -> Path:
    """Write ``results/NAME.json``: the environment, ``more``, and the rows; return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), **more, "rows": rows}
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    return path


def save_part(name: str, part: str, rows: Any, **more: Any) -> Path:
    """Put one part into ``results/NAME.json``, with its own environment; the others stay."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"parts": {**parts(name), part: {"environment": environment(), **more, "rows": rows}}}
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    return path


def parts(name: str) -> dict[str, Any]:
    """What `save_part` put into ``results/NAME.json``: part → environment and rows."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("parts", {})
    return found


def where(environment: Mapping[str, Any], language: str) -> str:
    """One line for below a table, in brackets: the machine, its load, torch and the day."""
    e = environment
    load = "" if e["load_1min"] is None else f"{e['load_1min']:.1f}"
    text = {
        "en": "({cpu}, {threads} thread(s), load {load} on {cores} cores, torch {torch}, {day})",
        "zh": "（{cpu}，{threads} 线程，负载 {load}，{cores} 核，torch {torch}，{day}）",
    }[language]
    return text.format(**{**e, "load": load, "day": e["date"][:10]})


def bar(cells: Iterable[object]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def kernel(chosen: Any) -> dict[str, str]:
    """A choice of a kernel, to be saved: without the folder it lies in on this machine."""
    return {**chosen._asdict(), "why": re.sub(r"/\S*/", "", chosen.why)}


def write_tables(page: str, script: str, table: Callable[[str], str]) -> None:
    """Put ``table("en")`` and ``table("zh")`` between the marks of ``script`` in both pages."""
    begin, end = f"<!-- benchmarks/{script}.py --table -->", f"<!-- end of {script} -->"
    for language in ("en", "zh"):
        path = Path(__file__).parents[1] / "docs" / language / f"{page}.md"
        before, rest = path.read_text(encoding="utf-8").split(begin)
        after = rest.split(end)[1]
        path.write_text(f"{before}{begin}\n{table(language)}\n{end}{after}", encoding="utf-8")
        print(path)


def _time(
    task: Callable[[], object], clock: Callable[[], float], prepare: Callable[[], object] | None
) -> float:
    if prepare is not None:
        prepare()
    start = clock()
    task()
    return clock() - start


def _timing(pairs: list[tuple[float, float]]) -> Timing:
    times = [task for _, task in pairs]
    ratios = [task / base for base, task in pairs]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    best = min(base for base, _ in pairs)
    return Timing(
        statistics.median(times), min(times), ratio, low, high, min(times) / best, len(pairs)
    )


def _against(timing: Timing, best: float) -> Timing:
    return Timing(**{**asdict(timing), "best_ratio": timing.best / best})


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Timing) else str(value)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
