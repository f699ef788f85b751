"""Visual prompt tuning of a pretrained DINOv2 ViT-S/14 on a thousand pictures of clothes.

    python examples/pretrained/prompts_in_dinov2.py --bf16
    python examples/pretrained/prompts_in_dinov2.py --bf16 --loop lightning

Eight tokens are grafted in front of the first block (VPT-shallow, arXiv:2203.12119) and train
together with the head; the 22 million other values are frozen. The head starts as the best linear
probe of the frozen features of the same pictures, so that whatever is gained is the prompts'.
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


def normalised(images: Tensor) -> Tensor:
    return (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


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
    parser.add_argument("--size", type=int, default=56, help="side of the pictures, 14 × n")
    parser.add_argument("--train", type=int, default=1000, help="pictures with a label")
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--bf16", action="store_true", help="autocast: where the CPU has it")
    parser.add_argument("--json", type=Path, help="write the curve there")
    wanted = parser.parse_args(arguments)
    torch.manual_seed(0)

    model = dinov2(wanted.size, num_classes=10)
    x, y, x_test, y_test = fashion(wanted.size, wanted.train, wanted.test)
    train = Rows(x=normalised(x), labels=y)
    test = Rows(x=normalised(x_test), labels=y_test)
    task = Task(model)

    started = time.process_time()
    head = linear_probe(features(model, train.columns["x"], wanted.bf16), y, 10)
    model.head.load_state_dict(head.state_dict())
    probe = scores(task, test, wanted.bf16)
    print(f"linear probe of {wanted.train} pictures: {probe:.1%}")

    ln.graft(model, "prompts", ln.nn.Prompts(8, model.embed_dim, prefix=1, patch_size=14))
    ln.train_only(model, ["prompts.*", "head.*"], stays="eval")
    curve = [(time.process_time() - started, probe)]
    tested = 0.0  # CPU seconds of testing, which are no training

    def after_epoch() -> None:
        nonlocal tested
        now = time.process_time()
        curve.append((now - started - tested, scores(task, test, wanted.bf16)))
        tested += time.process_time() - now
        print(f"{curve[-1][0]:4.0f} CPU seconds: {curve[-1][1]:.1%}", flush=True)

    LOOPS[wanted.loop](
        task,
        train,
        lr=2e-3,
        epochs=wanted.epochs,
        batch=wanted.batch,
        policy={"*prompts.tokens": {"lr_scale": 10.0}},
        bf16=wanted.bf16,
        after_epoch=after_epoch,
    )
    size = Path("runs/prompts.safetensors")
    size.parent.mkdir(exist_ok=True)
    ln.save_delta(model, size)
    print(
        f"linear probe {probe:.1%}, prompts {curve[-1][1]:.1%}; {size}: {size.stat().st_size} bytes"
    )
    found = {"probe": probe, "curve": curve, **{k: str(v) for k, v in vars(wanted).items()}}
    if wanted.json:
        wanted.json.write_text(json.dumps(found), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
