import pytest
import torch
from tests.sparse.families import MASKS, layout_of
from tests.sparse.test_reference import by_slices, every_layout
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from learnables._native import block_sparse as native
from learnables.errors import LearnablesError, ShapeError
from learnables.sparse import Layout, block_sparse_linear, kernels, product, random


def three(layout, samples):
    shapes = (samples, layout.in_features), layout.weight_shape, (layout.out_features,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.fixture(params=["torch", "native"])
def by(request, monkeypatch):
    """Each backend that runs here, forced."""
    if request.param == "native" and not native.available()[0]:
        pytest.skip(native.available()[1])
    monkeypatch.setenv(kernels.FORCE, request.param)
    return request.param


@every_layout
def test_gradients_are_right(mask, size, by) -> None:
    layout = layout_of(mask, size)
    assert kernels.backend(torch.empty(0, dtype=torch.float64)).name == by
    leaves = three(layout, samples=3)
    torch.autograd.gradcheck(
        lambda x, weight, bias: block_sparse_linear(x, weight, layout, bias), leaves
    )


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_gradients_are_right(mask, by) -> None:
    layout = layout_of(mask, "ragged")
    leaves = three(layout, samples=2)
    torch.autograd.gradgradcheck(
        lambda x, weight, bias: block_sparse_linear(x, weight, layout, bias), leaves
    )


def test_only_what_is_asked_for_is_differentiated() -> None:
    layout = layout_of("random", "whole")
    x, weight = torch.randn(3, 8), torch.randn(layout.weight_shape, requires_grad=True)
    block_sparse_linear(x, weight, layout).square().sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    frozen, x = weight.detach(), x.requires_grad_()
    block_sparse_linear(x, frozen, layout).sum().backward()  # an expanded gradient
    torch.testing.assert_close(x.grad, torch.ones(3, 12) @ by_slices(frozen, layout))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8), (2, 0, 3, 8)])
def test_leading_dimensions_are_samples(shape) -> None:
    layout = layout_of("random", "whole")
    weight, x = torch.randn(layout.weight_shape), torch.randn(shape)
    wanted = F.linear(x, by_slices(weight, layout))
    torch.testing.assert_close(block_sparse_linear(x, weight, layout), wanted)
    strided = x.repeat_interleave(2, -1)[..., ::2]
    torch.testing.assert_close(block_sparse_linear(strided, weight, layout), wanted)


