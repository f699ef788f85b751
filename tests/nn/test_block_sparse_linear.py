import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from tests.gloo import one_process_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import learnables as ln
from learnables._native import block_sparse as native
from learnables.errors import CheckpointError, LayoutError, ShapeError
from learnables.sparse import kernels

INDEX = ("row_starts", "columns", "column_starts", "rows", "order")


def a_layer(**options):
    return ln.nn.BlockSparseLinear(48, 40, **{"block": 16, "density": 0.4, **options})


def same(one, other):
    assert one.layout == other.layout
    for name in (*INDEX, "weight", "bias"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    x = torch.randn(3, 48, dtype=one.weight.dtype)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("mask", [None, "random", "banded", "butterfly", "2:4"])
@pytest.mark.parametrize("block", [8, 16, (16, 8), (40, 48)])
def test_is_the_linear_layer_of_its_dense_matrix(mask, block) -> None:
    layer = ln.nn.BlockSparseLinear(48, 40, block=block, density=0.4, mask=mask)
    x = torch.randn(2, 5, 48, requires_grad=True)
    layer(x).add_(1.0)  # the output is nobody's view
    wanted = F.linear(x, layer.dense(), layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    leaves, g = (x, layer.weight, layer.bias), torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(y, leaves, g) for y in (layer(x), wanted))
    torch.testing.assert_close(ours, theirs)


def test_one_tenth_of_the_blocks_is_one_tenth_of_the_parameters() -> None:
    layer = ln.nn.BlockSparseLinear(640, 640, block=64, density=0.1, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 0.1 * 640 * 640
    assert layer.density == pytest.approx(0.1)
    assert "density=0.1" in repr(layer)


def test_is_known_as_a_matrix_that_decays() -> None:
    inventory = ln.inventory(nn.Sequential(a_layer()))
    assert inventory["0.weight"].kind.name == "matrix"
    assert inventory["0.weight"].weight_decay is True
    assert inventory["0.bias"].weight_decay is False


def test_initial_scale_is_that_of_the_real_fan_in() -> None:
    layer = ln.nn.BlockSparseLinear(512, 512, block=32, density=0.125, bias=False)
    linear = nn.Linear(64, 512)
    assert layer.weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)


def test_every_optimizer_and_clipping_take_it() -> None:
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adadelta", "Rprop"):
        layer, x = a_layer(), torch.randn(8, 48)
        optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.01)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (layer(x) - 1).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], name


def test_what_reaches_over_the_edge_stays_zero_in_training() -> None:
    layer = ln.nn.BlockSparseLinear(43, 37, block=16, density=0.7)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 43)).square().sum().backward()
        optimizer.step()
    assert layer.weight[~layer.layout.edge_mask].eq(0).all()
    assert layer.weight[layer.layout.edge_mask].ne(0).all()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_whole_and_apart(copied) -> None:
    layer = a_layer()
    other = copied(layer)
    same(layer, other)
    other.load_state_dict(a_layer(mask="banded").state_dict())
    assert other.layout != layer.layout
    same(layer, copied(layer))


