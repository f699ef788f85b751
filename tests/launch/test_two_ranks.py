"""What holds in a group of two real processes; each check runs on both, and both must pass."""

import sys

import pytest
import torch
import torch.distributed as dist
from tests.launch.session import outcomes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import learnables as ln
from learnables._torch import local
from learnables.errors import AuditFailed, LearnablesError
from learnables.runtime.checkpoint import read_checkpoint
from learnables.watching import Run


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, width=8, blocks=2):
        super().__init__()
        self.token = ln.parameter(1, 5, width, init=ln.init.normal(0.5))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        x = x + self.token
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def adam(model):
    return torch.optim.AdamW(ln.param_groups(model, lr=0.01, weight_decay=0.1))


def built(seed=0, **sizes):
    torch.manual_seed(seed)
    return Net(**sizes)


def loss_of(model, seed=0, batch=8, width=8):
    rows = slice(dist.get_rank() * batch // 2, (dist.get_rank() + 1) * batch // 2)
    x = torch.randn(batch, 5, width, generator=torch.Generator().manual_seed(seed))
    return model(x[rows]).square().mean()


def train(model, optimizer, seeds, **sizes):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed, **sizes).backward()
        optimizer.step()


def wholes(model):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


# --- bad input: every rank says who is different, and none of them hangs --------------------------


def rank_with_another_shape_is_named_with_the_parameter(folder):
    model = built(blocks=3 if dist.get_rank() == 1 else 2)
    for strategy in ("ddp", "fsdp2"):
        with pytest.raises(LearnablesError, match="different models") as caught:
            ln.prepare(model, adam, strategy)
        assert caught.value.where == "blocks.2.up.weight, rank 1"
        assert "nothing on the other ranks" in caught.value.found


def rank_with_another_dtype_or_tie_is_named(folder):
    model = built()
    if dist.get_rank() == 1:
        model.scale.data = model.scale.data.double()
    with pytest.raises(LearnablesError, match=r"scale, rank 1[\s\S]*float64 on rank 1"):
        ln.prepare(model, adam, "fsdp2")
    model = built()
    if dist.get_rank() == 0:
        ln.tie(model, "blocks.1.up.weight", "blocks.0.up.weight")
    with pytest.raises(LearnablesError, match=r"different models[\s\S]*blocks\.0\.up\.weight"):
        ln.prepare(model, adam, "fsdp2")


def rank_with_another_seed_is_named_or_takes_the_values_of_rank_0(folder):
    model = built(seed=dist.get_rank())
    with pytest.raises(LearnablesError, match="start from different values") as caught:
        ln.prepare(model, adam, "fsdp2")
    assert caught.value.where == "token, rank 1"
    assert "torch.manual_seed" in caught.value.mend
    same, *_ = ln.prepare(model, adam, "fsdp2", values="rank 0")
    wanted = [x.detach().reshape(x.shape or (1,)) for x in built(seed=0).parameters()]
    torch.testing.assert_close(wholes(same), wanted, rtol=0, atol=0)


def optimizer_of_before_is_refused_on_every_rank(folder):
    model = built()
    early = adam(model)
    with pytest.raises(AuditFailed, match="LRN904"):
        ln.prepare(model, lambda _: early, "fsdp2")


def parameter_used_outside_forward_is_a_finding_with_its_line(folder):
    model, optimizer, _ = ln.prepare(built(), adam, "fsdp2")

    def step():
        optimizer.zero_grad()
        loss = (torch.ones(2, 5, 8) * model.token).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    report = ln.audit(model, optimizer, step)
    finding = next(f for f in report.findings if f.code == "LRN905")
    assert finding.where == ["token"]
    assert finding.location.startswith(__file__)


def gradient_of_an_empty_shard_is_not_taken_for_cleared(folder):
    model, optimizer, _ = ln.prepare(built(), adam, "fsdp2")
    assert dist.get_rank() == 0 or model.scale.to_local().numel() == 0

    def step(clear=False):
        optimizer.zero_grad()
        for seed in range(2):
            if clear:
                for p in model.parameters():
                    p.grad = None if p.grad is None else torch.zeros_like(p.grad)
            loss = loss_of(model, seed) / 2
            loss.backward()
        optimizer.step()
        return loss

    assert ln.audit(model, optimizer, step).findings == []
    found = ln.audit(model, optimizer, lambda: step(clear=True)).findings
    assert {f.code for f in found} == {"LRN405"}
    assert sorted(name for f in found for name in f.where) == sorted(dict(model.named_parameters()))


# --- shards ---------------------------------------------------------------------------------------


def token_is_cut_where_no_rank_gets_padding(folder):
    model, *_ = ln.prepare(built(), adam, "fsdp2")
    assert tuple(model.token.to_local().shape) == (1, 5, 4)
    for name, p in model.named_parameters():
        assert name == "scale" or p.to_local().numel() * 2 == p.numel()
    assert tuple(model.scale.shape) == (1,)