@pytest.mark.parametrize("samples", [1, 8, 32, 33, 512, 8192])
@pytest.mark.parametrize("block", [8, (16, 32), 64, 128])
def test_every_size_of_batch_and_block_gives_the_dense_result(samples, block, by) -> None:
    p, q = (block, block) if isinstance(block, int) else block
    layout = Layout(200, 264, block, random(-(-200 // p), -(-264 // q), 0.4))
    weight, x = torch.randn(layout.weight_shape), torch.randn(samples, 264)
    if layout.edge_mask is not None:
        weight *= layout.edge_mask
    leaves = [weight.requires_grad_(), x.requires_grad_()]
    ours = block_sparse_linear(x, weight, layout)
    theirs = F.linear(x, by_slices(weight, layout))
    close = {"rtol": 1e-4, "atol": 1e-4 * samples**0.5}
    torch.testing.assert_close(ours, theirs, **close)
    g = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), **close
    )


@pytest.mark.parametrize("call", ["product", "transposed", "sampled"])
def test_operators_keep_torchs_contract(call) -> None:
    layout = Layout(64, 96, 16, random(4, 6, 0.4))
    x, g = torch.randn(5, 96, requires_grad=True), torch.randn(5, 64, requires_grad=True)
    weight = torch.randn(layout.weight_shape, requires_grad=True)
    args = {
        "product": (x, weight, torch.randn(64, requires_grad=True), *layout.index, 64),
        "transposed": (g, weight, *layout.index, 96),
        "sampled": (g, x, *layout.index, 16, 16),
    }[call]
    torch.library.opcheck(getattr(product._OPERATORS, call), args)


def test_compiled_whole_and_equal() -> None:
    layout = Layout(64, 96, 16, random(4, 6, 0.4))
    x, weight, bias = torch.randn(5, 96), torch.randn(layout.weight_shape), torch.randn(64)

    def loss(x, weight, bias):
        return block_sparse_linear(x, weight, layout, bias).relu().square().sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        value = f(*leaves)
        value.backward()
        results.append([value, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[0], results[1])


def test_autocast_decides_the_dtype() -> None:
    layout = layout_of("random", "whole")
    x, weight = torch.randn(3, 8), torch.randn(layout.weight_shape, requires_grad=True)
    bias = torch.randn(12)
    with torch.autocast("cpu", torch.bfloat16):
        y = block_sparse_linear(x, weight, layout, bias)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    wanted = F.linear(x, by_slices(weight.detach(), layout), bias)
    torch.testing.assert_close(y.float(), wanted, rtol=2e-2, atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_linear(x.double(), weight.double(), layout).dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "says"),
    [
        ((3, 7), (2, 4, 4), None, ShapeError, r"input of shape \(3, 7\).*wanted: \(…, 8\)"),
        ((), (2, 4, 4), None, ShapeError, r"input of shape \(\)"),
        ((3, 8), (3, 4, 4), None, ShapeError, r"weight of shape \(3, 4, 4\)"),
        ((3, 8), (2, 4, 4), (8,), ShapeError, r"bias of shape \(8,\).*wanted: \(12,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, weight, bias, error, says) -> None:
    layout = Layout(12, 8, 4, [[1, 0], [0, 0], [0, 1]])
    given = None if bias is None else torch.zeros(bias)
    with pytest.raises(error, match=f"(?s){says}"):
        block_sparse_linear(torch.zeros(x), torch.zeros(weight), layout, given)


def test_mixed_dtypes_are_refused() -> None:
    layout = Layout(12, 8, 4, [[1, 0], [0, 0], [0, 1]])
    with pytest.raises(LearnablesError, match=r"float64 on cpu, torch.float32 on cpu"):
        block_sparse_linear(torch.zeros(3, 8).double(), torch.zeros(2, 4, 4), layout)


def test_a_call_without_a_graph_gives_what_one_with_a_graph_gives(by) -> None:
    layout = layout_of("random", "ragged")
    x, weight, bias = three(layout, samples=5)
    recorded = block_sparse_linear(x, weight, layout, bias)
    with torch.no_grad():
        bare = block_sparse_linear(x, weight, layout, bias)
    assert recorded.grad_fn is not None
    assert bare.grad_fn is None
    assert torch.equal(recorded, bare)


def test_tensors_without_memory_are_never_pointed_at(by) -> None:
    layout = layout_of("random", "whole")
    shape, index = layout.weight_shape, layout.index  # real, from before
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = torch.randn(2, 3, 8), torch.randn(shape, requires_grad=True)
        y = block_sparse_linear(x, weight, layout)
        assert isinstance(y, FakeTensor)
        assert y.shape == (2, 3, 12)
    assert layout.index is index
    x, weight = torch.randn(3, 8, device="meta"), torch.randn(layout.weight_shape, device="meta")
    y = block_sparse_linear(x, weight, layout)
    assert (y.device.type, y.shape) == ("meta", (3, 12))


def test_a_map_over_inputs_and_gradients_in_batches_give_what_a_loop_gives(by) -> None:
    layout = layout_of("random", "whole")
    x, weight = torch.randn(3, 8), torch.randn(layout.weight_shape)
    xs = torch.randn(4, 3, 8)
    mapped = torch.func.vmap(lambda x: block_sparse_linear(x, weight, layout))(xs)
    torch.testing.assert_close(mapped, block_sparse_linear(xs, weight, layout))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y, gs = block_sparse_linear(x, weight, layout), torch.randn(4, 3, 12)
    together = torch.autograd.grad(y, leaves, gs, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in gs]
    for ours, theirs in zip(together, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_through_a_checkpoint(reentrant, by) -> None:
    layout = layout_of("random", "ragged")
    leaves = three(layout, samples=5)

    def run(x, weight, bias):
        return block_sparse_linear(x, weight, layout, bias).tanh()

    wanted = torch.autograd.grad(run(*leaves).sum(), leaves)
    checkpoint(run, *leaves, use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip(leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("recorded", [True, False])
def test_tangents_are_refused_and_never_lost(recorded) -> None:
    layout = layout_of("random", "whole")
    x, weight = torch.randn(3, 8), torch.randn(layout.weight_shape, requires_grad=recorded)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        block_sparse_linear(forward_ad.make_dual(x, x), weight, layout)
