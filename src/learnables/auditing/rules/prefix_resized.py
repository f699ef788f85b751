"""LRN802: the prefix of a position table is not resampled with its grid."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.auditing.rules.not_restored import checkpoint, counterpart


@rule("LRN802", needs=Stage.MODEL, severity="warning")
def prefix_resized(evidence: Evidence) -> Iterator[Finding]:
    """A resized position table in which the class token's row was mixed with its neighbours.

    ## Why it matters

    A table for a class token and a grid has 1 + h·w rows. Interpolating all of them mixes the class
    token's position into the grid and shifts every patch by a fraction of its place: the first row
    has to be split off, kept, and put back.

    ## Example

    ```python
    saved = torch.randn(1, 5, 4)
    model = nn.Linear(4, 4)
    resized = nn.functional.interpolate(saved.mT, size=10, mode="linear").mT
    model.pos_embed = nn.Parameter(resized)
    loaded = ln.Loaded(state_dict={"pos_embed": saved})
    ```

    ## Use instead

    ```python
    saved = torch.randn(1, 5, 4)
    model = nn.Linear(4, 4)
    grid = nn.functional.interpolate(saved[:, 1:].mT, size=9, mode="linear").mT
    model.pos_embed = nn.Parameter(torch.cat([saved[:, :1], grid], 1))
    loaded = ln.Loaded(state_dict={"pos_embed": saved})
    ```

    ## When to silence it

    The table has no prefix, and its number of positions is one more than a square by chance.
    """
    state = checkpoint(evidence)
    for entry in evidence.entries_of_model():
        value, key = evidence.first.get(entry.param), counterpart(entry, state)
        if value is None or key is None:
            continue
        new, old = _rows(value), _rows(state[key].to(value.device))
        if new is None or old is None or len(new) == len(old) or new.shape[1] != old.shape[1]:
            continue
        if len(old) < 3 or not _is_square(len(old) - 1) or _is_square(len(old)):
            continue
        how = _resampled_whole(old.double(), new.double())
        if how:
            yield Finding(
                what="the prefix row of a position table was resampled together with its grid",
                where=list(entry.names),
                found=f"{len(old)} = 1 + {len(old) - 1} rows became {len(new)} by one "
                f"{how} interpolation over all of them",
                wanted="row 0 kept, and the others resampled on their own",
            )


def _resampled_whole(old: Tensor, new: Tensor) -> str:
    """The interpolation that turns the whole of ``old`` into ``new``; empty if none does."""
    line = old.T[None, :, None]  # (1, D, 1, N): a picture of height 1
    for mode, aligned in (("bilinear", False), ("bilinear", True), ("bicubic", False)):
        for antialias in (False, True):
            made = F.interpolate(
                line, (1, len(new)), mode=mode, align_corners=aligned, antialias=antialias
            )
            if torch.allclose(made[0, :, 0].T, new, rtol=1e-3, atol=1e-5 * float(new.abs().max())):
                return mode.replace("bi", "")
    nearest = F.interpolate(line, (1, len(new)), mode="nearest")[0, :, 0].T
    return "nearest" if torch.allclose(nearest, new) else ""


def _rows(x: Tensor) -> Tensor | None:
    if x.ndim == 3 and x.shape[0] == 1:
        x = x[0]
    return x if x.ndim == 2 else None


def _is_square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n
