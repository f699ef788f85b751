"""Visual prompt tuning of a pretrained DINOv2 ViT-S/14: which garment is at the upper left?

    python examples/pretrained/prompts_in_dinov2.py --bf16
    python examples/pretrained/prompts_in_dinov2.py --bf16 --loop lightning
    python examples/pretrained/prompts_in_dinov2.py --bf16 --pictures one

A picture shows four garments of Fashion-MNIST; the one at the upper left is asked for. The class
token of the frozen model speaks of all four, so that a linear probe of it has little to go by. 16
tokens grafted in front of the first block (VPT-shallow, arXiv:2203.12119) tell it where to look;
they train together with the head, and the 22 million other values are frozen. The head starts as
the best linear probe of the same pictures, and trains on from there once with prompts and once
without: whatever is between the two is the prompts'. With `--pictures one` the class token says
already what is asked for.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loops import LOOPS, Rows, Task, scores
from probe import linear_probe
from torch import Tensor
from weights import dinov2, fashion

import learnables as ln

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CLASSES, PROMPTS, RATE = 10, 16, 2e-3


def normalised(images: Tensor) -> Tensor:
    return (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def four(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Four pictures (S, S) as one (2 S, 2 S), and the label of the one at the upper left."""
    _, channels, height, width = images.shape
    grid = images.reshape(-1, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, 2 * height, 2 * width), labels[::4]


def pictures(
    kind: str, size: int, train: int, test: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 3, size, size) in [0, 1] and labels: train, test."""
    if kind == "one":
        return fashion(size, train, test, seed)
    x, y, x_test, y_test = fashion(size // 2, 4 * train, 4 * test, seed)
    return (*four(x, y), *four(x_test, y_test))


def features(model: Any, images: Tensor, bf16: bool) -> Tensor:
    """What the head of timm's model sees: the class token behind the last norm (N, 384)."""
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = [
            model.forward_head(model.forward_features(part), pre_logits=True).float()
            for part in images.split(50)
        ]
    return torch.cat(found).clone()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=LOOPS, default="plain")
    parser.add_argument("--pictures", choices=("four", "one"), default="four")
    parser.add_argument("--size", type=int, default=56, help="side of the pictures, 14 × n")
    parser.add_argument("--train", type=int, default=1000, help="pictures with a label")
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of pictures and values")
    parser.add_argument("--bf16", action="store_true", help="autocast: where the CPU has it")
    parser.add_argument("--json", type=Path, help="write the curves there")
    wanted = parser.parse_args(arguments)
    torch.manual_seed(wanted.seed)

    model = dinov2(wanted.size, num_classes=CLASSES)
    x, y, x_test, y_test = pictures(
        wanted.pictures, wanted.size, wanted.train, wanted.test, wanted.seed
    )
    train = Rows(x=normalised(x), labels=y)
    test = Rows(x=normalised(x_test), labels=y_test)
    fit = LOOPS[wanted.loop]
    options = {"epochs": wanted.epochs, "batch": wanted.batch, "bf16": wanted.bf16}

    clock = Clock()
    seen = features(model, train.columns["x"], wanted.bf16)
    head = linear_probe(seen, y, CLASSES)
    model.head.load_state_dict(head.state_dict())
    clock.pause()
    seen_test = Rows(input=features(model, test.columns["x"], wanted.bf16), labels=y_test)
    alone = Task(head)
    probe = scores(alone, seen_test, wanted.bf16)
    print(f"linear probe of {wanted.train} pictures: {probe:.1%}", flush=True)
    without = [probe]
    fit(
        alone,
        Rows(input=seen, labels=y),
        lr=RATE,
        **options,
        after_epoch=lambda: without.append(scores(alone, seen_test, wanted.bf16)),
    )
    clock.go_on()

    prompts = ln.nn.Prompts(PROMPTS, model.embed_dim, prefix=1, patch_size=14)
    ln.graft(model, "prompts", prompts)
    ln.train_only(model, ["prompts.*", "head.*"], stays="eval")
    task = Task(model)
    seconds, curve = [clock.seconds()], [probe]

    def after_epoch() -> None:
        clock.pause()
        seconds.append(clock.seconds())
        curve.append(scores(task, test, wanted.bf16))
        print(f"{seconds[-1]:4.0f} CPU seconds: {curve[-1]:.1%}", flush=True)
        clock.go_on()

    policy = {"*prompts.tokens": {"lr_scale": 10.0}}
    # At the full rate from the first step on, some draws of the prompts lose what the head knows.
    warmup = wanted.epochs * (wanted.train // wanted.batch) // 10
    fit(task, train, lr=RATE, policy=policy, warmup=warmup, **options, after_epoch=after_epoch)
    file = Path("runs/prompts.safetensors")
    file.parent.mkdir(exist_ok=True)
    ln.save_delta(model, file)
    print(
        f"linear probe {probe:.1%}, trained on alone {without[-1]:.1%}, "
        f"with prompts {curve[-1]:.1%}; {file}: {file.stat().st_size} bytes"
    )
    found = {
        "probe": probe,
        "alone": without[-1],
        "prompts": curve[-1],
        "seconds": seconds,
        "curve": curve,
        "curve alone": without,
        "options": {k: v for k, v in vars(wanted).items() if k != "json"},
    }
    if wanted.json:
        wanted.json.write_text(json.dumps(found), encoding="utf-8")
    return found


class Clock:
    """CPU seconds of this process, with pauses: testing is no training."""

    def __init__(self) -> None:
        self.before, self.since = 0.0, time.process_time()

    def pause(self) -> None:
        self.before += time.process_time() - self.since

    def go_on(self) -> None:
        self.since = time.process_time()

    def seconds(self) -> float:
        """Until the last pause."""
        return self.before


if __name__ == "__main__":
    main()
