import math
from html.parser import HTMLParser

import torch
from torch import nn

import learnables as ln
from learnables.watching import Run
from learnables.watching.spark import spark

NASTY = "<img src=x onerror=alert(1)>"


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def watched(folder, model, poison=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ln.watch(model, optimizer, every=1, to=folder, budget=None) as watcher:
        for step in range(6):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.5)
            if step == 3 and poison is not None:
                poison.grad[0] = math.nan
            optimizer.step()
            watcher.log_scalars(watcher.step, {"loss": 6.0 - step})
    return Run(folder)


def test_a_run_in_a_notebook_says_what_is_wrong_and_shows_every_parameter(tmp_path):
    model = nn.Linear(4, 3)
    model.register_parameter(NASTY, nn.Parameter(torch.ones(2)))
    read = Reader(watched(tmp_path, model, model.bias)._repr_html_())
    text = " ".join(read.texts)
    assert set(read.tags) <= {
        "div",
        "p",
        "b",
        "br",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "code",
    }
    assert "the gradient is not finite" in text
    assert NASTY in text
    assert text.index("bias, step 4") < text.index("3 × 4")
    assert "█▇▅▄▂▁" in text  # the loss falls


def test_a_run_of_very_many_parameters_is_cut_and_says_so(tmp_path):
    model = nn.ParameterList(torch.ones(1) for _ in range(210))
    text = watched(tmp_path, model)._repr_html_()
    assert text.count("<code>") == 200
    assert "and 10 more" in text


def test_a_run_without_looks_is_shown_too(tmp_path):
    model = nn.Linear(2, 2)
    with ln.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), to=tmp_path):
        pass
    assert "0 looks at 2 parameters" in Run(tmp_path)._repr_html_()


def test_a_row_of_blocks_does_not_draw_rounding():
    assert spark([1.0, 1 - 6e-8, 1.0], width=3) == "▁▁▁"
    assert spark([0.0, math.nan, 1.0, math.inf], width=4) == "▁ █ "
