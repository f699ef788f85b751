"""Which of 25 hand-written parameters does each published rule decay toward zero?

    python benchmarks/decay.py

The model is ``tests/handwritten.py``: 22 parameters that should not be decayed, 3 that should.
Rules of timm and transformers are theirs, called from the installed package, and left out where it
is not installed; the others are the one-line conditions of the cited files.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import save
from tests.gloo import one_process_group
from tests.handwritten import DECAYED, Handwritten, Wrapper
from tests.integrations.shim import ensure_torchvision

import learnables as ln

Rule = Callable[[nn.Module], set[str]]


def ours(model: nn.Module) -> set[str]:
    groups = ln.param_groups(model, lr=1e-3, weight_decay=0.05)
    return {name for g in groups if g["weight_decay"] for name in g["param_names"]}


def by_condition(decays: Callable[[str, nn.Parameter], bool]) -> Rule:
    return lambda model: {n for n, p in model.named_parameters() if decays(n, p)}


RULES: dict[str, Rule] = {
    "nanoGPT (model.py)": by_condition(lambda n, p: p.dim() >= 2),
    "DINO v1 (utils.py)": by_condition(lambda n, p: not (n.endswith(".bias") or p.ndim == 1)),
    "DINOv2 (param_groups.py)": by_condition(
        lambda n, p: not (n.endswith(".bias") or "norm" in n or "gamma" in n)
    ),
    "DINOv3 (param_groups.py)": by_condition(
        lambda n, p: not (n.endswith("bias") or "norm" in n or "gamma" in n or "fourier_w" in n)
    ),
    "Swin (optimizer.py)": by_condition(
        lambda n, p: not (p.ndim == 1 or n.endswith(".bias") or "relative_position_bias_table" in n)
    ),
    "torchtitan (default)": by_condition(lambda n, p: True),
}


def add_installed_rules() -> None:
    ensure_torchvision()
    try:
        import timm.optim
    except ImportError:
        print("timm is not installed: its row is left out")
    else:

        def timm_rule(model: nn.Module) -> set[str]:
            listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
            groups = timm.optim.param_groups_weight_decay(
                model, 0.05, no_weight_decay_list=tuple(listed)
            )
            held = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
            return {n for n, p in model.named_parameters() if id(p) in held}

        RULES[f"timm {timm.__version__}"] = timm_rule
    try:
        import transformers
        from transformers.trainer_pt_utils import get_parameter_names
    except ImportError:
        print("transformers is not installed: its row is left out")
        return
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    RULES[f"HF Trainer {transformers.__version__}"] = lambda model: set(
        get_parameter_names(model, [nn.LayerNorm], patterns)
    )


def wrong(rule: Rule, model: nn.Module) -> int:
    """Parameters decayed that should not be, or spared that should be decayed."""
    wanted = {n for n, _ in model.named_parameters() if any(n.endswith(d) for d in DECAYED)}
    return len(rule(model) ^ wanted)


def main() -> None:
    add_installed_rules()
    rows = {}
    with one_process_group():
        for name, rule in {"learnables": ours, **RULES}.items():
            rows[name] = {
                "bare": wrong(rule, Handwritten()),
                "wrapped": wrong(rule, Wrapper()),
                "compiled": wrong(rule, torch.compile(Handwritten())),
                "ddp": wrong(rule, nn.parallel.DistributedDataParallel(Handwritten())),
            }
    print("| rule | bare | in a module | torch.compile | DDP |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(str(v) for v in row.values()) + " |")
    save("decay", rows, wrong_of=25)


if __name__ == "__main__":
    main()
