"""Everything that can be set about a training run of the ViT recipe, and the presets.

This file imports no torch, so that ``learnables train vit --help`` is quick.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from learnables.errors import LearnablesError


@dataclass(frozen=True)
class Config:
    """One training run. The defaults are the preset ``digits``.

    Attributes:
        data: ``"digits"``, ``"fashion-mnist"``, or a folder of images.
        data_dir: Where Fashion-MNIST's files lie; Debian's place when None.
        image_size: Pixels that images of a folder are resized to.
        channels: 1 for grey, 3 for colour; for images of a folder.
        patch_size: See `learnables.models.vit.ViTConfig`, as for all up to ``color_matrix``.
        stem: ``"patch"`` or ``"conv"``.
        dim: Width of a token.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP, as a multiple of ``dim``.
        pool: ``"class"`` or ``"mean"``.
        registers: Number of register tokens.
        layer_scale: Where the factors on the branches start; None leaves them out.
        drop_path: Stochastic depth of the last block.
        qk_norm: Whether queries and keys are normalised.
        color_matrix: Whether a learned colour matrix comes first.
        rotate: See `learnables.recipes.vit.augment.Augmentation`, as for all up to ``padding``.
        scale: Largest relative change of size.
        shear: Largest shear, in degrees.
        shift: Largest shift, as a share of the image.
        flip: Whether half of the images are mirrored.
        erase: Chance that a rectangle is erased.
        mixup: Parameter of mixup; 0 is off.
        cutmix: Parameter of CutMix; 0 is off.
        mix_chance: Chance that an image is mixed.
        padding: What lies beyond the border of a moved image.
        epochs: Passes over the training images.
        batch_size: Images per optimizer step, over all processes and micro-batches.
        accumulate: Micro-batches that a process cuts its share of a batch into.
        lr: Highest learning rate.
        weight_decay: Coefficient for what decays.
        beta2: AdamW's second decay rate.
        warmup: Share of the steps in which the learning rate rises; it falls as a cosine after.
        clip: Longest gradient; 0 is off.
        label_smoothing: Share of the target that all classes share.
        ema: Decay of the averaged weights per step, which are then the result; 0 is off.
        precision: ``"fp32"``, ``"bf16"`` autocast, or ``"fp16"`` autocast with a gradient scaler.
        compile: Whether the model is compiled.
        seed: Of the initial values, the order and the augmentation.
        device: ``"auto"``, or one that torch knows.
        strategy: How many processes share the model: ``"ddp"`` gives each a copy, ``"fsdp2"`` a
            part of it. It means nothing for one process alone.
        max_steps: End after this many steps, for a dry run; 0 is off.
        watch_every: Steps between two looks at every parameter; 0 is off.
        watch_budget: Longest time for looking, as a share of the time for training;
            0 is no bound.
        save_seconds: Least time between two checkpoints, which are written where an epoch ends.
    """

    # what is learned from
    data: str = "digits"
    data_dir: str | None = None
    image_size: int = 32
    channels: int = 3
    # the model
    patch_size: int = 2
    stem: Literal["patch", "conv"] = "conv"
    dim: int = 64
    depth: int = 3
    heads: int = 4
    mlp_ratio: float = 2.0
    pool: Literal["class", "mean"] = "class"
    registers: int = 0
    layer_scale: float | None = None
    drop_path: float = 0.0
    qk_norm: bool = False
    color_matrix: bool = True
    # what is done to the images
    rotate: float = 8.0
    scale: float = 0.08
    shear: float = 5.0
    shift: float = 0.08
    flip: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_chance: float = 0.5
    padding: Literal["zeros", "border", "reflection"] = "zeros"
    # how it is trained
    epochs: int = 60
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 2e-3
    weight_decay: float = 0.05
    beta2: float = 0.99
    warmup: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 0.1
    ema: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    seed: int = 0
    # where and how long
    device: str = "auto"
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    max_steps: int = 0
    watch_every: int = 50
    watch_budget: float = 0.0075
    save_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            value = getattr(self, name)
            _demand(value >= low, name, value, f"at least {low}")
        for name in ("warmup", "mix_chance", "erase", "label_smoothing"):
            value = getattr(self, name)
            _demand(0 <= value <= 1, name, value, "a number from 0 to 1")
        for name in ("ema", "drop_path"):
            value = getattr(self, name)
            _demand(0 <= value < 1, name, value, "a number from 0 to less than 1")

    def part(self, kind: type) -> dict[str, Any]:
        """The fields that the dataclass ``kind`` has too."""
        return {f.name: getattr(self, f.name) for f in fields(kind) if hasattr(self, f.name)}

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Config":
        """A config from plain data.

        Raises:
            LearnablesError: A field is unknown or has a wrong type.
        """
        hints = get_type_hints(cls)
        for name, value in data.items():
            _demand_known(name)
            _demand(_fits(value, hints[name]), name, value, _says(hints[name]))
        return cls(**data)


#: What differs from the defaults, by preset. The default preset of a data set has its name.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    # 0.16 M parameters, 5 epochs: minutes on two CPU cores.
    "fashion-mnist": {
        "data": "fashion-mnist",
        "patch_size": 4,
        "depth": 4,
        "rotate": 0.0,
        "scale": 0.0,
        "shear": 0.0,
        "shift": 0.04,
        "flip": True,
        "epochs": 5,
        "batch_size": 256,
        "label_smoothing": 0.05,
    },
    # 0.9 M parameters, 60 epochs, for one GPU.
    "fashion-mnist-gpu": {
        "data": "fashion-mnist",
        "patch_size": 4,
        "dim": 128,
        "depth": 6,
        "pool": "mean",
        "layer_scale": 0.1,
        "drop_path": 0.1,
        "qk_norm": True,
        "rotate": 5.0,
        "scale": 0.08,
        "shear": 0.0,
        "shift": 0.08,
        "flip": True,
        "erase": 0.25,
        "cutmix": 1.0,
        "mixup": 0.2,
        "epochs": 60,
        "batch_size": 512,
        "lr": 2e-3,
        "ema": 0.998,
        "precision": "bf16",
    },
    # Any folder of photographs.
    "folder": {
        "image_size": 32,
        "patch_size": 4,
        "dim": 128,
        "depth": 6,
        "registers": 4,
        "layer_scale": 0.1,
        "drop_path": 0.1,
        "flip": True,
        "erase": 0.25,
        "mixup": 0.2,
        "cutmix": 1.0,
        "padding": "reflection",
        "epochs": 100,
        "batch_size": 128,
        "lr": 1e-3,
        "ema": 0.998,
    },
}


def choose(
    data: str | None = None, preset: str | None = None, changes: Mapping[str, Any] | None = None
) -> Config:
    """The config of a preset, or of the data set's own preset, with some fields changed.

    Args:
        data: The data set; that of the preset when None.
        preset: A name among `PRESETS`; that of the data set, else ``"folder"``, when None.
        changes: Field → value; strings are read as the field's type.

    Raises:
        LearnablesError: There is no such preset or field, or a value does not fit its field.

    Example:
        >>> choose("fashion-mnist", changes={"epochs": "2"}).epochs
        2
    """
    if preset is None:
        preset = "digits" if data is None else data if data in PRESETS else "folder"
    if preset not in PRESETS:
        raise LearnablesError(
            "there is no such preset", found=repr(preset), wanted=f"one of {', '.join(PRESETS)}"
        )
    chosen = {**PRESETS[preset], **({} if data is None else {"data": data})}
    return Config.from_json({**chosen, **read_changes(changes or {})})


def read_changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values given as text, as the types of their fields.

    Raises:
        LearnablesError: A field is unknown, or a text does not fit it.
    """
    hints = get_type_hints(Config)
    out = {}
    for name, value in changes.items():
        _demand_known(name)
        out[name] = _read(name, value, hints[name]) if isinstance(value, str) else value
    return out


