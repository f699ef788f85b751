"""What the page holds, against slow twins over the run itself."""

import base64
import dataclasses
import gzip
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import learnables as ln
from learnables.report.content import POINTS, SHADES, content, encode_log, thin, thumbnails
from learnables.report.html import render
from learnables.watching import Run
from learnables.watching.artifacts import table
from learnables.watching.observation import CONSUMED, Filled, Rows
from learnables.watching.store import Store

KINDS = {"u1": np.uint8, "u2": np.dtype("<u2"), "f4": np.dtype("<f4")}
QUANTITIES = ("weight", "gradient", "update")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Forty looks at declared, constrained, tied, half and frozen parameters, with one alarm."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    model = nn.Module()
    model.token = ln.parameter(1, 1, 6, init=ln.init.normal(0.02), weight_decay=False)
    model.mix = ln.parameter(torch.full((6, 3), 1 / 3), constraint=ln.sets.Simplex())
    model.narrow = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
    model.alias = model.token
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ln.watch(model, optimizer, every=1, to=folder, budget=None) as watcher:
        for step in range(1, 41):
            optimizer.zero_grad()
            x = torch.randn(8, 6)
            loss = ((x + model.token.reshape(6)) * model.narrow @ model.mix).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            if step == 37:
                model.mix.grad[0, 0] = math.nan
            optimizer.step()
            model.mix.data.nan_to_num_(0.5)
            watcher.log_scalars(step, {"loss/train": loss.item(), "lr": 0.05})
        matrix = torch.tensor([[0.25, -1.0, 3.0], [0.5, math.nan, 0.0]])
        watcher.log_table("color matrix", matrix, 40)
        watcher.log_table("weight blocks.0.attn_qkv.weight[::2, ::1]", torch.randn(64, 48), 40)
        watcher.log_table("position similarity", torch.randn(4, 5, 4, 5), 40)
        watcher.log_images("misclassified_pictures", torch.zeros(2, 4, 4, 1).byte(), "ab", 40)
    return Run(folder)


def arrays(page):
    """The figures as a browser unpacks them."""
    raw = gzip.decompress(base64.b64decode(page.figures.text()))
    return [
        np.frombuffer(raw, KINDS[kind], length, offset)
        for offset, kind, length in page.figures.index
    ]


def decoded(codes):
    """The sentence above `encode_log` in Python, as the page's script has it."""
    return [
        None if c == 0 else 0.0 if c == 1 else 2 ** ((int(c) - 2) / 65533 * 320 - 160)
        for c in codes
    ]


def test_numbers_survive_their_two_bytes_to_three_in_a_thousand():
    values = np.array([0.0, math.nan, math.inf, 1e-40, 3e-8, 1.0, 65504.0, 3e38])
    found = decoded(encode_log(values))
    assert found[:3] == [0.0, None, None]
    assert found[3:] == pytest.approx(values[3:].tolist(), rel=3e-3)


def test_the_lines_of_each_parameter_are_its_norms_and_ratios(run):
    page = content(run)
    figures = arrays(page)
    assert figures[page.index["steps"]].tolist() == list(range(1, 41))
    assert [row.name for row in page.rows] == ["token", "mix", "narrow"]
    for row, lines in zip(page.rows, page.index["lines"], strict=True):
        for quantity in QUANTITIES:
            seen = run.series(quantity, "norm", row.name)
            wanted = dict(zip(seen.steps.tolist(), seen.values.tolist(), strict=True))
            told = decoded(figures[lines[quantity]])
            for step in range(1, 41):
                value = wanted.get(step, math.nan)
                if math.isnan(value):
                    assert told[step - 1] is None
                else:
                    assert told[step - 1] == pytest.approx(value, rel=3e-3)
        ratios = [o.ratio[o.names.index(row.name)] for o in run.observations]
        assert decoded(figures[lines["ratio"]])[5] == pytest.approx(ratios[5], rel=3e-3)
        assert row.ratio == pytest.approx(np.nanmedian(ratios))
    assert ["defect" in lines for lines in page.index["lines"]] == [False, True, False]
    defects = [o.columns["defect"][1] for o in run.observations]
    told = decoded(figures[page.index["lines"][1]["defect"]])
    assert told.pop(36) is None  # NaN is at no distance
    assert told == pytest.approx(defects[:36] + defects[37:], rel=3e-3)
    assert page.rows[1].defect == defects[-1]
    assert page.rows[2].lost == run.observations[-1].columns["lost"][2]


