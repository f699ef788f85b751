"""Grafts leave a model as it was, and survive what is done to models."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from tests.gloo import one_process_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import learnables as ln
from learnables.errors import LearnablesError, SelectionError, ShapeError
from learnables.grafting.graft import graft, grafts_of


class Plus(nn.Module):
    """A low-rank delta of a matrix."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.a = ln.parameter(out_features, 2, init=ln.init.normal(0.1))
        self.b = ln.parameter(2, in_features, init=ln.init.normal(0.1))

    def forward(self, weight):
        return weight + self.a @ self.b


class Stack(nn.Module):
    """Blocks that mix tokens inside, as those of a transformer do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        assert x.shape[1] == 5
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Attention that takes a mask, as those of libraries do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x, attention_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2).flatten(2)


class Experts(nn.Module):
    """A bank of matrices as one parameter of three dimensions; each sees each token."""

    def __init__(self):
        super().__init__()
        self.bank = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x):
        return torch.einsum("bni,eoi->bno", x, self.bank).tanh()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp, self.experts = Attention(), nn.Linear(8, 8), Experts()

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.experts(self.mlp(x).tanh())


class Seer(nn.Module):
    """Images (B, 3, 4, 4) of four patches, a class token in front."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        assert x.shape[1] == 5
        return self.head(x[:, 0])


def moved(component):
    """A component that changes something: many begin by changing nothing."""
    with torch.no_grad():
        for param in component.parameters():
            param.add_(torch.randn_like(param) / 3)
    return component


def seen():
    return torch.rand(2, 3, 4, 4)


SEEN = {
    "colour": lambda: (ln.nn.ColorMatrix(), "", "input"),
    "table of colours": lambda: (ln.nn.ColorLUT(5), "", "input"),
    "gate": lambda: (ln.nn.Gate(8, value=0.5), "blocks.*.attention", None),
    "channels": lambda: (ln.nn.LayerScale2d(8, 0.5), "patches", None),
    "relative": lambda: (ln.nn.RelativeBias(2, 2, prefix=1), "blocks.*.attention", None),
    "memory": lambda: (ln.nn.MemoryTokens(2, 8), "blocks.*", None),
    "delta 1-D": lambda: (ln.nn.LowRankDelta(8), "blocks.0.mlp.bias", None),
    "delta 2-D": lambda: (ln.nn.LowRankDelta(8, 8, rank=2), "blocks.1.mlp.weight", None),
    "delta 3-D": lambda: (ln.nn.LowRankDelta(2, 8, 8, rank=1), "blocks.0.experts.bank", None),
    "delta of a kernel": lambda: (ln.nn.LowRankDelta(8, 3, 2, 2, rank=2), "patches.weight", None),
    "delta of a fused qkv": lambda: (
        ln.nn.LowRankDelta(24, 8, rank=2, sections=3, chosen=(0, 2)),
        "blocks.0.attention.qkv.weight",
        None,
    ),
    "delta of a token": lambda: (ln.nn.LowRankDelta(1, 1, 8, rank=1), "token", None),
    "blocks": lambda: (
        ln.nn.BlockSparseDelta(8, 8, block=4, density=0.5),
        "blocks.0.mlp.weight",
        None,
    ),
    "user's own": lambda: (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), "blocks.0", None),
}
GRAFTS = {
    "prompts": lambda: (ln.nn.Prompts(4, 8, prefix=1), "blocks.*", None),
    "deep": lambda: (ln.nn.DeepPrompts(3, 4, 8, prefix=1), "blocks.*", None),
    "registers": lambda: (ln.nn.RegisterTokens(2, 8), "blocks.*", None),
    "class": lambda: (ln.nn.ClassToken(8), "blocks.*", None),
    "scale": lambda: (ln.nn.LayerScale(8, 0.5), "blocks.1", None),
    "front": lambda: (nn.Linear(3, 3), "", "input"),
    "delta": lambda: (Plus(16, 8), "blocks.0.linear1.weight", None),
    "second": lambda: (Plus(8, 16), "blocks.2.linear2.weight", None),
}