_LEAST: dict[str, float] = {
    "image_size": 1,
    "patch_size": 1,
    "dim": 1,
    "depth": 1,
    "heads": 1,
    "registers": 0,
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "lr": 0,
    "weight_decay": 0,
    "clip": 0,
    "max_steps": 0,
    "watch_every": 0,
    "watch_budget": 0,
    "save_seconds": 0,
}


def _read(name: str, text: str, hint: Any) -> Any:
    for kind in _kinds(hint):
        if get_origin(kind) is Literal and text in get_args(kind):
            return text
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str:
            return text
    return _demand(False, name, text, _says(hint))


def _fits(value: Any, hint: Any) -> bool:
    return any(
        value in get_args(kind)
        if get_origin(kind) is Literal
        else isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float
        else type(value) is kind
        for kind in _kinds(hint)
    )


def _kinds(hint: Any) -> Iterable[Any]:
    many = get_origin(hint) in (Union, types.UnionType)
    return sorted(get_args(hint), key=lambda kind: kind is str) if many else [hint]


def _says(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return " or ".join(
        ", ".join(get_args(kind)) if get_origin(kind) is Literal else words.get(kind, "none")
        for kind in _kinds(hint)
    )


def _demand(is_fine: bool, name: str, value: object, wanted: str) -> None:
    if not is_fine:
        raise LearnablesError(
            "a setting of the recipe has a value that means nothing",
            where=name,
            found=repr(value),
            wanted=wanted,
        )


def _demand_known(name: str) -> None:
    names = [f.name for f in fields(Config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, 3, 0.4)
        raise LearnablesError(
            "the recipe has no such setting",
            found=repr(name),
            wanted=f"{', '.join(near)}, …" if near else "a field of learnables.recipes.vit.Config",
            mend="docs/en/vit.md lists all settings",
        )
