"""Deltas start as nothing, change what they are told to change, and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import learnables as ln
from learnables.errors import ShapeError
from learnables.nn import BlockSparseDelta, LowRankDelta


@st.composite
def cases(draw):
    """A shape, and arguments that fit it."""
    dimensions = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 7)) for _ in range(dimensions))
    dim = draw(st.sampled_from([-2, -1]))
    banks = draw(st.sampled_from([None, 0] if dimensions > 1 else [None]))
    inner = shape[1 if dimensions == 3 and banks is None else 0 :]
    rows = inner[-1] if dim == -1 and len(inner) > 1 else inner[0]
    sizes, left = [], rows
    while left:
        sizes.append(draw(st.integers(1, left)))
        left -= sizes[-1]
    chosen = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, unique=True))
    rank, scale = draw(st.integers(1, 3)), draw(st.sampled_from([1.0, 0.5]))
    return shape, {
        "rank": rank,
        "scale": scale,
        "dim": dim,
        "banks": banks,
        "sections": sizes,
        "chosen": chosen,
    }


def slowly(delta, shape, rank, scale, dim, banks, sections, chosen):
    """The difference, entry by entry, from the definition."""
    banks = (1 if len(shape) == 3 else 0) if banks is None else banks
    inner = shape[banks:]
    out = torch.zeros(shape, dtype=torch.float64)
    starts = [sum(sections[:i]) for i in range(len(sections))]
    for place in range(out.numel()):
        where = torch.unravel_index(torch.tensor(place), shape)
        where = [int(i) for i in where]
        bank, entry = tuple(where[:banks]), where[banks:]
        if len(inner) == 1:
            row, column = entry[0], None
        elif dim == -1:
            row = entry[-1]
            column = sum(e * math.prod(inner[i + 1 : -1]) for i, e in enumerate(entry[:-1]))
        else:
            row = entry[0]
            column = sum(e * math.prod(inner[i + 2 :]) for i, e in enumerate(entry[1:]))
        section = max(i for i, start in enumerate(starts) if start <= row)
        if section not in chosen:
            continue
        order = chosen.index(section)
        own = sum(sections[i] for i in chosen[:order]) + row - starts[section]
        if column is None:
            out[tuple(where)] = scale * delta.up[(*bank, own)].double()
            continue
        up = delta.up[(*bank, own)].double()
        down = delta.down[(*bank, slice(order * rank, (order + 1) * rank), column)].double()
        out[tuple(where)] = scale * (up @ down)
    return out


@given(cases(), st.integers(0, 2**16))
def test_a_low_rank_delta_is_what_its_definition_says(case, seed):
    shape, arguments = case
    torch.manual_seed(seed)
    delta = LowRankDelta(*shape, **arguments)
    weight = torch.randn(shape)
    assert torch.equal(delta(weight), weight)
    with torch.no_grad():
        delta.up.normal_()
        wanted = weight.double() + slowly(delta, shape, **arguments)
        torch.testing.assert_close(delta(weight).double(), wanted, rtol=1e-5, atol=1e-5)


PARAMETERS = {
    "vector": ((12,), {}),
    "matrix": ((12, 8), {"rank": 2}),
    "qkv": ((24, 8), {"rank": 2, "sections": 3, "chosen": (0, 2)}),
    "grouped qkv": ((16, 8), {"rank": 2, "sections": (8, 4, 4), "chosen": (0, 2)}),
    "qkv of GPT-2": ((8, 24), {"rank": 2, "sections": 3, "chosen": (0, 2), "dim": -1}),
    "qkv bias": ((24,), {"sections": 3, "chosen": (0, 2)}),
    "experts": ((3, 12, 8), {"rank": 2}),
    "kernel": ((6, 4, 3, 3), {"rank": 2}),
}


class Holder(nn.Module):
    """A model that reads one raw parameter of any shape."""

    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return (self.weight * x).tanh()


def train(model, x, steps=3):
    ln.train_only(model, "delta.*")
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.5))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.fixture(params=[*PARAMETERS, "blocks"])
def grafted(request):
    torch.manual_seed(0)
    if request.param == "blocks":
        shape, delta = (24, 16), BlockSparseDelta(24, 16, block=8, density=0.34)
    else:
        shape, arguments = PARAMETERS[request.param]
        delta = LowRankDelta(*shape, **arguments)
    model, x = Holder(shape), torch.randn(shape)
    before = model(x)
    handle = ln.graft(model, "delta", delta, "weight")
    assert torch.equal(model(x), before)
    train(model, x)
    assert not torch.equal(model(x), before)
    return model, handle, x, before


def test_a_trained_delta_is_removed_or_merged(grafted):
    model, handle, x, _ = grafted
    kept, out = model.weight.detach().clone(), model(x)
    handle.merge()
    assert torch.equal(model(x), out)
    assert not torch.equal(model.weight, kept)
    assert list(model.state_dict()) == ["weight"]


def test_a_removed_delta_leaves_no_trace(grafted):
    model, handle, x, before = grafted
    handle.remove()
    assert torch.equal(model(x), before)
    assert type(model) is Holder


def test_a_file_keeps_it(grafted, tmp_path):
    model, handle, x, _ = grafted
    out = model(x)
    ln.save_delta(model, tmp_path / "delta")
    handle.remove()
    torch.manual_seed(7)  # other blocks would be drawn
    ln.load_delta(model, tmp_path / "delta")
    assert torch.equal(model(x), out)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at each input's
def test_it_compiles_and_exports(grafted):
    model, _, x, _ = grafted
    torch._dynamo.reset()

    def call(x):
        return model(x)

    assert torch._dynamo.explain(call)(x).graph_break_count == 0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_what_is_not_chosen_keeps_every_bit(grafted):
    model, handle, _, _ = grafted
    delta, weight = handle.component, model.weight.detach()
    moved = delta(weight) != weight
    if isinstance(delta, BlockSparseDelta):
        assert torch.equal(moved, delta.blocks.dense() != 0)
    elif len(delta.sizes) > 1:
        axis = delta.shape.index(sum(delta.sizes))
        parts = moved.split(delta.sizes, dim=axis)
        assert [bool(part.any()) for part in parts] == [True, False, True]


def test_a_delta_in_fp32_fits_a_parameter_in_bf16():
    weight = torch.randn(12, 8, dtype=torch.bfloat16)
    for delta in (LowRankDelta(12, 8), BlockSparseDelta(12, 8, block=4, density=0.5)):
        assert delta(weight).dtype == torch.bfloat16
        assert torch.equal(delta(weight), weight)


def test_the_delta_decays_toward_the_parameter():
    model = Holder((12, 8))
    ln.graft(model, "delta", LowRankDelta(12, 8), "weight")
    groups = ln.param_groups(model, lr=0.1, weight_decay=0.05)
    decayed = {n for g in groups if g["weight_decay"] for n in g["param_names"]}
    assert {"delta.up", "delta.down"} <= decayed


@pytest.mark.parametrize(
    ("shape", "arguments", "says"),
    [
        ((), {}, "needs the shape"),
        ((6, 4), {"rank": 0}, "no such delta"),
        ((6, 4), {"sections": 4}, "do not fill"),
        ((6, 4), {"sections": (2, 3)}, "5 rows[\\s\\S]*6 rows"),
        ((6, 4), {"sections": 3, "chosen": (3,)}, "0 … 2"),
        ((6, 4), {"sections": 3, "chosen": (1, 1)}, "each once"),
    ],
)
def test_what_does_not_fit_is_refused(shape, arguments, says):
    with pytest.raises(ShapeError, match=says):
        LowRankDelta(*shape, **arguments)


def test_a_delta_of_another_shape_tells_both_shapes():
    model = nn.Sequential(nn.Linear(4, 6))
    for delta in (LowRankDelta(6, 5), BlockSparseDelta(6, 5, block=1)):
        with pytest.raises(ShapeError, match=r"\(6, 5\)[\s\S]*\(6, 4\)"):
            ln.graft(model, "delta", delta, "0.weight")
        with pytest.raises(ShapeError, match=r"\(6, 5\)[\s\S]*\(6, 4\)"):
            delta(model[0].weight)
    assert not hasattr(model, "delta")


class Experts(nn.Module):
    """A bank of experts, each row of x goes through one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x, expert):
        return torch.einsum("eoi,bi,be->bo", self.weight, x, F.one_hot(expert, 3).float())


def test_each_expert_has_a_delta_of_its_own():
    model = Experts()
    ln.graft(model, "delta", LowRankDelta(3, 6, 4, rank=2), "weight")
    with torch.no_grad():
        model.delta.up.normal_()
    x, expert = torch.randn(5, 4), torch.tensor([1, 1, 1, 1, 1])
    model(x, expert).sum().backward()
    reached = model.delta.up.grad.flatten(1).any(dim=1)
    assert reached.tolist() == [False, True, False]
