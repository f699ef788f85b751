"""`learnables inspect`: files of every kind, beside models and other files."""

import gzip
import json
import pickle
import shlex
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import learnables as ln
from learnables.auditing.inspection import inspect_file, run_inspect, suggest_renames
from learnables.errors import CheckpointError, LearnablesError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        self.token = ln.parameter(1, 1, 4, init=ln.init.normal(0.02))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.body:
            x = layer(x + self.token)
        return self.head(x)


def trained(steps=3):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 4)).square().sum().backward()
        optimizer.step()
    return model


WRITERS = {
    "ours": lambda model, path: ln.save_checkpoint(path, model, step=3),
    "safetensors": lambda model, path: save_file(model.state_dict(), path),
    "torch": lambda model, path: torch.save(model.state_dict(), path),
    "lightning": lambda model, path: torch.save(
        {"epoch": 1, "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, path
    ),
    "ddp": lambda model, path: torch.save(
        {"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "lr": 0.1}, path
    ),
    "compiled": lambda model, path: save_file(
        {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}, path
    ),
    "old pickle": lambda model, path: torch.save(
        model.state_dict(), path, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_trained_model_in_any_kind_of_file_is_clean(write, tmp_path):
    write(trained(), tmp_path / "file")
    seen = inspect_file(tmp_path / "file", Net())
    assert seen.ok, str(seen)
    assert "8 of 8" not in str(seen)
    assert "7 of 7 names and shapes fit" in str(seen)


def test_a_prefix_is_named(tmp_path):
    WRITERS["lightning"](trained(), tmp_path / "file")
    seen = inspect_file(tmp_path / "file", Net())
    assert seen.prefix == "model."
    assert seen.about == {"read from": "the key 'state_dict'", "epoch": "1"}


def test_what_never_left_its_initial_value_is_named(tmp_path):
    model = trained()
    model.token.data.copy_(Net().token)
    torch.save(model.state_dict(), tmp_path / "file")
    seen = inspect_file(tmp_path / "file", Net())
    assert seen.initial == ["token"]
    assert not seen.ok
    frozen = Net()
    frozen.token.requires_grad_(False)
    assert inspect_file(tmp_path / "file", frozen).ok


def test_missing_unexpected_and_mis_shaped_names_are_listed_with_a_map_to_type(tmp_path):
    state = trained().state_dict()
    state["trunk.0.weight"], state["trunk.0.bias"] = (
        state.pop("body.0.weight"),
        state.pop("body.0.bias"),
    )
    state["body.1.gamma"] = state.pop("body.1.weight")
    state["head.weight"] = torch.randn(5, 4)
    torch.save(state, tmp_path / "file")
    seen = inspect_file(tmp_path / "file", Net())
    assert seen.missing == ["body.0.weight", "body.0.bias", "body.1.weight"]
    assert sorted(seen.unexpected) == ["body.1.gamma", "trunk.0.bias", "trunk.0.weight"]
    assert seen.misshaped == {"head.weight": "(5, 4) in the file, (3, 4) in the model"}
    assert seen.rename == {"trunk.*": "body.*", "body.1.gamma": "body.1.weight"}
    words = "the same under another name: {'trunk.*': 'body.*', 'body.1.gamma': 'body.1.weight'}"
    assert words in str(seen)


def test_the_map_can_be_typed(tmp_path):
    state = {k.replace("body", "trunk"): v for k, v in trained().state_dict().items()}
    holder = nn.Module()
    holder.trunk, holder.head, holder.token = (
        Net().body,
        Net().head,
        nn.Parameter(torch.zeros(1, 1, 4)),
    )
    holder.load_state_dict(state)
    ln.save_checkpoint(tmp_path / "file", holder)
    seen = inspect_file(tmp_path / "file", Net())
    assert seen.missing
    assert f"ln.load_checkpoint(path, model, rename={seen.rename})" in str(seen)
    model = Net()
    ln.load_checkpoint(tmp_path / "file", model, rename=seen.rename)
    torch.testing.assert_close(model.body[0].weight, state["trunk.0.weight"])


def test_a_table_with_a_resize_rule_is_resized_and_no_finding(tmp_path):
    small = ln.nn.Positions2d((4, 4), 8)
    small.table.data.add_(1)
    torch.save(small.state_dict(), tmp_path / "file")
    seen = inspect_file(tmp_path / "file", ln.nn.Positions2d((6, 6), 8))
    assert seen.resized == {"table": "(1, 16, 8) in the file, (1, 36, 8) in the model"}
    assert seen.ok


def test_a_scalar_and_a_shape_of_one_fit(tmp_path):
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "file")
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(1))
    assert inspect_file(tmp_path / "file", model).ok


def test_two_values_for_one_tied_parameter_are_found(tmp_path):
    model = nn.Module()
    model.embed, model.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    ln.tie(model, "out.weight", "embed.weight")
    torch.save(
        {"embed.weight": torch.ones(5, 3), "out.weight": torch.zeros(5, 3)}, tmp_path / "file"
    )
    seen = inspect_file(tmp_path / "file", model)
    assert seen.untied == ["embed.weight = out.weight"]


def test_ties_in_the_file_are_named(tmp_path):
    x = torch.randn(3, 3)
    torch.save({"a": x, "b": x, "c": x[:2]}, tmp_path / "file")
    assert inspect_file(tmp_path / "file").ties == {"b": "a"}


def test_values_that_are_no_numbers_are_counted(tmp_path):
    torch.save({"a": torch.tensor([1.0, float("nan"), float("inf")])}, tmp_path / "file")
    seen = inspect_file(tmp_path / "file")
    assert seen.nonfinite == {"a": 2}
    assert not seen.ok


def test_the_difference_from_a_base_is_relative(tmp_path):
    torch.save({"module.a": torch.full((4,), 2.0), "gone": torch.ones(1)}, tmp_path / "base")
    torch.save({"a": torch.full((4,), 3.0), "new": torch.ones(2)}, tmp_path / "file")
    seen = inspect_file(tmp_path / "file", base=tmp_path / "base")
    assert seen.changed == {"a": 0.5}
    assert (seen.only_here, seen.only_there) == (["new"], ["gone"])


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3),
    st.lists(st.sampled_from(["x", "y"]), min_size=1, max_size=2),
    st.dictionaries(
        st.sampled_from(["0.weight", "0.bias", "1.weight", "norm.bias", "q.k.v"]),
        st.integers(1, 9),
        min_size=1,
    ),
)
def test_a_module_that_moved_as_a_whole_is_recognised(old, new, shapes):
    old, new = ".".join(old), ".".join(new)
    found = suggest_renames(
        {f"{old}.{name}": (n,) for name, n in shapes.items()},
        {f"{new}.{name}": (n,) for name, n in shapes.items()},
    )
    typed = {}
    for name in shapes:
        key = f"{old}.{name}"
        prefix = next((k for k in found if k.endswith(".*") and key.startswith(k[:-1])), None)
        typed[key] = found[prefix][:-1] + key[len(prefix) - 1 :] if prefix else found.get(key)
    assert typed == {f"{old}.{name}": f"{new}.{name}" for name in shapes}


