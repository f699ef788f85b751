"""What an observed step costs: ViT-Tiny/16 at 224, batch 8, AdamW, one thread.

    python benchmarks/audit.py

*traced*: the function mode alone. *observed*: events, looks at four points, snapshots and trace, as
`ln.audit` and `ln.observe` run it; *without snapshots* has no room for values, so that they are
told apart by checksum. *after*: a plain step once all of it is gone.

*70 billion*: the static audit of a decoder of that size on the meta device, in a process of its
own: seconds, and memory beside that of torch and the model. It is told nothing but the model.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from environment import paired, save
from torch import nn
from torch.nn import functional as F

from learnables.auditing.observe import Observer
from learnables.auditing.survey import survey
from learnables.auditing.trace import Trace


class Tiny(nn.Module):
    """A ViT-Tiny/16 in torch's own layers."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 192, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 192))
        self.pos = nn.Parameter(torch.randn(1, 197, 192) * 0.02)
        layer = nn.TransformerEncoderLayer(
            192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 1000)

    def forward(self, x):
        rows = self.patch(x).flatten(2).transpose(1, 2)
        rows = torch.cat([self.token.expand(len(x), -1, -1), rows], 1) + self.pos
        return self.head(self.norm(self.body(rows))[:, 0])


class Block(nn.Module):
    """A decoder block of Llama 2 70B: 8192 wide, 8 of 64 heads keep keys, 28672 hidden."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(8192), nn.RMSNorm(8192)
        self.q, self.o = nn.Linear(8192, 8192, bias=False), nn.Linear(8192, 8192, bias=False)
        self.k, self.v = nn.Linear(8192, 1024, bias=False), nn.Linear(8192, 1024, bias=False)
        self.gate, self.up = (nn.Linear(8192, 28672, bias=False) for _ in range(2))
        self.down = nn.Linear(28672, 8192, bias=False)


def highest_megabytes() -> float:
    """Linux hands ``ru_maxrss`` on from parent to child; its own mark belongs to this program."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def audit_70_billion() -> dict[str, float]:
    """Run in a fresh process, since the highest memory of a process never falls."""
    import learnables as ln

    with torch.device("meta"):
        model = nn.Module()
        model.embedding = nn.Embedding(32000, 8192)
        model.blocks = nn.ModuleList([Block() for _ in range(80)])
        model.norm = nn.RMSNorm(8192)
        model.head = nn.Linear(8192, 32000, bias=False)
    before = highest_megabytes()
    start = time.process_time()
    report = ln.audit(model)
    seconds = time.process_time() - start
    return {
        "values": sum(p.numel() for p in model.parameters()),
        "parameters": len(report.parameters),
        "findings": len(report.findings),
        "seconds": round(seconds, 2),
        "megabytes": round(highest_megabytes() - before, 1),
    }


def main() -> None:
    if sys.argv[1:] == ["70-billion"]:
        print(json.dumps(audit_70_billion()))
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, y = torch.randn(8, 3, 224, 224), torch.randint(0, 1000, (8,))

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    trace = Trace(model.parameters())
    observer = Observer(survey(model, [optimizer], None, {}))

    def traced():
        with trace:
            trace.begin()
            step()

    def observed():
        with observer:
            observer.begin()
            observer.end(step())

    small = Observer(survey(model, [optimizer], None, {}), budget=0)

    def without_snapshots():
        with small:
            small.begin()
            small.end(step())

    tasks = {
        "traced": traced,
        "without snapshots": without_snapshots,
        "observed": observed,
        "after": step,
    }
    timings = paired(step, tasks, rounds=7)
    for name, timing in timings.items():
        print(f"{name:18s} {timing.median * 1e3:8.1f} ms  {timing.ratio:.2f} x")
    command = [sys.executable, __file__, "70-billion"]
    large = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    print("70 billion", large)
    held = len(list(model.parameters()))
    more = {"model": "ViT-Tiny/16, batch 8", "parameters": held, "70 billion": large}
    save("audit", timings, **more)


if __name__ == "__main__":
    main()
