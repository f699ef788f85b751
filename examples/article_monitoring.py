"""The end of the article: keep an eye on each parameter that matters.

What the article's own code does wrong: `add_histogram` takes bfloat16 through float16, where 1e-9
becomes 0, and raises where all is NaN; and the norm it logs under FSDP2 is that of the local shard.
"""

from pathlib import Path

import torch

import learnables as ln
from learnables.watching import Run
from learnables.watching.sinks import TensorBoard


def main() -> None:
    torch.manual_seed(0)
    model = ln.nn.ColorMatrix(channels=3)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=0.02, weight_decay=1e-3))
    pictures = torch.rand(16, 3, 8, 8)
    folder = Path("runs/monitoring")
    sinks = [TensorBoard(folder / "tensorboard")]
    with ln.watch(model, optimizer, every=50, to=folder, sinks=sinks, budget=None) as watcher:
        for _ in range(200):
            optimizer.zero_grad()
            loss = (model(pictures) - 0.5 * pictures).square().mean()
            loss.backward()
            optimizer.step()
            watcher.log_scalars(watcher.step, {"loss/train": loss.item()})
        watcher.log_table("color_matrix", model.matrix, watcher.step)
    run = Run(folder)
    for parameter in run.parameters:
        norm = run.series("weight", "norm", parameter.name)
        print(f"{parameter.name}: norm {norm.values[0]:.3f} → {norm.values[-1]:.3f}")
    page = ln.write_html(folder, folder / "report.html")
    print(f"{len(run.observations)} looks, {len(run.alarms)} alarms; {page}")


if __name__ == "__main__":
    main()
