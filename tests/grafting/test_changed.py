"""What is grafted on a parameter is seen by every forward that reads it, and by nobody else."""

import copy
import pickle

import pytest
import torch
from tests.grafting.test_graft import Plus, Stack
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import learnables as ln
from learnables.errors import LearnablesError
from learnables.grafting.graft import grafts_of


class Reader(nn.Module):
    """A parent that reads the parameter of its child past the child's forward."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return F.linear(x, self.child.weight)


class Listed(nn.Module):
    """Parameters in a list, which has no forward."""

    def __init__(self):
        super().__init__()
        self.child = nn.ParameterList([nn.Parameter(torch.randn(3, 4))])

    def forward(self, x):
        return F.linear(x, self.child[0])


class Inner(nn.Module):
    """An owner that computes with its parameter again in backward."""

    def __init__(self, again=None):
        super().__init__()
        self.weight, self.again = nn.Parameter(torch.randn(3, 4)), again

    def product(self, x):
        return F.linear(x, self.weight).tanh()

    def forward(self, x):
        if self.again is None:
            return self.product(x)
        return checkpoint(self.product, x, use_reentrant=self.again == "reentrant")


class Around(nn.Module):
    """A parent that computes its child again in backward."""

    def __init__(self, again=None):
        super().__init__()
        self.child, self.again = Inner(), again

    def forward(self, x):
        if self.again is None:
            return self.child(x)
        return checkpoint(self.child, x, use_reentrant=self.again == "reentrant")


class ReadAround(Around):
    """A parent that reads its child's parameter, and does so again in backward."""

    def forward(self, x):
        def product(x):
            return F.linear(x, self.child.weight).tanh()

        if self.again is None:
            return product(x)
        return checkpoint(product, x, use_reentrant=self.again == "reentrant")


@pytest.mark.parametrize(("kind", "at"), [(Reader, "child.weight"), (Listed, "child.0")])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at each input's
def test_a_parent_that_reads_the_parameter_itself_sees_the_change(kind, at):
    model, x = kind(), torch.randn(2, 4)
    before = model(x)
    handle = ln.graft(model, "delta", Plus(3, 4), at)
    weight = model.get_parameter(at) + model.delta.a @ model.delta.b
    torch.testing.assert_close(model(x), F.linear(x, weight))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    handle.remove()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("again", ["reentrant", "saved"])
@pytest.mark.parametrize(("kind", "at"), [(Inner, ""), (Around, "child."), (ReadAround, "child.")])
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
def test_activation_checkpointing_changes_no_gradient(kind, at, again):
    x = torch.randn(2, 4, requires_grad=True)
    plain, checkpointed = kind(), kind(again)
    checkpointed.load_state_dict(plain.state_dict())
    delta = Plus(3, 4)
    ln.graft(plain, "delta", delta, f"{at}weight")
    ln.graft(checkpointed, "delta", copy.deepcopy(delta), f"{at}weight")
    grads = []
    for model in (plain, checkpointed):
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
        grads.append({name: param.grad for name, param in model.named_parameters()})
    assert all(grad.any() for grad in grads[0].values())
    torch.testing.assert_close(grads[0], grads[1])


def test_outside_of_forwards_the_attribute_is_the_parameter():
    model = Stack()
    param = model.blocks[0].linear1.weight
    ln.graft(model, "delta", Plus(16, 8), "blocks.0.linear1.weight")
    assert model.blocks[0].linear1.weight is param
    model(torch.randn(2, 5, 3))
    assert model.get_parameter("blocks.0.linear1.weight") is param
    assert type(model.blocks[0].linear1).__name__ == "Linear"
    assert isinstance(model.blocks[0].linear1, nn.Linear)


def test_after_a_forward_that_raised_the_attribute_is_the_parameter():
    model = Stack()
    param = model.blocks[0].linear1.weight
    ln.graft(model, "delta", Plus(16, 8), "blocks.0.linear1.weight")
    for wrong in (torch.randn(2, 5), torch.randn(2, 5, 4)):
        with pytest.raises(RuntimeError):
            model(wrong)
        with pytest.raises(RuntimeError):
            model.blocks[0].linear1(torch.randn(2, 5))
    assert model.blocks[0].linear1.weight is param


