"""Section 2.1 of the article: a learnable colour correction.

What the article's own code does wrong: it decays the matrix toward zero, which darkens the picture,
and permutes to NHWC and back for what one fused matrix product on NCHW does.
"""

import torch

import learnables as ln


def main() -> None:
    torch.manual_seed(0)
    colour = ln.nn.ColorMatrix(channels=3)
    pictures = torch.rand(64, 3, 16, 16)
    cast = torch.tensor([[0.8, 0.1, 0.0], [0.1, 0.9, 0.2], [0.0, 0.0, 0.7]])  # what a bad lamp does
    seen = torch.einsum("oc,bchw->bohw", cast, pictures) + 0.05

    optimizer = torch.optim.AdamW(ln.param_groups(colour, lr=0.02, weight_decay=1e-3))
    ln.attach(colour, optimizer)  # the matrix decays toward the identity
    for _ in range(400):
        optimizer.zero_grad()
        loss = (colour(seen) - pictures).square().mean()
        loss.backward()
        optimizer.step()
    print(ln.inventory(colour))
    before = (seen - pictures).square().mean()
    print(f"mean squared error {loss.item():.1e}; without the layer {before.item():.1e}")


if __name__ == "__main__":
    main()
