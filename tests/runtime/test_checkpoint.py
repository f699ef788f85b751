import copy
import importlib.util
import json
import os
import random
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import CheckpointError, LearnablesWarning
from learnables.runtime.checkpoint import read_checkpoint


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


class Picture(nn.Module):
    """A tie, a buffer, a table that can be resized, and a value that decays toward its start."""

    def __init__(self, side: int = 4, order: str = "ab") -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(6, 6, bias=name == "a"))
        self.b.weight = self.a.weight
        self.positions = ln.nn.Positions2d(side, 6)
        self.colour = ln.parameter(torch.randn(3, 3), weight_decay="init")
        self.norm = nn.BatchNorm1d(side * side)

    def forward(self, x):
        x = self.norm(self.positions(x @ torch.block_diag(self.colour, self.colour)))
        return self.b(self.a(x)).square().mean()


def build(seed=0, side=4, order="ab"):
    torch.manual_seed(seed)
    model = Picture(side, order)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-2, weight_decay=0.1))
    ln.attach(model, optimizer)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 16, 6)).backward()
        optimizer.step()
        scheduler.step()


def test_training_goes_on_bit_equal(tmp_path):
    path = tmp_path / "c.safetensors"
    model, optimizer, scheduler = build(0)
    train(model, optimizer, scheduler, 3)
    ln.save_checkpoint(path, model, optimizer, also={"scheduler": scheduler}, step=3)
    train(model, optimizer, scheduler, 3)

    again, optimizer, scheduler = build(1)
    restored = ln.load_checkpoint(path, again, optimizer, also={"scheduler": scheduler})
    assert restored.step == 3
    train(again, optimizer, scheduler, 3)

    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert again.b.weight is again.a.weight


def test_optimizer_state_follows_the_name_and_not_the_order(tmp_path):
    path = tmp_path / "c.safetensors"
    model, optimizer, scheduler = build(0, order="ab")
    train(model, optimizer, scheduler, 2)
    ln.save_checkpoint(path, model, optimizer)
    other, other_optimizer, _ = build(1, order="ba")
    assert [n for n, _ in other.named_parameters()] != [n for n, _ in model.named_parameters()]
    ln.load_checkpoint(path, other, other_optimizer)
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    for a, b in [("a.weight", "b.weight"), ("a.bias", "a.bias"), ("colour", "colour")]:
        torch.testing.assert_close(
            optimizer.state[mine[a]], other_optimizer.state[theirs[b]], rtol=0, atol=0
        )


