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


# What is drawn on a canvas as text, and where; installed before the page's own script runs.
LISTEN = """
window.drawn = [];
const fill = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  window.drawn.push([text, y, this.canvas.getAttribute('aria-label') || '']);
  return fill.apply(this, arguments);
};
"""


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_the_heat_map_draws_the_limits_of_the_dtypes_where_they_are(tmp_path):
    model = nn.Linear(64, 64)
    model.weight.data = torch.randn(64, 64) * (torch.randn(64, 64) * 12 - 4).exp2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ln.watch(model, optimizer, every=1, to=tmp_path / "run", budget=None) as watcher:
        for _ in range(3):
            optimizer.step()
    histogram = watcher.run().observations[0].rows["weight"].histogram[0].reshape(2, 256).sum(0)
    filled = [k - 127 for k in range(1, 255) if histogram[k]]
    assert min(filled) < -25
    assert max(filled) > 16
    path = ln.write_html(tmp_path / "run", tmp_path / "report.html")
    with tab(tmp_path) as browser:
        browser("Page.addScriptToEvaluateOnNewDocument", source=LISTEN)
        browser.go(path.as_uri())
        browser.run("window.drawn.length = 0; document.querySelector('.open').click()")
        drawn = {text: y for text, y, _ in browser.run("window.drawn")}
        assert not browser.errors
    # Powers of two are named on the axis: the limits lie between them on the same scale.
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    axis = {int(t[1:].translate(digits)): y for t, y in drawn.items() if re.match("2[⁻⁰-⁹¹²³]", t)}
    (k0, y0), (k1, y1) = min(axis.items()), max(axis.items())
    limits = {
        "fp16: smallest": -24,
        "fp16: normal from here": -14,
        "fp16: largest": 16,
        "fp8 e4m3: smallest": -9,
    }
    for name, k in limits.items():
        place = y0 + (k - k0) / (k1 - k0) * (y1 - y0)
        assert abs(drawn[name] + 2 - place) < 1e-6, name  # it is written on its line
    assert "bf16, fp32: normal from here" not in drawn  # nothing is as small as that


CONTRAST = """
(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
  const light = (c) => {
    const [r, g, b] = c.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const layers = [];
    for (let n = node; n; n = n.parentElement) layers.push(parse(getComputedStyle(n).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const found = {};
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const style = getComputedStyle(node);
    if (!own || !node.getClientRects().length || style.visibility === 'hidden' || node.closest('.unseen')) continue;
    const under = behind(node), ink = over(parse(style.color), under);
    const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) found[`${node.tagName}.${node.className}: ${node.textContent.trim().slice(0, 30)}`] = ratio;
  }
  return found;
})()
"""  # noqa: E501 - WCAG 2.2, 1.4.3
PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_every_text_can_be_read_on_light_and_on_dark_paper(folder, tmp_path):
    path = ln.write_html(folder, tmp_path / "report.html")
    papers = []
    with tab(tmp_path) as browser:
        for scheme in ("light", "dark"):
            wanted = {"name": "prefers-color-scheme", "value": scheme}
            browser("Emulation.setEmulatedMedia", features=[wanted])
            browser.go(path.as_uri())
            browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            for button in range(5):
                browser.run(f"document.querySelectorAll('.open')[{button}].click()")
            browser.wait("document.querySelectorAll('.detail .u-wrap').length >= 2")
            papers.append(sum(map(int, re.findall(r"\d+", browser.run(PAPER))[:3])))
            assert browser.run(CONTRAST) == {}, scheme
        browser.run("document.querySelector('h1').style.color = 'rgb(90, 90, 90)'")
        assert list(browser.run(CONTRAST)) == ["H1.: a run"]  # it can say no
    assert papers[0] > 700 > 100 > papers[1]


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_pictures_are_drawn_and_described(folder, tmp_path):
    path = ln.write_html(folder, tmp_path / "report.html")
    with tab(tmp_path) as browser:
        browser.go(path.as_uri())
        labels = browser.run(
            "[...document.querySelectorAll('.pictures canvas')].map((c) => c.ariaLabel)"
        )
        assert any(label.startswith("position similarity: one map for each") for label in labels)
        assert any(label.startswith("weights, 50 by 75 of 50 × 300, from") for label in labels)
        assert labels[-2:] == ["a", NASTY]
        shades = browser.run(
            "[...document.querySelectorAll('.pictures canvas')].map((c) => new Set("
            "new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)"
            ").size)"
        )
        assert min(shades[:-2]) > 5  # no empty canvas; those at the end are black pictures
        cells = "[...document.querySelectorAll('.confusion td')].map((c) => c.textContent)"
        assert [text for text in browser.run(cells) if text] == ["5"] * 3
        sparks = "document.querySelectorAll('tr[data-row] .spark path').length"
        assert browser.run(sparks) >= 3 * 4


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
