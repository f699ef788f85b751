"""Section 4.3 of the article: hand-written parameters in mixed and in low precision.

What the article's own code does wrong: torch.cuda.amp is deprecated (torch.amp takes the device),
and "converted automatically" holds for matrix products only: an fp32 gamma promotes a bf16 stream.
What it does not say: in pure bf16 a gamma of 1 never moves, because each step is rounded away.
"""

import torch
from torch import nn

import learnables as ln


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x)) * self.gamma


def built(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), Block(64), Block(64), nn.Linear(64, 1)).to(device)


def data(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    return x.to(device), (torch.sin(2 * x[:, :1]) * x[:, 1:2]).to(device)


def under_autocast(device: str, dtype: torch.dtype) -> None:
    """Parameters in float32, the stream in 16 bits; float16 needs a scaler, bfloat16 does not."""
    model, (x, y) = built(device), data(device)
    with ln.promotions(model) as seen, torch.autocast(device, dtype=dtype):
        model(x)
    for name in seen.parameters:
        ln.annotate(model, name, compute_dtype="autocast")  # what seen.mend says
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=3e-3, weight_decay=0.05))
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = (model(x).float() - y).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # after unscale_, before step
        scaler.step(optimizer)
        scaler.update()
    with ln.promotions(model) as after, torch.autocast(device, dtype=dtype):
        model(x)
    name = str(dtype).removeprefix("torch.")
    print(
        f"autocast {name:9} loss {loss.item():.4f}, promotions {len(seen.found)} "
        f"by {', '.join(seen.parameters)}; after the cure {len(after.found)}"
    )
    assert not after.found


def stored_in(device: str, dtype: torch.dtype, rounding: str | None) -> float:
    """Everything in one dtype; returns how far gamma has gone."""
    model, (x, y) = built(device).to(dtype), data(device)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-3, weight_decay=0.0))
    ln.attach(model, optimizer, rounding=rounding)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
    own = [*model.parameters()]
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    size = sum(t.nbytes for t in [*own, *state]) / sum(p.numel() for p in own)
    moved = float((model[1].gamma.detach().float() - 1).abs().mean())
    name = f"{str(dtype).removeprefix('torch.')}, {rounding or 'plain'}"
    print(
        f"stored in {name:20} loss {loss.item():.4f}, gamma moved by {moved:.4f}, "
        f"{size:.1f} bytes per parameter and its state"
    )
    return moved


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.bfloat16, torch.float16):
        under_autocast(device, dtype)
    exact = stored_in(device, torch.float32, None)
    assert stored_in(device, torch.bfloat16, None) == 0  # never moves
    for rounding in ("kahan", "stochastic", "master"):
        moved = stored_in(device, torch.bfloat16, rounding)
        assert 0.5 * exact < moved < 2 * exact


if __name__ == "__main__":
    main()