@pytest.fixture(params=[*GRAFTS, *SEEN])
def grafted(request):
    torch.manual_seed(0)
    kind, build, x = (
        (Stack, GRAFTS[request.param], torch.randn(2, 5, 3))
        if request.param in GRAFTS
        else (Seer, SEEN[request.param], seen())
    )
    model = kind()
    component, at, where = build()
    before = model(x)
    handle = graft(model, "extra", moved(component), at, where=where)
    return model, handle, x, before


def test_it_acts_trains_and_leaves_no_trace(grafted):
    model, handle, x, before = grafted
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("extra.")}
    out = model(x)
    assert not torch.equal(out, before)
    out.square().sum().backward()
    for name, param in handle.component.named_parameters():
        assert param.grad is not None, name
        assert param.grad.any(), name
    handle.remove()
    left = model.state_dict()
    assert list(left) == list(state)
    assert all(torch.equal(value, left[name]) for name, value in state.items())
    assert torch.equal(model(x), before)
    for module, new in zip(model.modules(), type(model)().modules(), strict=True):
        assert type(module) is type(new)
        assert vars(module).keys() == vars(new).keys()
        for name, held in vars(new).items():
            if "hooks" in name:  # and whatever torch notes about them
                assert vars(module)[name] == held, name
    with pytest.raises(LearnablesError, match="no more"):
        handle.remove()


