"""LRN222: a schedule-free optimizer is in the mode of its model."""

from collections.abc import Iterator

from learnables.auditing.evidence import Evidence, Stage
from learnables.auditing.rule import Finding, needed, rule


@rule("LRN222", needs=Stage.OPTIMIZER, severity="warning")
def schedule_free_mode(evidence: Evidence) -> Iterator[Finding]:
    """A model in evaluation mode while its schedule-free optimizer is still in training mode.

    ## Why it matters

    Schedule-free optimizers keep two sequences of weights and show the model one of them:
    `optimizer.train()` the one to take gradients at, `optimizer.eval()` the averaged one that is
    worth evaluating and saving. Without the call, evaluation and checkpoints use the wrong weights.

    ## Example

    ```python
    class ScheduleFree(torch.optim.SGD):
        def train(self): self.param_groups[0]["train_mode"] = True
        def eval(self): self.param_groups[0]["train_mode"] = False

    model = nn.Linear(4, 4)
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    model.eval()
    step = None
    ```

    ## Use instead

    ```python
    class ScheduleFree(torch.optim.SGD):
        def train(self): self.param_groups[0]["train_mode"] = True
        def eval(self): self.param_groups[0]["train_mode"] = False

    model = nn.Linear(4, 4)
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    optimizer.eval()
    model.eval()
    step = None
    ```

    ## When to silence it

    The model is trained in evaluation mode on purpose.

    Source: Defazio et al., *The Road Less Scheduled*, arXiv:2405.15682.
    """
    modes = [
        (seen, group.options["train_mode"])
        for seen in evidence.optimizers
        for group in seen.groups[:1]
        if "train_mode" in group.options and callable(getattr(seen.optimizer, "eval", None))
    ]
    needed(modes, "an optimizer with a train and an eval mode")
    for seen, training in modes:
        if bool(training) == evidence.model.training:
            continue
        mode = "training" if training else "evaluation"
        yield Finding(
            what="a schedule-free optimizer and its model are in different modes",
            where=[e.name for e in evidence.trainable() if evidence.groups_of(e)],
            found=f"{seen.name} in {mode} mode, model.training = {evidence.model.training}",
            wanted="the same mode for both",
            mend="optimizer.eval()" if training else "optimizer.train()",
        )