def test_options_of_the_groups_come_back(tmp_path):
    path = tmp_path / "c.safetensors"
    model, optimizer, scheduler = build(0)
    train(model, optimizer, scheduler, 4)
    rates = [group["lr"] for group in optimizer.param_groups]
    ln.save_checkpoint(path, model, optimizer)
    model, optimizer, _ = build(0)
    assert [group["lr"] for group in optimizer.param_groups] != rates
    ln.load_checkpoint(path, model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_a_tied_parameter_is_written_once(tmp_path):
    from safetensors.torch import load_file

    model, *_ = build()
    ln.save_checkpoint(tmp_path / "c.safetensors", model, random_state=False)
    tensors = load_file(tmp_path / "c.safetensors")
    assert "a.weight" in tensors
    assert "b.weight" not in tensors
    assert read_checkpoint(tmp_path / "c.safetensors").ties == {"b.weight": "a.weight"}


def test_untied_model_gets_both_values_and_a_warning(tmp_path):
    model, *_ = build()
    ln.save_checkpoint(tmp_path / "c.safetensors", model)
    loose = copy.deepcopy(model)
    loose.b.weight = nn.Parameter(torch.zeros(6, 6))
    with pytest.warns(LearnablesWarning, match=r"ln\.tie\(model, 'b\.weight', 'a\.weight'\)"):
        ln.load_checkpoint(tmp_path / "c.safetensors", loose)
    torch.testing.assert_close(loose.b.weight, model.a.weight, rtol=0, atol=0)


def test_tied_model_refuses_two_different_values(tmp_path):
    model, *_ = build()
    loose = copy.deepcopy(model)
    loose.b.weight = nn.Parameter(torch.zeros(6, 6))
    ln.save_checkpoint(tmp_path / "c.safetensors", loose)
    with pytest.raises(CheckpointError, match="two different values for one tied parameter"):
        ln.load_checkpoint(tmp_path / "c.safetensors", model)


def test_value_to_decay_toward_comes_back(tmp_path):
    model, optimizer, _ = build(0)
    ln.save_checkpoint(tmp_path / "c.safetensors", model, optimizer)
    start = model.colour.detach().clone()
    other, optimizer, _ = build(1)
    ln.load_checkpoint(tmp_path / "c.safetensors", other, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
        if "decay_toward_init" in group:
            group["decay_toward_init"] = 1.0
    other.colour.grad = torch.zeros(3, 3)
    other.colour.data.zero_()
    optimizer.step()  # all the way back to the start of the *saved* run
    torch.testing.assert_close(other.colour.detach(), start)


def test_all_random_states_come_back(tmp_path):
    draw = lambda: (torch.rand(2).tolist(), np.random.rand(), random.random())  # noqa: E731, NPY002
    model = nn.Linear(1, 1)
    ln.save_checkpoint(tmp_path / "c.safetensors", model)
    first = draw()
    ln.load_checkpoint(tmp_path / "c.safetensors", model)
    assert draw() == first
    ln.load_checkpoint(tmp_path / "c.safetensors", model, random_state=False)
    assert draw() != first


def test_table_is_resized_and_another_shape_is_not(tmp_path):
    model, *_ = build(side=4)
    ln.save_checkpoint(tmp_path / "c.safetensors", model)
    larger = ln.nn.Positions2d(6, 6)
    state = {"table": read_checkpoint(tmp_path / "c.safetensors").model["positions.table"]}
    larger.load_state_dict(state)
    model.positions = ln.nn.Positions2d(6, 6)
    ln.load_checkpoint(tmp_path / "c.safetensors", model)
    torch.testing.assert_close(model.positions.table, larger.table)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
def test_any_dtype_and_any_layout_comes_back_exactly(tmp_path, dtype):
    model = nn.Module()
    model.column_major = nn.Parameter(torch.randn(3, 5, dtype=dtype).t())
    model.slice = nn.Parameter(torch.randn(4, 6, dtype=dtype)[:, ::2])
    model.scalar = nn.Parameter(torch.randn((), dtype=dtype))
    model.empty = nn.Parameter(torch.empty(0, 2, dtype=dtype))
    model.register_buffer("view", model.slice.detach()[0])
    expected, strides = copy.deepcopy(model.state_dict()), model.column_major.stride()
    ln.save_checkpoint(tmp_path / "c.safetensors", model)
    with torch.no_grad():
        for x in model.state_dict().values():
            x.zero_()
    ln.load_checkpoint(tmp_path / "c.safetensors", model)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)
    assert model.column_major.stride() == strides


def test_state_gets_the_strides_of_its_parameter(tmp_path):
    """The fused CPU optimizers read both in memory order: other strides are silently wrong."""

    def build(layout):
        torch.manual_seed(0)
        model = nn.Conv2d(4, 4, 3).to(memory_format=layout)
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def step(model, optimizer):
        torch.manual_seed(1)
        optimizer.zero_grad()
        model(torch.randn(2, 4, 5, 5)).square().mean().backward()
        optimizer.step()

    plain, optimizer = build(torch.contiguous_format)
    step(plain, optimizer)
    ln.save_checkpoint(tmp_path / "c.safetensors", plain, optimizer)
    step(plain, optimizer)
    other, optimizer = build(torch.channels_last)
    ln.load_checkpoint(tmp_path / "c.safetensors", other, optimizer)
    assert optimizer.param_groups[0]["fused"]
    step(other, optimizer)
    torch.testing.assert_close(other.weight, plain.weight)


def test_sgd_with_momentum_lbfgs_and_several_optimizers(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        first = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
        second = torch.optim.LBFGS(model[1].parameters(), max_iter=3)
        return model, [first, second]

    def step(model, optimizers):
        torch.manual_seed(1)
        x = torch.randn(8, 3)

        def loss():
            model.zero_grad()
            value = (model(x) - x.sum(1, keepdim=True)).square().mean()
            value.backward()
            return value

        for optimizer in optimizers:
            optimizer.step(loss)

    model, optimizers = build()
    step(model, optimizers)
    ln.save_checkpoint(tmp_path / "c.safetensors", model, optimizers)
    step(model, optimizers)
    other, optimizers = build()
    ln.load_checkpoint(tmp_path / "c.safetensors", other, optimizers)
    step(other, optimizers)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_compiled_model_and_bare_model_read_each_others_files(tmp_path):
    model, optimizer, _ = build(0)
    compiled = torch.compile(model, backend="eager")
    ln.save_checkpoint(tmp_path / "c.safetensors", compiled, optimizer)
    bare, optimizer, _ = build(1)
    ln.load_checkpoint(tmp_path / "c.safetensors", bare, optimizer)
    torch.testing.assert_close(bare.state_dict(), model.state_dict(), rtol=0, atol=0)
    ln.save_checkpoint(tmp_path / "d.safetensors", bare)
    ln.load_checkpoint(tmp_path / "d.safetensors", torch.compile(build(2)[0], backend="eager"))


def test_averaged_model_and_scaler_come_back(tmp_path):
    model, *_ = build(0)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ln.save_checkpoint(
        tmp_path / "c.safetensors", model, also={"average": average, "scaler": scaler}
    )
    other = torch.optim.swa_utils.AveragedModel(build(1)[0])
    fresh = torch.amp.GradScaler("cpu")
    ln.load_checkpoint(
        tmp_path / "c.safetensors", build(2)[0], also={"average": other, "scaler": fresh}
    )
    assert fresh.get_scale() == 8.0
    torch.testing.assert_close(other.state_dict(), average.state_dict(), rtol=0, atol=0)


# --- what is refused, and leaves everything as it was ---------------------------------------------


def test_checkpoint_of_another_model_lists_every_name_and_changes_nothing(tmp_path):
    ln.save_checkpoint(tmp_path / "c.safetensors", nn.ModuleDict({"x": nn.Linear(2, 2)}))
    other = nn.ModuleDict({"x": nn.Linear(3, 2), "y": nn.LayerNorm(2)})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError) as caught:
        ln.load_checkpoint(tmp_path / "c.safetensors", other)
    assert "missing: y.weight, y.bias" in caught.value.found
    assert "mis-shaped: x.weight (2, 2) instead of (2, 3)" in caught.value.found
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)

    smaller = nn.ModuleDict({"x": nn.Linear(2, 2, bias=False)})
    before = copy.deepcopy(smaller.state_dict())
    with pytest.raises(CheckpointError, match=r"unexpected: x\.bias"):
        ln.load_checkpoint(tmp_path / "c.safetensors", smaller)
    torch.testing.assert_close(smaller.state_dict(), before, rtol=0, atol=0)
    ln.load_checkpoint(tmp_path / "c.safetensors", smaller, allow="x.bias")


