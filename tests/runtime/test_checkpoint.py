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
from learnables.runtime import checkpoint as checkpoint_module
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


# --- another model, on purpose -------------------------------------------------------------------


class Body(nn.Module):
    """A body and a head, under names of one's choice."""

    def __init__(self, body: str = "body", head: str = "head", classes: int = 3) -> None:
        super().__init__()
        self.add_module(body, nn.Linear(4, 4))
        self.add_module(head, nn.Linear(4, classes))
        self.parts = body, head

    def forward(self, x):
        body, head = self.parts
        return getattr(self, head)(getattr(self, body)(x))


def trained(model, steps=2):
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_a_renamed_model_goes_on_bit_equal(tmp_path):
    model, optimizer = trained(Body())
    ln.save_checkpoint(tmp_path / "c", model, optimizer)
    again = Body("trunk", "classifier")
    theirs = torch.optim.AdamW(again.parameters(), lr=0.5)
    rename = {"body.*": "trunk.*", "head.weight": "classifier.weight"}
    with pytest.raises(CheckpointError, match=r"missing: classifier\.bias; unexpected: head\.bias"):
        ln.load_checkpoint(tmp_path / "c", again, rename=rename)
    rename["head.bias"] = "classifier.bias"
    done = ln.load_checkpoint(tmp_path / "c", again, theirs, rename=rename)
    assert "renamed: body.weight → trunk.weight" in str(done.matched)
    for m, o in ((model, optimizer), (again, theirs)):
        o.zero_grad()
        m(torch.ones(2, 4)).square().mean().backward()
        o.step()
    mine, others = list(model.parameters()), list(again.parameters())
    torch.testing.assert_close(others, mine, rtol=0, atol=0)


def test_only_what_is_allowed_may_be_missing_or_unexpected(tmp_path):
    model, optimizer = trained(Body())
    ln.save_checkpoint(tmp_path / "c", model, optimizer)
    other = Body(head="classifier", classes=5)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.5)
    start = other.classifier.weight.detach().clone()
    for allow in ("head.*", "classifier.*", ["head.*", "classifier.weight"]):
        with pytest.raises(CheckpointError, match=r"another model|groups its parameters"):
            ln.load_checkpoint(tmp_path / "c", other, theirs, allow=allow)
    with pytest.raises(CheckpointError, match="fits no name") as caught:
        ln.load_checkpoint(tmp_path / "c", other, allow=["head.*", "clasifier.*"])
    assert caught.value.where == "clasifier.*"
    allow = ["head.*", "classifier.*"]
    done = ln.load_checkpoint(tmp_path / "c", other, theirs, allow=allow).matched
    assert (done.loaded, done.of) == (2, 4)
    assert done.missing == ("classifier.weight", "classifier.bias")
    assert done.unexpected == ("head.bias", "head.weight")
    assert set(done.anew) == {"classifier.weight", "classifier.bias"}
    assert theirs.param_groups[0]["lr"] == 0.1, "the group is the same but for what is allowed"
    assert torch.equal(other.classifier.weight, start)
    assert torch.equal(other.body.weight, model.body.weight)
    assert theirs.state[other.body.weight]["step"] == 2
    other(torch.ones(1, 4)).sum().backward()
    theirs.step()


def test_the_mending_that_the_error_offers_works(tmp_path):
    ln.save_checkpoint(tmp_path / "c", Body())
    model = Body(head="classifier")  # the mending's
    with pytest.raises(CheckpointError) as caught:
        ln.load_checkpoint(tmp_path / "c", model)
    eval(caught.value.mend)


def test_a_shape_is_never_allowed_to_differ(tmp_path):
    ln.save_checkpoint(tmp_path / "c", Body())
    with pytest.raises(CheckpointError, match=r"mis-shaped: head\.weight"):
        ln.load_checkpoint(tmp_path / "c", Body(classes=5), allow="*")


def test_whole_numbers_are_not_loaded_into_real_ones(tmp_path):
    model = nn.Module()
    model.register_buffer("table", torch.arange(3))
    ln.save_checkpoint(tmp_path / "c", model)
    model.table = torch.zeros(3)
    with pytest.raises(CheckpointError, match="mis-typed: table int64 instead of float32"):
        ln.load_checkpoint(tmp_path / "c", model)
    assert model.table.eq(0).all()


@pytest.mark.parametrize("held", [True, False])
def test_what_a_lightning_module_holds_as_model_is_found(tmp_path, held):
    plain, holder = Body(), nn.ModuleDict({"model": Body()})
    source, target = (holder, plain) if held else (plain, holder)
    ln.save_checkpoint(tmp_path / "c", source)
    matched = ln.load_checkpoint(tmp_path / "c", target).matched
    assert matched.loaded == 4
    assert len(matched.renamed) == 4
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resized_table_has_its_line_and_its_moments_begin_anew(tmp_path):
    model, optimizer, scheduler = build(side=4)
    train(model, optimizer, scheduler, 2)
    ln.save_checkpoint(tmp_path / "c", model, optimizer)
    model = Picture(side=6)
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-2, weight_decay=0.1))
    ln.attach(model, optimizer)
    with pytest.raises(CheckpointError, match=r"mis-shaped: norm\.weight"):
        ln.load_checkpoint(tmp_path / "c", model, optimizer)
    model.norm = nn.BatchNorm1d(16)  # has no rule by which it could be resized
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=1e-2, weight_decay=0.1))
    matched = ln.load_checkpoint(tmp_path / "c", model, optimizer).matched
    lines = str(matched).splitlines()
    assert any(
        line.startswith("resized: positions.table from (1, 16, 6) to (1, 36, 6) by its rule, ")
        for line in lines
    ), lines
    assert "optimizer state begins anew: positions.table, whose shape was (1, 16, 6)" in lines
    assert not optimizer.state[model.positions.table]
    assert optimizer.state[model.colour]["step"] == 2
    model.positions(torch.randn(1, 36, 6)).sum().backward()
    optimizer.step()


