"""The fast way to round, on bits, is held to a slow one on numbers, optimizer by optimizer."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.gloo import spawn
from torch import nn

import learnables as ln
from learnables.errors import PolicyError
from learnables.policy import rounding as module
from learnables.policy.rounding import _FORMAT, _noise, _round_stochastically_, _stochastic

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MODES = ("kahan", "stochastic", "master")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "AdamW for": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=1e-3),
}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gamma = nn.Parameter(torch.ones(6, dtype=dtype))
        self.mix = nn.Parameter(torch.randn(6, 5, generator=g).to(dtype))
        self.turned = nn.Parameter(torch.randn(4, 6, generator=g).to(dtype).t())
        self.idle = nn.Parameter(torch.ones(3, dtype=dtype))
        self.wide = nn.Parameter(torch.ones(5))  # stays in float32

    def feed(self, step: int) -> None:
        """Gradients that do not depend on the value."""
        g = torch.Generator().manual_seed(step)
        for name, p in self.named_parameters():
            if name != "idle":
                value = torch.empty_like(p, dtype=p.grad_dtype)
                p.grad = value.copy_(0.3 + torch.randn(p.shape, generator=g))


def carried_by_hand(make, steps: int) -> list[torch.Tensor]:
    """Slow twin of carrying without loss: all in float32, given the same bfloat16 gradients."""
    source, twin = Net(), Net(FP32)
    for p, q in zip(source.parameters(), twin.parameters(), strict=True):
        q.data.copy_(p.data)
    optimizer = make(list(twin.parameters()))
    for step in range(steps):
        source.feed(step)
        for p, q in zip(source.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
    return [q.detach() for q in twin.parameters()]


@pytest.mark.parametrize("mode", ["kahan", "master"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nothing_is_lost_with_any_optimizer(make, mode) -> None:
    model = Net()
    optimizer = make(list(model.parameters()))
    handle = ln.attach(model, optimizer, rounding=mode, state_dtype=FP32)
    for step in range(12):
        model.feed(step)
        optimizer.step()
    full = handle.full_precision()
    for (name, p), wanted in zip(model.named_parameters(), carried_by_hand(make, 12), strict=True):
        if name == "wide":
            torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=0)
        elif name in full:
            torch.testing.assert_close(full[name], wanted, rtol=0, atol=0)
            away = (p.detach().float() - wanted).abs()
            assert (away <= wanted.abs() * 2**-8).all()
    assert "wide" not in full


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_stochastic_rounding_is_that_of_a_float32_step(make) -> None:
    """Slow twin: each step in float32 from the rounded value, rounded by numbers, not by bits."""
    model, twin = Net(), Net(FP32)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.data.copy_(p.data)
    optimizer, plain = make(list(model.parameters())), make(list(twin.parameters()))
    ln.attach(model, optimizer, rounding="stochastic", state_dtype=FP32)
    for step in range(6):
        model.feed(step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        plain.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            value, exact = p.detach().float(), q.detach()
            unit = torch.ldexp(torch.ones(exact.shape), torch.frexp(exact).exponent - 8)
            assert ((value - exact).abs() < unit).all() or q is twin.wide  # a neighbour
            q.data.copy_(value)


@given(
    x=st.floats(-3.0, 3.0, width=32, allow_subnormal=False),
    dtype=st.sampled_from([BF16, FP16, torch.float8_e4m3fn, torch.float8_e5m2]),
    seed=st.integers(0, 2**31),
)
def test_the_mean_of_what_is_rounded_is_the_number(x, dtype, seed) -> None:
    n = 4096
    xs = torch.full((n,), x)
    (noise,) = _noise([xs], seed)
    if dtype is BF16:
        out = torch.empty(n, dtype=BF16)
        _round_stochastically_([out], [xs.clone()], seed)
    else:
        out = _stochastic(xs, noise, dtype)
    mantissa, smallest = _FORMAT.get(dtype, (7, -126))
    power = torch.frexp(torch.tensor(abs(x))).exponent.item() - 1
    unit = 2.0 ** (max(power, smallest) - mantissa)
    values = out.double()
    assert ((values - x).abs() < unit).all()  # one of the two neighbours
    assert len(values.unique()) <= 2
    assert abs(float(values.mean()) - x) <= 6 * unit / 2 / n**0.5  # six standard deviations


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_that_fit_stay_and_those_that_are_none_stay_none(dtype) -> None:
    bits = 8 if dtype.itemsize == 1 else 16
    kind = torch.uint8 if bits == 8 else torch.int16
    every = torch.arange(2**bits).to(torch.int32).to(kind).view(dtype).float()
    (noise,) = _noise([every], 3)
    if dtype is BF16:
        out = torch.empty_like(every, dtype=BF16)
        _round_stochastically_([out], [every.clone()], 3)
    else:
        out = _stochastic(every, noise, dtype)
    torch.testing.assert_close(out.float(), every, rtol=0, atol=0, equal_nan=True)


@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_upper_and_lower_half_are_the_float32_whatever_its_bits(bits) -> None:
    wide = torch.tensor(bits, dtype=torch.int32).view(FP32)
    p = nn.Parameter(torch.zeros(len(bits), dtype=BF16))
    one = module.Rounded("p", p, "kahan", values=wide.clone())
    with torch.no_grad():
        module._write_kahan([one], spoil=False)
        # To nearest, ties away from zero: half a unit off at most.
        near = p.float()
        assert (near.isnan() == wide.isnan()).all()
        one.values = torch.empty_like(wide)
        module._read_kahan([one])
    wanted = torch.where(near == 0, 0.0, wide)  # below 2^-134 nothing is carried
    torch.testing.assert_close(one.values, wanted, rtol=0, atol=0, equal_nan=True)
    finite = wide.isfinite() & near.isfinite()
    powers = (torch.frexp(wide[finite]).exponent - 8).clamp(min=-133)
    unit = torch.ldexp(torch.ones(powers.shape), powers)
    assert ((near[finite] - wide[finite]).abs() <= unit / 2).all()


def test_a_carry_in_another_layout_belongs_to_the_same_elements() -> None:
    # torch's own load_state_dict takes state as it lies in the file, whatever the strides are here.
    wide = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    p = nn.Parameter(torch.zeros_like(wide, dtype=BF16))
    one = module.Rounded("p", p, "kahan", values=wide.clone())
    with torch.no_grad():
        module._write_kahan([one], spoil=False)
        one.ours[module.CARRY] = one.ours[module.CARRY].contiguous()
        one.values = torch.empty_like(wide)
        module._read_kahan([one])
    assert one.values.equal(wide)


@pytest.mark.parametrize("mode", MODES)
def test_a_gamma_of_one_follows_the_float32_trajectory(mode) -> None:
    """Plain bfloat16 never moves; the figure of docs/en/precision.md."""

    def trained(dtype, rounding):
        gamma = nn.Parameter(torch.ones(256, dtype=dtype))
        model = nn.Module()
        model.gamma = gamma
        optimizer = torch.optim.AdamW([gamma], lr=1e-3)
        if rounding:
            ln.attach(model, optimizer, rounding=rounding)
        for _ in range(100):
            gamma.grad = torch.full_like(gamma, 0.5)
            optimizer.step()
        return gamma.detach().float()

    assert (trained(BF16, None) == 1).all()
    exact, ours = trained(FP32, None), trained(BF16, mode)
    assert abs(float(ours.mean() / exact.mean()) - 1) < 0.01
    assert ((ours / exact - 1).abs() < (0.1 if mode == "stochastic" else 0.01)).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state_dtype", [BF16, FP32])
def test_the_extra_bytes_are_what_is_promised(mode, state_dtype) -> None:
    def size(rounding):
        model = nn.Linear(64, 64, bias=False).to(BF16)
        optimizer = torch.optim.AdamW(model.parameters())
        if rounding:
            ln.attach(model, optimizer, rounding=rounding, state_dtype=state_dtype)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        tensors = [x for s in optimizer.state.values() for x in s.values() if hasattr(x, "nbytes")]
        return sum(x.nbytes for x in tensors) / model.weight.numel()

    wanted = {"kahan": 2, "stochastic": 0, "master": 4}[mode] + (4 if state_dtype is FP32 else 0)
    assert size(mode) - size(None) == wanted


def trainer(mode: str, dtype: torch.dtype = BF16, **options):
    torch.manual_seed(0)
    model = Net(dtype)
    groups = [
        {"params": [model.gamma, model.idle], "weight_decay": 0.0},
        {"params": [model.mix, model.turned, model.wide], "lr": 2e-3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, **options)
    handle = ln.attach(model, optimizer, rounding=mode)
    return model, optimizer, handle


def run(model, optimizer, steps) -> None:
    for step in steps:
        model.feed(step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["ours", "torch"])
def test_a_resumed_run_is_bit_equal(tmp_path, mode, dtype, way) -> None:
    model, optimizer, handle = trainer(mode, dtype)
    run(model, optimizer, range(5))
    other, theirs, loaded = trainer(mode, dtype)
    if way == "ours":
        path = ln.save_checkpoint(tmp_path / "c.safetensors", model, optimizer)
        ln.load_checkpoint(path, other, theirs)
    else:
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        other.load_state_dict(weights)
        theirs.load_state_dict(state)
    run(model, optimizer, range(5, 9))
    run(other, theirs, range(5, 9))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    wanted, got = handle.full_precision(), loaded.full_precision()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def test_attaching_after_torch_has_converted_the_state_is_refused() -> None:
    model, optimizer, _ = trainer("kahan")
    run(model, optimizer, range(2))
    other = Net()
    theirs = torch.optim.AdamW(
        [{"params": [other.gamma, other.idle]}, {"params": [other.mix, other.turned, other.wide]}]
    )
    theirs.load_state_dict(optimizer.state_dict())
    with pytest.raises(PolicyError, match=r"converted(.|\n)*where: gamma(.|\n)*before"):
        ln.attach(other, theirs, rounding="kahan")


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_the_scaler_skips_changes_nothing(mode, dtype, options) -> None:
    model, optimizer, handle = trainer(mode, dtype, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def iterate(factor: float) -> None:
        optimizer.zero_grad()
        loss = sum((p.float() * factor).sum() for p in model.parameters())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    iterate(0.25)
    before = [p.detach().clone() for p in model.parameters()]
    full = handle.full_precision()
    iterate(float("inf"))
    assert scaler.get_scale() == 2.0
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=0)
    for name, value in handle.full_precision().items():
        torch.testing.assert_close(value, full[name], rtol=0, atol=0)
    iterate(0.25)
    assert any(not torch.equal(v, full[n]) for n, v in handle.full_precision().items())


def test_float16_parameters_train_under_a_scaler_with_clipping() -> None:
    """GradScaler itself refuses: "Attempting to unscale FP16 gradients"."""
    model, optimizer, handle = trainer("kahan", FP16)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum((p.float() - 2).square().sum() for p in model.parameters())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert model.gamma.grad.dtype is FP32
    assert model.gamma.dtype is FP16
    assert (handle.full_precision()["gamma"] > 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_closure_sees_rounded_parameters_and_its_gradients_are_used(mode) -> None:
    model, optimizer, _ = trainer(mode)
    twin, plain, _ = trainer(mode)
    for m, opt in ((model, optimizer), (twin, plain)):  # one noise: of the same parameters
        m.idle.requires_grad_(False)
        ln.attach(m, opt, rounding=mode)
    for step in range(4):
        twin.feed(step)
        plain.step()

        def closure(step=step):
            assert model.gamma.dtype is BF16
            assert optimizer.param_groups[0]["params"][0] is model.gamma
            optimizer.zero_grad()
            model.feed(step)
            return torch.zeros(())

        optimizer.step(closure)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_lbfgs_finds_a_minimum_that_plain_bfloat16_misses() -> None:
    wanted = torch.tensor([1.003, -0.777, 0.1234])

    def solved(rounding):
        model = nn.Module()
        model.x = nn.Parameter(torch.ones(3, dtype=BF16))
        optimizer = torch.optim.LBFGS([model.x], line_search_fn="strong_wolfe")
        handle = ln.attach(model, optimizer, rounding=rounding)

        def closure():
            optimizer.zero_grad()
            loss = (model.x.float() - wanted).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return model.x.detach().float(), handle

    found, _ = solved("kahan")
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("mode", ["kahan", "master"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_somebody_writes_into_the_parameter_counts(mode, dtype) -> None:
    """Loading, a projection, a mask: the carried error of the old value does not come back."""
    model, optimizer, handle = trainer(mode, dtype)
    run(model, optimizer, range(3))
    with torch.no_grad():
        model.mix.zero_()
        model.gamma.data.fill_(3.0)
    full = handle.full_precision()
    assert full["mix"].abs().max() < 1e-30
    torch.testing.assert_close(full["gamma"], torch.full((6,), 3.0), rtol=2**-8, atol=0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert (model.mix == 0).all()
    assert (model.gamma == 3).all()


def test_a_step_that_raises_leaves_all_as_it_was() -> None:
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    model = Net()
    optimizer = Failing(model.parameters(), lr=0.1, momentum=0.9)
    handle = ln.attach(model, optimizer, rounding="kahan")
    run(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.fails = True
    model.feed(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fails = False
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert optimizer.param_groups[0]["params"][0] is model.gamma
    optimizer.step()
    handle.remove()
    assert all(
        p is q for p, q in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
def test_empty_and_0_dim_parameters_and_those_with_gaps_are_stepped(mode) -> None:
    model = nn.Module()
    model.empty = nn.Parameter(torch.empty(0, 3, dtype=BF16))
    model.scalar = nn.Parameter(torch.tensor(1.0, dtype=BF16))
    model.gaps = nn.Parameter(torch.ones(4, 6, dtype=BF16)[:, ::2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ln.attach(model, optimizer, rounding=mode)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(model.scalar.float().item(), 0.7, rtol=0.03, atol=0)
    torch.testing.assert_close(
        model.gaps.detach().float(), torch.full((4, 3), 0.7), rtol=0.03, atol=0
    )
    assert (model.gaps._base is None) or (model.gaps._base[:, 1::2] == 1).all()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_gradients_of_an_embedding_are_taken(make) -> None:
    table = nn.Embedding(10, 4, sparse=True).to(BF16)
    nn.init.ones_(table.weight)
    optimizer = make(table.parameters(), lr=1e-3)
    handle = ln.attach(table, optimizer, rounding="kahan")
    for _ in range(4):
        optimizer.zero_grad()
        table(torch.tensor([1, 3])).float().sum().backward()
        optimizer.step()
    full = handle.full_precision()["weight"]
    assert (full[[1, 3]] < 1 - 1e-3).all()
    assert (full[[0, 2, 4, 5, 6, 7, 8, 9]] == 1).all()


def test_declared_rounding_counts_before_that_of_the_call() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = ln.parameter(4, dtype=BF16, rounding="master")
            self.b = ln.parameter(4, dtype=BF16)

    model = Two()
    ln.annotate(model, "b", rounding="stochastic")
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=0.1))
    handle = ln.attach(model, optimizer)
    modes = {one.name: one.mode for one in handle.rounded.values()}
    assert modes == {"a": "master", "b": "stochastic"}
    with pytest.raises(PolicyError, match="rounding has a value"):
        ln.annotate(model, "b", rounding="up")
    with pytest.raises(PolicyError, match="no such rounding"):
        ln.attach(model, optimizer, rounding="up")
    with pytest.raises(PolicyError, match="state of an optimizer"):
        ln.attach(model, optimizer, rounding="kahan", state_dtype=FP16)


def test_decay_toward_the_initial_value_is_not_lost_in_bfloat16() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = ln.parameter(torch.ones(4), dtype=BF16, weight_decay="init")

    model = One()
    optimizer = torch.optim.SGD(ln.param_groups(model, lr=1e-3, weight_decay=1.0))
    handle = ln.attach(model, optimizer, rounding="kahan")
    with torch.no_grad():
        model.a.fill_(2.0)
    for _ in range(10):
        model.a.grad = torch.zeros_like(model.a)
        optimizer.step()
    wanted = 1 + (1 - 1e-3) ** 10
    torch.testing.assert_close(handle.full_precision()["a"], torch.full((4,), wanted))


def test_hooks_of_others_see_parameters_and_not_their_copies() -> None:
    """Whenever they were registered; their own changes to the arguments are kept."""
    model, optimizer, _ = trainer("kahan")
    own = [model.gamma, model.idle, model.mix, model.turned, model.wide]
    seen = []

    def look(stepped, *_):
        held = [p for group in stepped.param_groups for p in group["params"]]
        seen.append(all(p is q for p, q in zip(held, own, strict=True)))

    def swap_closure(stepped, args, kwargs):
        return args, {**kwargs, "closure": lambda: torch.full((), 7.0)}

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_pre_hook(swap_closure)
    optimizer.register_step_post_hook(look)
    for step in range(3):
        model.feed(step)
        assert optimizer.step() == 7
    assert seen == [True] * 6
    assert not torch.equal(optimizer.state[model.gamma]["rounding_error"], torch.zeros(6))


def test_a_hook_that_raises_leaves_the_hooks_in_order() -> None:
    model, optimizer, _ = trainer("kahan")
    fails = [True]
    calls = []

    def failing(*_):
        if fails:
            fails.pop()
            raise RuntimeError("in a hook")

    optimizer.register_step_pre_hook(failing)
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    model.feed(0)
    with pytest.raises(RuntimeError, match="in a hook"):
        optimizer.step()
    assert optimizer.param_groups[0]["params"][0] is model.gamma
    run(model, optimizer, range(2))
    assert len(calls) == 2
    assert optimizer.state[model.gamma]["rounding_step"] == 2


@pytest.mark.parametrize("attach_first", [True, False])
def test_the_watch_sees_rates_gradients_and_updates(tmp_path, attach_first) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if attach_first:
        ln.attach(model, optimizer, rounding="kahan")
    with ln.watch(model, optimizer, every=1, to=tmp_path, budget=None) as watcher:
        if not attach_first:
            ln.attach(model, optimizer, rounding="kahan")
        run(model, optimizer, range(4))
    seen = watcher.run().observations
    assert len(seen) == 4
    for look in seen:
        used = [i for i, name in enumerate(look.names) if name != "idle"]
        assert (look.columns["lr"][used] == 1e-3).all()
        assert look.rows["gradient"].present[used].all()
        assert look.rows["update"].present[used].all()


def test_an_audit_puts_all_of_it_back_bit_for_bit() -> None:
    model, optimizer, _ = trainer("stochastic")
    run(model, optimizer, range(2))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])

    def step():
        optimizer.zero_grad()
        loss = sum((p.float() - 2).square().sum() for p in model.parameters())
        loss.backward()
        optimizer.step()
        return loss

    report = ln.audit(model, optimizer, step)
    assert "LRN401" not in report.codes
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def _replicas(rank: int) -> None:
    for mode, dtype in (("stochastic", BF16), ("kahan", FP16)):
        _replicas_agree(rank, mode, dtype)


def _replicas_agree(rank: int, mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(rank)
    model = nn.Linear(8, 8).to(dtype)
    model.gamma = ln.parameter(torch.ones(8), dtype=dtype)
    forward = model.forward
    model.forward = lambda x: forward(x) * model.gamma
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    ln.attach(ddp, optimizer, rounding=mode)
    torch.randn(rank + 1)  # ranks draw differently
    for _ in range(4):
        optimizer.zero_grad()
        ddp(torch.ones(2, 8, dtype=dtype) * (rank + 1)).float().square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.gamma, torch.ones_like(model.gamma))
    for p in model.parameters():
        gathered = [torch.empty_like(p) for _ in range(2)]
        torch.distributed.all_gather(gathered, p.detach())
        torch.testing.assert_close(gathered[0], gathered[1], rtol=0, atol=0)


def test_replicas_stay_equal_under_ddp() -> None:
    spawn(_replicas, 2)


def _sharded(rank: int, folder: str) -> None:
    for mode in MODES:
        _shards_agree(mode, f"{folder}/{mode}.safetensors")


def _shards_agree(mode: str, path: str) -> None:
    from torch.distributed.fsdp import fully_shard

    def built(shard: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 2)).to(BF16)
        if shard:
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer, ln.attach(model, optimizer, rounding=mode, state_dtype=FP32)

    def train(model, optimizer, steps) -> None:
        for step in steps:
            optimizer.zero_grad()
            g = torch.Generator().manual_seed(step)
            model(torch.randn(4, 8, generator=g).to(BF16)).float().square().sum().backward()
            optimizer.step()

    model, optimizer, handle = built(shard=True)
    whole, plain, reference = built(shard=False)
    train(model, optimizer, range(4))
    train(whole, plain, range(4))
    if mode != "stochastic":
        for name, value in handle.full_precision().items():
            wanted = reference.full_precision()[name]
            torch.testing.assert_close(value.full_tensor(), wanted, rtol=1e-3, atol=1e-4)
    ln.save_checkpoint(path, model, optimizer)
    torch.distributed.barrier()
    other, theirs, _ = built(shard=True)
    ln.load_checkpoint(path, other, theirs)
    train(model, optimizer, range(4, 7))
    train(other, theirs, range(4, 7))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.to_local(), q.to_local(), rtol=0, atol=0)


def test_shards_are_rounded_and_resumed_under_fsdp2(tmp_path) -> None:
    spawn(_sharded, 2, str(tmp_path))