def modules_of_a_list_are_gathered_one_at_a_time(folder):
    model, *_ = ln.prepare(built(), adam, "fsdp2")
    with CommDebugMode() as comm:
        loss_of(model).backward()
    gathers = [n for op, n in comm.get_comm_counts().items() if "gather" in str(op)]
    assert sum(gathers) == 3 + 2  # root and two blocks; the blocks again in the backward


def statistics_and_watch_cost_two_collectives_for_98_parameters(folder):
    model, optimizer, _ = ln.prepare(built(blocks=24, width=4), adam, "fsdp2")
    params = list(model.parameters())
    assert len(params) == 98
    with CommDebugMode() as naive:
        [p.norm().full_tensor().item() for p in params]
    assert naive.get_total_counts() == len(params)
    with CommDebugMode() as packed:
        ln.statistics(params)
    assert packed.get_total_counts() == 2
    watcher = ln.watch(model, optimizer, every=1, to=folder / "run", budget=None)
    with watcher:
        for seed in range(2):
            optimizer.zero_grad()
            loss_of(model, seed, width=4).backward()
            with CommDebugMode() as comm:
                optimizer.step()
            assert comm.get_total_counts() <= 2
    dist.barrier()
    assert len(Run(folder / "run").observations) == 2


# --- tensor parallel ------------------------------------------------------------------------------


class Planted(Block):
    """``idle`` is sharded too, and enters no call."""

    def __init__(self, width=8):
        super().__init__(width)
        self.idle = nn.Linear(width, width)


def tensor_parallel(model):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "idle": ColwiseParallel()}
    mesh = init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, {k: v for k, v in plan.items() if hasattr(model, k)})


def stepping(model, optimizer):
    def step(seed=0):
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def tensor_parallel_is_audited_as_one_process_is(folder):
    reports = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = tensor_parallel(Planted()) if parallel else Planted()
        optimizer = adam(model)
        reports.append(ln.audit(model, optimizer, stepping(model, optimizer)))
    whole, sharded = reports
    assert [(f.code, f.where) for f in whole.findings] == [("LRN301", ["idle.weight", "idle.bias"])]
    assert [(f.code, f.where) for f in sharded.findings] == [
        (f.code, f.where) for f in whole.findings
    ]
    for a, b in zip(whole.parameters, sharded.parameters, strict=True):
        assert (a.name, a.shape, a.moved) == (b.name, b.shape, b.moved)
        for key in ("value_before", "value_after", "gradient_first", "gradient_last", "update"):
            x, y = getattr(a, key), getattr(b, key)
            assert (y is None) == (x is None), (a.name, key)
            assert x is None or y == pytest.approx(x, rel=1e-5), (a.name, key)


def tensor_parallel_is_watched_as_one_process_is(folder):
    seen = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = tensor_parallel(Block(8)) if parallel else Block(8)
        optimizer = adam(model)
        step = stepping(model, optimizer)
        to = folder / f"{'tp' if parallel else 'one'}{'' if parallel else dist.get_rank()}"
        with ln.watch(model, optimizer, every=1, to=to, budget=None):
            for seed in range(3):
                step(seed)
        dist.barrier()
        seen.append(to)
    if dist.get_rank():
        return  # rank 0 has written
    whole, sharded = (Run(to).observations for to in seen)
    assert len(whole) == len(sharded) == 3
    for a, b in zip(whole, sharded, strict=True):
        assert a.names == b.names
        for quantity in ("weight", "gradient", "update"):
            for key in ("count", "sum_of_squares", "absmax"):
                x, y = a.rows[quantity].moments[key], b.rows[quantity].moments[key]
                assert y.tolist() == pytest.approx(x.tolist(), rel=1e-4), (quantity, key)


# --- precision ------------------------------------------------------------------------------------


def train_in_half(model, optimizer, seeds):
    rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for seed in seeds:
        optimizer.zero_grad()
        x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(seed))
        model(x[rows].bfloat16()).float().square().mean().backward()
        optimizer.step()


def rounding_is_handed_on_and_resumed_bit_for_bit(folder):
    for strategy in ("ddp", "fsdp2"):
        for mode in ("kahan", "stochastic", "master"):
            path = folder / f"{strategy}-{mode}.safetensors"
            one = ln.prepare(built().bfloat16(), slow, strategy, rounding=mode)
            assert len(one.attachment.rounded) == len(list(one.model.parameters()))
            train_in_half(one.model, one.optimizer, range(3))
            ln.save_checkpoint(path, one.model, one.optimizer)
            dist.barrier()
            train_in_half(one.model, one.optimizer, range(3, 6))
            two = ln.prepare(built(seed=7).bfloat16(), slow, strategy, rounding=mode)
            ln.load_checkpoint(path, two.model, two.optimizer)
            train_in_half(two.model, two.optimizer, range(3, 6))
            torch.testing.assert_close(wholes(two.model), wholes(one.model), rtol=0, atol=0)
            exact, again = one.attachment.full_precision(), two.attachment.full_precision()
            parts = [[local(x) for x in some.values()] for some in (exact, again)]
            torch.testing.assert_close(*parts, rtol=0, atol=0)
            scale = next(value for name, value in exact.items() if name.endswith("scale"))
            # Six steps of 2e-4, of which plain bfloat16 makes none; drawn for, they may come later.
            assert (local(scale) != 1.5).all() or mode == "stochastic"