def test_the_heat_map_holds_the_histogram_of_every_look(run):
    """Cell by cell: the share of the values in each power of two, zeros and what is not finite."""
    page = content(run)
    figures = arrays(page)
    assert figures[page.index["heatSteps"]].tolist() == list(range(1, 41))
    for i, heat in enumerate(page.index["heat"]):
        assert list(heat) == [*QUANTITIES]
        for quantity, (low, high, at) in heat.items():
            cells = figures[at].reshape(high - low + 3, 40)
            for t, o in enumerate(run.observations):
                rows = o.rows[quantity]
                zeros, bad = (int(rows.moments[m][i]) for m in ("zeros", "nonfinite"))
                histogram = rows.histogram[i].reshape(2, 256).sum(0)
                histogram[0] -= zeros
                histogram[255] -= bad
                counts = [zeros, *histogram[low + 127 : high + 128], bad]
                assert sum(counts) == rows.moments["count"][i], "nothing lies outside the map"
                for cell, number in zip(cells[:, t].tolist(), counts, strict=True):
                    assert (cell > 0) == (number > 0)
                    if number:
                        share = SHADES + 2 * math.log2(number / sum(counts))
                        assert abs(cell - max(1.0, share)) <= 0.5


def test_a_row_has_its_policy_its_other_names_and_its_findings(run):
    page = content(run)
    token, mix, narrow = page.rows
    assert (token.kind, token.also, token.shape) == ("token", ("alias",), "1 × 1 × 6")
    facts = [dict(row.facts) for row in page.rows]
    assert facts[0]["tied to"] == "alias"
    assert facts[0]["declared weight_decay".replace("_", " ")] == "False"
    assert "test_content.py" in facts[0]["declared at"]
    assert "Simplex" in facts[1]["declared constraint"]
    assert narrow.dtype == "bfloat16"
    wrong = [page.issues[number].code for number in mix.issues]
    assert "non-finite" in wrong
    assert mix.severity == "error"
    assert page.level == "error"
    assert page.issues[0].at == "step 37"


def test_the_clipped_norm_says_that_it_is_one(run):
    page = content(run)
    (chart,) = [chart for chart in page.charts if chart["title"] == CONSUMED]
    assert "after clipping" in CONSUMED
    values = arrays(page)[chart["lines"][0]["y"]]
    assert not math.isfinite(values[36])
    assert np.delete(values, 36) == pytest.approx(0.3, rel=2e-3)  # in part of bfloat16
    assert [tile["name"] for tile in page.tiles] == ["loss · train", CONSUMED, "lr"]
    assert CONSUMED in run._repr_html_()


def test_pictures_hold_the_values_under_the_names_they_were_given(run):
    page = content(run)
    figures = arrays(page)
    colour, weight, positions = page.pictures
    assert colour["title"] == "color matrix"
    assert (colour["form"], colour["exact"], colour["low"], colour["high"]) == (
        *("matrix", True),
        *(-1.0, 3.0),
    )
    assert figures[colour["data"]].tolist() == pytest.approx(
        [0.25, -1.0, 3.0, 0.5, math.nan, 0.0], nan_ok=True
    )
    assert weight["title"] == "weight blocks.0.attn_qkv.weight[::2, ::1]"
    for picture in (weight, positions):
        values = run.artifact(picture["title"]).arrays()["values"]
        span = picture["high"] - picture["low"]
        shown = figures[picture["data"]].reshape(picture["shape"])
        if not picture["exact"]:
            shown = picture["low"] + shown / 255 * span
        np.testing.assert_allclose(shown, values, atol=span / 255)
    assert positions["form"] == "maps"
    assert page.gallery[0]["title"] == "misclassified_pictures"