def test_a_number_with_and_without_a_dimension_are_one_with_their_moments(tmp_path):
    models = [nn.Module(), nn.Module()]
    models[0].scale = nn.Parameter(torch.tensor(2.0))
    models[1].scale = ln.parameter(1, init=ln.init.constant(3.0))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        (model.scale * 3).sum().backward()
        optimizer.step()
    for a, b in ((0, 1), (1, 0)):
        assert models[a].scale.shape != models[b].scale.shape
        ln.save_checkpoint(tmp_path / "c", models[a], optimizers[a])
        ln.load_checkpoint(tmp_path / "c", models[b], optimizers[b])
        moments = optimizers[b].state[models[b].scale]
        assert moments["exp_avg"].shape == models[b].scale.shape
        assert moments["exp_avg"].item() == optimizers[a].state[models[a].scale]["exp_avg"].item()
        optimizers[b].step()


def test_a_constraint_that_is_no_longer_declared_is_told(tmp_path):
    def build(**kwargs):
        model = nn.Module()
        model.mix = ln.parameter(torch.tensor([0.5, 0.5]), **kwargs)
        return model

    ln.save_checkpoint(tmp_path / "c", build(constraint=ln.sets.Simplex(), lr_scale=2.0))
    same = ln.load_checkpoint(tmp_path / "c", build(constraint=ln.sets.Simplex(), lr_scale=2.0))
    assert same.matched.changed == ()
    with pytest.warns(LearnablesWarning, match="is free now"):
        changed = ln.load_checkpoint(tmp_path / "c", build(lr_scale=3.0)).matched.changed
    assert changed == (
        f"mix: constraint was {ln.sets.Simplex()!r}, is not declared",
        "mix: lr_scale was 2.0, is 3.0",
    )
    frozen = build(constraint=ln.sets.Simplex(), lr_scale=2.0)
    frozen.mix.requires_grad_(False)
    told = ln.load_checkpoint(tmp_path / "c", frozen).matched.changed
    assert told == ("mix: trainable was not declared, is False",)


def test_masks_sets_ties_and_parametrizations_come_back_and_hold(tmp_path):
    from torch.nn.utils import parametrizations, prune

    def build(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({n: nn.Linear(6, 6) for n in ("pruned", "turned", "tied", "free")})
        prune.random_unstructured(model["pruned"], "weight", 0.5)
        parametrizations.orthogonal(model["turned"])
        model["sparse"] = ln.nn.BlockSparseLinear(16, 16, block=4, density=0.5)
        ln.tie(model, "tied.weight", "free.weight")
        model.mix = ln.parameter(torch.rand(6), constraint=ln.sets.Simplex())
        optimizer = torch.optim.AdamW(ln.param_groups(model, lr=0.1, weight_decay=0.1))
        ln.attach(model, optimizer)
        return model, optimizer

    def step(model, optimizer):
        torch.manual_seed(3)
        optimizer.zero_grad()
        x = torch.randn(4, 6) * model.mix
        for name in ("pruned", "turned", "tied", "free"):
            x = model[name](x)
        (x.square().mean() + model["sparse"](torch.randn(4, 16)).square().mean()).backward()
        optimizer.step()

    model, optimizer = build(0)
    step(model, optimizer)
    ln.save_checkpoint(tmp_path / "c", model, optimizer)
    again, theirs = build(1)
    assert not torch.equal(again["pruned"].weight_mask, model["pruned"].weight_mask)
    ln.load_checkpoint(tmp_path / "c", again, theirs)
    for _ in range(3):
        step(model, optimizer)
        step(again, theirs)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(again["pruned"].weight_mask, model["pruned"].weight_mask)
    assert (again["pruned"].weight == 0).sum() == 18
    assert again["tied"].weight is again["free"].weight
    assert again.mix.sum().item() == pytest.approx(1.0)
    assert ln.sets.Simplex().contains(again.mix.detach(), 1e-6)


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


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    model = nn.Linear(4, 4)
    ln.save_checkpoint(path, model, step=1)
    read_meta = checkpoint_module.read_meta

    def and_then_replaced(path):
        meta = read_meta(path)
        if meta["step"] == 1:  # the training saves just now
            nn.init.zeros_(model.weight)
            ln.save_checkpoint(path, model, step=2)
        return meta

    monkeypatch.setattr(checkpoint_module, "read_meta", and_then_replaced)
    found = read_checkpoint(path)
    assert found.step == 2
    assert not found.model["weight"].any()


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
