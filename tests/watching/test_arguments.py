"""What is handed over wrong is refused by its name, in five parts, before anything is changed."""

import io
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import learnables as ln
from learnables.arguments import describe
from learnables.cli import app
from learnables.errors import ArgumentError, LearnablesError, RunError, ShapeError
from learnables.report.command import export_run
from learnables.report.live import LivePage
from learnables.watching import Run
from learnables.watching.compare import compare
from learnables.watching.sinks import CSV, JSONLines, Sink, TensorBoard, Trackio, WeightsAndBiases


class Taken(Sink):
    """Keeps what it is given."""

    def __repr__(self):  # names a case: without an address, which two processes would not share
        return "Taken()"

    def __init__(self) -> None:
        self.numbers = {}

    def observation(self, observation):
        pass

    def scalars(self, step, values):
        self.numbers[step] = dict(values)


def make():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def assert_says(error: LearnablesError, where: str) -> None:
    assert error.where == where
    for part in ("what", "found", "wanted", "mend"):
        assert getattr(error, part), part


OF_ANOTHER_KIND = [
    *(("every", wrong) for wrong in ("10", 2.5, None, True, [10])),
    *(("to", wrong) for wrong in (5, ["runs"], b"runs", "", nn.Linear)),
    *(("sinks", wrong) for wrong in (3, None, "tensorboard", ["tensorboard"], Taken(), [Taken])),
    *(("quantities", wrong) for wrong in ("weight", "weights", 3, None)),
    *(("histogram", wrong) for wrong in ("yes", 1, None)),
    *(("budget", wrong) for wrong in ("1%", True, [0.01], nn.Linear)),
    *(("on_alarm", wrong) for wrong in (3, "explode", ["stop"])),
    *(("scaler", wrong) for wrong in (3, "fp16", torch.amp)),
    *(("step", wrong) for wrong in ("3", 2.5, None, False)),
    *(("resume", wrong) for wrong in ("yes", 1, None)),
    *(("optimizer", wrong) for wrong in (3, "sgd", None, [], {}, [3], torch.optim.SGD)),
]
OUT_OF_RANGE = [
    *(("every", wrong) for wrong in (0, -5)),
    ("step", -1),
    *(("budget", wrong) for wrong in (0.0, -0.1, math.nan, 0)),
    *(("quantities", wrong) for wrong in (["weights"], [], [3], [["weight"]], ("weight", "grad"))),
]


@pytest.mark.parametrize(
    ("argument", "wrong", "kind"),
    [
        *((name, wrong, ArgumentError) for name, wrong in OF_ANOTHER_KIND),
        *((name, wrong, LearnablesError) for name, wrong in OUT_OF_RANGE),
    ],
    ids=str,
)
def test_the_watch_refuses_it_and_has_touched_nothing(tmp_path, argument, wrong, kind):
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    right = {"optimizer": optimizer, "to": tmp_path / "run", "scaler": scaler}
    with pytest.raises(LearnablesError) as caught:
        ln.watch(model, **{**right, argument: wrong})
    assert type(caught.value) is kind
    assert isinstance(caught.value, TypeError) == (kind is ArgumentError)
    assert_says(caught.value, argument)
    assert not optimizer._optimizer_step_pre_hooks
    assert not {"step", "unscale_"} & vars(scaler).keys()
    assert not list(tmp_path.iterdir())
    name, _, mended = caught.value.mend.partition("=")
    if name == argument:  # typed, it works
        ln.watch(model, **right).close()  # there is a run to go on with
        scope = {"learnables": ln, "torch": torch, "print": print, "ln": ln, "model": model}
        ln.watch(model, **{**right, argument: eval(mended, scope)}).close()


def test_to_go_on_without_a_run_has_no_meaning():
    with pytest.raises(LearnablesError, match="no run to go on with") as caught:
        ln.watch(*make(), to=None, resume=True)
    assert_says(caught.value, "resume")


