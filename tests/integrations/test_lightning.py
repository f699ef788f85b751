"""The callback in a real Trainer: audit, watch, our groups; what it says and when it stops."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import learnables as ln
from learnables.errors import AuditFailed
from learnables.watching import Run


def module(*, cut: bool = False) -> Any:
    import lightning as L

    from learnables.integrations.lightning import build_optimizer

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = ln.parameter(8, init=ln.init.ones(), weight_decay="init")
            self.fc = nn.Linear(8, 1)

        def training_step(self, batch: Any, _: int) -> Tensor:
            scale = self.scale.detach() if cut else self.scale
            loss = (self.fc(batch[0] * scale) - 1).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer(self, torch.optim.AdamW, lr=0.05, weight_decay=0.1)

    torch.manual_seed(0)
    return Model()


def fit(model: Any, callback: Any, **options: Any) -> Any:
    import lightning as L

    data = torch.utils.data.TensorDataset(torch.randn(96, 8))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        callbacks=[callback],
        **options,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
    return trainer


def test_a_healthy_fit_is_audited_and_watched(tmp_path: Path) -> None:
    from learnables.integrations.lightning import LearnablesCallback

    callback = LearnablesCallback(watch=2, to=tmp_path, budget=None)
    model = module()
    trainer = fit(model, callback, gradient_clip_val=0.5, accumulate_grad_batches=2)
    decay = {
        n: g["weight_decay"] for g in trainer.optimizers[0].param_groups for n in g["param_names"]
    }
    assert decay == {"fc.weight": 0.1, "fc.bias": 0.0, "scale": 0.0}
    assert callback.report is not None
    assert callback.report.ok, str(callback.report)
    run = Run(callback.watcher.path)
    assert [o.step for o in run.observations] == [1, 2, 4, 6]
    assert {o.stage for o in run.observations} == {"closure"}
    assert "loss" in run.scalars


@pytest.mark.parametrize("fail", [False, True])
def test_a_cut_is_printed_with_its_line_or_stops_the_fit(
    fail: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    from learnables.integrations.lightning import LearnablesCallback

    callback = LearnablesCallback(watch=0, fail=fail)
    if fail:
        with pytest.raises(AuditFailed, match="LRN301"):
            fit(module(cut=True), callback)
    else:
        fit(module(cut=True), callback)
    (finding,) = [f for f in callback.report.findings if f.severity == "error"]
    assert (finding.code, finding.where) == ("LRN301", ["scale"])
    assert "self.scale.detach()" in finding.quote
    assert "LRN301" in capfd.readouterr().err or fail


def test_a_fit_shorter_than_the_audit_is_judged_by_what_there_was(tmp_path: Path) -> None:
    from learnables.integrations.lightning import LearnablesCallback

    callback = LearnablesCallback(audit=50, watch=1, to=tmp_path, budget=None)
    fit(module(cut=True), callback)
    assert callback.report.iterations == 12
    assert callback.report.codes[0] == "LRN301"
    document = Run(callback.watcher.path).artifact("audit")
    assert document is not None
    assert document.document()["findings"][0]["code"] == "LRN301"


def test_the_callback_is_lightnings_and_can_be_copied() -> None:
    import copy
    import pickle

    from lightning.pytorch.callbacks import Callback

    from learnables.integrations.lightning import LearnablesCallback

    callback = LearnablesCallback(watch=7)
    assert isinstance(callback, Callback)
    for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(again) is LearnablesCallback
        assert again._watch == 7


@pytest.mark.slow
def test_two_processes_look_and_one_speaks(tmp_path: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / "lightning_ddp.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{here / 'site'}:{here.parents[1] / 'src'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "looked at [1, 2, 4, 6] {'closure'}" in done.stdout
    assert done.stderr.count("error LRN302") == 1
    assert "0 * self.lost.sum()" in done.stderr
