"""Row-major memory for parameters, their gradients and their optimizer state."""

import torch
from torch import Tensor, nn

__all__ = ["canonicalize_"]


def canonicalize_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Names of the parameters whose memory was laid out anew, in the order of ``named_parameters``.

    Parameters, gradients and optimizer state of a parameter's shape become dense and row-major,
    also along dimensions of size 1. The Parameter objects stay, so optimizers, ties and hooks go on
    working; the values stay bit for bit. Fused CPU optimizers walk memory and ignore strides: with
    a strided parameter, or with state of other strides, they compute something else, silently.

    Args:
        model: Any module on one process. A parameter that was a view of a larger tensor gets memory
            of its own.
        optimizer: The optimizer whose state is laid out too.

    Returns:
        A parameter is named where it, its gradient or its state was moved; an empty list says that
        nothing was wrong.

    Example:
        >>> layer = nn.Linear(2, 3, bias=False)
        >>> layer.weight.data = torch.zeros(2, 3).t()
        >>> canonicalize_(layer)
        ['weight']
        >>> layer.weight.stride()
        (2, 1)

    Cost:
        One copy of each tensor that is moved; nothing for the others.
    """
    moved = []
    for name, parameter in model.named_parameters():
        tensors = [parameter] if parameter.grad is None else [parameter, parameter.grad]
        if optimizer is not None and parameter in optimizer.state:
            state = optimizer.state[parameter].values()
            tensors += [s for s in state if isinstance(s, Tensor) and s.shape == parameter.shape]
        # sum, not any, which would stop at the first: every tensor has to be visited.
        if sum(_row_major_(tensor) for tensor in tensors):
            moved.append(name)
    return moved


def _row_major_(tensor: Tensor) -> bool:
    """Whether the tensor had to be given new memory, which it then has."""
    if tensor.layout is not torch.strided:
        return False
    wanted = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").stride()
    if tensor.stride() == wanted:
        return False
    # ``contiguous()`` would return the same tensor where only a dimension of size 1 is odd.
    tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
    if tensor.stride() != wanted:
        tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(
            tensor.detach()
        )
    return True
