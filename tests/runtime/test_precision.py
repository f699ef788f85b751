"""The map of promotions is held to what the dtypes of the activations really are."""

import copy
import pickle
import threading

import pytest
import torch
from tests.handwritten import HandwrittenViT
from torch import nn

import learnables as ln
from learnables.errors import PolicyError
from learnables.models.vit import ViT, ViTConfig

BF16 = torch.bfloat16


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of all distinct memory that autograd keeps for the backward, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", BF16):
            y = model(x)
        total = sum(kept.values())
        del y
    return total


def looked_at(model: nn.Module, x: torch.Tensor):
    with ln.promotions(model) as seen, torch.autocast("cpu", BF16):
        y = model(x)
    return seen, y


def test_each_promoting_parameter_of_a_vit_is_named_and_typing_the_mend_leaves_none() -> None:
    torch.manual_seed(0)
    model, x = HandwrittenViT(dropout=0.1), torch.randn(32, 3, 32, 32)
    seen, _ = looked_at(model, x)
    gammas = [f"blocks.{i}.gamma{j}" for i in range(6) for j in (1, 2)]
    # The class token makes the stream float32; the position is added to what is float32 by then.
    assert set(seen.parameters) == {"cls_token", *gammas}
    assert {p.op for p in seen.found} == {"cat", "mul"}
    assert all("handwritten.py" in p.location for p in seen.found)
    before = saved_bytes(model, x)
    for _ in range(3):  # what one parameter hid comes to light when it is mended
        exec(seen.mend, {"ln": ln, "model": model})  # what a reader would type
        seen, y = looked_at(model, x)
    assert seen.found == []
    assert y.dtype is BF16
    assert saved_bytes(model, x) <= 0.85 * before
    assert str(seen) == "no parameter makes an activation float32"


def test_our_own_vit_promotes_nothing() -> None:
    config = ViTConfig((32, 32), 3, 10, depth=6, layer_scale=1e-4, registers=2, qk_norm=True)
    seen, y = looked_at(ViT(config), torch.randn(2, 3, 32, 32))
    assert seen.found == []
    assert y.dtype is BF16


def test_what_is_found_is_what_hooks_on_every_module_see() -> None:
    """Slow twin: the stream between the blocks, looked at by dtype."""
    model, x = HandwrittenViT(depth=2), torch.randn(2, 3, 32, 32)
    dtypes = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    looked_at(model, x)
    ln.annotate(model, "*gamma*", compute_dtype="autocast")
    ln.annotate(model, "cls_token", compute_dtype="autocast")
    seen, _ = looked_at(model, x)
    assert seen.parameters == ("pos_embed",)
    ln.annotate(model, "pos_embed", compute_dtype="autocast")
    looked_at(model, x)
    assert dtypes == [torch.float32] * 4 + [BF16] * 2


def test_a_parameter_that_is_cast_by_hand_or_meets_float32_is_not_blamed() -> None:
    class Fine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x):
            x = x * self.gamma  # before any matrix product: float32 and float32
            return self.linear(x) * self.gamma.to(BF16)

    seen, y = looked_at(Fine(), torch.ones(2, 4))
    assert seen.found == []
    assert y.dtype is BF16


def test_promotions_without_autocast_of_an_island_in_float32_are_found_too() -> None:
    model = HandwrittenViT(depth=1).to(BF16)
    model.blocks[0].gamma1 = nn.Parameter(model.blocks[0].gamma1.detach().float())
    with pytest.raises(RuntimeError, match="dtype"), ln.promotions(model) as seen:
        model(torch.randn(1, 3, 32, 32, dtype=BF16))  # a float32 stream meets a bfloat16 norm
    assert seen.parameters == ("blocks.0.gamma1",)
    ln.annotate(model, "blocks.0.gamma1", compute_dtype=BF16)
    with ln.promotions(model) as seen:
        model(torch.randn(1, 3, 32, 32, dtype=BF16))
    assert seen.found == []
    assert model.blocks[0].gamma1.dtype is torch.float32


class Scaled(nn.Module):
    def __init__(self, compute_dtype="autocast") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gamma = ln.parameter(torch.ones(4), compute_dtype=compute_dtype)
        self.fails = False

    def forward(self, x):
        y = self.linear(x) * self.gamma
        if self.fails:
            raise RuntimeError("in the middle")
        return y


