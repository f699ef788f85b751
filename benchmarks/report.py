"""How large the page of a long run is: a Vision Transformer ViT-B/16, looked at 1000 times.

    python benchmarks/report.py [FOLDER]

Some looks are real: all 86 million parameters of ViT-B, their gradients and a step of SGD. The
other observations are drawn around them, each count of each histogram from its Poisson distribution
and each moment with a hundredth of noise, so that no two are alike and nothing compresses that
would not in a real run. Prints bytes and seconds, and writes results/report.json. With FOLDER the
run and its page are kept there.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from watch import vit_b

import learnables as ln
from learnables.watching import Run
from learnables.watching.observation import Filled, Observation, Rows
from learnables.watching.store import Store

LOOKS, REAL, WANTED = 1000, 24, 1_000_000


def real_looks(folder: Path) -> Run:
    """A run of real looks at a model whose weights and gradients change from look to look."""
    torch.manual_seed(0)
    model = vit_b()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ln.watch(model, optimizer, every=1, to=folder, budget=None) as watcher:
        for look in range(REAL):
            for p in model.parameters():
                p.grad.mul_(0.8 if look % 2 else 1.1)
            optimizer.step()
    return watcher.run()


def drawn_from(o: Observation, step: int, draw: np.random.Generator) -> Observation:
    """An observation as one a little later would be."""
    rows = {}
    for quantity, seen in o.rows.items():
        moments = dict(seen.moments)
        for name in ("sum", "sum_of_squares", "min", "max"):
            moments[name] = moments[name] * draw.normal(1.0, 0.01, len(moments[name]))
        counts = draw.poisson(seen.filled.counts).astype(np.int64)
        filled = Filled(seen.filled.lengths, seen.filled.bins, counts)
        rows[quantity] = Rows(moments, filled)
    norms = draw.lognormal(0.0, 0.3, 10).astype(np.float32)
    return dataclasses.replace(o, step=step, time=o.time + step, rows=rows, norms=norms)


def long_run(folder: Path) -> Run:
    """A thousand observations, ten steps apart, with the numbers that a recipe logs."""
    real = real_looks(folder / "real")
    draw = np.random.default_rng(0)
    store = Store(folder / "run", meta={"every": 10})
    ids = store.add_parameters(
        [
            {**dataclasses.asdict(p), "names": list(p.names), "shape": list(p.shape)}
            for p in real.parameters
        ]
    )
    for look in range(LOOKS):
        near = real.observations[look * REAL // LOOKS]
        store.add_observation(drawn_from(near, 10 * look + 10, draw), ids)
        loss = 7.0 * np.exp(-look / 300) + draw.normal(0, 0.05)
        store.add_scalars(10 * look + 10, {"loss/train": loss, "accuracy/test": 1 - loss / 7.5})
    store.close()
    return Run(folder / "run")


def measure(folder: Path) -> dict[str, Any]:
    run = long_run(folder)
    begun = time.perf_counter()
    page = ln.write_html(run, folder / "report.html")
    return {
        "parameters": len(run.parameters),
        "observations": len(run.observations),
        "page_bytes": page.stat().st_size,
        "record_bytes": run.path.stat().st_size / len(run.observations),
        "render_seconds": time.perf_counter() - begun,
        "wanted_page_bytes": WANTED,
    }


def main() -> None:
    if sys.argv[1:]:
        found = measure(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder))
    print(
        f"page of ViT-B, {found['parameters']} parameters, {found['observations']} observations: "
        f"{found['page_bytes'] / 1e3:.0f} kB (wanted: {WANTED / 1e3:.0f}), "
        f"{found['render_seconds']:.1f} s; {found['record_bytes'] / 1e3:.0f} kB a record"
    )
    save("report", found)


if __name__ == "__main__":
    main()
