"""A colour matrix in front of a frozen classifier, when the camera changes.

    python examples/pretrained/colour_before_dinov2.py --bf16
    python examples/pretrained/colour_before_dinov2.py --bf16 --loop lightning

A DINOv2 ViT-S/14 with a linear head knows clothes as one camera shows them. The next camera mixes
the channels, is dark and has a haze. Twelve numbers in front of the model, trained on 200 pictures
of the new camera, bring the accuracy back; the backbone and the head stay as they are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loops import LOOPS, Rows, Task, scores
from probe import linear_probe
from prompts_in_dinov2 import features, normalised
from torch import Tensor
from weights import dinov2, fashion

import learnables as ln

MIX = torch.tensor([[0.10, 0.02, 0.00], [0.05, 0.12, 0.03], [0.00, 0.04, 0.08]])
HAZE = torch.tensor([0.55, 0.35, 0.15])


def other_camera(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1], in 256 steps as a file has them."""
    seen = torch.einsum("oc,nchw->nohw", MIX, images) + HAZE.view(3, 1, 1)
    return seen.mul(255).round().clamp(0, 255) / 255


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=LOOPS, default="plain")
    parser.add_argument("--size", type=int, default=56, help="side of the pictures, 14 × n")
    parser.add_argument("--train", type=int, default=1000, help="pictures of the first camera")
    parser.add_argument("--new", type=int, default=200, help="pictures of the second one")
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--bf16", action="store_true", help="autocast: where the CPU has it")
    wanted = parser.parse_args(arguments)
    torch.manual_seed(0)

    model = dinov2(wanted.size, num_classes=10)
    x, y, x_test, y_test = fashion(wanted.size, wanted.train + wanted.new, wanted.test)
    task, old = Task(model), slice(wanted.train)
    head = linear_probe(features(model, normalised(x[old]), wanted.bf16), y[old], 10)
    model.head.load_state_dict(head.state_dict())
    new = slice(wanted.train, None)
    train = Rows(x=normalised(other_camera(x[new])), labels=y[new])
    test = Rows(x=normalised(other_camera(x_test)), labels=y_test)
    before = scores(task, Rows(x=normalised(x_test), labels=y_test), wanted.bf16)
    shifted = scores(task, test, wanted.bf16)
    print(f"first camera {before:.1%}, second camera {shifted:.1%}", flush=True)

    ln.graft(model, "colour", ln.nn.ColorMatrix(), at="", where="input")
    ln.train_only(model, "colour.*", stays="eval")
    LOOPS[wanted.loop](
        task,
        train,
        lr=0.1,
        epochs=wanted.epochs,
        batch=25,
        bf16=wanted.bf16,
    )
    recovered = scores(task, test, wanted.bf16)
    file = Path("runs/colour.safetensors")
    file.parent.mkdir(exist_ok=True)
    ln.save_delta(model, file)
    print(f"second camera with the matrix {recovered:.1%}; {file}: {file.stat().st_size} bytes")
    return {"before": before, "shifted": shifted, "recovered": recovered}


if __name__ == "__main__":
    main()
