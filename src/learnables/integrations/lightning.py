"""At home in Lightning: a callback that audits and watches, and our groups in one line.

```python
class Model(L.LightningModule):
    def configure_optimizers(self):
        return build_optimizer(self, torch.optim.AdamW, lr=1e-3, weight_decay=0.05)

L.Trainer(callbacks=[LearnablesCallback()]).fit(Model(), loader)
```
"""

import sys
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from learnables.errors import need_extra
from learnables.integrations.building import build_optimizer as build_optimizer
from learnables.integrations.looking import Looking

if TYPE_CHECKING:
    LearnablesCallback: type


class _Callback(Looking):
    """Audit the first iterations of a ``Trainer.fit`` and watch the rest.

    Lightning steps with a closure, and clips in it after its own hook ``on_before_optimizer_step``;
    what is recorded is read at the closure's end: accumulated, unscaled and clipped.

    Args:
        audit: Iterations to audit; 0 for no audit.
        fail: Raise `AuditFailed` where the audit finds an error, instead of only printing.
        watch: Steps between two looks of `ln.watch`; 0 for no watch.
        to: Folder of the run database.
        sinks: As in `ln.watch`.
        budget: Likewise.
    """

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Everything is built and loaded by now."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.begin_looking(module, trainer.optimizers, scaler, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Print the report when it has come."""
        self.look_after_iteration()
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            logged = {k: v.item() for k, v in trainer.logged_metrics.items() if v.numel() == 1}
            self.look_at_numbers(trainer.global_step, logged)

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        """The record reaches as far as the checkpoint."""
        self.keep_what_was_seen()

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """Close the watch."""
        self.end_looking()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Close the watch; the exception goes on."""
        self.end_looking(exception)


@lru_cache(maxsize=1)
def _callback() -> type:
    names = ("lightning.pytorch", "pytorch_lightning")  # two packages, two classes Callback
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            base = import_module(f"{name}.callbacks").Callback
            break
        except ImportError:
            continue
    else:
        raise need_extra("lightning", "lightning", "LearnablesCallback")
    return type(
        "LearnablesCallback",
        (_Callback, base),
        {"__module__": __name__, "__doc__": _Callback.__doc__},
    )


def __getattr__(name: str) -> Any:
    if name == "LearnablesCallback":  # its base class is Lightning's, which is imported only now
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