def test_what_numbers_are_called_elsewhere_is_taken(tmp_path):
    """numpy's, tensors, paths: what is a number or a path is none of our business to refuse."""
    model, optimizer = make()
    sink = Taken()
    with ln.watch(
        model,
        [optimizer, optimizer],  # once
        np.int64(1),
        tmp_path / "run",
        (sink,),
        quantities={"weight"},
        budget=torch.tensor(0.5),
        step=torch.tensor(4),
    ) as watcher:
        optimizer.step()
        values = {"a": np.float32(0.5), "b": torch.tensor([2.0]), "c": True, "d": np.array(3)}
        watcher.log_scalars(np.int64(5), values)
    assert watcher.step == 5
    assert not optimizer._optimizer_step_pre_hooks
    assert watcher.run().meta["every"] == 1
    assert sink.numbers == {5: {"a": 0.5, "b": 2.0, "c": 1.0, "d": 3.0}}


NUMBERS = [
    ("step", lambda w, x: w.log_scalars(x, {"loss": 1.0}), ("1", None, 0.5, True)),
    ("values", lambda w, x: w.log_scalars(1, x), (3, None, [("a", 1.0)], "loss")),
    (
        "values['loss']",
        lambda w, x: w.log_scalars(1, {"loss": x}),
        ("0.5", b"1", None, torch.ones(2), torch.ones(0), torch.tensor(1j), 1j, np.ones(3), [1.0]),
    ),
    ("values[3]", lambda w, x: w.log_scalars(1, {3: x}), (1.0,)),
    ("name", lambda w, x: w.log_table(x, torch.ones(2), 1), (3, None)),
    ("step", lambda w, x: w.log_table("t", torch.ones(2), x), ("1", None, 0.5)),
    (
        "array",
        lambda w, x: w.log_table("t", x, 1),
        ("abc", None, [[1], [1, 2]], torch.ones(2, dtype=torch.complex64), np.array(["a"])),
    ),
    ("array", lambda w, x: w.log_images("i", x, ["a"], 1), (torch.ones(2), None, np.zeros(1))),
    (
        "labels",
        lambda w, x: w.log_images("i", torch.zeros(1, 2, 2, 1, dtype=torch.uint8), x, 1),
        (3, None, {"a"}),
    ),
    ("value", lambda w, x: w.log_document("d", x), ({(1, 2): 3}, b"\xff\xfe")),
    ("name", lambda w, x: w.log_document(x, 1), (3, None)),
]


@pytest.mark.parametrize(
    ("where", "call", "wrong"),
    [(where, call, wrong) for where, call, several in NUMBERS for wrong in several],
    ids=lambda x: x if isinstance(x, str) else describe(x) if not callable(x) else "",
)
def test_what_a_loop_records_wrong_is_its_mistake_and_ends_no_watch(tmp_path, where, call, wrong):
    with ln.watch(*make(), to=tmp_path, budget=None) as watcher:
        with pytest.raises(LearnablesError) as caught:
            call(watcher, wrong)
        assert isinstance(caught.value, ArgumentError | ShapeError)
        assert caught.value.where == where
        assert caught.value.found
        assert caught.value.wanted
        watcher.log_scalars(1, {"loss": 1.0})
    assert watcher.failed is None
    run = watcher.run()
    assert list(run.scalars) == ["loss"]
    assert not run.artifacts


def test_a_circle_is_no_document(tmp_path):
    circle = []
    circle.append(circle)
    with (
        ln.watch(*make(), to=tmp_path) as watcher,
        pytest.raises(ArgumentError, match="a document is a JSON value"),
    ):
        watcher.log_document("d", circle)


@pytest.mark.parametrize(
    "array", [torch.ones(2).half(), torch.ones(2).to(torch.float8_e5m2), torch.ones(2).bfloat16()]
)
def test_a_table_takes_narrow_numbers(tmp_path, array):
    with ln.watch(*make(), to=tmp_path) as watcher:
        watcher.log_table("t", array, 0)
    assert watcher.run().artifact("t").arrays()["values"].tolist() == [1.0, 1.0]


@pytest.fixture
def run(tmp_path) -> Run:
    model, optimizer = make()
    with ln.watch(model, optimizer, every=1, to=tmp_path / "run", budget=None) as watcher:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    return watcher.run()


