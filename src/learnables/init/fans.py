"""How many inputs and outputs one number of a weight connects, by the role of its dimensions."""

from math import prod

import torch
from torch import Tensor

from learnables.errors import ShapeError


def fans(shape: torch.Size, role: str | None = None) -> tuple[int, int]:
    r"""(fan in, fan out) of a weight.

    ========== ==================== ================= ==================
    role       shape                fan in            fan out
    ========== ==================== ================= ==================
    linear     (…, out, in)         in                out
    conv       (out, in, \*kernel)   in · ∏ kernel     out · ∏ kernel
    experts    (expert, in, out)    in                out
    projection (…, in, out)         in                out
    ========== ==================== ================= ==================

    Without a role, two dimensions are a linear weight and four or five a convolution. Three are
    refused: torch would read a stack of experts as a convolution, which makes the standard
    deviation wrong by the square root of a dimension.

    Raises:
        ShapeError: ``shape`` does not fit the role, or leaves open what is meant.

    Example:
        >>> fans(torch.Size([8, 64, 256]), "experts")
        (64, 256)
        >>> fans(torch.Size([32, 16, 3, 3]))
        (144, 288)
    """
    read = as_read(shape, role)
    if read == "conv":
        kernel = prod(shape[2:])
        return shape[1] * kernel, shape[0] * kernel
    if read == "linear":
        return shape[-1], shape[-2]
    return shape[-2], shape[-1]


def as_read(shape: torch.Size, role: str | None) -> str:
    """The role, declared or taken from the number of dimensions.

    Raises:
        ShapeError: ``shape`` does not fit the role, or leaves open what is meant.
    """
    least = {"linear": 2, "projection": 2, "experts": 3, "conv": 3}
    if role is None and len(shape) in (2, 4, 5):
        return "linear" if len(shape) == 2 else "conv"
    if role is None or len(shape) < least[role]:
        raise ShapeError(
            "the fan of a weight depends on what its dimensions mean",
            found=f"shape {tuple(shape)}" + (f" with role={role!r}" if role else " without a role"),
            wanted="2 dimensions or more, and a role where there are three: 'linear' (…, out, in),"
            " 'conv' (out, in, k), 'experts' (expert, in, out), 'projection' (…, in, out)",
            mend="ln.parameter(…, role='experts'), or an initialiser without fans",
        )
    return role


def at_centre(x: Tensor) -> Tensor:
    """The (out, in) matrix in the middle of a convolution's kernel, as a view."""
    for size in x.shape[2:]:
        x = x.select(2, size // 2)
    return x