@pytest.mark.parametrize("carried", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_two_grafts_on_one_parameter_are_copied_with_it(carried):
    model, x = Stack(), torch.randn(2, 5, 3)
    before = model(x)
    ln.graft(model, "first", Plus(16, 8), "blocks.0.linear1.weight")
    ln.graft(model, "second", ln.nn.LayerScale(8, 0.5), "blocks.0.linear1.weight")
    other = carried(model)
    assert torch.equal(other(x), model(x))
    grafts_of(other)[1].remove()
    grafts_of(other)[0].remove()
    assert torch.equal(other(x), before)
    assert type(other.blocks[0].linear1) is nn.Linear
    assert not torch.equal(model(x), before)


def test_of_two_grafts_the_first_is_merged_first():
    model, x = Stack(), torch.randn(2, 5, 3)
    first = ln.graft(model, "first", Plus(16, 8), "blocks.0.linear1.weight")
    second = ln.graft(model, "second", ln.nn.LayerScale(8, 0.5), "blocks.0.linear1.weight")
    out = model(x)
    with pytest.raises(LearnablesError, match="merge 'first', then 'second'"):
        second.merge()
    assert torch.equal(model(x), out)
    first.merge()
    assert torch.equal(model(x), out)
    second.merge()
    assert torch.equal(model(x), out)
    assert type(model.blocks[0].linear1) is nn.Linear


def test_of_two_grafts_on_one_parameter_the_last_is_removed_first():
    model, x = Stack(), torch.randn(2, 5, 3)
    before = model(x)
    first = ln.graft(model, "first", Plus(16, 8), "blocks.0.linear1.weight")
    second = ln.graft(model, "second", ln.nn.LayerScale(8, 0.5), "blocks.0.linear1.weight")
    elsewhere = ln.graft(model, "elsewhere", Plus(16, 8), "blocks.1.linear1.weight")
    out = model(x)
    with pytest.raises(LearnablesError, match="remove 'second', then 'first'"):
        first.remove()
    assert torch.equal(model(x), out)
    assert [g.name for g in grafts_of(model)] == ["first", "second", "elsewhere"]
    second.remove()
    first.remove()
    elsewhere.remove()
    assert torch.equal(model(x), before)


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        ln.tie(self, "out.weight", "embed.weight")

    def forward(self, ids):
        return self.out(self.embed(ids))


def test_a_graft_on_one_name_of_a_tied_parameter_is_not_merged_into_the_other():
    model, ids = Coder(), torch.tensor([0, 3])
    handle = ln.graft(model, "delta", Plus(5, 3), "out.weight")
    embedded, out = model.embed(ids), model(ids)
    with pytest.raises(LearnablesError, match=r"ln.untie\(model, 'out.weight'\)"):
        handle.merge()
    ln.untie(model, "out.weight")
    assert torch.equal(model(ids), out)
    handle.merge()
    assert torch.equal(model(ids), out)
    assert torch.equal(model.embed(ids), embedded)


def test_a_graft_on_all_names_of_a_tied_parameter_is_merged():
    model, ids = Coder(), torch.tensor([0, 3])
    handle = ln.graft(model, "delta", Plus(5, 3), ["embed.weight", "out.weight"])
    out = model(ids)
    handle.merge()
    assert torch.equal(model(ids), out)
    assert model.embed.weight is model.out.weight


def test_a_module_that_would_not_see_the_change_is_refused():
    model = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(LearnablesError, match="LSTM"):
        ln.graft(model, "delta", Plus(16, 4), "0.weight_hh_l0")
    assert not hasattr(model, "delta")


def test_a_component_that_fails_is_heard():
    class Wrong(nn.Module):
        def forward(self, x):
            return x + self.absent

    model = Reader()
    ln.graft(model, "delta", Wrong(), "child.weight")
    with pytest.raises(LearnablesError, match="absent"):
        model(torch.randn(2, 4))


def test_functional_calls_see_the_change():
    model, x = Reader(), torch.randn(2, 4)
    ln.graft(model, "delta", Plus(3, 4), "child.weight")
    state = {name: value.detach() * 2 for name, value in model.named_parameters()}
    weight = state["child.weight"] + state["delta.a"] @ state["delta.b"]
    out = torch.func.functional_call(model, state, (x,))
    torch.testing.assert_close(out, F.linear(x, weight))


def test_a_tensor_in_the_place_of_the_parameter_is_changed_too():
    model, x = Inner(), torch.randn(2, 4)
    ln.graft(model, "delta", Plus(3, 4), "weight")
    out, weight = model(x), model.weight.detach().clone()
    del model.weight
    assert not hasattr(model, "weight")
    model.weight = weight  # as DataParallel does
    assert torch.equal(model(x), out)
    assert model.weight is weight
    del model.weight
    model.weight = nn.Parameter(weight * 2)
    assert isinstance(model.weight, nn.Parameter)
    torch.testing.assert_close(
        model(x), F.linear(x, weight * 2 + model.delta.a @ model.delta.b).tanh()
    )


@pytest.mark.parametrize("at", ["linear1.weight", "self_attn.in_proj_weight", "norm1.weight"])
def test_the_fused_path_of_torch_sees_the_change(at):
    model, x = Stack(), torch.randn(2, 5, 3)
    shape = model.get_parameter(f"blocks.0.{at}").shape
    before = model(x)
    ln.graft(model, "delta", ln.nn.LowRankDelta(*shape), f"blocks.0.{at}")
    nn.init.normal_(model.delta.up)
    wanted = model.train()(x)
    assert not torch.equal(wanted, before)
    with torch.inference_mode():  # here torch multiplies all of a layer in one kernel
        torch.testing.assert_close(model.eval()(x), wanted)


class Keeping(nn.Module):
    """As timm's LeViT: in evaluation mode it keeps what it has made of its parameter."""

    def __init__(self):
        super().__init__()
        self.biases = nn.Parameter(torch.randn(3))
        self.attention_bias_cache = {}

    def forward(self, x):
        if self.training:
            return x + self.biases.exp()
        if "made" not in self.attention_bias_cache:
            self.attention_bias_cache["made"] = self.biases.exp()
        return x + self.attention_bias_cache["made"]


def test_what_an_owner_keeps_of_its_parameter_is_of_now():
    model, x = nn.Sequential(Keeping()).eval(), torch.zeros(3)
    with torch.no_grad():
        before = model(x)
        handle = ln.graft(model, "plus", ln.nn.LowRankDelta(3), "0.biases")
        for value in (1.0, 2.0):
            for p in model.plus.parameters():
                p.fill_(value)
            torch.testing.assert_close(model(x), model.plus(model[0].biases).exp())
        handle.remove()
        assert torch.equal(model(x), before)


class Beside(nn.Module):
    """As PEFT's LoRA: it takes the place of a layer, and holds it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


@pytest.mark.parametrize("end", ["remove", "merge"])
def test_a_layer_that_was_moved_meanwhile_is_found_again(end):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    before = model(x)
    handle = ln.graft(model, "delta", Plus(3, 4), "0.weight")
    changed = model(x)
    model[0] = Beside(model[0])
    assert torch.equal(model(x), changed)
    getattr(handle, end)()
    assert torch.equal(model(x), changed if end == "merge" else before)
    assert type(model[0].base_layer) is nn.Linear
