"""LRN728: a stack of matrices is initialised matrix by matrix."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@rule("LRN728", needs=Stage.MODEL, severity="warning")
def orthogonal_as_one_matrix(evidence: Evidence) -> Iterator[Finding]:
    """A stack of matrices that is orthogonal as one flat matrix, and none of them is.

    ## Why it matters

    `nn.init.orthogonal_` flattens all dimensions but the first. For the stacked weights of heads or
    experts, shape `(48, 64, 64)`, the 48 flat rows become orthonormal: each matrix has norm 1
    instead of 8 and a defect of 7.9.

    ## Example

    ```python
    model = nn.Module()
    model.heads = nn.Parameter(nn.init.orthogonal_(torch.empty(6, 8, 8)))
    ```

    ## Use instead

    ```python
    model = nn.Module()
    model.heads = ln.parameter(6, 8, 8, init=ln.init.orthogonal())
    ```

    ## When to silence it

    The parameter is a filter or a bank of templates, whose rows are meant.
    """
    for entry in evidence.entries:
        value = evidence.first.get(entry.param)
        if value is None or value.ndim != 3 or isinstance(entry.owner, _CONVOLUTIONS):
            continue
        if not value.is_floating_point() or min(value.shape) < 2:
            continue
        if 2 * int(value.count_nonzero()) < value.numel():
            continue  # one-hot rows: chosen as they are, or memory that nobody initialised
        flat = _defect(value.flatten(1)[None])
        if flat > 1e-3 or not bool(value.isfinite().all()):
            continue
        each = _defect(value)
        if each > 0.1:
            yield Finding(
                what="a stack of matrices is orthogonal as one flat matrix only",
                where=list(entry.names),
                found=f"‖WᵀW − I‖ = {each:.1f} for the worst of {value.shape[0]} matrices",
                wanted="≤ 1e-05 for each; ln.init.orthogonal() makes them so",
            )


def _defect(x: Tensor) -> float:
    x = x.double()
    x = x if x.shape[-2] >= x.shape[-1] else x.mT
    x = x / max(1e-300, float(x.square().sum((-2, -1)).max().sqrt())) * math.sqrt(x.shape[-1])
    return float(torch.linalg.matrix_norm(x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).max())
