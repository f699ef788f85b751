"""What was declared about a parameter, kept on the module that owns it.

A note lives in the owner's ``__dict__`` under one attribute, keyed by the parameter's local name.
That place survives ``.to()``, ``deepcopy``, pickling, ``to_empty``, ``torch.compile``, DDP, FSDP2
and ``load_state_dict(assign=True)``, all of which replace or wrap the Parameter object itself.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from learnables.errors import PolicyError

FIELDS = (
    "weight_decay",
    "lr_scale",
    "storage_dtype",
    "compute_dtype",
    "rounding",
    "memory_format",
    "constraint",
    "resize",
    "init",
    "role",
    "tags",
)
_ATTRIBUTE = "_learnables_notes"
_PACKAGE = str(Path(__file__).parent)
_STATING = (__file__, str(Path(__file__).with_name("declare.py")))  # hand on what others state
_TORCH = str(Path(torch.__file__).parent)
_COMMANDS = ("typer", "click")  # what starts our own commands


@dataclass(frozen=True)
class Statement:
    """Some policy fields that one line of somebody's code declared.

    Attributes:
        fields: Field name → value; only what was said.
        at: ``file:line`` of the call outside this package.
        by: The call that said it, e.g. ``ln.parameter``.
    """

    fields: Mapping[str, Any]
    at: str
    by: str

    def __getstate__(self) -> dict[str, Any]:
        """A layout by its name: torch's own pickle of it needs protocol 4, torch.save uses 2."""
        fields = dict(self.fields)
        if isinstance(fields.get("memory_format"), torch.memory_format):
            fields["memory_format"] = str(fields["memory_format"])
        return {**vars(self), "fields": fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The reverse."""
        fields = state["fields"]
        if isinstance(fields.get("memory_format"), str):
            layout = getattr(torch, fields["memory_format"].removeprefix("torch."))
            fields = {**fields, "memory_format": layout}
        vars(self).update(state, fields=fields)


@dataclass(frozen=True)
class Note:
    """Everything said about one parameter, and its value when that was said.

    Attributes:
        declared: What ``ln.parameter`` was given; None for a plain Parameter.
        annotated: What each ``ln.annotate`` call added, oldest first.
        initial: The value to decay toward; kept only where ``weight_decay="init"``.
    """

    declared: Statement | None = None
    annotated: tuple[Statement, ...] = ()
    initial: Tensor | None = field(default=None, compare=False)

    def get(self, name: str) -> Any:
        """The strongest statement about field ``name``: annotated before declared, else None."""
        for statement in (*reversed(self.annotated), self.declared):
            if statement is not None and name in statement.fields:
                return statement.fields[name]
        return None


def caller() -> str:
    """``file:line`` of the nearest frame outside this package and outside torch's machinery.

    Where one of our own commands builds the model no such frame is anybody's code, only the command
    line's: then it is the line of ours that states the policy.
    """
    frame: FrameType | None = sys._getframe(1)
    ours, at = "", ""
    while frame is not None:
        file = frame.f_code.co_filename
        at = f"{file}:{frame.f_lineno}"
        if file.startswith(_PACKAGE):
            ours = ours or ("" if file in _STATING else at)
        elif str(frame.f_globals.get("__name__")).partition(".")[0] in _COMMANDS:
            break
        elif not file.startswith(_TORCH):
            return at
        frame = frame.f_back
    return ours or at


def notes_of(owner: nn.Module) -> dict[str, Note]:
    """Local name → note for the parameters of ``owner`` itself; a live, possibly empty dict."""
    notes: dict[str, Note] = owner.__dict__.get(_ATTRIBUTE, {})
    return notes


def note_of(owner: nn.Module, local_name: str) -> Note:
    """The note about one parameter of ``owner``; an empty one where nothing was said."""
    return notes_of(owner).get(local_name, Note())


def put_note(owner: nn.Module, local_name: str, note: Note) -> None:
    """Keep ``note`` on ``owner``."""
    owner.__dict__.setdefault(_ATTRIBUTE, {})[local_name] = note


def add_annotation(note: Note, statement: Statement, where: str) -> Note:
    """``note`` with one annotation more; a call on the same line replaces its earlier self.

    Raises:
        PolicyError: Another line already annotated the same field otherwise.
    """
    kept = tuple(s for s in note.annotated if s.at != statement.at)
    for earlier in kept:
        for name, value in statement.fields.items():
            if name in earlier.fields and name != "tags" and earlier.fields[name] != value:
                raise PolicyError(
                    f"two annotations disagree on {name}",
                    where=where,
                    found=f"{name}={earlier.fields[name]!r} at {earlier.at}, "
                    f"{name}={value!r} at {statement.at}",
                    wanted="one annotation of each field",
                    mend="remove one of the two lines",
                )
    return replace(note, annotated=(*kept, statement))
