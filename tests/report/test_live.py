import http.client
import urllib.request

import pytest
import torch
from tests.chromium import CHROMIUM, MISSING, tab
from torch import nn

import learnables as ln
from learnables.report.html import content_security_policy
from learnables.report.live import LivePage


@pytest.fixture
def training(tmp_path):
    """A watcher in the middle of its run, and a function that makes a step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        model(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
        watcher.log_scalars(watcher.step, {"loss": 1.0})

    with ln.watch(model, optimizer, every=1, to=tmp_path / "run", budget=None) as watcher:
        step()
        yield watcher, step


def get(page, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{page.port}"})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_the_page_follows_the_run(training):
    watcher, step = training
    with LivePage(watcher.path.parent).running() as page:
        status, headers, text = get(page)
        assert status == 200
        assert headers["Content-Security-Policy"] == content_security_policy(live=True)
        assert "<dd>1</dd>" in text
        with urllib.request.urlopen(page.address + "events", timeout=20) as events:
            assert events.readline() == b": following\n"
            step()
            lines = iter(events.readline, b"data: changed\n")  # or that the line is still open
            assert sum(1 for _ in zip(range(20), lines)) < 20  # noqa: B905 - whichever ends first
        assert "<dd>2</dd>" in get(page)[2]


def test_the_step_is_that_of_the_run_and_not_of_the_last_look(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with ln.watch(model, optimizer, every=10**6, to=tmp_path, budget=None) as watcher:
        for _ in range(23):
            model(torch.ones(2, 3)).square().mean().backward()
            optimizer.step()
            watcher.log_scalars(watcher.step, {"loss": 1.0})
        watcher.log_document("note", "what waits is written now")
        with LivePage(tmp_path).running() as page:
            assert "<dt>steps</dt><dd>23</dd>" in get(page)[2]
            assert "<dt>looks</dt><dd>1</dd>" in get(page)[2]


def test_a_change_between_the_page_and_its_events_is_told(training):
    watcher, step = training
    with LivePage(watcher.path.parent).running() as page:
        get(page)
        step()
        with urllib.request.urlopen(page.address + "events", timeout=20) as events:
            assert [events.readline() for _ in range(3)][::2] == [
                b": following\n",
                b"data: changed\n",
            ]


def test_a_stranger_is_told_nothing(training):
    with LivePage(training[0].path.parent).running() as page:
        assert get(page, host="evil.example")[0] == 403
        assert get(page, path="/../../etc/passwd")[0] == 404


def test_a_run_that_disappears_is_said_so_on_the_page(training):
    watcher, _ = training
    with LivePage(watcher.path.parent).running() as page:
        get(page)
        for file in watcher.path.parent.glob("run.db*"):
            file.rename(file.with_name("gone-" + file.name))
        assert "holds no run" in get(page)[2]


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_shows_each_step_and_keeps_what_the_reader_opened(training, tmp_path):
    watcher, step = training
    with LivePage(watcher.path.parent).running() as page, tab(tmp_path) as browser:
        browser.go(page.address)
        browser.run("document.querySelector('.open').click()")
        browser.run("document.querySelector('.filter input').value = 'weight'")
        for _ in range(4):
            step()
        browser.wait("document.querySelector('.facts').textContent.includes('5')")
        browser.wait("document.querySelectorAll('.detail:not([hidden]) canvas').length > 0")
        assert browser.run("document.querySelector('.filter input').value") == "weight"
        assert not browser.errors
        assert all(url.startswith((page.address, "data:", "blob:")) for url in browser.asked)
