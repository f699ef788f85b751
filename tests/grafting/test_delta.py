"""A delta file goes into the model it came from, and into no other."""

import json
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.grafting.test_graft import Plus, Stack
from torch import nn

import learnables as ln
from learnables.auditing.inspection import inspect_file, run_inspect
from learnables.errors import CheckpointError, LearnablesWarning


def fresh(seed=0):
    torch.manual_seed(seed)
    return Stack()


def trained(model, x):
    ln.train_only(model, ["extra.*", "head.*"])
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return inferred(model, x)


@torch.no_grad()
def inferred(model, x):
    # As it was trained: torch multiplies another way where a weight asks for a gradient.
    ln.train_only(model, ["extra.*", "head.*"])
    return model(x)


def is_same(model, other):
    theirs = other.state_dict()
    assert list(model.state_dict()) == list(theirs)
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


COMPONENTS = {
    "prompts": (lambda: ln.nn.Prompts(4, 8, prefix=1), "blocks.*"),
    "deep": (lambda: ln.nn.DeepPrompts(3, 4, 8, init=ln.init.normal(0.1)), "blocks.*"),
    "registers": (lambda: ln.nn.RegisterTokens(2, 8), "blocks.*"),
    "scale": (lambda: ln.nn.LayerScale(8, 0.5), "blocks.1"),
}


@pytest.mark.parametrize("kind", COMPONENTS)
def test_saved_and_loaded_the_outputs_are_bit_equal(kind, tmp_path):
    build, at = COMPONENTS[kind]
    model, x, file = fresh(), torch.randn(2, 5, 3), tmp_path / "delta.safetensors"
    ln.graft(model, "extra", build(), at)
    out = trained(model, x)
    names = ln.save_delta(model, file)
    assert all(name.startswith(("extra.", "head.")) for name in names)
    assert file.stat().st_size < 4096
    other = fresh()
    (handle,) = ln.load_delta(other, file)
    assert handle.name == "extra"
    assert is_same(model, other)
    assert torch.equal(inferred(other, x), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_a_component_comes_back(dtype, tmp_path):
    model, file = fresh().to(dtype), tmp_path / "delta"
    prompts = ln.nn.Prompts(4, 8).to(dtype)
    ln.graft(model, "extra", prompts, "blocks.*")
    ln.train_only(model, "extra.*")
    ln.save_delta(model, file)
    (handle,) = ln.load_delta(fresh().to(dtype), file)
    assert handle.component.tokens.dtype == dtype
    assert torch.equal(handle.component.tokens, prompts.tokens)


def test_a_component_of_ones_own_is_handed_over(tmp_path):
    model, x, file = fresh(), torch.randn(2, 5, 3), tmp_path / "delta"
    ln.graft(model, "extra", Plus(16, 8), "blocks.0.linear1.weight")
    out = trained(model, x)
    ln.save_delta(model, file)
    with pytest.raises(CheckpointError, match="handed over"):
        ln.load_delta(fresh(), file)
    other = fresh()
    ln.load_delta(other, file, components={"extra": Plus(16, 8)})
    assert is_same(model, other)
    assert torch.equal(inferred(other, x), out)


def saved(tmp_path):
    model, file = fresh(), tmp_path / "delta"
    ln.graft(model, "extra", ln.nn.Prompts(4, 8), "blocks.*")
    ln.train_only(model, "extra.*")
    ln.save_delta(model, file)
    return file


def test_another_base_is_refused_and_left_alone(tmp_path):
    file = saved(tmp_path)
    with pytest.raises(CheckpointError, match="values of its parameters differ"):
        ln.load_delta(fresh(1), file)
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="names and shapes"):
        ln.load_delta(other, file)
    assert list(other.state_dict()) == ["0.weight", "0.bias"]


def rewritten(file, change):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        meta = json.loads(opened.metadata()["learnables_delta"])
    change(meta)
    text = json.dumps(meta)
    header = {"learnables_delta": text, "learnables_delta_crc32": str(zlib.crc32(text.encode()))}
    save_file(load_file(file), file, metadata=header)


def test_a_newer_file_is_refused(tmp_path):
    file = saved(tmp_path)
    rewritten(file, lambda meta: meta.update(format=2, learnables="9.1.0"))
    with pytest.raises(CheckpointError, match=r"newer version[\s\S]*format 2, of learnables 9.1.0"):
        ln.load_delta(fresh(), file)


def test_no_class_is_looked_up_outside_the_components(tmp_path):
    file = saved(tmp_path)
    for kind in ("os.system", "comparison", "Component", "torch.nn.Linear"):
        rewritten(file, lambda meta, k=kind: meta["grafts"][0]["component"].update({"class": k}))
        with pytest.raises(CheckpointError, match=r"handed over|cannot be built"):
            ln.load_delta(fresh(), file)


