"""What all components share: declared parameters that can be drawn again."""

from abc import ABC
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learnables.arguments import require_as_annotated
from learnables.init.redraw import redraw_
from learnables.notes import notes_of

if TYPE_CHECKING:
    from typing_extensions import Self

_BUILT_WITH = "_learnables_built_with"
_PLAIN = (bool, int, float, str, type(None))


class Component(nn.Module, ABC):
    """A module whose own parameters are all declared with ``ln.parameter``.

    So its initialisers, its decay and its resize rules are known to `ln.inventory`,
    `ln.param_groups` and the checkpoint, and ``reset_parameters`` needs no code. No component has a
    buffer: nothing is left unfilled after meta construction and ``to_empty``.
    """

    def __new__(cls, *args: object, **kwargs: object) -> "Self":
        """Note what it is built with, so that a delta file can say how to build it again.

        An argument of another kind is refused here, by its name.
        """
        require_as_annotated(cls, args, kwargs)
        made = super().__new__(cls)
        named = {key: value for key, value in kwargs.items() if key != "init"}  # drawn once only
        if all(map(_is_plain, (*args, *named.values()))):
            made.__dict__[_BUILT_WITH] = {"args": list(args), "kwargs": named}
        return made

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw every parameter of this module anew, in place, as it was declared."""
        for local_name in notes_of(self):
            redraw_(self, local_name, generator=generator)


def built_with(component: nn.Module) -> dict[str, Any] | None:
    """Arguments of the call that made ``component``, without its initialiser, or None.

    None where one of them is more than a number, a word, a truth, None, or a sequence of these.
    """
    found: dict[str, Any] | None = component.__dict__.get(_BUILT_WITH)
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in its own dtype where that is wider: for exp, tanh, softmax of scalars."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
