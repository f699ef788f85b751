"""LRN220: Muon steps hidden matrices, and nothing else."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, rule
from learnables.policy.kinds import MATRIX, is_hidden_matrix, kind_of


@rule("LRN220", needs=Stage.OPTIMIZER, severity="warning")
def muon_on_a_non_matrix(evidence: Evidence) -> Iterator[Finding]:
    """A table of tokens, positions or embeddings, or an output head, given to Muon.

    ## Why it matters

    Muon replaces the gradient by its nearest orthogonal matrix: right for a linear map between
    hidden layers, and meaningless for a table whose rows are separate things. Its authors give
    embeddings, heads, vectors and everything that is no matrix to AdamW.

    ## Example

    ```python
    model = nn.Linear(4, 4, bias=False)
    model.prompt = nn.Parameter(torch.randn(8, 4))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
    step = None
    ```

    ## Use instead

    ```python
    model = nn.Linear(4, 4, bias=False)
    model.prompt = nn.Parameter(torch.randn(8, 4))
    matrices, rest = ln.param_groups(model, lr=0.02, split="muon")
    optimizers = [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]
    step = None
    ```

    ## When to silence it

    The output head is trained with Muon on purpose.
    """
    for seen in evidence.optimizers:
        if "muon" not in type(seen.optimizer).__name__.lower():
            continue
        for group in seen.groups:
            if group.options.get("use_muon") is False:  # hybrid optimizers mark their AdamW groups
                continue
            for param in group.params:
                entry = evidence.entry_of.get(id(param))
                if entry is None or is_hidden_matrix(entry):
                    continue
                kind = kind_of(entry)
                is_head = kind is MATRIX and param.ndim == 2
                yield Finding(
                    what="Muon is given a parameter that is not a hidden matrix",
                    where=list(entry.names),
                    found=f"{'output head' if is_head else kind.name}, {entry.looks}",
                    wanted="AdamW for it: ln.param_groups(model, split='muon')",
                    severity="note" if is_head else None,
                )
