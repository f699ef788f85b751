"""Five hundred hostile names, through a real watch, into every sink."""

import csv
import io
import json

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.chromium import CHROMIUM, MISSING, tab
from tests.watching.sinks.hostile import names
from tests.watching.sinks.test_escape import seen_on_one_line
from torch import nn

import learnables as ln
from learnables.watching import Run
from learnables.watching.sinks import CSV, JSONLines, TensorBoard, escape
from learnables.watching.terminal import screen, table_of_runs

NAMES = names()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose every parameter, number, document and label has a hostile name."""
    folder = tmp_path_factory.mktemp("runs") / "<b>run"
    folder.mkdir()
    torch.manual_seed(0)
    model = nn.Module()
    for name in NAMES:
        model.register_parameter(name, nn.Parameter(torch.ones(2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sinks = [TensorBoard(folder / "tb"), JSONLines(folder / "lines"), CSV(folder / "table")]
    with ln.watch(model, optimizer, every=1, to=folder, sinks=sinks, budget=None) as watcher:
        for step in range(2):
            optimizer.zero_grad()
            sum(p.square().sum() for p in model.parameters()).backward()
            if step:
                next(model.parameters()).grad[0] = float("nan")
            optimizer.step()
        watcher.log_scalars(2, dict.fromkeys(NAMES[:60], 1.0))
        watcher.log_document(NAMES[0], {NAMES[1]: NAMES[2]})
        watcher.log_table(NAMES[1], torch.eye(2), 2)
        watcher.log_images(NAMES[2], torch.zeros(1, 2, 2, 3, dtype=torch.uint8), [NAMES[3]], 2)
        finding = {"severity": "error", "code": NAMES[0], "what": NAMES[1], "where": NAMES[2:4]}
        finding |= {"found": NAMES[4], "wanted": NAMES[5], "mend": NAMES[6], "location": NAMES[7]}
        watcher.log_document("audit", {"findings": [finding], "skipped": {NAMES[8]: NAMES[9]}})
    assert watcher.failed is None
    return folder


def without_surrogates(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def test_the_database_holds_them_as_they_are(folder):
    assert [p.name for p in Run(folder).parameters] == [without_surrogates(n) for n in NAMES]
    assert not Run(folder).damage


def test_csv_parses_back(folder):
    with (folder / "table").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seen = [r["name"] for r in rows if r["step"] == "1" and r["quantity"] == "weight"]
    assert len(seen) == len(NAMES)
    for cell, name in zip(seen, NAMES, strict=True):
        assert cell.removeprefix("'") == escape.visible(name).removeprefix("'")


def test_json_lines_parse_back(folder):
    lines = [json.loads(line) for line in (folder / "lines").read_text("ascii").splitlines()]
    seen = [x["name"] for x in lines if x.get("quantity") == "weight" and x["step"] == 1]
    assert seen == NAMES


def test_tensorboard_reads_every_tag(folder):
    events = EventAccumulator(str(folder / "tb"), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert all(f"weight_norm/{escape.tensorboard_tag(name)}" in tags for name in NAMES)


def test_the_terminal_gets_no_control_characters(folder):
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=False)
    console.print(screen(Run(folder), rows=len(NAMES)))
    console.print(table_of_runs([folder]))
    assert all(seen_on_one_line(line) for line in text.getvalue().split("\n"))


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_runs_none_of_them(folder, tmp_path):
    page = ln.write_html(folder, tmp_path / "report.html")
    with tab(tmp_path) as browser:
        browser.go(page.as_uri())
        browser.run("[...document.querySelectorAll('.open')].slice(0, 20).forEach(b => b.click())")
        shown = browser.run(
            "[...document.querySelectorAll('tr[data-row] .open')].map(b => b.textContent)"
        )
        assert browser.errors == []
        assert browser.dialogs == []
        assert [url for url in browser.asked if not url.startswith("data:")] == [page.as_uri()]
    wanted = [escape.visible(without_surrogates(name)) for name in NAMES]
    assert [text.removeprefix("error: ") for text in shown] == wanted
