"""How large the page of a long run is: a Vision Transformer ViT-B/16, looked at 1000 times.

    python benchmarks/report.py [FOLDER]

Some looks are real: all 86 million parameters of ViT-B, their gradients and a step of SGD. The
other observations are drawn around them, each count of each histogram from its Poisson distribution
and each moment with a hundredth of noise, so that no two are alike and nothing compresses that
would not in a real run. Pictures are those that ``learnables train vit`` draws: twelve weights, the
positions, the colour matrix, a confusion matrix of 1000 classes and 48 photos, of noise. Prints
bytes and seconds, and writes results/report.json and the sentence in docs/*/watch.md. With FOLDER
the run and its page are kept there.
"""

import dataclasses
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment, save, write_tables

import learnables as ln
from learnables.models.vit import ViT, ViTConfig
from learnables.recipes.vit.measure import pictures_of_weights, position_similarity
from learnables.watching import Run
from learnables.watching.artifacts import document, images, table
from learnables.watching.observation import Filled, Observation, Rows
from learnables.watching.store import Store

LOOKS, REAL, WANTED = 1000, 24, 1_000_000


def vit_b() -> ViT:
    """The model, with gradients as they are spread in one: over some powers of two."""
    torch.manual_seed(0)
    size = {"dim": 768, "depth": 12, "heads": 12, "mlp_ratio": 4.0, "patch_size": 16}
    model = ViT(ViTConfig(image_size=(224, 224), channels=3, classes=1000, **size))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * torch.rand_like(p) ** 3 * 1e-3
    return model


def real_looks(model: ViT, folder: Path) -> Run:
    """A run of real looks at a model whose weights and gradients change from look to look."""
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
    model = vit_b()
    real = real_looks(model, folder / "real")
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
    for name, kind, data in pictures(model, draw):
        store.add_artifact(10 * LOOKS, name, kind, data)
    store.close()
    return Run(folder / "run")


def pictures(model: ViT, draw: np.random.Generator) -> Iterator[tuple[str, str, bytes]]:
    """Name, kind and bytes of what the recipe draws at the end of a training."""
    names = [f"class {i}" for i in range(1000)]
    yield "classes", "document", document(names)
    yield (
        "confusion",
        "table",
        table(draw.poisson(0.05, (1000, 1000)) + 40 * np.eye(1000, dtype=int)),
    )
    yield "position similarity", "table", table(position_similarity(model))
    yield "color matrix", "table", table(model.get_parameter("color_matrix.matrix"))
    for name, values in pictures_of_weights(model):
        yield name, "table", table(values)
    photos = draw.integers(0, 256, (48, 224, 224, 3), dtype=np.uint8)
    labels = [f"{names[i]} taken for {names[-i]} (87%)" for i in range(48)]
    yield "misclassified", "images", images(photos, labels)


def measure(folder: Path) -> dict[str, Any]:
    run = long_run(folder)
    begun = time.perf_counter()
    page = ln.write_html(run, folder / "report.html")
    return {
        "parameters": len(run.parameters),
        "observations": len(run.observations),
        "pictures": len(run.artifacts) - 1,
        "page_bytes": page.stat().st_size,
        "record_bytes": record_bytes(run.path),
        "render_seconds": time.perf_counter() - begun,
        "wanted_page_bytes": WANTED,
    }


def record_bytes(path: Path) -> float:
    database = sqlite3.connect(path)
    query = "SELECT avg(length(numbers) + length(rows)) FROM observations"
    (size,) = database.execute(query).fetchone()
    database.close()
    return float(size)


ENGLISH = (
    "The page of ViT-B ({parameters} parameters) with {observations} looks and {pictures} pictures "
    "is {page:.0f} kB (`python benchmarks/report.py`; torch {torch}, {date})."
)
CHINESE = (
    "ViT-B（{parameters} 个参数）观测 {observations} 次并带 {pictures} 组图片时，页面是 "
    "{page:.0f} kB（`python benchmarks/report.py`；torch {torch}，{date}）。"
)


def in_words(found: dict[str, Any], sentence: str) -> str:
    here = environment()
    told = {"page": found["page_bytes"] / 1e3, "torch": here["torch"], "date": here["date"][:10]}
    return sentence.format(**found, **told)


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
    words = {"en": ENGLISH, "zh": CHINESE}
    write_tables("watch", "report", lambda language: in_words(found, words[language]))


if __name__ == "__main__":
    main()