def test_other_groups_are_refused_unless_allowed(tmp_path):
    model = nn.Linear(2, 2)
    ln.save_checkpoint(
        tmp_path / "c.safetensors", model, torch.optim.SGD(model.parameters(), lr=0.1)
    )
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    with pytest.raises(CheckpointError, match="no saved group of exactly: weight"):
        ln.load_checkpoint(tmp_path / "c.safetensors", model, optimizer)
    ln.load_checkpoint(tmp_path / "c.safetensors", model, optimizer, allow="*")
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.3]


def test_missing_scheduler_or_optimizer_is_refused(tmp_path):
    model, optimizer, scheduler = build()
    ln.save_checkpoint(tmp_path / "c.safetensors", model)
    with pytest.raises(CheckpointError, match="lacks what is to be loaded"):
        ln.load_checkpoint(tmp_path / "c.safetensors", model, optimizer)
    with pytest.raises(CheckpointError, match="lacks what is to be loaded"):
        ln.load_checkpoint(tmp_path / "c.safetensors", model, also={"scheduler": scheduler})


def test_optimizer_with_a_parameter_of_nobody_is_refused(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(CheckpointError, match="the model does not have"):
        ln.save_checkpoint(tmp_path / "c.safetensors", nn.Linear(1, 1), optimizer)
    assert names_in(tmp_path) == []


def test_every_flipped_or_missing_byte_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    model = nn.Linear(3, 3)
    ln.save_checkpoint(path, model, random_state=False)
    whole = path.read_bytes()
    before = copy.deepcopy(model.state_dict())
    rng = random.Random(0)
    for at in rng.sample(range(len(whole)), 60):
        for damaged in (
            whole[:at],
            whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :],
        ):
            path.write_bytes(damaged)
            # A flip in safetensors' own part of the header may rename a tensor: still an error.
            with pytest.raises(CheckpointError):
                ln.load_checkpoint(path, model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_foreign_and_missing_and_newer_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="no checkpoint of learnables"):
        read_checkpoint(tmp_path / "foreign")
    text = json.dumps({"format": 99})
    header = {"learnables": text, "learnables_crc32": str(zlib.crc32(text.encode()))}
    save_file({"x": torch.zeros(1)}, tmp_path / "newer", header)
    with pytest.raises(CheckpointError, match="newer version"):
        read_checkpoint(tmp_path / "newer")


