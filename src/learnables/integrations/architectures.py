"""Every architecture that an installed library can build offline, on the meta device.

A library is a class here; adding one with the two methods is the whole registration.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Protocol, final

import torch
from torch import nn

from learnables.errors import LearnablesError, SelectionError, need_extra

_SMALL = ("tiny", "nano", "pico", "atto", "_s", "small", "xs")


@final
@dataclass(frozen=True)
class Architecture:
    """One model that can be built.

    Attributes:
        name: What the library calls it.
        build: Builds it on the meta device: no weights, no download.
    """

    name: str
    build: Callable[[], nn.Module]


class Library(Protocol):
    """What a sweep needs to know of a library of models."""

    def architectures(self, patterns: Sequence[str]) -> Iterator[Architecture]:
        """Those whose name fits one of the globs; a sample or all where none is given."""

    def decayed(self, model: nn.Module) -> set[str]:
        """Names of the parameters that the library's own default groups decay toward zero."""


@final
class Timm:
    """timm: two models of each module, small ones first, or all that fit a pattern."""

    def __init__(self) -> None:
        try:
            import timm
        except ImportError as error:
            raise need_extra("timm", "timm", "learnables sweep timm") from error
        except RuntimeError as error:  # of a torchvision built for another torch
            raise LearnablesError(
                "timm cannot be imported",
                found=str(error),
                wanted="a torchvision that was built for the torch that is installed",
            ) from error
        self._timm = timm

    def architectures(self, patterns: Sequence[str] = ()) -> Iterator[Architecture]:
        """As the class says.

        Raises:
            SelectionError: No name fits.
        """
        if patterns:
            names = sorted({n for pattern in patterns for n in self._timm.list_models(pattern)})
            _require(names, patterns, self._timm.list_models())
        else:
            names = [
                name
                for module in self._timm.list_modules()
                for name in sorted(self._timm.list_models(module=module), key=_small_first)[:2]
            ]
        for name in names:
            yield Architecture(name, partial(self._build, name))

    def _build(self, name: str) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = self._timm.create_model(name, pretrained=False)
        return model

    def decayed(self, model: nn.Module) -> set[str]:
        """By ``timm.optim.param_groups_weight_decay`` with the model's own list."""
        from timm.optim import param_groups_weight_decay

        listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
        groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=tuple(listed))
        return _held(model, groups)


@final
class Transformers:
    """transformers: the base model of each registered configuration with its defaults."""

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            import transformers
        except ImportError as error:
            purpose = "learnables sweep transformers"
            raise need_extra("transformers", "transformers", purpose) from error
        transformers.logging.set_verbosity_error()
        self._transformers = transformers

    def architectures(self, patterns: Sequence[str] = ()) -> Iterator[Architecture]:
        """As the class says; many configurations have no base model or lack a default.

        Raises:
            SelectionError: No name fits.
        """
        every = list(self._transformers.CONFIG_MAPPING.keys())
        names = [n for n in every if not patterns or any(fnmatchcase(n, p) for p in patterns)]
        _require(names, patterns, every)
        for name in names:
            yield Architecture(name, partial(self._build, name))

    def _build(self, name: str) -> nn.Module:
        config = self._transformers.CONFIG_MAPPING[name]()
        with torch.device("meta"):
            model: nn.Module = self._transformers.AutoModel.from_config(config)
        return model

    def decayed(self, model: nn.Module) -> set[str]:
        """By the rule of ``transformers.Trainer``: what is no LayerNorm and has no such name."""
        from transformers.trainer_pt_utils import get_parameter_names

        patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
        return set(get_parameter_names(model, [nn.LayerNorm], patterns))


LIBRARIES: dict[str, Callable[[], Library]] = {"timm": Timm, "transformers": Transformers}


def _held(model: nn.Module, groups: list[dict[str, object]]) -> set[str]:
    held = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}  # type: ignore[attr-defined]
    return {name for name, p in model.named_parameters() if id(p) in held}


def _small_first(name: str) -> tuple[bool, int]:
    return not any(word in name for word in _SMALL), len(name)


def _require(found: Sequence[str], patterns: Sequence[str], every: Sequence[str]) -> None:
    if not found:
        import difflib

        near = difflib.get_close_matches(patterns[0].strip("*"), every, n=3, cutoff=0.3)
        raise SelectionError(
            "no architecture has such a name",
            found=", ".join(map(repr, patterns)),
            wanted=f"a glob over {len(every)} names, such as {', '.join(near) or every[0]}",
        )
