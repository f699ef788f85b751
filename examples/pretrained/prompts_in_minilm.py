"""Prompt tuning of the pretrained sentence encoder MiniLM: which library does a sentence document?

    python examples/pretrained/prompts_in_minilm.py
    python examples/pretrained/prompts_in_minilm.py --loop transformers

The texts are first sentences of docstrings of six libraries that are installed beside torch, with
their names blotted out. Eight tokens are grafted between [CLS] and the words, the mask of padding
is widened for them; they train together with the head, which starts as the best linear probe.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loops import LOOPS, Rows, Task, scores
from probe import linear_probe
from torch import Tensor, nn
from weights import minilm, sentences

import learnables as ln


class Classifier(nn.Module):
    """The mean of a sentence's words, as MiniLM was trained to be read, and a linear head."""

    def __init__(self, body: Any, classes: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.hidden_size, classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, N) → (B, 384)."""
        words = self.body(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(words.dtype)
        return (words * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.features(input_ids, attention_mask))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=LOOPS, default="plain")
    parser.add_argument("--train", type=int, default=150, help="sentences of each library")
    parser.add_argument("--test", type=int, default=150)
    parser.add_argument("--epochs", type=int, default=5)
    wanted = parser.parse_args(arguments)
    torch.manual_seed(0)

    tokenizer, body = minilm()
    texts, labels, test_texts, test_labels, libraries = sentences(wanted.train, wanted.test)

    def rows(texts: list[str], labels: Tensor) -> Rows:
        found = tokenizer(
            texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
        )
        return Rows(
            input_ids=found["input_ids"], attention_mask=found["attention_mask"], labels=labels
        )

    train, test = rows(texts, labels), rows(test_texts, test_labels)
    model = Classifier(body, len(libraries)).eval()
    task = Task(model)
    with torch.inference_mode():
        parts = zip(
            train.columns["input_ids"].split(50),
            train.columns["attention_mask"].split(50),
            strict=True,
        )
        seen = torch.cat([model.features(*part) for part in parts])
    head = linear_probe(seen.clone(), labels, len(libraries))
    model.head.load_state_dict(head.state_dict())
    probe = scores(task, test)
    print(f"linear probe of {len(texts)} sentences: {probe:.1%}")

    prompts = ln.nn.Prompts(8, body.config.hidden_size, prefix=1, init=ln.init.trunc_normal(0.02))
    ln.graft(model, "prompts", prompts)
    ln.train_only(model, ["prompts.*", "head.*"], stays="eval")
    LOOPS[wanted.loop](
        task,
        train,
        lr=2e-3,
        epochs=wanted.epochs,
        batch=25,
        policy={"*prompts.tokens": {"lr_scale": 10.0}},
        after_epoch=lambda: print(f"after an epoch: {scores(task, test):.1%}", flush=True),
    )
    prompted = scores(task, test)
    file = Path("runs/minilm.safetensors")
    file.parent.mkdir(exist_ok=True)
    ln.save_delta(model, file)
    print(f"linear probe {probe:.1%}, prompts {prompted:.1%}; {file}: {file.stat().st_size} bytes")
    return {"probe": probe, "prompts": prompted}


if __name__ == "__main__":
    main()