def test_other_numbers_of_prompts_are_resized_and_other_widths_refused(tmp_path):
    file, model = saved(tmp_path), fresh()
    with pytest.warns(LearnablesWarning, match=r"extra.tokens \(1, 4, 8\) → \(1, 6, 8\)"):
        (handle,) = ln.load_delta(model, file, components={"extra": ln.nn.Prompts(6, 8)})
    kept = load_file(file)["extra.tokens"]
    assert torch.equal(handle.component.tokens[:, :4], kept)
    registers = {"extra": ln.nn.RegisterTokens(2, 8)}
    with pytest.raises(CheckpointError, match=r"\(1, 4, 8\)[\s\S]*\(1, 2, 8\)"):
        ln.load_delta(fresh(), file, components=registers)


def test_what_is_no_delta_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no delta"):
        ln.load_delta(fresh(), tmp_path / "missing")
    (tmp_path / "junk").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError):
        ln.load_delta(fresh(), tmp_path / "junk")
    with pytest.raises(CheckpointError, match="no graft"):
        ln.save_delta(fresh(), tmp_path / "x")


def test_the_file_says_what_went_where_and_which_library_wrote_it(tmp_path):
    seen = inspect_file(saved(tmp_path))
    assert seen.kind == "ln.save_delta"
    assert seen.about["learnables"] == ln.__version__
    page = str(seen)
    assert "graft extra: Prompts at 'blocks.0 … blocks.2 (3 modules)', where='tokens'" in page
    assert "1 tensors, 32 values" in page


def test_beside_its_base_model_a_delta_lacks_nothing(tmp_path):
    model, file = fresh(), tmp_path / "delta"
    ln.graft(model, "extra", ln.nn.Prompts(4, 8), "blocks.*")
    trained(model, torch.randn(2, 5, 3))
    ln.save_delta(model, file)
    seen = inspect_file(file, fresh())
    assert seen.ok, str(seen)
    assert seen.added == ["extra.tokens"]
    assert "beside the model: 2 of 3 names" in str(seen)
    assert run_inspect(file, output=tmp_path / "page") == 0
    other = nn.Sequential(nn.Linear(2, 2))
    assert inspect_file(file, other).unexpected == ["head.bias", "head.weight"]


def test_a_header_of_nonsense_is_refused_by_inspect(tmp_path):
    for change in (
        lambda meta: meta.pop("grafts"),
        lambda meta: meta.update(grafts=[{"name": "extra", "at": []}]),
        lambda meta: meta.update(base=None),
    ):
        file = saved(tmp_path)
        rewritten(file, change)
        with pytest.raises(CheckpointError, match="nothing right about grafts"):
            inspect_file(file)


def test_a_name_that_the_model_has_not_offers_the_nearest(tmp_path):
    model, file = fresh(), tmp_path / "delta"
    ln.graft(model, "extra", ln.nn.Prompts(4, 8), "blocks.*")
    ln.train_only(model, ["extra.*", "head.*"])
    ln.save_delta(model, file)
    other = fresh()
    other.header = other.head
    del other.head
    with pytest.raises(CheckpointError, match=r"where: head.bias[\s\S]*header.bias"):
        ln.load_delta(other, file)
    assert not hasattr(other, "extra")


