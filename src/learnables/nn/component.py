"""What all components share: declared parameters that can be drawn again."""

from abc import ABC

import torch
from torch import Tensor, nn

from learnables.init.redraw import redraw_
from learnables.notes import notes_of


class Component(nn.Module, ABC):
    """A module whose own parameters are all declared with ``ln.parameter``.

    So its initialisers, its decay and its resize rules are known to `ln.inventory`,
    `ln.param_groups` and the checkpoint, and ``reset_parameters`` needs no code. No component has a
    buffer: nothing is left unfilled after meta construction and ``to_empty``.
    """

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw every parameter of this module anew, in place, as it was declared."""
        for local_name in notes_of(self):
            redraw_(self, local_name, generator=generator)


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in its own dtype where that is wider: for exp, tanh, softmax of scalars."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
