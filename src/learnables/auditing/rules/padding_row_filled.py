"""LRN503: the padding row of an embedding is not noise."""

from collections.abc import Iterator

from torch import nn

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule


@rule("LRN503", needs=Stage.MODEL, severity="warning")
def padding_row_filled(evidence: Evidence) -> Iterator[Finding]:
    """An embedding whose padding row looks like the other rows.

    ## Why it matters

    `nn.Embedding(padding_idx=…)` zeroes that row once. An initialiser that runs over the weights
    afterwards fills it with noise, and because its gradient is masked it never leaves that noise:
    padding then carries a random meaning.

    ## Example

    ```python
    model = nn.Embedding(5, 4, padding_idx=0)
    nn.init.normal_(model.weight)
    ```

    ## Use instead

    ```python
    model = nn.Embedding(5, 4, padding_idx=0)
    nn.init.normal_(model.weight)
    nn.init.zeros_(model.weight.data[model.padding_idx])
    ```

    ## When to silence it

    The padding vector was chosen on purpose.
    """
    for entry in evidence.entries:
        for place in entry.places:
            owner = place.owner
            if (
                not isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
                or place.local_name != "weight"
            ):
                continue
            value = evidence.first.get(entry.param)
            if owner.padding_idx is None or value is None or len(value) < 2:
                continue
            norms = value.float().norm(dim=1)
            usual = float(norms.median())
            if usual > 0 and float(norms[owner.padding_idx]) > 0.1 * usual:
                yield Finding(
                    what="the padding row of an embedding is filled like any other",
                    where=list(entry.names),
                    found=f"norm {float(norms[owner.padding_idx]):.2g} in row "
                    f"{owner.padding_idx}; median of all rows {usual:.2g}",
                    wanted="norm 0",
                    mend=f"nn.init.zeros_(model.get_parameter({entry.name!r})"
                    f".data[{owner.padding_idx}])",
                    severity="note" if evidence.library_of(entry) else None,
                )
                break
