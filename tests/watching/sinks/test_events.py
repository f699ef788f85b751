"""Event files against the reader and the checksum of TensorBoard itself."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as slow_twin
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import learnables as ln
from learnables.watching.sinks import TensorBoard
from learnables.watching.sinks.events import EventFile, crc32c, masked
from learnables.watching.sinks.tensorboard import buckets


@given(
    length=st.one_of(st.integers(0, 4000), st.sampled_from([511, 512, 513, 640, 641])),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_checksum_is_the_one_that_readers_reckon(length, seed):
    data = np.random.default_rng(seed).bytes(length)
    assert crc32c(data) == slow_twin(data)
    assert masked(crc32c(data)) == masked_crc32c(data)


def test_two_files_of_one_second_do_not_collide(tmp_path):
    files = [EventFile(tmp_path) for _ in range(3)]
    assert len({file.path for file in files}) == 3
    for file in files:
        file.close()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_disk_that_is_full_is_an_error(tmp_path, monkeypatch):
    file = EventFile(tmp_path)
    file.close()
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123 - a device
        monkeypatch.setattr(file, "_file", full)
        with pytest.raises(OSError, match="No space left"):
            file.write(b"x")


def test_a_record_is_with_the_system_at_once(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.scalars(3, {"loss": 0.5})
    events = EventAccumulator(str(tmp_path))
    events.Reload()  # while it is open
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.5)]
    sink.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with all kinds of values, through our sink and through torch's writer."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = nn.Linear(7, 5, dtype=torch.float64)
    model.register_parameter("zero", nn.Parameter(torch.zeros(3)))
    model.register_parameter("tiny", nn.Parameter(torch.tensor([1e-40, -1e-3, 0.0])))
    huge = torch.tensor([1e300, -2.0], dtype=torch.float64)
    model.register_parameter("huge", nn.Parameter(huge))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = TensorBoard(folder / "ours")
    with ln.watch(model, optimizer, every=1, to=folder, sinks=[sink], budget=None) as watcher:
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            if step == 2:
                model.bias.grad[1] = float("nan")
            optimizer.step()
    assert watcher.failed is None
    with SummaryWriter(str(folder / "torch")) as writer:
        for o in watcher.run().observations:
            for quantity, rows in o.rows.items():
                for i, filled in enumerate(rows.filled.by_row()):
                    if rows.present[i]:
                        add_slowly(writer, f"{quantity}/{o.names[i]}", o.step, rows, filled, i)
    return [read(folder / who) for who in ("ours", "torch")]


def add_slowly(writer, tag, step, rows, filled, i):
    limits, counts = buckets(filled, rows, i)
    if counts:
        names = {"min": "min", "max": "max", "sum": "sum", "sum_squares": "sum_of_squares"}
        writer.add_histogram_raw(
            tag,
            num=sum(counts),
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=step,
            **{key: float(rows.moments[name][i]) for key, name in names.items()},
        )


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    found = {tag: events.Histograms(tag) for tag in events.Tags()["histograms"]}
    return {tag: [(e.step, *fields_of(e.histogram_value)) for e in found[tag]] for tag in found}


def fields_of(h):
    return h.min, h.max, h.num, h.sum, h.sum_squares, list(h.bucket_limit), list(h.bucket)


def test_histograms_are_those_that_add_histogram_raw_writes(written):
    ours, torchs = written
    assert ours == torchs
    assert len(ours["weight/weight"]) == 3


def test_histograms_hold_every_finite_value(written):
    ours, _ = written
    assert [h[3] for h in ours["gradient/bias"]] == [5, 5, 4]  # one was NaN
    for histograms in ours.values():
        for _step, low, high, number, _sum, _squares, limits, counts in histograms:
            assert sum(counts) == number
            assert sorted(limits) == limits
            assert limits[-1] >= high
            assert low <= high