def without_rounding_such_a_step_is_lost(folder):
    model, optimizer, _ = ln.prepare(built().bfloat16(), slow, "ddp")
    train_in_half(model, optimizer, range(6))
    assert model.module.scale.item() == 1.5
    with pytest.raises(LearnablesError, match="no such rounding"):
        ln.prepare(built().bfloat16(), slow, "fsdp2", rounding="up")


def slow(model):
    return torch.optim.AdamW(ln.param_groups(model, lr=2e-4, weight_decay=0.0))


class Stored(nn.Module):
    """Something in another dtype, in a module of its own or beside others."""

    def __init__(self, dtype, *, alone):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8, dtype=torch.bfloat16)
        if alone:
            self.scale = ln.nn.LayerScale(8, 1.0)
            ln.annotate(self, "scale.*", storage_dtype=dtype, compute_dtype=torch.bfloat16)
        else:
            self.gamma = ln.parameter(
                torch.ones(8), storage_dtype=dtype, compute_dtype=torch.bfloat16
            )

    def forward(self, x):
        x = self.linear(x)
        return self.scale(x) if hasattr(self, "scale") else x * self.gamma


def parameter_in_8_bits_is_refused_and_its_mend_works(folder):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for strategy in ("ddp", "fsdp2"):
            model = Stored(dtype, alone=False)
            with pytest.raises(LearnablesError, match="8 bits cannot be sent") as caught:
                ln.prepare(model, slow, strategy)
            assert caught.value.where == "gamma"
            exec(caught.value.mend, {"ln": ln, "model": model, "torch": torch})
            done = ln.prepare(model, slow, strategy, rounding="stochastic")
            train_in_half(done.model, done.optimizer, range(2))


def island_of_float32_is_gathered_by_itself(folder):
    model = Stored(torch.float32, alone=True)
    start = model.scale.gamma.detach().clone()
    done = ln.prepare(model, slow, "fsdp2")
    train_in_half(done.model, done.optimizer, range(3))
    (scale,) = (p for name, p in model.named_parameters() if name == "scale.gamma")
    assert (scale.dtype, model.linear.weight.dtype) == (torch.float32, torch.bfloat16)
    assert (scale.full_tensor() != start).all()
    together = Stored(torch.float32, alone=True)
    done = ln.prepare(together, slow, "ddp")  # which keeps islands anywhere
    train_in_half(done.model, done.optimizer, range(3))
    torch.testing.assert_close(scale.full_tensor(), together.scale.gamma, rtol=1e-3, atol=1e-5)


def island_beside_others_is_refused_and_its_mend_works(folder):
    model = Stored(torch.float32, alone=False)
    with pytest.raises(LearnablesError, match="in another dtype than what FSDP2") as caught:
        ln.prepare(model, slow, "fsdp2")
    assert caught.value.where == "gamma"
    assert caught.value.found == "float32; its group is bfloat16"
    exec(caught.value.mend, {"ln": ln, "model": model, "torch": torch})
    done = ln.prepare(model, slow, "fsdp2")
    train_in_half(done.model, done.optimizer, range(2))


# --- checkpoints ----------------------------------------------------------------------------------


def resumed_on_as_many_ranks_it_ends_bit_for_bit_the_same(folder):
    for strategy in ("ddp", "fsdp2"):
        path = folder / f"{strategy}.safetensors"
        model, optimizer, _ = ln.prepare(built(), adam, strategy)
        train(model, optimizer, range(3))
        ln.save_checkpoint(path, model, optimizer, step=3)
        dist.barrier()
        train(model, optimizer, range(3, 6))
        again, other, _ = ln.prepare(built(seed=7), adam, strategy)
        assert ln.load_checkpoint(path, again, other).step == 3
        train(again, other, range(3, 6))
        torch.testing.assert_close(wholes(again), wholes(model), rtol=0, atol=0)


def whole_file_of_many_ranks_is_the_file_of_one(folder):
    path = folder / "two.safetensors"
    model, optimizer, _ = ln.prepare(built(), adam, "fsdp2")
    train(model, optimizer, range(2))
    ln.save_checkpoint(path, model, optimizer)
    dist.barrier()
    alone = built(seed=5)
    ln.load_checkpoint(path, alone, adam(alone))
    saved = read_checkpoint(path).model
    for (name, x), whole in zip(alone.named_parameters(), wholes(model), strict=True):
        torch.testing.assert_close(x.detach().reshape(whole.shape), whole, rtol=0, atol=0)
        assert torch.equal(saved[name].reshape(-1), whole.reshape(-1))


# --- the session ----------------------------------------------------------------------------------

CHECKS = [
    f
    for f in list(vars(sys.modules[__name__]).values())
    if getattr(f, "__module__", "") == __name__
    and getattr(f, "__code__", None) is not None
    and f.__code__.co_varnames[: f.__code__.co_argcount] == ("folder",)
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return outcomes(CHECKS, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_two_ranks(check, said):
    for rank, trace in enumerate(said[check.__name__]):
        assert not trace, f"rank {rank}: {trace}"
