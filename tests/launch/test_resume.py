"""A run goes on with another number of ranks: what is loaded is equal bit for bit."""

import shutil

import pytest
import torch
from tests.gloo import spawn
from tests.launch.resuming import go_on

from learnables.runtime.checkpoint import read_checkpoint


def tensors(path):
    read = read_checkpoint(path)
    found = {f"model {name}": x.reshape(-1) for name, x in read.model.items()}
    for name, state in read.meta["optimizers"][0]["state"].items():
        found |= {f"{name} {key}": torch.as_tensor(x).reshape(-1) for key, x in state.items()}
    return found


@pytest.mark.slow  # eight processes for each strategy
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_from_two_ranks_to_one_to_four(strategy, tmp_path):
    path, before = tmp_path / "run.safetensors", tmp_path / "before.safetensors"
    spawn(go_on, 2, path, 0, 3, strategy)
    for start, ranks, how in ((3, 1, "none"), (6, 4, strategy)):
        shutil.copy(path, before)
        if ranks == 1:
            go_on(0, path, start, start + 3, how)
        else:
            spawn(go_on, ranks, path, start, start + 3, how)
        saved, loaded = tensors(before), tensors(tmp_path / f"loaded-at-{start}.safetensors")
        assert saved.keys() == loaded.keys()
        for name, x in saved.items():  # whatever the number of ranks that wrote it
            assert torch.equal(x, loaded[name]), name
    go_on(0, tmp_path / "alone.safetensors", 0, 9, "none")
    alone, changed = tensors(tmp_path / "alone.safetensors"), tensors(path)
    for name, x in alone.items():  # sums over ranks round otherwise
        torch.testing.assert_close(changed[name], x, rtol=1e-4, atol=1e-6)
