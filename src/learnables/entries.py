"""One walk over a model: which parameters there are, under which names, in which modules."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from learnables._torch import is_uninitialised, storage_key, without_wrappers
from learnables.arguments import require_module
from learnables.notes import Note, note_of


@dataclass(frozen=True, eq=False)
class Place:
    """One registration of a parameter: the module that owns it and the name it has there.

    Attributes:
        owner: The module whose ``_parameters`` holds it.
        local_name: The key in there.
        name: The qualified name, as ``named_parameters()`` gives it.
    """

    owner: nn.Module
    local_name: str
    name: str

    @property
    def note(self) -> Note:
        """What was declared at this place."""
        return note_of(self.owner, self.local_name)


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter of a model, whatever the number of names it goes by.

    Attributes:
        param: The parameter itself.
        places: Where it is registered, in registration order; more than one means it is tied.
        index: Position in the walk.
    """

    param: nn.Parameter
    places: tuple[Place, ...]
    index: int

    @property
    def name(self) -> str:
        """First qualified name in registration order; used in every message."""
        return self.places[0].name

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All qualified names."""
        return tuple(place.name for place in self.places)

    @cached_property
    def plain_names(self) -> tuple[str, ...]:
        """All names without what wrappers (DDP, compile, FSDP) put in front."""
        return tuple(without_wrappers(name) for name in self.names)

    @property
    def owner(self) -> nn.Module:
        """The module of the first name."""
        return self.places[0].owner

    @property
    def local_name(self) -> str:
        """The first name inside its owner."""
        return self.places[0].local_name

    @property
    def shape(self) -> torch.Size:
        """Shape; the global one for a DTensor."""
        return self.param.shape

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype."""
        return self.param.dtype

    @property
    def trainable(self) -> bool:
        """Whether it asks for a gradient."""
        return self.param.requires_grad

    @property
    def storage(self) -> tuple[str, int]:
        """Equal for two entries exactly when they share memory."""
        return storage_key(self.param)

    @property
    def initial(self) -> Tensor | None:
        """The value it decays toward, where one was declared."""
        return next((p.note.initial for p in self.places if p.note.initial is not None), None)

    @property
    def looks(self) -> str:
        """Shape, dtype and device in one short phrase for messages."""
        p = self.param
        if is_uninitialised(p):
            return f"lazy, without a shape yet, {str(p.dtype).removeprefix('torch.')}, {p.device}"
        return f"shape {tuple(p.shape)}, {str(p.dtype).removeprefix('torch.')}, {p.device}"


def entries(model: nn.Module) -> tuple[Entry, ...]:
    """List every distinct parameter of ``model`` once, in registration order.

    Raises:
        ArgumentError: ``model`` is no module.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> layer.alias = layer.weight
        >>> [entry.names for entry in entries(layer)]
        [('weight', 'alias'), ('bias',)]

    Cost:
        One pass over the modules; no tensor is read.
    """
    require_module(model)
    places: dict[nn.Parameter, list[Place]] = {}
    for place, param in _registrations(model):
        places.setdefault(param, []).append(place)
    return tuple(Entry(p, tuple(found), i) for i, (p, found) in enumerate(places.items()))


def _registrations(model: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local_name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{local_name}" if prefix else local_name
            yield Place(module, local_name, name), param
