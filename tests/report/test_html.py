import base64
import hashlib
import math
import re
import shutil
import sqlite3
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import torch
from tests.chromium import CHROMIUM, MISSING, tab
from torch import nn

import learnables as ln
from learnables.errors import ArgumentError, RunError
from learnables.report.html import content_security_policy, render
from learnables.watching import Run

DARK = {"name": "prefers-color-scheme", "value": "dark"}
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


def test_what_is_neither_a_run_nor_a_report_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="found: of type Linear"):
        ln.write_html(nn.Linear(1, 1), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


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


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_sees_no_error_no_request_no_dialog(folder, tmp_path):
    path = ln.write_html(folder, tmp_path / "report.html")
    with tab(tmp_path) as browser:
        browser.go(path.as_uri())
        assert browser.run("document.querySelectorAll('.u-wrap').length") == 3
        for button in range(5):
            browser.run(f"document.querySelectorAll('.open')[{button}].click()")
        browser.run("document.querySelector('[data-sort=weight]').click()")
        browser.run("document.querySelector('.filter input').value = 'bias'")
        browser.run("document.querySelector('.filter').oninput()")
        assert browser.run("document.querySelectorAll('tr[data-row]:not([hidden])').length") == 2
        browser("Emulation.setEmulatedMedia", features=[DARK])
        browser.wait("document.querySelectorAll('.detail .u-wrap').length >= 2")
        assert browser.errors == []
        assert browser.dialogs == []
        assert {url.split(":")[0] for url in browser.asked} <= {"file", "data", "blob"}
        assert [url for url in browser.asked if url.startswith("file")] == [path.as_uri()]


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_the_browser_would_have_told(tmp_path):
    """The test above can fail: a page that asks, logs and alerts is caught at each."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<html data-drawn=yes><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('oh'); alert(1)</script>"
    )
    with tab(tmp_path) as browser:
        browser.go(page.as_uri())
        assert "http://127.0.0.1:9/x.png" in browser.asked
        assert browser.dialogs == ["1"]
        assert browser.errors


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_keyboard_reaches_everything_and_everything_has_a_name(folder, tmp_path):
    path = ln.write_html(folder, tmp_path / "report.html")
    with tab(tmp_path) as browser:
        browser.go(path.as_uri())
        reached = set()
        for _ in range(60):
            press(browser, "Tab")
            reached.add(browser.run("document.activeElement.outerHTML.slice(0, 60)"))
        for wanted in (
            'data-sort="weight"',
            'class="open"',
            'class="scroll"',
            "<input",
            "<summary",
        ):
            assert any(wanted in html for html in reached), wanted
        browser.run("document.querySelector('.open').focus()")
        for opened in ("true", "false"):
            press(browser, "Enter")
            assert browser.run("document.querySelector('.open').ariaExpanded") == opened
        browser.run("document.querySelector('[data-sort=weight]').focus()")
        press(browser, "Enter")
        assert browser.run("document.activeElement.closest('th').ariaSort") == "descending"
        nodes = browser("Accessibility.getFullAXTree")["nodes"]
        told = [n for n in nodes if not n["ignored"] and n["role"]["value"] in NEEDS_A_NAME]
        assert len(told) > 15
        for node in told:
            assert node["name"]["value"].strip(), node


NEEDS_A_NAME = {"button", "img", "image", "region", "textbox", "searchbox", "checkbox", "table"}


def press(browser, key):
    code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
    about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
    browser("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
    browser("Input.dispatchKeyEvent", type="keyUp", **about)


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_curve_that_is_flat_but_for_rounding_is_drawn(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ln.watch(model, optimizer, to=tmp_path / "run", budget=None) as watcher:
        for step in range(1, 30):
            watcher.log_scalars(step, {"clipped": 1 - 6e-8 * (step % 2)})
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    path = ln.write_html(tmp_path / "run", tmp_path / "report.html")
    with tab(tmp_path) as browser:
        browser.go(path.as_uri())
        drawn = (
            "(([c]) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
            ".filter((v, i) => i % 4 === 3 && v).length)"
            "(document.querySelectorAll('.charts .u-wrap canvas'))"
        )
        assert browser.run(drawn) > 500
