import copy
import pickle

import pytest
import torch
from tests.gloo import one_process_group
from torch import nn
from torch.distributed.fsdp import fully_shard

import learnables as ln
from learnables.dynamic import FORMS
from learnables.errors import LearnablesError, ShapeError
from learnables.nn.dynamic_linear import KINDS

every_kind = pytest.mark.parametrize("kind", KINDS)


def a_layer(kind="auto", **options):
    options = {"hidden_features": 6, "rank": 2, "bases": 3, **options}
    layer = ln.nn.DynamicLinear(8, 5, condition_features=4, kind=kind, **options)
    with torch.no_grad():
        for param in layer.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return layer


@every_kind
@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize("shape", [(3, 8), (3, 7, 8)])
def test_each_sample_meets_its_own_weight(kind, form, hidden, shape) -> None:
    layer = a_layer(kind, form=form, hidden_features=hidden)
    x, condition = torch.randn(shape), torch.randn(3, 4)
    weights = layer.weights(condition)
    assert weights.shape == (3, 5, 8)
    wanted = [nn.functional.linear(x[b], weights[b], layer.bias) for b in range(3)]
    torch.testing.assert_close(layer(x, condition), torch.stack(wanted))
    alone = [layer(x[b : b + 1], condition[b : b + 1]) for b in range(3)]
    torch.testing.assert_close(torch.cat(alone), torch.stack(wanted))


@every_kind
def test_auto_and_full_are_one_function(kind) -> None:
    layer = a_layer(kind)
    x, condition = torch.randn(3, 8), torch.randn(3, 4)
    if kind in ("auto", "full"):
        other = a_layer("full" if kind == "auto" else "auto")
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x, condition), layer(x, condition))


@every_kind
def test_gradients_are_right(kind) -> None:
    layer = a_layer(kind, activation=nn.Tanh()).double()
    names = [name for name, _ in layer.named_parameters()]
    x, condition = torch.randn(2, 3, 8).double(), torch.randn(2, 4).double()

    def f(x, condition, *values):
        return torch.func.functional_call(
            layer, dict(zip(names, values, strict=True)), (x, condition)
        )

    leaves = [t.detach().requires_grad_() for t in (x, condition, *layer.parameters())]
    torch.autograd.gradcheck(f, leaves)


@every_kind
@pytest.mark.parametrize("hidden", [0, 64])
@pytest.mark.parametrize("base", [True, False])
def test_the_first_output_is_as_large_as_that_of_a_linear_layer(kind, hidden, base) -> None:
    torch.manual_seed(0)
    x, condition = torch.randn(1500, 96), torch.randn(1500, 48)
    wanted = nn.Linear(96, 64, bias=False)(x).std().item()
    layer = ln.nn.DynamicLinear(
        96, 64, 48, kind=kind, hidden_features=hidden, base=base, bias=False
    )
    assert layer(x, condition).std().item() == pytest.approx(wanted, rel=0.12)
    weights = layer.weights(condition[:50])
    assert weights.std().item() == pytest.approx((3 * 96) ** -0.5, rel=0.12)


@every_kind
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "linear"])
def test_share_divides_the_variance(kind, gate) -> None:
    torch.manual_seed(0)
    layer = ln.nn.DynamicLinear(96, 64, 48, kind=kind, share=0.25, gate=gate)
    condition = torch.randn(200, 48)
    generated = layer.weights(condition) - layer.weight
    ratio = generated.square().mean() / (generated.square().mean() + layer.weight.square().mean())
    assert ratio.item() == pytest.approx(0.25, abs=0.06)
    still = ln.nn.DynamicLinear(96, 64, 48, kind=kind, share=0.0, gate=gate)
    x = torch.randn(200, 96)
    torch.testing.assert_close(
        still(x, condition), nn.functional.linear(x, still.weight, still.bias)
    )
    still(x, condition).sum().backward()
    moved = [name for name, p in still.named_parameters() if p.grad is not None and p.grad.any()]
    assert set(moved) & {"generator_weight", "basis_weight", "left_weight"}


def test_full_keeps_no_generated_weight_for_backward() -> None:
    layer = ln.nn.DynamicLinear(64, 64, 16, kind="full", hidden_features=8)
    x, condition = torch.randn(128, 64, requires_grad=True), torch.randn(128, 16)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def kept(layer):
        found = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x, condition)
        return sum(found.values())

    small = kept(layer)
    layer.kind, layer.form = "auto", "materialised"
    assert kept(layer) >= 128 * 64 * 64 * 4
    assert small <= 4 * 128 * (64 + 16 + 2 * 8)


@every_kind
def test_trains_compiles_copies_and_casts(kind) -> None:
    layer = a_layer(kind)
    x, condition = torch.randn(16, 8), torch.randn(16, 4)
    wanted = torch.randn(16, 5)
    optimizer = torch.optim.AdamW(ln.param_groups(layer, lr=0.02, weight_decay=0.01))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x, condition) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    y = layer(x, condition)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, condition), y)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x, condition), y)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x, condition)
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), y, rtol=0.05, atol=0.05)
    half = layer.bfloat16()(x.bfloat16(), condition.bfloat16())
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)


@every_kind
def test_policy_meta_construction_and_report(kind) -> None:
    with torch.device("meta"):
        layer = ln.nn.DynamicLinear(64, 48, 16, kind=kind)
    layer.to_empty(device="cpu").reset_parameters()
    assert not ln.init.report(layer).off
    decays = {plan.entry.name: plan.weight_decay for plan in ln.inventory(layer)}
    assert decays == {name: not name.endswith("bias") for name in decays}


def test_ddp_and_fsdp2_give_the_same_gradients() -> None:
    plain = a_layer("full")
    wrapped, sharded = copy.deepcopy(plain), copy.deepcopy(plain)
    x, condition = torch.randn(4, 8), torch.randn(4, 4)
    plain(x, condition).sum().backward()
    with one_process_group():
        nn.parallel.DistributedDataParallel(wrapped)(x, condition).sum().backward()
        fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        sharded(x, condition).sum().backward()
        for name, param in plain.named_parameters():
            torch.testing.assert_close(wrapped.get_parameter(name).grad, param.grad)
            torch.testing.assert_close(sharded.get_parameter(name).grad.full_tensor(), param.grad)


@pytest.mark.parametrize(
    ("x", "condition"),
    [
        ((3, 8), (4, 4)),
        ((3, 8), (1, 4)),
        ((3, 7), (3, 4)),
        ((3, 8), (3, 5)),
        ((8,), (3, 4)),
        ((3, 8), (4,)),
    ],
)
def test_a_condition_that_does_not_belong_to_the_input_is_refused(x, condition) -> None:
    with pytest.raises(
        ShapeError, match=r"found: x \(.*\), condition \(.*wanted: x \(B, 8\)|(?s:.*)"
    ) as caught:
        a_layer()(torch.zeros(x), torch.zeros(condition))
    assert str(x) in str(caught.value)
    assert str(condition) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "lora"}, "kind='lora'.*'auto', 'full', 'basis', 'low_rank'"),
        ({"gate": "max"}, "gate='max'"),
        ({"form": "fast"}, "form='fast'"),
        ({"rank": 0}, "rank=0"),
        ({"hidden_features": -1}, "hidden_features=-1"),
        ({"share": 1.5}, "share=1.5"),
        ({"share": float("nan")}, "share=nan"),
    ],
)
def test_bad_options_are_refused(options, says) -> None:
    with pytest.raises(LearnablesError, match=f"(?s){says}"):
        ln.nn.DynamicLinear(8, 5, 4, **options)
