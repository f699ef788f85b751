"""Section 3.3 of the article: does the value really move?

What the article's own code does wrong: it prints parameter.data before and after the step, and both
prints show a view of the same memory if the first is kept; ln.audit keeps copies, for four steps.
"""

import torch
from torch import nn

import learnables as ln


def main() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    model.gamma = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    model.forward = lambda x: nn.functional.linear(x * model.gamma, model.weight, model.bias)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3))
    x, y = torch.randn(32, 8), torch.randn(32, 1)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    report = ln.audit(model, optimizer, step)
    print(report.parameters)  # value and gradient before and after, update, ratio
    print(report)  # 1.0 ± 0.001 rounds to 1.0 in bfloat16: gamma never moves
    (finding,) = report.findings
    assert finding.where == ["gamma"]


if __name__ == "__main__":
    main()
