"""At home in transformers: a Trainer callback, our groups, and parameters that survive its files.

```python
class Model(Declared, ViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.prompt = ln.parameter(1, 8, config.hidden_size, weight_decay=False)
        self.post_init()

model = Model.from_pretrained("google/vit-base-patch16-224")
Trainer(
    model,
    args,
    train_dataset=data,
    optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, args),
    callbacks=[LearnablesCallback()],
).train()
```
"""

import copy
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnables.auditing.rules.filled_by_nobody import fills
from learnables.auditing.rules.renamed_in_the_file import as_loaded
from learnables.auditing.rules.renamed_in_the_file import (
    names_lost_by_saving as names_lost_by_saving,
)
from learnables.errors import CheckpointError, need_extra
from learnables.init.redraw import redraw_
from learnables.integrations.building import build_optimizer
from learnables.integrations.looking import Looking
from learnables.notes import Note, note_of, put_note
from learnables.policy.attach import attach, attachment_of
from learnables.policy.groups import param_groups
from learnables.policy.resolve import Policy
from learnables.watching.gradient import steppable

if TYPE_CHECKING:
    LearnablesCallback: type


# -- the Trainer ----------------------------------------------------------------------------------


class _Callback(Looking):
    """Audit the first iterations of a ``Trainer.train`` and watch the rest.

    What was declared and groups cannot carry (decay toward the initial value, constraints) is
    attached to the Trainer's optimizer before the first step, whoever built it.

    Args:
        audit: Iterations to audit; 0 for no audit.
        fail: Raise `AuditFailed` where the audit finds an error, instead of only printing.
        watch: Steps between two looks of `ln.watch`; 0 for no watch.
        to: Folder of the run database.
        sinks: As in `ln.watch`.
        budget: Likewise.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """Everything is built and loaded by now."""
        optimizer = steppable(its["optimizer"])
        if attachment_of(optimizer) is None:
            attach(its["model"], optimizer)
        scaler = getattr(its["optimizer"], "scaler", None)  # Accelerate's wrapper has it
        self.begin_looking(its["model"], [optimizer], scaler, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """Print the report when it has come."""
        self.look_after_iteration()

    def on_log(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """The Trainer's numbers go into the run database."""
        self.look_at_numbers(state.global_step, its.get("logs") or {})

    def on_save(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """The record reaches as far as the checkpoint."""
        self.keep_what_was_seen()

    def on_train_end(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """Close the watch."""
        self.end_looking()


@lru_cache(maxsize=1)
def _callback() -> type:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise need_extra("transformers", "transformers", "LearnablesCallback") from error
    return type(
        "LearnablesCallback",
        (_Callback, TrainerCallback),
        {"__module__": __name__, "__doc__": _Callback.__doc__},
    )


def __getattr__(name: str) -> Any:
    if name == "LearnablesCallback":  # its base class is transformers', imported only now
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def optimizer_cls_and_kwargs(
    model: nn.Module,
    args: Any,
    *,
    policy: Policy | None = None,
    layer_decay: float | None = None,
) -> tuple[Any, dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=…)`` takes, with our groups instead of its own.

    The optimizer, its learning rate, weight decay and betas are those of ``args``. The Trainer
    decides by the words "bias" and "norm" in a name; class tokens, position tables, LayerScale and
    scalars are decayed then. `LearnablesCallback` attaches what groups cannot carry.

    Args:
        model: The model.
        args: The ``TrainingArguments``.
        policy: As in `ln.param_groups`.
        layer_decay: Likewise.

    Returns:
        The optimizer's class and its keywords.
    """
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = param_groups(
        model,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        policy=policy,
        layer_decay=layer_decay,
    )
    return kind, {**options, "params": groups}


class Groups:
    """Mix-in before ``Trainer``: its optimizer gets our groups, and is attached.

    ``class MyTrainer(Groups, Trainer)``; ``policy`` and ``layer_decay`` are class attributes.

    Attributes:
        policy: As in `ln.param_groups`.
        layer_decay: Likewise.
    """

    policy: Policy | None = None
    layer_decay: float | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer of ``self.args`` over `ln.param_groups`.

        Where the Trainer makes groups of a special kind itself (GaLore, Muon, LOMO), they stay.
        """
        trainer: Any = self
        if trainer.optimizer is None:
            model = trainer.model if model is None else model
            given = trainer.optimizer_cls_and_kwargs
            kind, options = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
            special = {"params", "model", "optimizer_dict"} & options.keys()
            if special or not (isinstance(kind, type) and issubclass(kind, Optimizer)):
                theirs: Optimizer = super().create_optimizer(model)  # type: ignore[misc]
                attach(model, steppable(theirs))
                return theirs
            options = dict(options)
            lr = options.pop("lr", trainer.args.learning_rate)
            trainer.optimizer = build_optimizer(
                model,
                kind,
                lr=lr,
                weight_decay=trainer.args.weight_decay,
                policy=self.policy,
                layer_decay=self.layer_decay,
                **options,
            )
        ours: Optimizer = trainer.optimizer
        return ours


# -- files ----------------------------------------------------------------------------------------


class Declared:
    """Mix-in before a ``PreTrainedModel``: parameters of one's own survive its files.

    transformers builds a model without memory, and gives what the checkpoint lacks to
    ``_init_weights``, which knows its own layers only: a raw Parameter of a subclass holds whatever
    lay in memory. And it writes files under the names of the original code, by patterns that meet
    other people's names too. With this mix-in, a parameter that the checkpoint lacks has its
    declared initial value (or what the constructor gives it, where none was declared), and a name
    that would not come back is written as it is. Where ``weight_decay="init"`` was declared, the
    value to decay toward is the one that was loaded or filled: what training starts from.
    """

    _learnables_keeps_names = True  # the audit's rule LRN806 asks

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.from_pretrained``; see the class."""
        there: Any = super()
        model, info = there.from_pretrained(*args, output_loading_info=True, **kwargs)
        fill_missing_(model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.save_pretrained``; see the class.

        Where a pattern would rewrite a name for good, the whole file has the names of the model
        itself (``save_original_format=False``), which ``from_pretrained`` reads as well.

        Raises:
            CheckpointError: A name would not come back in that form either.
        """
        there: Any = super()
        model: Any = self
        lost = names_lost_by_saving(model)
        if lost:
            kwargs["save_original_format"] = False
            broken = {name: new for name in lost if (new := as_loaded(model, name)) != name}
            if broken:
                name, new = next(iter(broken.items()))
                raise CheckpointError(
                    "transformers rewrites the name of a parameter whenever it is loaded",
                    where=name,
                    found=f"{new!r}",
                    wanted="a name that its patterns leave alone",
                    mend=f"rename the attribute {name.split('.')[0]!r}",
                )
        return there.save_pretrained(save_directory, *args, **kwargs)


def fill_missing_(model: nn.Module, missing: Iterable[str]) -> tuple[str, ...]:
    """Give parameters that a checkpoint lacks the value that was meant.

    What was declared with an initialiser is drawn by it. What neither a declaration nor the model's
    ``_init_weights`` fills takes the value that the constructor gives it, from a second instance
    that is built for the purpose.

    Args:
        model: What ``from_pretrained`` returned.
        missing: ``loading_info["missing_keys"]``.

    Returns:
        The names that were filled.
    """
    filled, left = [], []
    params = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(set(missing) & params.keys()):
        path, _, local_name = name.rpartition(".")
        owner = model.get_submodule(path)
        if redraw_(owner, local_name):
            filled.append(name)
        elif not fills(model, path, local_name):
            left.append(name)
    if left:
        with torch.random.fork_rng(devices=[]):
            fresh = type(model)(copy.deepcopy(model.config))
        with torch.no_grad():
            for name in left:
                params[name].copy_(fresh.get_parameter(name))
    for name, param in params.items():
        path, _, local_name = name.rpartition(".")
        _remember(model.get_submodule(path), local_name, param)
    for name in (*filled, *left):
        params[name]._is_hf_initialized = True  # type: ignore[attr-defined]
    return (*filled, *left)


def _remember(owner: nn.Module, local_name: str, param: Tensor) -> None:
    """The value to decay toward is the one that training starts from."""
    note = note_of(owner, local_name)
    if note.get("weight_decay") == "init":
        put_note(owner, local_name, Note(note.declared, note.annotated, param.detach().clone()))
