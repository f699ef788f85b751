"""Each rank writes its own part, any number of ranks reads them, and no part may be missing."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.gloo import spawn
from tests.launch.session import outcomes
from torch import nn
from torch.distributed.fsdp import fully_shard
from typer.testing import CliRunner

import learnables as ln
from learnables.cli import app
from learnables.errors import CheckpointError
from learnables.runtime import sharded
from learnables.runtime.checkpoint import open_checkpoint, read_checkpoint
from learnables.runtime.restoring import restore
from learnables.runtime.untrusted import read_meta


class Net(nn.Module):
    """A token, a tie, a shape that no number of ranks divides, and a value to decay toward."""

    def __init__(self) -> None:
        super().__init__()
        self.token = ln.parameter(1, 5, 8, init=ln.init.normal(0.5))
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.odd = nn.Parameter(torch.randn(7, 3))
        self.colour = ln.parameter(torch.eye(4), weight_decay="init")
        self.register_buffer("mask", torch.ones(8))
        ln.tie(self, "down.weight", "up.weight")

    def forward(self, x):
        x = self.down(torch.tanh(self.up((x + self.token) * self.mask)))
        return x.square().mean() + self.odd.square().sum() + (self.colour - 2).square().sum()


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 8)


def adam(model):
    return torch.optim.AdamW(ln.param_groups(model, lr=0.01, weight_decay=0.1))


def built(seed=0, strategy="fsdp2"):
    torch.manual_seed(seed)
    return tuple(ln.prepare(Net(), adam, strategy))[:2]


def train(model, optimizer, steps=2):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()


def wholes(model, optimizer):
    """Every value and moment of a training, whole, by name."""
    whole = lambda x: getattr(x, "full_tensor", lambda: x)().detach().clone()  # noqa: E731
    found = {name: whole(x) for name, x in model.state_dict().items()}
    for name, param in model.named_parameters():
        for key, x in optimizer.state[param].items():
            found[f"{name}/{key}"] = whole(x)
    return {key.removeprefix("module."): x for key, x in found.items()}


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


# --- on two ranks, beside one another -------------------------------------------------------------


def saved(folder, name="c.safetensors", **more):
    model, optimizer = built()
    train(model, optimizer)
    ln.save_checkpoint(folder / name, model, optimizer, sharded=True, **more)
    return model, optimizer, folder / name


def two_ranks_go_on_bit_equal(folder):
    model, optimizer, path = saved(folder, step=2)
    again, optimizer_again = built(seed=1)
    restored = ln.load_checkpoint(path, again, optimizer_again)
    assert restored.step == 2
    same(wholes(model, optimizer), wholes(again, optimizer_again))
    assert again.up.weight is again.down.weight
    train(model, optimizer)
    train(again, optimizer_again)
    same(wholes(model, optimizer), wholes(again, optimizer_again))


def no_rank_reads_or_writes_the_part_of_another(folder):
    _, _, path = saved(folder)
    (parts,) = folder.glob("c.safetensors.shards-*")
    files = sorted(parts.iterdir())
    assert len(files) == 2
    own = load_file(files[dist.get_rank()])
    model, _ = built()
    for name, param in model.named_parameters():
        assert own[name].shape == param.to_local().shape
    assert "mask" in load_file(path), "what is whole on each rank lies in the file itself"
    assert not set(load_file(path)) & set(own)


def the_file_of_before_stays_until_the_new_one_is_there(folder):
    model, optimizer, path = saved(folder, step=1)
    (before,) = folder.glob("c.safetensors.shards-*")
    ln.save_checkpoint(path, model, optimizer, sharded=True, step=2)
    (after,) = folder.glob("c.safetensors.shards-*")
    assert before != after
    assert read_meta(path)["shards"]["folder"] == after.name
    ln.save_checkpoint(path, model, optimizer, step=3)
    dist.barrier()  # an ordinary checkpoint is rank 0's
    assert list(folder.glob("*.shards-*")) == []


def a_rank_that_cannot_write_is_named_on_all_and_nothing_changes(folder):
    model, optimizer, path = saved(folder, step=1)
    before = path.read_bytes()
    real = sharded._crc32
    if dist.get_rank() == 1:

        def fail(file):
            raise OSError(28, "No space left on device")

        sharded._crc32 = fail
    try:
        with pytest.raises(CheckpointError, match=r"rank 1[\s\S]*No space left"):
            ln.save_checkpoint(path, model, optimizer, sharded=True, step=2)
    finally:
        sharded._crc32 = real
    dist.barrier()
    assert path.read_bytes() == before
    assert len(list(folder.glob("*.shards-*"))) == 1
    assert ln.load_checkpoint(path, model, optimizer).step == 1


def a_missing_or_damaged_part_is_refused_on_every_rank_and_nothing_is_loaded(folder):
    model, optimizer, path = saved(folder)
    (parts,) = folder.glob("c.safetensors.shards-*")
    first, second = sorted(parts.iterdir())
    whole = second.read_bytes()
    before = wholes(model, optimizer)

    def refused(match, damage):
        dist.barrier()
        if dist.get_rank() == 0:
            damage()
        dist.barrier()
        other, optimizer_other = built(seed=1)
        untouched = wholes(other, optimizer_other)
        with pytest.raises(CheckpointError, match=match) as caught:
            ln.load_checkpoint(path, other, optimizer_other)
        same(untouched, wholes(other, optimizer_other))
        assert str(parts) in caught.value.where
        dist.barrier()
        if dist.get_rank() == 0:
            second.write_bytes(whole)
        dist.barrier()

    refused(r"1 of 2 parts are missing: shard-00002", second.unlink)
    refused("checksum of shard-00002", lambda: second.write_bytes(whole[:-1] + b"\0"))
    refused("bytes instead of", lambda: second.write_bytes(whole[:-1]))
    refused("bytes instead of|checksum", lambda: shutil.copy(first, second))
    assert ln.load_checkpoint(path, model, optimizer)
    same(before, wholes(model, optimizer))


def a_part_that_vanishes_while_it_is_read_is_told_on_every_rank(folder):
    model, optimizer, path = saved(folder)
    (parts,) = folder.glob("c.safetensors.shards-*")
    opened = open_checkpoint(path)
    dist.barrier()
    if dist.get_rank() == 0:
        sorted(parts.iterdir())[1].unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match="not as they were written"):
        restore(opened, model, optimizer)


def a_folder_of_another_checkpoint_does_not_fit(folder):
    _, _, path = saved(folder)
    model, optimizer, other = saved(folder, "d.safetensors")
    dist.barrier()
    if dist.get_rank() == 0:
        (mine,) = folder.glob("c.safetensors.shards-*")
        shutil.rmtree(mine)
    dist.barrier()
    with pytest.raises(CheckpointError, match="2 of 2 parts are missing"):
        ln.load_checkpoint(path, model, optimizer)
    assert ln.load_checkpoint(other, model, optimizer)


def the_last_few_are_kept_with_their_parts(folder):
    model, optimizer = built()
    train(model, optimizer, 1)
    kept = ln.Checkpoints(folder / "kept", keep=2)
    for step in (1, 2, 3):
        kept.save(model, optimizer, step=step, sharded=True)
    dist.barrier()
    assert kept.steps == [2, 3]
    names = {p.name.partition(".shards-")[0] for p in (folder / "kept").glob("*.shards-*")}
    assert names == {"step-000000002.safetensors", "step-000000003.safetensors"}
    dist.barrier()
    if dist.get_rank() == 1:
        newest = next((folder / "kept").glob("step-000000003*.shards-*"))
        next(newest.iterdir()).unlink()
    dist.barrier()
    with pytest.warns(UserWarning, match="an older one is taken"):
        assert kept.load(model, optimizer).step == 2


def renamed_and_partial_loads_read_only_what_they_need(folder):
    _, _, path = saved(folder)
    torch.manual_seed(1)
    part = fully_shard(Trunk())
    allow = ["token", "odd", "colour", "mask", "down.*"]
    restored = ln.load_checkpoint(path, part, rename={"up.*": "trunk.*"}, allow=allow)
    model, _ = built()
    ln.load_checkpoint(path, model)
    torch.testing.assert_close(
        part.trunk.weight.full_tensor(), model.up.weight.full_tensor(), rtol=0, atol=0
    )
    assert restored.model["odd"].device.type == "meta"


def ddp_has_no_parts_and_needs_none(folder):
    model, optimizer = built(strategy="ddp")
    train(model, optimizer)
    ln.save_checkpoint(folder / "ddp.safetensors", model, optimizer, sharded=True)
    assert list(folder.glob("*.shards-*")) == []
    again, optimizer_again = built(1, "ddp")
    ln.load_checkpoint(folder / "ddp.safetensors", again, optimizer_again)
    same(wholes(model, optimizer), wholes(again, optimizer_again))


def complex_numbers_of_128_bits_are_refused(folder):
    model = fully_shard(nn.ParameterDict({"z": torch.zeros(4, 4, dtype=torch.complex128)}))
    with pytest.raises(CheckpointError, match="complex128"):
        ln.save_checkpoint(folder / "z.safetensors", model, sharded=True)


CHECKS = [
    two_ranks_go_on_bit_equal,
    no_rank_reads_or_writes_the_part_of_another,
    the_file_of_before_stays_until_the_new_one_is_there,
    a_rank_that_cannot_write_is_named_on_all_and_nothing_changes,
    a_missing_or_damaged_part_is_refused_on_every_rank_and_nothing_is_loaded,
    a_part_that_vanishes_while_it_is_read_is_told_on_every_rank,
    a_folder_of_another_checkpoint_does_not_fit,
    the_last_few_are_kept_with_their_parts,
    renamed_and_partial_loads_read_only_what_they_need,
    ddp_has_no_parts_and_needs_none,
    complex_numbers_of_128_bits_are_refused,
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return outcomes(CHECKS, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_two_ranks(check, said):
    for rank, trace in enumerate(said[check.__name__]):
        assert not trace, f"rank {rank}: {trace}"


# --- from some ranks to others --------------------------------------------------------------------


def save_both_ways(rank: int, folder: Path) -> None:
    model, optimizer, _ = saved(folder, step=2)
    ln.save_checkpoint(folder / "whole.safetensors", model, optimizer, step=2)


def load_and_compare(rank: int, folder: Path, strategy: str) -> None:
    model, optimizer = built(1, strategy)
    ln.load_checkpoint(folder / "c.safetensors", model, optimizer)
    again, optimizer_again = built(2, strategy)
    ln.load_checkpoint(folder / "whole.safetensors", again, optimizer_again)
    same(wholes(model, optimizer), wholes(again, optimizer_again))
    train(model, optimizer)
    train(again, optimizer_again)
    same(wholes(model, optimizer), wholes(again, optimizer_again))
    ln.save_checkpoint(folder / f"{strategy}.safetensors", model, optimizer, sharded=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    spawn(save_both_ways, 2, folder)
    return folder


def test_one_process_reads_what_two_ranks_wrote(two):
    model = Net()
    optimizer = adam(model)
    ln.attach(model, optimizer)
    assert ln.load_checkpoint(two / "c.safetensors", model, optimizer).step == 2
    again = Net()
    optimizer_again = adam(again)
    ln.attach(again, optimizer_again)
    ln.load_checkpoint(two / "whole.safetensors", again, optimizer_again)
    same(wholes(model, optimizer), wholes(again, optimizer_again))


def test_the_whole_is_read_without_a_model(two):
    parts = read_checkpoint(two / "c.safetensors")
    whole = read_checkpoint(two / "whole.safetensors")
    assert parts.model.keys() == whole.model.keys()
    for name, x in whole.model.items():
        torch.testing.assert_close(parts.model[name], x, rtol=0, atol=0)
    (ours,), (theirs,) = parts.meta["optimizers"], whole.meta["optimizers"]
    for name, state in theirs["state"].items():
        for key, x in state.items():
            torch.testing.assert_close(ours["state"][name][key], x, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.slow  # six processes for each strategy
def test_from_two_ranks_to_three_and_back_to_one(two, strategy):
    """Three divide neither the token nor the matrices evenly."""
    spawn(load_and_compare, 3, two, strategy)
    assert read_checkpoint(two / f"{strategy}.safetensors").model["odd"].shape == (7, 3)


@pytest.mark.slow
def test_four_ranks_read_what_two_wrote(two):
    spawn(load_and_compare, 4, two, "fsdp2")


# --- damaged and forged ---------------------------------------------------------------------------


def forge(two: Path, folder: Path, change) -> Path:
    """A copy whose header was changed by ``change(meta)``, with the right checksum."""
    path = folder / "c.safetensors"
    with safe_open(two / "c.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = json.loads(file.metadata()["learnables"])
    shutil.copytree(two / meta["shards"]["folder"], folder / meta["shards"]["folder"])
    change(meta)
    text = json.dumps(meta)
    crc = str(zlib.crc32(text.encode()))
    save_file(tensors, path, {"learnables": text, "learnables_crc32": crc})
    return path


def set_folder(name):
    return lambda meta: meta["shards"].update(folder=name)


def rename_file(name):
    def change(meta):
        files = meta["shards"]["files"]
        files[name] = files.pop(next(iter(files)))

    return change


def resize(meta):
    name = next(iter(meta["shards"]["tensors"]))
    meta["shards"]["tensors"][name][1][0] = 1 << 50


def retype(word):
    return lambda meta: next(iter(meta["shards"]["tensors"].values())).__setitem__(0, word)


@pytest.mark.parametrize(
    "change",
    [
        set_folder("../etc.shards-0123456789abcdef"),
        set_folder("/c.shards-0123456789abcdef"),
        set_folder("c.safetensors"),
        set_folder(7),
        rename_file("../../shard-00001-model-00001-of-00001.safetensors"),
        rename_file("shard-00009-model-00001-of-00001.safetensors"),
        resize,
        retype("float64"),
        retype("__import__"),
        retype("nn"),
        lambda meta: meta["shards"]["tensors"].pop(next(iter(meta["shards"]["tensors"]))),
        lambda meta: meta["shards"].update(files={}),
        lambda meta: meta["shards"].update(files=[]),
        lambda meta: meta["shards"].update(more=1),
        lambda meta: meta.update(shards=None),
    ],
)
def test_a_forged_header_is_refused_with_a_reason(two, tmp_path, change):
    path = forge(two, tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert caught.value.found


def test_an_unforged_copy_is_read(two, tmp_path):
    assert read_checkpoint(forge(two, tmp_path, lambda meta: None)).step == 2


def test_parts_that_overlap_or_leave_a_hole_are_refused(two, tmp_path):
    """Files as long as they should be, with the checksums they should have, of other parts."""

    def twice(meta):
        folder = tmp_path / meta["shards"]["folder"]
        first, second = sorted(folder.iterdir())
        shutil.copy(first, second)
        files = meta["shards"]["files"]
        files[second.name] = [second.stat().st_size, sharded._crc32(second)]

    with pytest.raises(CheckpointError, match="do not make a"):
        read_checkpoint(forge(two, tmp_path, twice))


def test_inspect_reads_the_parts(two):
    done = CliRunner().invoke(app, ["inspect", str(two / "c.safetensors")])
    assert done.exit_code == 0, done.output
    assert "up.weight" in done.output
    assert "odd" in done.output