def test_the_dtype_of_autocast_is_used_inside_of_it_only_and_gradients_come_back_float32() -> None:
    model, x = Scaled(), torch.ones(2, 4)
    assert model(x).dtype is torch.float32
    for dtype in (BF16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = model(x)
        assert y.dtype is dtype
        y.float().sum().backward()
    assert model.gamma.grad.dtype is torch.float32
    assert isinstance(model.gamma, nn.Parameter)


def test_a_forward_that_raises_leaves_the_parameter_in_its_place() -> None:
    model = Scaled(BF16)
    model.fails = True
    with pytest.raises(RuntimeError, match="in the middle"):
        model(torch.ones(2, 4))
    assert isinstance(model.gamma, nn.Parameter)
    model.fails = False
    assert model(torch.ones(1, 4)).dtype is torch.float32  # float32 linear, bfloat16 gamma
    assert isinstance(model.gamma, nn.Parameter)


def test_threads_that_use_one_module_at_once_all_see_the_cast() -> None:
    """One leaves while the others are inside: what they see has to stay until the last is out."""

    class Slow(nn.Module):
        def __init__(self, gate: threading.Barrier) -> None:
            super().__init__()
            self.gamma = ln.parameter(torch.ones(4), compute_dtype=BF16)
            self.gate = gate

        def forward(self, late: bool, seen: list, learns: bool):
            self.gate.wait(10)
            if late:
                self.gate.wait(10)
            seen.append((self.gamma.dtype, self.gamma.requires_grad))
            return self.gamma.float().sum()

    gate, seen = threading.Barrier(2), []
    model = Slow(gate)

    def early() -> None:
        with torch.no_grad():
            model(False, seen, False)
        gate.wait(10)  # it is out now; the other goes on

    def late() -> None:
        model(True, seen, True).backward()

    threads = [threading.Thread(target=early), threading.Thread(target=late)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [(BF16, True)] * 2
    torch.testing.assert_close(model.gamma.grad, torch.ones(4))
    assert isinstance(model.gamma, nn.Parameter)


def test_the_cure_compiles_without_a_break() -> None:
    model = Scaled()
    compiled = torch.compile(nn.Sequential(model), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", BF16):
        y = compiled(torch.ones(2, 4))
    assert y.dtype is BF16
    y.float().sum().backward()
    assert model.gamma.grad is not None
    assert compiled(torch.ones(2, 4)).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_parameter_in_eight_bits_trains(dtype) -> None:
    torch.manual_seed(0)
    wanted = torch.tensor([0.3, -1.7, 0.02, 5.0])

    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = ln.parameter(
                torch.ones(4), dtype=dtype, compute_dtype=torch.float32, rounding="kahan"
            )

        def forward(self):
            return (self.w - wanted).square().sum()

    model = copy.deepcopy(Eight())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    handle = ln.attach(model, optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    assert model.w.dtype is dtype
    assert model.w.grad.dtype is torch.float32
    # The nearest of the few numbers there are, or its neighbour: it swings around the minimum.
    unit = 2.0 ** -(3 if dtype is torch.float8_e4m3fn else 2)
    torch.testing.assert_close(model.w.detach().float(), wanted, rtol=unit, atol=2**-9)
    assert list(handle.full_precision()) == ["w"]


def test_a_copy_in_eight_bits_gets_its_gradient_in_float32_without_attach() -> None:
    class Eight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = ln.parameter(
                torch.ones(4), dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
            )

        def forward(self, x):
            return (self.w * x).sum()

    made = copy.deepcopy(Eight())
    x = torch.tensor([1.001, 1000.0, 3.0, 1e-6])  # 8 bits have none of these
    made(x).backward()
    torch.testing.assert_close(made.w.grad, x, rtol=0, atol=0)


def island() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Scaled())
    with torch.no_grad():
        model[1].gamma.copy_(1 + 1e-4 * torch.randn(4))  # bfloat16 would make 1 of it
    ln.annotate(model, "1.gamma", storage_dtype=torch.float32)
    return model


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(BF16),
        lambda m: m.to(torch.float64),
        lambda m: m.bfloat16().float(),
        lambda m: copy.deepcopy(m).bfloat16(),
        lambda m: pickle.loads(pickle.dumps(m)).bfloat16(),
        lambda m: m.apply(lambda part: part.bfloat16()),
        lambda m: m.bfloat16().requires_grad_(True),
    ],
)
def test_an_island_keeps_dtype_and_value_whatever_the_model_is_converted_to(convert) -> None:
    model = island()
    model[1].gamma.grad = torch.full((4,), 1 / 3)
    wanted = model[1].gamma.detach().clone()
    made = convert(model)
    assert made[1].gamma.dtype is torch.float32
    torch.testing.assert_close(made[1].gamma.detach(), wanted, rtol=0, atol=0)
    if made is model:
        torch.testing.assert_close(model[1].gamma.grad, torch.full((4,), 1 / 3), rtol=0, atol=0)
    assert isinstance(made[1].gamma, nn.Parameter)
    assert made[1].gamma.requires_grad


def test_an_island_survives_meta_and_loading_with_assign() -> None:
    model = island()
    state = {name: value.to(BF16) for name, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    assert model[1].gamma.dtype is torch.float32
    model.load_state_dict(state, assign=True)
    assert model[1].gamma.dtype is torch.float32
    assert model[0].weight.dtype is BF16


def test_an_annotation_converts_at_once_and_two_dtypes_in_one_line_are_refused() -> None:
    model = Scaled().to(BF16)
    ln.annotate(model, "gamma", storage_dtype=torch.float32)
    assert model.gamma.dtype is torch.float32
    assert ln.parameter(3, storage_dtype=BF16).dtype is BF16
    with pytest.raises(PolicyError, match="kept in another"):
        ln.parameter(3, dtype=BF16, storage_dtype=torch.float32)
    with pytest.raises(PolicyError, match="storage_dtype has a value"):
        ln.annotate(model, "gamma", storage_dtype=torch.int8)