# --- a disk that fills up ---------------------------------------------------------------------


def test_file_size_limit_in_the_middle_of_a_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.safetensors"
    code = """
        import resource, sys, torch, learnables as ln
        from learnables.errors import CheckpointError
        torch.manual_seed(0)
        path, model = sys.argv[1], torch.nn.Linear(200, 200)
        ln.save_checkpoint(path, model, step=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            ln.save_checkpoint(path, model, step=2)
        except CheckpointError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "the checkpoint cannot be written" in said
    assert "File too large" in said
    assert read_checkpoint(path).step == 1
    assert names_in(tmp_path) == ["c.safetensors"]


def test_full_disk_in_the_middle_of_a_save_leaves_the_old_file(disk_of):
    tiny_disk = disk_of("300k")
    path = tiny_disk / "c.safetensors"
    model = nn.Linear(200, 200)  # 160 kB: one fits, two do not
    ln.save_checkpoint(path, model, step=1, random_state=False)
    with pytest.raises(CheckpointError, match="No space left on device"):
        ln.save_checkpoint(path, model, step=2, random_state=False)
    assert names_in(tiny_disk) == ["c.safetensors"]
    ln.load_checkpoint(path, model)
    (tiny_disk / "c.safetensors").unlink()
    ln.save_checkpoint(path, model, step=3, random_state=False)
    assert read_checkpoint(path).step == 3


# --- many processes -----------------------------------------------------------------------------

SHARDED = Path(__file__).with_name("sharded_checkpoint.py")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_and_one_read_each_others_files(tmp_path, strategy):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SHARDED), strategy, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("sharded_checkpoint", SHARDED)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    build, step = script.build, script.step

    whole, optimizer = build()
    ln.load_checkpoint(tmp_path / "two.safetensors", whole, optimizer)
    step(whole, optimizer)
    expected = read_checkpoint(tmp_path / "two_after.safetensors").model
    torch.testing.assert_close(dict(whole.state_dict()), expected)
