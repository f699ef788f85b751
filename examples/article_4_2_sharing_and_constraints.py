"""Section 4.2 of the article: a shared, transposed weight, an orthogonal matrix and a unit ball.

What the article's own code does wrong: it projects once, with a deprecated SVD for each matrix, and
the next step of the optimizer leaves the set again; its "ball" stretches every row to length 1.
"""

import torch
from torch import nn

import learnables as ln


class Autoencoder(nn.Module):
    """Two layers that share one matrix; codes are mixed by a rotation and kept in a ball."""

    def __init__(self, features: int, hidden: int, words: int) -> None:
        super().__init__()
        self.encode = nn.Linear(features, hidden, bias=False)
        self.decode = nn.Linear(hidden, features, bias=False)
        self.rotate = nn.Parameter(torch.randn(hidden, hidden))
        self.codes = nn.Parameter(0.1 * torch.randn(words, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.encode(x) @ self.rotate
        near = torch.softmax(hidden @ self.codes.T, dim=-1) @ self.codes
        return self.decode((hidden + near) @ self.rotate.T)


def main() -> None:
    torch.manual_seed(0)
    model = Autoencoder(features=32, hidden=8, words=16)
    ln.tie(model, "decode.weight", "encode.weight", transpose=True)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-2, weight_decay=0.01))
    ln.constrain(model, "rotate", ln.sets.Orthogonal(), optimizer=optimizer)
    ln.constrain(model, "codes", ln.sets.Ball(), optimizer=optimizer)

    data = torch.randn(256, 8) @ torch.randn(8, 32)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(data) - data).square().mean()
        loss.backward()
        optimizer.step()

    lengths = model.codes.detach().norm(dim=1)
    print(f"loss {loss.item():.2e}, variance of the data {data.var().item():.2e}")
    print(f"parameters: {', '.join(name for name, _ in model.named_parameters())}")
    print(f"how far outside: {ln.violation(model)}")
    print(f"row lengths of the ball: from {lengths.min():.2f} to {lengths.max():.2f}")
    assert torch.equal(model.decode.weight, model.encode.weight.T)
    assert max(ln.violation(model).values()) <= 1e-5


if __name__ == "__main__":
    main()
