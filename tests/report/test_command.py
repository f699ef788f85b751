import csv
import json
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import learnables as ln
from learnables.cli import app
from learnables.errors import LearnablesError
from learnables.report.command import (
    export_run,
    list_runs,
    print_comparison,
    watch_run,
    write_report,
)
from learnables.watching.terminal import follow


def train(folder, seed=0, steps=6, poison=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
    with ln.watch(model, optimizer, every=1, to=folder, budget=None) as watcher:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if step == poison:
                model[1].bias.grad.add_(1.0)
            optimizer.step()
            watcher.log_scalars(step, {"loss": loss.item()})
    return folder


def broken(folder):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with ln.watch(model, optimizer, every=1, to=folder, budget=None):
        model(torch.full((1, 2), float("nan"))).sum().backward()
        optimizer.step()
    return folder


def test_report_writes_beside_the_run_and_fails_on_request(tmp_path, capsys):
    assert write_report(train(tmp_path / "good"), None, "warning") == 0
    assert (tmp_path / "good" / "report.html").exists()
    assert write_report(broken(tmp_path / "bad"), tmp_path / "page.html", None) == 0
    assert write_report(tmp_path / "bad", tmp_path / "page.html", "error") == 1
    assert "1 error" in capsys.readouterr().out


def test_runs_lists_every_run_with_its_state(tmp_path, capsys):
    train(tmp_path / "one")
    train(tmp_path / "one")  # a second run in the same folder
    broken(tmp_path / "two")
    list_runs(tmp_path)
    out = capsys.readouterr().out
    assert [word in out for word in ("one", "one/run-2", "two", "good", "1 error")] == [True] * 5


def test_runs_without_a_run_is_an_error(tmp_path):
    with pytest.raises(LearnablesError, match="there is no run here"):
        list_runs(tmp_path)


def test_equal_trainings_compare_equal(tmp_path, capsys):
    assert print_comparison(train(tmp_path / "a"), train(tmp_path / "b")) == 0
    assert "all 4 parameters are equal" in capsys.readouterr().out


def test_compare_says_which_parameter_differed_first_and_since_when(tmp_path, capsys):
    assert print_comparison(train(tmp_path / "a"), train(tmp_path / "b", poison=4)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\s*1\.bias\s+gradient\s+4", lines[4]), lines
    assert "4 parameters differ, 0 are alike" in lines[-1]


def test_exports_hold_the_recorded_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tmp_path / "a")
    for form in ("jsonl", "csv", "tensorboard"):
        export_run(run, form, tmp_path / form)
    lines = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    mine = [x for x in lines if x.get("quantity") == "gradient" and x["name"] == "1.bias"]
    with (tmp_path / "csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    theirs = [r for r in table if r["quantity"] == "gradient" and r["name"] == "1.bias"]
    assert [x["step"] for x in mine] == [int(r["step"]) for r in theirs] == [1, 2, 3, 4, 5, 6]
    assert [x["norm"] for x in mine] == pytest.approx([float(r["norm"]) for r in theirs])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    norms = [e.value for e in events.Scalars("gradient_norm/1/bias")]
    assert norms == pytest.approx([x["norm"] for x in mine])
    histogram = events.Histograms("gradient/0/weight")[0].histogram_value
    assert histogram.num == sum(histogram.bucket) == 12


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(LearnablesError, match="tensorboard, jsonl, csv"):
        export_run(train(tmp_path), "parquet", None)


def test_watching_nothing_is_an_error_at_once(tmp_path):
    with pytest.raises(LearnablesError, match="holds no run"):
        watch_run(tmp_path, 0, terminal=False)


def test_the_terminal_shows_the_run(tmp_path, capsys):
    follow(broken(tmp_path), seconds=0.0, times=2)
    out = capsys.readouterr().out
    assert "non-finite" in out
    assert "weight" in out


def test_the_commands_are_on_the_command_line(tmp_path):
    run = str(train(tmp_path / "a"))
    for arguments, said in (
        (["report", run], "Nothing found wrong"),
        (["runs", str(tmp_path)], "good"),
        (["compare", run, run], "all 4 parameters are equal"),
        (["export", run, "--to", "jsonl"], "6 looks"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert said in done.output
