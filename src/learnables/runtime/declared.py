"""What was declared about parameters, for checkpoints that other people's code writes."""

import json
from collections.abc import Sequence
from typing import Any, final

from torch import nn
from torch.optim import Optimizer

from learnables._torch import is_dtensor
from learnables.arguments import optimizers_in
from learnables.entries import entries
from learnables.errors import CheckpointError
from learnables.runtime.checkpoint import one_name, policy_in_words
from learnables.runtime.layout import lay_out_state_
from learnables.runtime.restoring import compare_policies, load_initial


@final
class Declared:
    """The part of a training that checkpoints of others leave out; saved and loaded beside them.

    It has ``state_dict`` and ``load_state_dict``, which is all that torch's distributed checkpoint
    (DCP) and ``Accelerator.register_for_checkpointing`` ask for. In it are the values that
    parameters decay toward, and the declared policies, to be compared. Loading it also gives
    optimizer state the strides of its parameter, which others leave as the file had them: fused CPU
    optimizers are silently wrong then. Load it after model and optimizer.

    Args:
        model: The model, bare or wrapped.
        optimizer: Its optimizer, or all of them.

    Attributes:
        changed: After loading: what was declared otherwise when it was saved, in sentences.

    Example:
        >>> def build():
        ...     model = nn.Module()
        ...     model.colour = ln.parameter(torch.rand(3, 3), weight_decay="init")
        ...     optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1, weight_decay=0.1))
        ...     ln.attach(model, optimizer)
        ...     return Declared(model, optimizer)
        >>> first, second = build(), build()
        >>> second.load_state_dict(first.state_dict())
        >>> torch.equal(*(d.state_dict()["initial"]["colour"] for d in (first, second)))
        True

    Cost:
        One copy of the values to decay toward.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] = ()) -> None:
        self._model = model
        self._optimizers = optimizers_in(optimizer)
        self.changed: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """``initial``: name → value; ``policy``: JSON, one text because DCP compares keys."""
        initial = {
            one_name(entry): entry.initial.detach().clone()
            for entry in entries(self._model)
            if entry.initial is not None and entry.initial.device.type != "meta"
        }
        return {"initial": initial, "policy": json.dumps(policy_in_words(self._model))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            CheckpointError: It is something else, or of another model; nothing is changed then.
        """
        try:
            initial, policy = dict(state["initial"]), json.loads(state["policy"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "this is no state of Declared",
                found=f"{type(error).__name__}: {error}",
                wanted="what its state_dict() gave",
            ) from error
        shapes = {one_name(e): e.shape for e in entries(self._model) if e.initial is not None}
        odd = [n for n in {*shapes, *initial} if n not in shapes or n not in initial]
        odd += [n for n in shapes if n in initial and initial[n].shape != shapes[n]]
        if odd:
            raise CheckpointError(
                "values to decay toward were saved of another model",
                where=", ".join(sorted(odd)),
                found=", ".join(f"{n} {tuple(x.shape)}" for n, x in sorted(initial.items())),
                wanted=", ".join(f"{n} {tuple(s)}" for n, s in sorted(shapes.items())),
            )
        load_initial(self._model, initial, self._optimizers)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if not is_dtensor(param):
                        lay_out_state_(optimizer, param)
        self.changed = compare_policies(policy, self._model)
