"""Section 3.2 of the article: does a gradient arrive?

What the article's own code does wrong: it prints .grad by hand after one backward, which tells None
from a number, but neither why it is None nor that an optimizer later consumes something else.
"""

import torch
from torch import nn

import learnables as ln


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * self.scale.data)  # the right value, and no gradient


def main() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(32, 4), torch.randn(32, 1)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    report = ln.audit(model, optimizer, step)
    print(report)
    (finding,) = report.findings
    assert finding.where == ["scale"]
    assert finding.quote.startswith("return self.head(x * self.scale.data)")  # the guilty line


if __name__ == "__main__":
    main()
