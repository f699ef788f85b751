"""Malicious and damaged checkpoints: none executed, all refused, soon and in little memory."""

import resource
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from tests.forked import told_by_fork
from tests.runtime.hostile import CANARY, build, contents, places

import learnables as ln
from learnables.errors import CheckpointError
from learnables.runtime.checkpoint import read_checkpoint

MEGABYTES, SECONDS = 256, 2.0


def opened(path: str) -> tuple[str, str, str, float, float, bool]:
    """Load a file as a user would; tell what that was like."""
    torch.set_num_threads(1)
    model, optimizer = build()
    before = [p.detach().clone() for p in model.parameters()]
    states = torch.get_rng_state()
    used, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ln.load_checkpoint(path, model, optimizer)
        said = ("loaded", "", "")
    except CheckpointError as error:
        said = (error.what, error.found, error.where)
    except BaseException as error:
        said = (f"raised {type(error).__name__}", str(error)[:200], "")
    seconds = time.process_time() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) / 1024
    same = all(map(torch.equal, before, model.parameters()))
    return *said, grown, seconds, same and torch.equal(states, torch.get_rng_state())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def files(folder) -> dict[str, Path]:
    """Every one of them, written out."""
    found = places(folder)
    for i, (name, content) in enumerate(contents(folder).items()):
        found[name] = folder / f"file{i}"
        found[name].write_bytes(content)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process as Linux counts it")
def test_each_is_refused_with_a_reason_in_little_time_and_memory(files, folder):
    assert len(files) >= 50
    wrong, largest, slowest = [], 0.0, 0.0
    for name, path in files.items():
        what, found, where, grown, seconds, unchanged = told_by_fork(opened, str(path))
        largest, slowest = max(largest, grown), max(slowest, seconds)
        refused = not what.startswith(("raised", "loaded")) and str(path) in where
        explained = bool(found) or name in NOT_THERE
        if not (refused and explained and unchanged and grown <= MEGABYTES and seconds <= SECONDS):
            wrong.append((name, what, found, round(grown), round(seconds, 2), unchanged))
    print(f"{len(files)} files: {largest:.0f} MB, {slowest:.2f} s at most")
    assert not wrong
    assert not (folder / CANARY).exists()
    assert not (folder.parent / "escaped").exists()


NOT_THERE = (
    "nothing there",
    "a folder",
    "a pipe that nobody writes to",
    "a link to itself",
    "a link to a device without end",
)


def test_the_file_that_they_are_forged_from_loads(tmp_path):
    """So that each is refused for what is wrong with it, and not for how it was put together."""
    from tests.runtime.hostile import Forge

    forge = Forge(tmp_path)
    path = tmp_path / "c"
    for content in (forge.whole, forge.pack(), forge.meta_with(step=2)):
        path.write_bytes(content)
        model, optimizer = build()
        assert ln.load_checkpoint(path, model, optimizer).extra == {"note": "x"}


def test_the_pickles_would_have_been_executed(tmp_path):
    """The canary can sing."""
    import pickle

    from tests.runtime.hostile import Evil

    pickle.loads(pickle.dumps(Evil(tmp_path)))
    assert (tmp_path / CANARY).exists()


def test_a_header_alone_is_checked_before_tensors_are_read(tmp_path):
    path = tmp_path / "c"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match=r"looks like a zip archive, as torch\.save writes"):
        read_checkpoint(path)
