"""Weights & Biases offline and Trackio on this disk: the real packages, where they are there."""

import sqlite3
import struct

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.watching import Run
from learnables.watching.sinks import flat

LOSSES = [3.0, 2.0, 1.5]


def watched(folder, sink):
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ln.watch(model, optimizer, every=1, to=folder, sinks=[sink], budget=None) as watcher:
        for step, loss in enumerate(LOSSES, 1):
            optimizer.zero_grad()
            model(torch.randn(8, 7)).square().mean().backward()
            if step == 3:
                model.bias.grad[0] = float("nan")
            optimizer.step()
            watcher.log_scalars(watcher.step, {"loss": loss})
    assert watcher.failed is None, watcher.failed
    return Run(folder)


def records(data):
    """What a ``.wandb`` file holds: LevelDB's log, in blocks of 32 kB, after seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _crc, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its end
            yield whole
            whole = b""


@pytest.mark.filterwarnings("ignore")  # theirs
def test_weights_and_biases_holds_norms_histograms_and_alarms(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    from learnables.watching.sinks import WeightsAndBiases

    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WeightsAndBiases("test", mode="offline", dir=str(tmp_path))
    run = watched(tmp_path / "run", sink)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history = []
    for record in map(Record.FromString, records(path.read_bytes())):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({i.key or "/".join(i.nested_key): i.value_json for i in items})
    seen = {key: value for row in history for key, value in row.items()}
    assert [float(row["loss"]) for row in history if "loss" in row] == LOSSES
    for name, value in flat.numbers(run.observations[0]).items():
        assert float(history[0][name]) == pytest.approx(value), name
    assert any(key.startswith("weight/weight") for key in seen)
    assert '"histogram"' in "".join(seen.values())


@pytest.mark.filterwarnings("ignore")  # theirs
def test_trackio_holds_norms_ratios_and_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from learnables.watching.sinks import Trackio

    run = watched(tmp_path / "run", Trackio("test", name="one", embed=False))
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    text = b"".join(bytes(metrics) for _, metrics in rows).decode()
    for name in flat.numbers(run.observations[0]):
        assert name in text
    assert '"loss":' in text
    assert "alarm/non-finite" in text
