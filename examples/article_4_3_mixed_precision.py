"""Section 4.3 of the article: a hand-written parameter under automatic mixed precision.

What the article's own code does wrong: torch.cuda.amp is deprecated (torch.amp takes the device),
and "converted automatically" holds for matrix products only: an fp32 gamma promotes a bf16 stream.
"""

import torch
from torch import nn

import learnables as ln


class Block(nn.Module):
    def __init__(self, dim: int, cast: bool) -> None:
        super().__init__()
        self.cast = cast
        self.linear = nn.Linear(dim, dim)
        self.gamma = ln.parameter(dim, init=ln.init.constant(1e-4), weight_decay=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y * (self.gamma.to(y.dtype) if self.cast else self.gamma)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for cast in (False, True):
        model = nn.Sequential(Block(16, cast), Block(16, cast)).to(device)
        optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.05))
        scaler = torch.amp.GradScaler(device)
        x = torch.randn(8, 16, device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = model(x)
            loss = y.float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # after unscale_, before step
        scaler.step(optimizer)
        scaler.update()
        print(f"gamma {'cast at use' if cast else 'as it is   '}: the stream is {y.dtype}")
        assert y.dtype == (torch.bfloat16 if cast else torch.float32)


if __name__ == "__main__":
    main()
