"""Learnable parameters you write yourself: build them, prove them, constrain, scale, watch them."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it. Resolved on first use (PEP 562), so that
# `import learnables` costs nothing and imports nothing but this file.
_HOME = {
    "Checkpoints": "learnables.runtime.kept",
    "Intent": "learnables.auditing.intent",
    "Loaded": "learnables.auditing.intent",
    "annotate": "learnables.declare",
    "attach": "learnables.policy.attach",
    "audit": "learnables.auditing.run",
    "canonicalize_": "learnables.runtime.layout",
    "constrain": "learnables.sets.registration",
    "freeze": "learnables.grafting.freezing",
    "graft": "learnables.grafting.graft",
    "inventory": "learnables.policy.table",
    "load_checkpoint": "learnables.runtime.restoring",
    "load_delta": "learnables.grafting.delta",
    "observe": "learnables.auditing.run",
    "param_groups": "learnables.policy.groups",
    "parameter": "learnables.declare",
    "prepare": "learnables.launch",
    "promotions": "learnables.runtime.precision",
    "save_checkpoint": "learnables.runtime.checkpoint",
    "save_delta": "learnables.grafting.delta",
    "silence": "learnables.auditing.silence",
    "sparsify": "learnables.nn.sparsification",
    "statistics": "learnables.stats",
    "tie": "learnables.sharing.tie",
    "train_only": "learnables.grafting.freezing",
    "unconstrain": "learnables.sets.registration",
    "untie": "learnables.sharing.tie",
    "violation": "learnables.sets.registration",
    "watch": "learnables.watching.recorder",
    "write_html": "learnables.report.html",
}
_PACKAGES = ("dynamic", "init", "nn", "sets", "sparse")

__all__ = [*_HOME, *_PACKAGES]

if TYPE_CHECKING:
    from learnables import dynamic as dynamic
    from learnables import init as init
    from learnables import nn as nn
    from learnables import sets as sets
    from learnables import sparse as sparse
    from learnables.auditing.intent import Intent as Intent
    from learnables.auditing.intent import Loaded as Loaded
    from learnables.auditing.run import audit as audit
    from learnables.auditing.run import observe as observe
    from learnables.auditing.silence import silence as silence
    from learnables.declare import annotate as annotate
    from learnables.declare import parameter as parameter
    from learnables.grafting.delta import load_delta as load_delta
    from learnables.grafting.delta import save_delta as save_delta
    from learnables.grafting.freezing import freeze as freeze
    from learnables.grafting.freezing import train_only as train_only
    from learnables.grafting.graft import graft as graft
    from learnables.launch import prepare as prepare
    from learnables.nn.sparsification import sparsify as sparsify
    from learnables.policy.attach import attach as attach
    from learnables.policy.groups import param_groups as param_groups
    from learnables.policy.table import inventory as inventory
    from learnables.report.html import write_html as write_html
    from learnables.runtime.checkpoint import save_checkpoint as save_checkpoint
    from learnables.runtime.kept import Checkpoints as Checkpoints
    from learnables.runtime.layout import canonicalize_ as canonicalize_
    from learnables.runtime.precision import promotions as promotions
    from learnables.runtime.restoring import load_checkpoint as load_checkpoint
    from learnables.sets.registration import constrain as constrain
    from learnables.sets.registration import unconstrain as unconstrain
    from learnables.sets.registration import violation as violation
    from learnables.sharing.tie import tie as tie
    from learnables.sharing.tie import untie as untie
    from learnables.stats import statistics as statistics
    from learnables.watching.recorder import watch as watch


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _PACKAGES:
        value = import_module(f"learnables.{name}")
    else:
        raise AttributeError(f"module 'learnables' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
