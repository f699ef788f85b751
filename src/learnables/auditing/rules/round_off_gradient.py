"""LRN304: a gradient is more than round-off."""

from collections.abc import Iterator

import torch

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule

_CANCELS = {torch.float32: 1e-5, torch.float64: 1e-12}


@rule("LRN304", needs=Stage.BACKWARD, severity="warning", subsumes=("LRN302", "LRN4"))
def round_off_gradient(evidence: Evidence) -> Iterator[Finding]:
    """A parameter on which nothing depends: its gradient is a sum that cancels.

    ## Why it matters

    A bias in front of a batch normalisation is subtracted again, and a bias of attention keys adds
    the same number to every logit of a row, which softmax removes. The true gradient is 0; what
    arrives is round-off, and Adam scales that noise up to full-size steps, so the value wanders.

    ## Example

    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ```

    ## Use instead

    ```python
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ```

    ## When to silence it

    The layer is kept as it is for the sake of old checkpoints. In modules that an installed
    library wrote, and where it is the loss that cancels it, this is a note.
    """
    for entry in evidence.trainable():
        share = evidence.shifts.get(entry)
        if share is None or share > _CANCELS.get(entry.dtype, 0.0):
            continue
        library = evidence.library_of(entry)
        yield Finding(
            what="nothing depends on a parameter: its gradient is round-off",
            where=list(entry.names),
            found=f"|Σ gradient| / Σ |gradient| = {share:.1e}",
            wanted=f"> {_CANCELS[entry.dtype]:g}",
            severity="note" if library or not evidence.shift_is_removed(entry) else None,
        )
