import base64
import hashlib
import json
import math
import re
import shutil
import sqlite3
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import RunError
from learnables.report.html import content_security_policy, render
from learnables.watching import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
NASTY = "</script><img src=x onerror=alert(1)>"


class Reader(HTMLParser):
    """The tags of a page and its text, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A short run that has everything on its page: an alarm, a table, images, a document."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model.register_parameter(NASTY, nn.Parameter(torch.zeros(2, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with ln.watch(model, optimizer, every=2, to=folder, budget=None) as watcher:
        watcher.log_document("audit", ln.audit(model, optimizer).to_json())
        watcher.log_document("config", {"lr": 1e-2, "note": NASTY})
        watcher.log_document("classes", ["a", NASTY, "c"])
        for step in range(8):
            loss = model(torch.randn(16, 6)).square().mean()
            loss.backward()
            if step == 6:
                model[2].bias.grad[0] = math.nan
            optimizer.step()
            optimizer.zero_grad()
            watcher.log_scalars(watcher.step, {"loss/train": loss.item(), NASTY: 1.0})
        watcher.log_table("confusion", torch.eye(3) * 5, 8)
        watcher.log_table("position similarity", torch.rand(2, 2, 2, 2), 8)
        watcher.log_table("weights", torch.randn(50, 300), 8)
        watcher.log_images("wrong", torch.zeros(2, 4, 4, 1, dtype=torch.uint8), ["a", NASTY], 8)
    return folder


def test_the_page_asks_nothing_of_the_network(folder):
    page = Reader(render(Run(folder)))
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "action", "data", "srcset"):
                assert value.startswith(("#", "data:,")), (tag, value)
            assert name != "style", tag


def test_scripts_and_styles_are_those_of_the_policy(folder):
    text = render(Run(folder))
    policy = next(
        a["content"]
        for t, a in Reader(text).tags
        if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == content_security_policy()
    assert "unsafe" not in policy
    for inside in re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", text, re.S):
        digest = torch.frombuffer(
            bytearray(hashlib.sha256(inside.encode()).digest()), dtype=torch.uint8
        )
        assert len(digest) == 32

        assert base64.b64encode(bytes(digest.tolist())).decode() in policy


def test_a_hostile_name_stays_text(folder):
    page = Reader(render(Run(folder)))
    assert not [a for t, a in page.tags if t == "img"]
    assert any(NASTY in text for text in page.texts)


def test_the_first_screen_names_the_fault_and_its_mending(folder):
    text = render(Run(folder))
    verdict = text[text.index('class="verdict') : text.index('class="tiles"')]
    assert "the gradient is not finite" in verdict
    assert "2.bias" in verdict
    assert "torch.autograd.set_detect_anomaly(True)" in verdict


def test_every_parameter_has_a_row(folder):
    rows = [
        a["data-name"] for t, a in Reader(render(Run(folder))).tags if t == "tr" and "data-row" in a
    ]
    assert rows == [NASTY, "0.weight", "0.bias", "2.weight", "2.bias"]


def test_an_audits_report_has_a_page_of_its_own(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    text = ln.write_html(ln.audit(model, optimizer), tmp_path / "audit.html").read_text()
    assert "LRN201" in text
    assert "add_param_group" in text


def test_a_damaged_run_says_so_on_the_page(folder, tmp_path):
    copy = tmp_path / "run.db"
    shutil.copy(Run(folder).path, copy)
    with sqlite3.connect(copy) as database:
        database.execute("UPDATE scalars SET value = 7.0 WHERE seq = 1")
    database.close()
    assert "This file is damaged" in render(Run(copy))


def test_what_cannot_be_written_leaves_nothing_behind(folder, tmp_path):
    target = tmp_path / "not" / "there.html"
    with pytest.raises(RunError, match="cannot be written"):
        ln.write_html(folder, target)
    assert not list(tmp_path.iterdir())


def test_vendored_files_are_the_published_ones():
    assets = resources.files("learnables.report") / "assets"
    lines = (assets / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        digest, name = line.split()
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_chromium_sees_no_error_no_request_no_dialog(folder, tmp_path):
    path = ln.write_html(folder, tmp_path / "report.html")
    log = tmp_path / "net.json"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000"]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += [f"--log-net-log={log}", f"--user-data-dir={tmp_path / 'profile'}"]
    address = path.as_uri() + "#parameter=0.weight"
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
    # An open dialog would have kept Chromium from ending, and the run above would have timed out.
    assert 'data-drawn="yes"' in done.stdout, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<canvas") > 6  # the opened row drew its charts
    assert "<img" not in done.stdout  # neither in the source nor made by a script
    events = json.loads(log.read_text())
    start = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [e for e in events["events"] if e["type"] == start and "params" in e]
    hosts = {urlsplit(e["params"].get("url", "")).hostname or "" for e in begun}
    # What is left is Chromium's own: it asks Google for updates and word lists.
    own = re.compile(r"(|.*\.)(google|googleapis|gvt1|gstatic)\.com|")
    assert all(own.fullmatch(host) for host in hosts), hosts
