"""Which parameters of two runs differ, in what, and since when."""

import dataclasses

import pytest
import torch
from torch import nn

import learnables as ln
from learnables.watching import Run
from learnables.watching.compare import compare
from learnables.watching.observation import QUANTITIES


class Model(nn.Module):
    def __init__(self, hidden=4, dtype=torch.float32, **parameters):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, hidden), nn.Linear(hidden, 1)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x):
        extra = sum(p.sum() for n, p in self.named_parameters() if "." not in n and n != "scale")
        return self.second(torch.tanh(self.first(x))) * self.scale.float() + extra


def train(folder, model, *, each=lambda step, model, optimizer: None, steps=8, every=1, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with ln.watch(model, optimizer, every, folder, budget=None, **options) as watcher:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            loss.backward()
            each(step, model, optimizer)
            optimizer.step()
            watcher.log_scalars(step, {"loss": loss.item()})
    return Run(folder)


def told(found):
    return {d.name: (d.what, d.since) for d in found.differences}


def test_the_same_training_twice_is_the_same(tmp_path):
    found = compare(train(tmp_path / "a", Model()), train(tmp_path / "b", Model()))
    assert found.differences == ()
    assert found.alike == 5
    assert found.steps == tuple(range(1, 9))


def test_the_parameter_that_differed_first_comes_first_with_what_and_when(tmp_path):
    def other_gradient(step, model, optimizer):
        if step == 4:
            model.second.bias.grad += 1e-3

    a = train(tmp_path / "a", Model())
    found = compare(a, train(tmp_path / "b", Model(), each=other_gradient))
    assert [d.since for d in found.differences] == [4, 5, 5, 5, 5]
    first = found.differences[0]
    assert (first.name, first.what) == ("second.bias", "gradient")
    norm = a.series("weight", "norm", "second.bias").values[-1]
    assert first.norms[0] == norm
    assert first.norms[1] != norm
    assert told(found)["first.weight"] == ("gradient", 5)  # its value follows a step later
    assert found.alike == 0
    assert set(found.scalars) == {"loss"}


def test_what_is_in_one_run_only_or_of_another_shape_or_dtype_is_said(tmp_path):
    a = train(tmp_path / "a", Model(hidden=4, prompt=2))
    b = train(tmp_path / "b", Model(hidden=5, dtype=torch.bfloat16, gate=3))
    found = told(compare(a, b))
    assert found == {
        "prompt": ("only in A", None),
        "gate": ("only in B", None),
        "first.weight": ("shape", None),
        "first.bias": ("shape", None),
        "second.weight": ("shape", None),
        "scale": ("dtype", None),
        "second.bias": ("weight", 1),
    }


def test_another_learning_rate_is_seen_though_it_moved_nothing_yet(tmp_path):
    """A group whose gradients are zero: no weight and no update tells."""

    def frozen(rate):
        def each(step, model, optimizer):
            for p in model.parameters():
                p.grad.zero_()
            if step == 6:
                optimizer.param_groups[0]["lr"] = rate

        return each

    a, b = (train(tmp_path / str(r), Model(), each=frozen(r)) for r in (0.05, 0.06))
    assert set(told(compare(a, b)).values()) == {("lr", 6)}


def test_looks_at_other_steps_are_compared_where_they_meet(tmp_path):
    a = train(tmp_path / "a", Model(), every=2)
    b = train(tmp_path / "b", Model(), every=3)
    found = compare(a, b)
    assert found.steps == (1, 6)
    assert found.differences == ()


def test_a_quantity_that_one_run_left_out_differs_and_a_histogram_does_not(tmp_path):
    a = train(tmp_path / "a", Model())
    without = train(tmp_path / "b", Model(), histogram=False)
    assert compare(a, without).differences == ()
    weights = train(tmp_path / "c", Model(), quantities=["weight"])
    assert set(told(compare(a, weights)).values()) == {("gradient", 1)}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("number", ["histogram", "sum", "max", "nonfinite"])
def test_any_recorded_number_that_differs_is_found(tmp_path, quantity, number):
    """Also where all others are the same: two values that change places between bins."""
    a, b = (train(tmp_path / name, Model(), steps=3) for name in "ab")
    seen = list(b.observations)
    rows = seen[1].rows[quantity]
    if number == "histogram":
        counts, at = rows.filled.counts.astype(int), int(rows.filled.lengths[0])
        counts[at] += 1
        counts[at + 1] -= 1
        changed = dataclasses.replace(rows, filled=dataclasses.replace(rows.filled, counts=counts))
        name = seen[1].names[1]
    else:
        moments = {k: v.copy() for k, v in rows.moments.items()}
        moments[number][-1] += 1
        changed = dataclasses.replace(rows, moments=moments)
        name = seen[1].names[-1]
    seen[1] = dataclasses.replace(seen[1], rows={**seen[1].rows, quantity: changed})
    b.__dict__["observations"] = tuple(seen)
    assert told(compare(a, b)) == {name: (quantity, 2)}


def test_parameters_that_came_later_are_compared_from_then_on(tmp_path):
    def comes(value):
        def each(step, model, optimizer):
            if step == 3:
                model.late = nn.Parameter(torch.full((2,), value))
                optimizer.add_param_group({"params": [model.late]})

        return each

    runs = [train(tmp_path / str(v), Model(), each=comes(v)) for v in (0.5, 0.5, 0.6)]
    assert compare(*runs[:2]).differences == ()
    assert told(compare(runs[0], runs[2]))["late"] == ("weight", 3)