@pytest.mark.parametrize("carried", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(grafted, carried):
    model, _, x, before = grafted
    out, other = model(x), carried(model)
    assert torch.equal(other(x), out)
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert "extra" in dict(other.named_modules())
    moved(other.extra)
    assert not torch.equal(other(x), out)
    assert torch.equal(model(x), out)
    grafts_of(other)[0].remove()
    assert torch.equal(other(x), before)
    assert torch.equal(model(x), out)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at each input's
def test_no_graph_breaks_and_export(grafted):
    model, _, x, _ = grafted
    torch._dynamo.reset()

    def call(x):  # so that hooks of the whole model are inside of what is compiled
        return model(x)

    explained = torch._dynamo.explain(call)(x)
    assert explained.graph_break_count == 0, explained.break_reasons
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def on_a_parameter(kind):
    return kind in ("delta", "second", "blocks") or kind.startswith("delta ")


@pytest.mark.parametrize("kind", [kind for kind in (*GRAFTS, *SEEN) if on_a_parameter(kind)])
def test_a_delta_is_merged_into_its_parameter(kind):
    model, x = (Seer(), seen()) if kind in SEEN else (Stack(), torch.randn(2, 5, 3))
    component, at, where = {**GRAFTS, **SEEN}[kind]()
    names, before = list(model.state_dict()), model.get_parameter(at).detach().clone()
    handle = graft(model, "delta", moved(component), at, where=where)
    out = model(x)
    wanted = component(before).detach()
    handle.merge()
    assert torch.equal(model(x), out)
    assert torch.equal(model.get_parameter(at), wanted)
    assert not torch.equal(wanted, before)
    assert list(model.state_dict()) == names


def test_grafts_on_one_place_are_removed_last_first():
    model, x = Stack(), torch.randn(2, 5, 3)
    before = model(x)
    first = graft(model, "registers", ln.nn.RegisterTokens(2, 8), "blocks.*")
    second = graft(model, "prompts", ln.nn.Prompts(3, 8, prefix=1), "blocks.*")
    model(x)
    with pytest.raises(LearnablesError, match="removed first"):
        first.remove()
    second.remove()
    first.remove()
    assert torch.equal(model(x), before)


def test_a_wrong_path_offers_the_nearest():
    with pytest.raises(SelectionError, match=r"'blocks\.2'"):
        graft(Stack(), "scale", ln.nn.LayerScale(8), "block.2")
    with pytest.raises(SelectionError, match=r"at='blocks\.\*'"):
        graft(Stack(), "prompts", ln.nn.Prompts(3, 8))


def test_a_name_is_taken_once():
    model = Stack()
    graft(model, "scale", ln.nn.LayerScale(8), "blocks.0")
    with pytest.raises(LearnablesError, match="taken"):
        graft(model, "scale", ln.nn.LayerScale(8), "blocks.1")
    for name in ("a.b", "", "2nd", "class"):
        with pytest.raises(LearnablesError, match="cannot have this name"):
            graft(model, name, ln.nn.LayerScale(8), "blocks.1")


def test_a_width_that_does_not_fit_tells_both_shapes():
    model = Stack()
    graft(model, "prompts", ln.nn.Prompts(3, 6), "blocks.*")
    with pytest.raises(ShapeError, match=r"\(1, 3, 6\)[\s\S]*\(2, 5, 8\)"):
        model(torch.randn(2, 5, 3))
    for component, shape in (
        (ln.nn.LayerScale(6), r"gamma \(6,\)"),
        (nn.Linear(6, 8), r"\(8, 6\)"),
    ):
        other = Stack()
        graft(other, "extra", component, "blocks.0")
        with pytest.raises(ShapeError, match=rf"{shape}[\s\S]*\(2, 5, 8\)"):
            other(torch.randn(2, 5, 3))
    with pytest.raises(ShapeError, match="3 layers"):
        graft(Stack(), "deep", ln.nn.DeepPrompts(2, 3, 8), "blocks.*")


def test_a_component_in_another_dtype_is_told_how_to_be_cast():
    model, x = Stack().double(), torch.randn(2, 5, 3).double()
    handle = graft(model, "front", nn.Linear(3, 3), "", where="input")
    with pytest.raises(LearnablesError, match=r"where: front[\s\S]*torch.float32") as error:
        model(x)
    eval(error.value.mend, {"torch": torch, "component": handle.component})
    assert model(x).dtype == torch.float64


OTHERS = ("front", "delta", "second", "user's own")


@pytest.mark.parametrize("kind", [kind for kind in (*GRAFTS, *SEEN) if kind not in OTHERS])
def test_components_of_ours_are_at_home_in_any_dtype(kind):
    model, x = (Seer(), seen()) if kind in SEEN else (Stack(), torch.randn(2, 5, 3))
    component, at, where = {**GRAFTS, **SEEN}[kind]()
    graft(model.bfloat16(), "extra", moved(component), at, where=where)
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_a_component_that_does_not_fit_its_parameter_tells_both_shapes():
    model = Stack()
    graft(model, "delta", Plus(8, 8), "blocks.0.linear1.weight")
    with pytest.raises(ShapeError, match=r"a \(8, 2\), b \(2, 8\)[\s\S]*shape \(16, 8\)"):
        model(torch.randn(2, 5, 3))


def compiled_inside(model):
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def around_a_part(model):
    return nn.Sequential(nn.Identity(), nn.DataParallel(model))


def exported(model):
    return torch.export.export(model, (torch.randn(2, 5, 3),)).module()


class Mine(nn.DataParallel):
    """A wrapper that somebody derived from torch's."""


WRAPS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile in place": compiled_in_place,
    "compile a block": compiled_inside,
    "script": lambda model: torch.jit.script(model.embed),
    "export": exported,
    "DataParallel": nn.DataParallel,
    "a class derived from it": Mine,
    "DataParallel inside": around_a_part,
    "average": torch.optim.swa_utils.AveragedModel,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP2": fully_shard,
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
def test_a_wrapped_model_says_when_to_graft(wrap):
    with one_process_group():
        model = WRAPS[wrap](Stack())
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(LearnablesError, match="graft first, then compile, wrap, shard"):
            graft(model, "s", ln.nn.LayerScale(8), names[-1])
        assert [name for name, _ in model.named_modules()] == names


class Own(nn.Module):
    """A module of somebody's own that calls its child as wrappers do."""

    def __init__(self):
        super().__init__()
        self.module = Stack()

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("kind", [Own, lambda: nn.Sequential(OrderedDict(module=Stack()))])
def test_a_child_called_module_makes_no_wrapper(kind):
    model, x = kind(), torch.randn(2, 5, 3)
    before = model(x)
    handle = graft(model, "scale", ln.nn.LayerScale(8, 0.5), "module.blocks.0")
    assert not torch.equal(model(x), before)
    handle.remove()
    assert torch.equal(model(x), before)


def test_a_traced_graph_calls_its_modules_and_their_grafts():
    x, traced = torch.randn(2, 3), torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    before = traced(x)
    handle = graft(traced, "scale", ln.nn.LayerScale(3, 0.5), "0")
    torch.testing.assert_close(traced(x), before * 0.5)
    handle.remove()
    assert torch.equal(traced(x), before)


def test_a_model_is_no_component_of_itself():
    model = Stack()
    for component in (model, nn.Sequential(model)):
        with pytest.raises(LearnablesError, match="cannot hold the model"):
            graft(model, "inner", component, "blocks.0")
    assert list(model.state_dict()) == list(Stack().state_dict())


def test_where_no_family_knows_the_model_the_mend_can_be_typed():
    model, x = Stack(), torch.randn(2, 5, 3)
    before = model(x)
    with pytest.raises(SelectionError, match="no family of models knows") as error:
        graft(model, "prompts", ln.nn.Prompts(3, 8))
    option, _, value = error.value.mend.partition("=")
    handle = graft(model, "prompts", ln.nn.Prompts(3, 8), **{option: eval(value)})
    assert handle.at == ("blocks.0", "blocks.1", "blocks.2")
    assert not torch.equal(model(x), before)


def test_a_parameter_that_does_not_exist_offers_the_nearest():
    with pytest.raises(SelectionError, match=r"such parameter[\s\S]*'blocks\.2\.linear1\.weight'"):
        graft(Stack(), "delta", Plus(16, 8), "blocks.2.linear.weight", where="parameter")


def test_a_delta_of_another_shape_tells_both_and_what_to_build():
    model = Stack()
    with pytest.raises(ShapeError, match=r"delta \(8, 16\)[\s\S]*parameter \(16, 8\)") as error:
        graft(model, "delta", ln.nn.LowRankDelta(8, 16), "blocks.0.linear1.weight")
    assert not hasattr(model, "delta")
    mended = eval(error.value.mend, vars(ln.nn))
    graft(model, "delta", mended, "blocks.0.linear1.weight")


@pytest.mark.parametrize("kind", [kind for kind in (*GRAFTS, *SEEN) if not on_a_parameter(kind)])
def test_what_algebra_cannot_merge_is_refused_and_stays(kind):
    model, x = (Seer(), seen()) if kind in SEEN else (Stack(), torch.randn(2, 5, 3))
    component, at, where = {**GRAFTS, **SEEN}[kind]()
    handle = graft(model, "extra", component, at, where=where)
    out = model(x)
    with pytest.raises(LearnablesError, match="only a graft on a parameter") as error:
        handle.merge()
    assert torch.equal(model(x), out)
    eval(error.value.mend, {"handle": handle})
    assert grafts_of(model) == []


def test_an_error_inside_leaves_the_parameter_in_its_place():
    model = Stack()
    graft(model, "delta", Plus(16, 8), "blocks.0.linear1.weight")
    with pytest.raises(RuntimeError):
        model.blocks[0].linear1(torch.randn(2, 5))
    assert "weight" not in vars(model.blocks[0].linear1)
    torch.save(model.state_dict(), io.BytesIO())