NO_PATHS = (3, None, ["runs"], b"runs", "")


@pytest.mark.parametrize("wrong", [*NO_PATHS, nn.Linear(1, 1)], ids=describe)
def test_what_is_no_path_is_refused_by_whatever_reads_or_writes(run, wrong, tmp_path):
    calls = [
        ("path", lambda: Run(wrong)),
        ("path", lambda: ln.write_html(run, wrong)),
        ("path", lambda: LivePage(wrong)),
        ("file", lambda: CSV(wrong)),
        ("file", lambda: JSONLines(wrong)),
        ("folder", lambda: TensorBoard(wrong)),
    ]
    before = sorted(tmp_path.rglob("*"))
    for where, call in calls:
        with pytest.raises(ArgumentError) as caught:
            call()
        assert_says(caught.value, where)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("sink", [Trackio, WeightsAndBiases])
def test_a_project_is_named_by_a_text(sink):
    with pytest.raises(ArgumentError, match="where: project"):
        sink(3)


def test_an_open_file_is_as_good_as_a_path():
    sink = JSONLines(text := io.StringIO())
    sink.scalars(1, {"loss": 2.0})
    assert text.getvalue().startswith('{"type": "scalar"')


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("weights", "norm", "weight"), "quantity"),
        ((3, "norm", "weight"), "quantity"),
        (("weight", "median", "weight"), "statistic"),
        (("weight", "histogram", "weight"), "statistic"),
        (("weight", "norm", "wieght"), "wieght"),
        (("weight", "norm", 3), "3"),
    ],
)
def test_a_series_that_there_is_not_is_refused_rather_than_empty(run, arguments, where):
    with pytest.raises(RunError) as caught:
        run.series(*arguments)
    assert_says(caught.value, where)


@pytest.mark.parametrize("wrong", ["runs/a", 3, None], ids=describe)
def test_what_is_no_run_is_not_compared(run, wrong):
    for pair, where in (((wrong, run), "a"), ((run, wrong), "b")):
        with pytest.raises(ArgumentError) as caught:
            compare(*pair)
        assert_says(caught.value, where)


def test_a_port_that_is_taken_is_said_so(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunError, match="cannot be served on this port") as caught:
            LivePage(run.path, taken.getsockname()[1])
    assert_says(
        caught.value, f"127.0.0.1:{taken.getsockname()[1]}" if False else caught.value.where
    )
    for wrong in ("8000", 2.5, None):
        with pytest.raises(ArgumentError, match="where: port"):
            LivePage(run.path, wrong)
    with pytest.raises(RunError):
        LivePage(run.path, 70_000)


def test_what_cannot_be_exported_or_written_is_said_in_five_parts(run, tmp_path):
    (tmp_path / "file").write_text("")
    for form in ("jsonl", "csv", "tensorboard"):
        with pytest.raises(RunError, match="cannot be written") as caught:
            export_run(run.path, form, tmp_path / "file" / "inside")
        assert_says(caught.value, str(tmp_path / "file" / "inside"))
    for nowhere in (tmp_path / "file" / "page.html", tmp_path, "."):
        with pytest.raises(RunError, match="the page cannot be written") as caught:
            ln.write_html(run, nowhere)
        assert_says(caught.value, str(nowhere))
    assert not list(Path().glob("*.part"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "RUN", "--fail-on", "everything"],
        ["report", "RUN", "--output", "/proc/none/page.html"],
        ["export", "RUN", "--to", "parquet"],
        ["export", "RUN", "--to", "csv", "--output", "/proc/none/x.csv"],
        ["report", "nowhere"],
        ["watch", "nowhere"],
        ["compare", "RUN", "nowhere"],
        ["runs", "nowhere"],
    ],
    ids=" ".join,
)
def test_on_the_command_line_too(run, arguments):
    asked = [str(run.path) if a == "RUN" else a for a in arguments]
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, LearnablesError), done.output
    assert_says(done.exception, done.exception.where)
    assert done.exception.where