def everything(model):
    """What a refused file could have changed: values, names, hooks, attributes, modes."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: [*vars(m), *map(repr, vars(m).values())] for name, m in model.named_modules()},
    )


def is_untouched(model, before):
    values, attributes = everything(model)
    same = attributes == before[1] and values.keys() == before[0].keys()
    return same and all(torch.equal(values[name], before[0][name]) for name in values)


def test_a_file_with_any_bit_flipped_or_cut_anywhere_is_refused_and_changes_nothing(tmp_path):
    file, model = saved(tmp_path), fresh()
    raw, before = file.read_bytes(), everything(model)
    broken = [raw[:at] for at in range(len(raw))]
    broken += [bytes((*raw[:at], raw[at] ^ 1 << at % 8, *raw[at + 1 :])) for at in range(len(raw))]
    broken.append(raw + b"\0")
    strangers = 0
    for bytes_ in broken:
        file.write_bytes(bytes_)
        with pytest.raises(CheckpointError):
            ln.load_delta(model, file)
        try:
            strangers += inspect_file(file).kind == "safetensors"
        except CheckpointError:
            continue
    # Under another key than this one it is a file of bare tensors.
    assert 0 < strangers <= len("learnables_delta")
    assert is_untouched(model, before)
    file.write_bytes(raw)
    ln.load_delta(model, file)


def test_a_load_that_fails_halfway_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model, file = fresh(), tmp_path / "delta"
    ln.graft(model, "first", ln.nn.Prompts(4, 8), "blocks.*")
    ln.graft(model, "extra", ln.nn.LayerScale(8, 0.5), "blocks.1")
    trained(model, torch.randn(2, 5, 3))
    ln.save_delta(model, file)
    other = fresh()
    before, load = everything(other), Stack.load_state_dict

    def interrupted(self, *args, **options):
        monkeypatch.undo()
        load(self, *args, **options)  # everything is in its place
        raise KeyboardInterrupt

    monkeypatch.setattr(Stack, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ln.load_delta(other, file)
    assert is_untouched(other, before)
    ln.load_delta(other, file)
    assert is_same(model, other)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.free = nn.BatchNorm1d(2, affine=False)

    def forward(self, x):
        return self.free(self.head(self.norm(self.body(x))))


def normed(seed=0):
    torch.manual_seed(seed)
    return Normed()


HELD = {"held": ("extra.*", {"free"}), "trained": (["extra.*", "norm.*"], {"free", "norm"})}


@pytest.mark.parametrize("kind", [*HELD, "frozen by hand"])
def test_running_statistics_that_moved_go_with_the_delta(kind, tmp_path):
    model, file, x = normed(), tmp_path / "delta", torch.randn(9, 3)
    ln.graft(model, "extra", ln.nn.LayerScale(8, 0.5), "body")
    if kind in HELD:
        ln.train_only(model, HELD[kind][0])
    else:
        for name, param in model.named_parameters():
            param.requires_grad_(name.startswith("extra."))
    for _ in range(3):
        model.train()(x + 3)
    names = ln.save_delta(model, file)
    moved = HELD[kind][1] if kind in HELD else {"free", "norm"}
    assert {name.split(".")[0] for name in names if "running" in name} == moved
    other = normed()
    ln.load_delta(other, file)
    assert is_same(model, other)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_a_base_with_other_running_statistics_is_another_base(tmp_path):
    model, file = normed(), tmp_path / "delta"
    ln.graft(model, "extra", ln.nn.LayerScale(8, 0.5), "body")
    ln.train_only(model, "extra.*")
    ln.save_delta(model, file)
    other = normed()
    other.train()(torch.randn(9, 3))
    before = everything(other)
    with pytest.raises(CheckpointError, match="another base model: running statistics differ"):
        ln.load_delta(other, file)
    assert is_untouched(other, before)


class Placed(nn.Module):
    """A table of positions that trains beside a graft, and is resized on load."""

    def __init__(self, places):
        super().__init__()
        self.places = ln.nn.Positions1d(places, 8)
        self.body = nn.Linear(8, 8)

    def forward(self, x):
        return self.body(self.places(x))


def placed(places):
    model = Placed(places)
    with torch.no_grad():
        model.body.weight.fill_(0.1), model.body.bias.zero_()
    return model


def test_a_reshaped_target_is_resized_with_a_line_that_says_both_shapes(tmp_path):
    model, file = placed(6), tmp_path / "delta"
    ln.graft(model, "extra", ln.nn.LayerScale(8, 0.5), "body")
    ln.train_only(model, ["extra.*", "places.*"])
    ln.save_delta(model, file)
    (name,) = (name for name in load_file(file) if name.startswith("places."))
    other = placed(9)
    with pytest.warns(LearnablesWarning, match=rf"{name} \(1, 6, 8\) → \(1, 9, 8\)"):
        ln.load_delta(other, file)
    twin = placed(9)
    twin.load_state_dict({name: model.state_dict()[name]}, strict=False)
    assert torch.equal(other.get_parameter(name), twin.get_parameter(name))
    other(torch.randn(2, 9, 8))


def test_a_target_under_another_name_is_refused_where_it_was_frozen_too(tmp_path):
    file, other = saved(tmp_path), fresh()
    other.stem = other.embed
    del other.embed
    before = everything(other)
    with pytest.raises(CheckpointError, match="names and shapes of its parameters differ"):
        ln.load_delta(other, file)
    assert is_untouched(other, before)


def test_a_component_for_no_graft_of_the_file_is_refused_with_the_name_that_was_meant(tmp_path):
    file, model = saved(tmp_path), fresh()
    with pytest.raises(CheckpointError, match=r"does not hold[\s\S]*{'extra': …}"):
        ln.load_delta(model, file, components={"extras": ln.nn.Prompts(4, 8)})
    assert vars(model).keys() == vars(fresh()).keys()


def test_grafts_of_a_module_inside_are_saved_from_that_module(tmp_path):
    outer, path = nn.Sequential(nn.Identity(), fresh()), tmp_path / "delta"
    ln.graft(outer[1], "extra", ln.nn.Prompts(4, 8), "blocks.*")
    with pytest.raises(CheckpointError, match="those of a module in it") as error:
        ln.save_delta(outer, path)
    eval(error.value.mend, {"ln": ln, "model": outer, "path": path})
    assert [handle.name for handle in ln.load_delta(fresh(), path)] == ["extra"]


def test_a_delta_does_not_take_the_place_of_a_folder(tmp_path):
    model = fresh()
    ln.graft(model, "extra", ln.nn.Prompts(4, 8), "blocks.*")
    with pytest.raises(CheckpointError, match="this is a folder") as error:
        ln.save_delta(model, tmp_path)
    eval(error.value.mend, {"ln": ln, "model": model})
    assert [path.name for path in tmp_path.iterdir()] == ["delta.safetensors"]
