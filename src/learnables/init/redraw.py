"""Run declared initialisers again, as after meta construction and ``to_empty``."""

import torch
from torch import nn

from learnables.entries import Entry, entries
from learnables.init.base import initialise_
from learnables.notes import Note, note_of, put_note
from learnables.select import Selector, select


def reset_(
    model: nn.Module, selector: Selector = "*", *, generator: torch.Generator | None = None
) -> tuple[Entry, ...]:
    """Draw every declared parameter anew, in place, by the initialiser it was declared with.

    Needed after ``with torch.device("meta")`` and ``to_empty``: the values are arbitrary memory
    then, and only modules that have a ``reset_parameters`` of their own are refilled by others.
    Where ``weight_decay="init"`` was declared, the value to decay toward becomes the new one.

    Args:
        model: The model, bare or wrapped.
        selector: Which parameters; those of them without a declared initialiser are left alone.
        generator: Source of randomness; torch's default generator when None.

    Returns:
        The entries that were drawn, in the order of the walk; the rest is yours to fill.

    Raises:
        SelectionError: The selector picks nothing.

    Example:
        >>> import learnables as ln
        >>> with torch.device("meta"):
        ...     scale = ln.nn.LayerScale(2)
        >>> [entry.name for entry in reset_(scale.to_empty(device="cpu"))]
        ['gamma']
        >>> scale.gamma
        Parameter containing:
        tensor([1.0000e-04, 1.0000e-04], requires_grad=True)
    """
    drawn = []
    for entry in select(entries(model), selector):
        place = next((p for p in entry.places if p.note.get("init") is not None), None)
        if place is not None and redraw_(place.owner, place.local_name, generator=generator):
            drawn.append(entry)
    return tuple(drawn)


def redraw_(owner: nn.Module, local_name: str, *, generator: torch.Generator | None = None) -> bool:
    """Draw one parameter of ``owner`` anew; False where no initialiser was declared for it."""
    param, note = owner._parameters[local_name], note_of(owner, local_name)
    init = note.get("init")
    if param is None or init is None:
        return False
    with torch.no_grad():
        initialise_(param, init, role=note.get("role"), generator=generator)
        if note.initial is not None:
            initial = param.detach().clone()
            put_note(owner, local_name, Note(note.declared, note.annotated, initial))
    return True