def test_of_a_line_that_is_thinned_no_spike_is_lost():
    steps, values = np.arange(10_000), np.zeros(10_000)
    values[7_777], values[1_234] = 5.0, -3.0
    kept, shown = thin(steps, values, 400)
    assert len(kept) <= 402
    assert (shown.max(), shown.min()) == (5.0, -3.0)
    assert (kept[0], kept[-1]) == (0, 9_999)


def test_images_are_shrunk_to_what_there_is_room_for_and_small_ones_are_left():
    small = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    assert np.array_equal(thumbnails(small), small[:48])
    for height, width, channels in ((224, 224, 3), (100, 333, 1), (3, 40_000, 3)):
        photos = np.random.default_rng(1).integers(
            0, 256, (30, height, width, channels), dtype=np.uint8
        )
        shown = thumbnails(photos)
        assert len(shown) == 24
        assert shown.dtype == np.uint8
        assert shown.nbytes <= 120_000
        square = width // shown.shape[2]
        corner = photos[3, : min(square, height), :square].astype(float).mean(axis=(0, 1))
        assert shown[3, 0, 0] == pytest.approx(corner, abs=0.6)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((14, 14, 14, 14), (14, 14, 14, 14)),
        ((32, 32, 32, 32), (6, 6, 32, 32)),
        ((1000, 1000), (91, 91)),
        ((50, 300), (50, 75)),
        ((7,), (1, 7)),
        ((2, 3, 4), (2, 12)),
    ],
)
def test_of_a_large_table_a_sample_is_shown_that_says_of_what(tmp_path, shape, wanted):
    store, values = Store(tmp_path), np.random.default_rng(0).normal(size=shape)
    store.add_artifact(1, "a table", "table", table(values))
    store.close()
    page = content(Run(tmp_path))
    (picture,) = page.pictures
    assert tuple(picture["shape"]) == wanted
    flat = values if values.ndim == 4 else values.reshape(shape[0] if len(shape) > 1 else 1, -1)
    assert tuple(picture["whole"]) == flat.shape
    assert len(arrays(page)[picture["data"]]) == math.prod(wanted) <= 40_000


def long(folder, looks, parameters):
    """A run of drawn observations: nothing in them repeats, so nothing compresses by chance."""
    draw, store = np.random.default_rng(0), Store(folder)
    ids = store.add_parameters(
        {
            "name": f"blocks.{i // 12}.layer_{i % 12}.weight",
            "names": "[]",
            "shape": "[8, 8]",
            "dtype": "float32",
            "device": "cpu",
            "numel": 64,
            "trainable": 1,
            "policy": "{}",
        }
        for i in range(parameters)
    )
    model = nn.ParameterList(torch.randn(16, 16) * 0.02 for _ in range(parameters))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ln.watch(model, optimizer, to=folder / "real", budget=None) as watcher:
        for p in model:
            p.grad = torch.randn_like(p) * 1e-3
        optimizer.step()
    (real,) = watcher.run().observations
    for look in range(looks):
        rows = {}
        for quantity, seen in real.rows.items():
            moments = {k: v * draw.lognormal(0, 0.05, len(v)) for k, v in seen.moments.items()}
            for k in ("count", "zeros", "nonfinite"):
                moments[k] = seen.moments[k]
            counts = draw.poisson(seen.filled.counts).astype(np.int64)
            filled = Filled(seen.filled.lengths, seen.filled.bins, counts)
            rows[quantity] = Rows(moments, filled)
        one = dataclasses.replace(real, step=10 * look + 10, time=float(look), rows=rows)
        store.add_observation(one, ids)
    store.close()
    return len(render(Run(folder)).encode())


def test_a_page_is_under_a_megabyte_for_as_many_parameters_as_vit_b_has(tmp_path):
    """However long the run: the benchmark has a thousand looks at the real one."""
    sizes = [long(tmp_path / str(looks), looks, 152) for looks in (POINTS, 2 * POINTS)]
    assert sizes[1] < 1.02 * sizes[0]
    assert max(sizes) < 1_000_000


def test_the_page_is_json_whatever_is_not_finite(run):
    text = render(run)
    data = text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["names"] == ["token", "mix", "narrow"]
