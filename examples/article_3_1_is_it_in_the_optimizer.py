"""Section 3.1 of the article: is the parameter known to the optimizer?

What the article's own code does wrong: it prints model.named_parameters(), which says what the
model holds, not what the optimizer holds; a parameter added later is printed and never trained.
"""

import torch
from torch import nn

import learnables as ln


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.prompt = nn.Parameter(torch.zeros(4))  # too late: the optimizer has its list

    report = ln.audit(model, optimizer)
    print(report)
    (finding,) = report.findings
    assert finding.where == ["prompt"]
    exec(finding.mend, {"model": model, "optimizer": optimizer})  # a mend is a line to type
    print("\nafter the mend:", "clean" if ln.audit(model, optimizer).ok else "not clean")


if __name__ == "__main__":
    main()
