"""What an observed step costs: ViT-Tiny/16 at 224, batch 8, AdamW, one thread.

    python benchmarks/audit.py

*traced*: the function mode alone. *observed*: events, looks at four points, snapshots and trace, as
`ln.audit` and `ln.observe` run it. *after*: a plain step once all of it is gone.
"""

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


def main() -> None:
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

    timings = paired(step, {"traced": traced, "observed": observed, "after": step}, rounds=7)
    for name, timing in timings.items():
        print(f"{name:10s} {timing.median * 1e3:8.1f} ms  {timing.ratio:.2f} x")
    save("audit", timings, model="ViT-Tiny/16, batch 8", parameters=len(list(model.parameters())))


if __name__ == "__main__":
    main()