@pytest.mark.parametrize("through", ["dict", "torch.save", "safetensors"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("density", [0.4, 0.8])
def test_a_checkpoint_brings_its_blocks(through, assign, density) -> None:
    saved, layer = a_layer(density=density), a_layer(density=0.4)
    state = saved.state_dict()
    assert set(state) == {"weight", "bias", "row_starts", "columns"}
    if through == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    if through == "safetensors":
        state = safetensors.torch.load(safetensors.torch.save(state))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.zeros(1, 48))  # so that the old index has been read
    layer.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
    same(saved, layer)
    if not assign:
        assert optimizer.param_groups[0]["params"][0] is layer.weight


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("columns", lambda t: t + 3),
        ("columns", lambda t: -t),
        ("columns", lambda t: t.flip(0)),
        ("columns", lambda t: t[:-1]),
        ("columns", lambda t: t.float()),
        ("row_starts", lambda t: t * 2),
        ("row_starts", lambda t: t[:-1]),
        ("weight", lambda t: t[:-1]),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(name, damage) -> None:
    model = nn.Sequential(a_layer(mask=torch.ones(3, 3)))
    before = copy.deepcopy(model)
    state = a_layer(mask=torch.ones(3, 3)).state_dict()
    state = {f"0.{key}": damage(t) if key == name else t for key, t in state.items()}
    with pytest.raises(CheckpointError, match=r"where: 0\."):
        model.load_state_dict(state)
    same(model[0], before[0])


def test_an_index_overwritten_in_place_is_refused_by_forward() -> None:
    layer = a_layer()
    layer(torch.zeros(1, 48))
    layer.columns[0] = 10**6
    with pytest.raises(LayoutError, match=r"columns from \d to 1000000"):
        layer(torch.zeros(1, 48))


def test_built_on_meta_it_keeps_its_blocks() -> None:
    with torch.device("meta"):
        layer = a_layer(generator=torch.Generator().manual_seed(1))
    assert {p.device.type for p in (*layer.parameters(), *layer.buffers())} == {"meta"}
    blocks = layer.layout
    model = nn.Sequential(layer).to_empty(device="cpu")
    ln.init.reset_(model)
    assert layer.layout == blocks
    torch.testing.assert_close(
        layer(torch.eye(48)), F.linear(torch.eye(48), layer.dense(), layer.bias)
    )
    with torch.device("meta"):
        other = a_layer()
    other.load_state_dict(layer.state_dict(), assign=True)
    same(layer, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moves_to_other_dtypes(dtype) -> None:
    layer = a_layer().to(dtype)
    assert layer.columns.dtype == torch.int64
    x = torch.randn(40, 48).to(dtype)
    wanted = F.linear(x.double(), layer.dense().double(), layer.bias.double())
    tolerance = 8 * torch.finfo(dtype).eps
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype


def test_compiles_whole() -> None:
    model = nn.Sequential(a_layer(), nn.GELU(), ln.nn.BlockSparseLinear(40, 8, block=8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 48)
    for f in (model, compiled):
        f(x).sum().backward()
    torch.testing.assert_close(compiled(x), model(x))
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], 2 * p.grad)


def test_exported_it_is_one_operation() -> None:
    layer, x = a_layer(), torch.randn(5, 48)
    exported = torch.export.export(layer, (x,))
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert calls.count("learnables.block_sparse_product.default") == 1
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_ddp_and_fsdp2_train_it_as_one_process_does() -> None:
    x = torch.randn(8, 48)

    def train(model, layer):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        weight = layer.weight
        return weight.full_tensor() if hasattr(weight, "full_tensor") else weight

    plain = a_layer()
    wrapped, sharded = copy.deepcopy(plain), copy.deepcopy(plain)
    wanted = train(plain, plain)
    with one_process_group():
        torch.testing.assert_close(
            train(nn.parallel.DistributedDataParallel(wrapped), wrapped), wanted
        )
        fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(train(sharded, sharded), wanted)


def test_from_dense_keeps_the_largest_blocks_or_the_given_ones() -> None:
    linear = nn.Linear(48, 40)
    layer = ln.nn.BlockSparseLinear.from_dense(linear, block=16, keep=0.5)
    norms = F.pad(linear.weight, (0, 0, 0, 8)).view(3, 16, 3, 16).square().sum((1, 3))
    kept = layer.layout.mask
    assert kept.sum() == round(0.5 * 9)
    assert norms[kept].min() >= norms[~kept].max()
    element = kept.repeat_interleave(16, 0)[:40].repeat_interleave(16, 1)
    torch.testing.assert_close(layer.dense(), linear.weight * element)
    assert torch.equal(layer.bias, linear.bias)
    given = ln.nn.BlockSparseLinear.from_dense(linear.weight, 16, torch.eye(3))
    assert given.bias is None
    assert torch.equal(given.layout.mask, torch.eye(3).bool())


def test_to_and_from_torchs_bsr() -> None:
    layer = ln.nn.BlockSparseLinear(48, 32, block=(16, 8), density=0.4)
    bsr = layer.to_bsr()
    assert torch.equal(bsr.to_dense(), layer.dense())
    assert bsr.values().data_ptr() == layer.weight.data_ptr()
    back = ln.nn.BlockSparseLinear.from_bsr(bsr, layer.bias)
    same_x = torch.randn(2, 48)
    assert torch.equal(back(same_x), layer(same_x))
    whole = torch.sparse_bsr_tensor(
        bsr.crow_indices().int(), bsr.col_indices().int(), bsr.values(), size=(32, 48)
    )
    assert ln.nn.BlockSparseLinear.from_bsr(whole).layout == layer.layout
    with pytest.raises(ShapeError, match="whole blocks only"):
        a_layer().to_bsr()
    with pytest.raises(ShapeError, match="strided"):
        ln.nn.BlockSparseLinear.from_bsr(torch.eye(4))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"density": 0}, LayoutError, "density=0.*0 < density ≤ 1"),
        ({"density": 1.1}, LayoutError, "density=1.1"),
        ({"block": 64}, LayoutError, r"larger than the matrix.*block=\(40, 48\)"),
        ({"mask": torch.ones(3, 4)}, ShapeError, r"\(3, 4\).*wanted: \(3, 3\)"),
        ({"mask": torch.full((3, 3), float("nan"))}, LayoutError, "9 NaN"),
        ({"mask": "4:2"}, LayoutError, "mask='4:2'.*'random', 'banded', 'butterfly', '2:4'"),
    ],
)
def test_bad_input_is_refused(options, error, says) -> None:
    with pytest.raises(error, match=f"(?s){says}"):
        a_layer(**options)


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (torch.full((3, 3), float("nan")), LayoutError, "9 NaN"),
        (torch.ones(3, 4), ShapeError, r"mask of shape \(3, 4\).*wanted: \(3, 3\)"),
        (torch.ones(9), ShapeError, r"mask of shape \(9,\)"),
    ],
)
def test_a_bad_mask_cannot_rewire_and_changes_nothing(mask, error, says) -> None:
    layer = a_layer()
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 48)).sum().backward()
    optimizer.step()
    before, state = copy.deepcopy(layer), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=f"(?s){says}"):
        layer.rewire(mask, optimizer)
    same(layer, before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["column_starts", "rows", "order"])
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("in_range", [False, True])
def test_index_tensors_by_columns_that_were_overwritten_are_refused(
    name, backend, in_range, monkeypatch
) -> None:
    if backend == "native" and not native.available()[0]:
        pytest.skip(native.available()[1])
    monkeypatch.setenv(kernels.FORCE, backend)
    layer, x = a_layer(), torch.randn(9, 48, requires_grad=True)
    layer(x).sum().backward()
    part = getattr(layer, name)
    part[1] = (part[1] + 1) % (part.max() + 1) if in_range else 10**6
    with pytest.raises(LayoutError, match=name):
        layer(x).sum().backward()
    layer.load_state_dict(layer.state_dict())
    layer(x).sum().backward()


def test_input_of_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"(?s)input of shape \(2, 47\).*wanted: \(…, 48\)"):
        a_layer()(torch.zeros(2, 47))
    with pytest.raises(ShapeError, match="made from a matrix"):
        ln.nn.BlockSparseLinear.from_dense(torch.zeros(2, 3, 4))
