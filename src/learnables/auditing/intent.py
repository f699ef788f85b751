"""What the author meant, and what was loaded, where the model itself does not say so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from learnables._torch import without_wrappers
from learnables.arguments import require_as_annotated
from learnables.notes import Note

Names: TypeAlias = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Intent:
    """What the author meant. What the model declares is known without it.

    Names are qualified names, prefixes of them (``"backbone"``), or globs (``"*.bias"``).

    Attributes:
        trainable: What has to train.
        frozen: What must not move.
        frozen_rows: Name → indices along the first dimension that must not move.
        tied: Groups of names that are meant to be one Parameter; an empty list says that nothing
            is shared.
        lr: Name → learning rate. Their ratios are compared, so a schedule may scale them.
        weight_decay: Name → decay coefficient.
        constraints: Name → set from ``ln.sets``, or any object with ``contains`` and ``violation``.
        masks: Name → tensor that broadcasts to the parameter; where it is 0 the value stays 0.
        pretrained: Name → the value it is meant to start from.
        max_norm: The limit of the gradient norm.
        surrogate: Parameters whose gradient is meant to differ from the derivative:
            straight-through estimators, gradient reversal.

    Example:
        >>> import learnables as ln
        >>> ln.Intent(frozen=["backbone"], lr={"prompt": 0.1}).frozen
        ['backbone']
    """

    trainable: Names = ()
    frozen: Names = ()
    frozen_rows: Mapping[str, Any] = field(default_factory=dict)
    tied: Sequence[Sequence[str]] | None = None
    lr: Mapping[str, float] = field(default_factory=dict)
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    constraints: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    pretrained: Mapping[str, Tensor] = field(default_factory=dict)
    max_norm: float | None = None
    surrogate: Names = ()

    def __post_init__(self) -> None:
        require_as_annotated(type(self), (), vars(self))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was loaded before the audit, as far as the caller still has it.

    Attributes:
        state_dict: The checkpoint, names as in the file.
        report: What ``load_state_dict`` returned: missing and unexpected keys.
        optimizer_state: The optimizer's state dict in the checkpoint.
        param_names: The parameter names in the order the checkpoint's optimizer numbered them.
    """

    state_dict: Mapping[str, Any] | None = None
    report: Any = None
    optimizer_state: Mapping[str, Any] | None = None
    param_names: Sequence[str] | None = None


def means(pattern: str, name: str) -> bool:
    """Whether ``pattern`` (a name, a prefix, a glob) means the parameter ``name``."""
    from fnmatch import fnmatchcase

    for candidate in (name, without_wrappers(name)):
        if candidate == pattern or candidate.startswith(f"{pattern}."):
            return True
        if fnmatchcase(candidate, pattern):
            return True
    return False


def declared_constraint(note: Note) -> Any:
    """The set that ``ln.parameter`` or ``ln.annotate`` declared, if any."""
    return note.get("constraint")