class Evil:
    def __reduce__(self):
        return (exec, ("open('executed', 'w').close()",))


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (100 << 20))


def database(path):
    with closing(sqlite3.connect(path)) as opened:
        opened.execute("create table steps (step)")
        opened.commit()


BAD = {
    "absent": (lambda path: None, "there is no checkpoint"),
    "code": (lambda path: torch.save({"a": Evil()}, path), "only be read by executing"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), ""),
    "truncated zip": (
        lambda path: (
            torch.save({"a": torch.ones(99)}, path),
            path.write_bytes(path.read_bytes()[:500]),
        ),
        "damaged",
    ),
    "truncated safetensors": (
        lambda path: (
            save_file({"a": torch.ones(99)}, path),
            path.write_bytes(path.read_bytes()[:200]),
        ),
        "damaged",
    ),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut in its first bytes": (lambda path: path.write_bytes(b"\x10\0\0"), "damaged"),
    "header of no text": (
        lambda path: path.write_bytes((20).to_bytes(8, "little") + b"{" + b"\xff" * 40),
        "damaged",
    ),
    "text": (
        lambda path: path.write_text("import torch\n" * 20),
        "no checkpoint\n  where: {path}\n  found: text, which begins with 'import torch'",
    ),
    "text of another script": (
        lambda path: path.write_text("可学习的参数" * 20, "utf-8"),  # 120 bytes end inside a letter
        "found: text, which begins with '可学习",
    ),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"a" * 99)), "found: a gzip archive"),
    "picture": (
        lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)),
        "found: a picture",
    ),
    "run": (database, "found: an SQLite database, as ln.watch writes"),
    "noise": (lambda path: path.write_bytes(bytes(range(130, 230))), "found: 100 bytes of no kind"),
    "zip of something": (
        lambda path: zipfile.ZipFile(path, "w").writestr("a/b.txt", "c"),
        "found: a zip archive, without",
    ),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no named tensors"),
    "list": (lambda path: torch.save([torch.ones(2)], path), "holds no named tensors"),
    "bomb": (bomb, "claim to be"),
    "folder": (lambda path: path.mkdir(), "there is no checkpoint"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_with_its_name_and_nothing_of_it_runs(case, tmp_path, monkeypatch):
    write, words = case
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file")
    with pytest.raises(CheckpointError, match="file") as caught:
        inspect_file(tmp_path / "file")
    assert words.format(path=tmp_path / "file") in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_script_is_told_from_a_damaged_checkpoint_and_what_runs_it_is_said(tmp_path):
    path = tmp_path / "train it.py"
    path.write_text('"""Trains."""\n\nimport torch\n')
    with pytest.raises(CheckpointError, match="this file is no checkpoint") as caught:
        run_inspect(path)
    assert "damaged" not in str(caught.value)
    program, command, script = shlex.split(caught.value.mend)
    assert (program, command, Path(script)) == ("learnables", "run", path)


def test_hostile_names_are_spelt_out(tmp_path):
    torch.save({"a\x1b[31m\nfound: all is well": torch.tensor([float("nan")])}, tmp_path / "file")
    seen = inspect_file(tmp_path / "file", nn.Linear(1, 1), tmp_path / "file")
    assert "\x1b" not in str(seen) + seen.to_json()
    assert not any(line.startswith("found") for line in str(seen).splitlines())


def test_the_command_line_ends_with_0_1_or_2(tmp_path, capsys):
    (tmp_path / "net.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 1)\n")
    torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, tmp_path / "good")
    torch.save({"weight": torch.ones(1, 2)}, tmp_path / "less")
    factory = f"{tmp_path / 'net.py'}:make"
    assert run_inspect(tmp_path / "good", model=factory) == 0
    assert run_inspect(tmp_path / "less", model=factory, format="json") == 1
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["missing"] == ["bias"]
    (tmp_path / "bad.py").write_text("def make(): raise ValueError('not today')\n")
    assert run_inspect(tmp_path / "good", model=f"{tmp_path / 'bad.py'}:make") == 2
    assert "ValueError: not today" in capsys.readouterr().err
    with pytest.raises(LearnablesError, match="no such format"):
        run_inspect(tmp_path / "good", format="yaml")
    assert run_inspect(tmp_path / "good", output=tmp_path / "page.txt") == 0
    assert "2 tensors, 3 values" in (tmp_path / "page.txt").read_text()
