"""The probes: programs that are right in every way, and ones that only an experiment tells."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import learnables as ln
from learnables.auditing.command import run_audit
from learnables.errors import LearnablesError


class Mlp(nn.Module):
    def __init__(self, depth=3, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.gains = nn.ParameterList(nn.Parameter(torch.rand(6) + 0.5) for _ in range(depth))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6, 1)
        self.wrong = set()

    def gain(self, i):
        gain = self.gains[i]
        return gain * gain.detach() if i in self.wrong else gain * gain

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = self.drop(F.gelu(layer(x)) * self.gain(i)) + x
        return self.head(x)


def job(model, kind=torch.optim.AdamW, parts=1, scale=1.0):
    optimizer = kind(model.parameters(), lr=1e-2)
    x, y = torch.randn(16, 6), torch.randn(16, 1)

    def step():
        optimizer.zero_grad()
        for rows, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.mse_loss(model(rows), wanted) * scale / parts
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss

    return model, optimizer, step


def probed(model, optimizer, step, **more):
    return ln.audit(model, optimizer, step, probes=["gradient"], **more)


@pytest.mark.parametrize(
    "make",
    [
        lambda: job(Mlp()),
        lambda: job(Mlp(dropout=0.3)),
        lambda: job(Mlp(), parts=4),
        lambda: job(Mlp(), torch.optim.SGD, scale=65536.0),
        lambda: job(Mlp(depth=8)),
    ],
    ids=["plain", "dropout", "accumulated", "scaled", "deep"],
)
def test_a_right_gradient_is_the_slope(make):
    torch.manual_seed(0)
    report = probed(*make())
    assert "LRN310" not in report.codes, report
    assert "LRN310" not in report.skipped


@given(st.sets(st.integers(0, 5), max_size=3), st.integers(0, 100))
def test_exactly_the_parameters_with_half_a_derivative_are_named(wrong, seed):
    torch.manual_seed(seed)
    model = Mlp(depth=6)
    model.wrong = wrong
    report = probed(*job(model), select=["LRN310"])
    named = {name for f in report.findings for name in f.where}
    assert named <= {f"gains.{i}" for i in wrong}  # never an innocent one
    assert len(named) >= len(wrong) - 1  # a kink may hide one


def test_a_slope_that_is_meant_is_silent():
    torch.manual_seed(0)
    model = Mlp()
    model.wrong = {1}
    assert probed(*job(model), select=["LRN3"]).codes == ["LRN310"]
    meant = ln.Intent(surrogate=["gains.1"])
    assert probed(*job(model), intent=meant, select=["LRN3"]).ok


def test_a_gradient_that_never_came_is_said_once():
    class Cut(Mlp):
        def gain(self, i):
            return self.gains[i].data

    torch.manual_seed(0)
    assert probed(*job(Cut()), select=["LRN3"]).codes == ["LRN301"]


def test_a_cut_is_told_from_what_has_no_influence():
    class Idle(Mlp):
        def gain(self, i):
            return self.gains[i].data if i == 0 else torch.ones(6)

    torch.manual_seed(0)
    report = probed(*job(Idle()), select=["LRN301"])
    found = {f.where[0]: f.found for f in report.findings}
    assert "the loss depends on it all the same" in found["gains.0"]
    assert "the loss does not depend on it" in found["gains.1"]


def test_two_optimizers_that_take_turns_are_judged_until_the_first_steps():
    torch.manual_seed(0)
    maker, judge = nn.Linear(3, 3), nn.Linear(3, 1)
    first = torch.optim.SGD(judge.parameters(), lr=0.5)
    second = torch.optim.SGD(maker.parameters(), lr=0.5)
    real, noise = torch.randn(8, 3), torch.randn(8, 3)

    def step():
        first.zero_grad()
        loss = F.softplus(-judge(real)).mean() + F.softplus(judge(maker(noise).detach())).mean()
        loss.backward()
        first.step()
        second.zero_grad()
        F.softplus(-judge(maker(noise))).mean().backward()
        second.step()
        return loss

    model = nn.ModuleDict({"maker": maker, "judge": judge})
    report = ln.audit(model, None, step, optimizers=[first, second], probes=["gradient"])
    assert "LRN310" not in report.codes, report


def test_a_step_that_does_not_repeat_gives_no_verdict_and_says_so():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = iter(torch.randn(100, 8, 2))

    def step():
        optimizer.zero_grad()
        loss = model(next(batches)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    report = probed(model, optimizer, step)
    assert "a step that repeats: it gave" in report.skipped["LRN310"]


def test_a_step_that_raises_is_the_reason():
    def step():
        raise ValueError("not today")

    report = ln.audit(nn.Linear(1, 1), None, step, probes=["checkpoint"], batch=torch.ones(2, 1))
    for code in ("LRN311", "LRN807"):
        assert report.skipped[code] == "needs a step that does not raise"


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_half_precision_gets_no_verdict_and_says_so(how):
    torch.manual_seed(8)  # under autocast, the noise of this one looks like another slope
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(8, 128), encoder, nn.Linear(128, 4))
    x, y = torch.randn(16, 5, 8), torch.randint(0, 4, (16,))
    if how == "parameters":
        model, x = model.bfloat16(), x.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = F.cross_entropy(model(x).mean(1).float(), y)
        loss.backward()
        optimizer.step()
        return loss

    report = probed(model, optimizer, step)
    assert "LRN310" not in report.codes
    assert "single" in report.skipped["LRN310"]


def test_the_probes_leave_everything_as_it_was():
    torch.manual_seed(0)
    model, optimizer, step = job(Mlp(dropout=0.2))
    step()
    batch = torch.randn(4, 6)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    grads = [p.grad.clone() for p in model.parameters()]
    ln.audit(model, optimizer, step, probes=["gradient", "checkpoint"], batch=batch)
    after = (model.state_dict(), optimizer.state_dict(), torch.get_rng_state())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=0, atol=0)
    assert model.training
    assert torch.autograd.backward.__module__ == "torch.autograd"


# --- batch ----------------------------------------------------------------------------------------


class Dynamic(nn.Module):
    """The article's dynamic weight: for 2-D x its product pairs every sample with every weight."""

    def __init__(self):
        super().__init__()
        self.make = nn.Linear(6, 12)

    def forward(self, x):
        weight = self.make(x).view(-1, 2, 6)
        return torch.matmul(x, weight.transpose(1, 2))  # (B, B, 2)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), torch.randn(8, 6)),
        (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), torch.randn(4, 5, 6)),
        (nn.Bilinear(3, 4, 2), (torch.randn(5, 3), torch.randn(5, 4))),
        (Mlp(), {"x": torch.randn(8, 6)}),
    ],
    ids=["norm", "attention", "two inputs", "by name"],
)
def test_samples_that_mind_their_own_business_are_clean(model, batch):
    report = ln.audit(model, batch=batch)
    assert "LRN311" not in report.codes, report
    assert "LRN311" not in report.skipped


def test_the_article_s_dynamic_weight_mixes_the_samples():
    report = ln.audit(Dynamic(), batch=torch.randn(8, 6))
    (finding,) = [f for f in report.findings if f.code == "LRN311"]
    assert (
        finding.found == "the output of shape (8, 8, 2) has shape (5, 5, 2) for half of the samples"
    )


def test_attention_over_the_batch_is_found():
    model = nn.TransformerEncoderLayer(6, 2, 8)  # sequence first, and given (batch, sequence)
    assert "LRN311" in ln.audit(model, batch=torch.randn(4, 5, 6)).codes


def test_a_batch_that_the_model_refuses_is_the_reason():
    report = ln.audit(Mlp(), batch=torch.randn(8, 5))
    assert "a batch that the model can be called with" in report.skipped["LRN311"]
    assert "two samples" in ln.audit(Mlp(), batch=torch.randn(1, 6)).skipped["LRN311"]


# --- checkpoint -----------------------------------------------------------------------------------


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.BatchNorm1d(3)
        self.alias = self.body.weight
        self.scale = ln.parameter(1)
        self.register_buffer("grid", torch.arange(3), persistent=False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))


def test_a_state_dict_that_keeps_all_is_clean():
    report = ln.audit(Table(), probes=["checkpoint"])
    assert "LRN807" not in report.codes, report
    assert "LRN807" not in report.skipped


DTYPES = [
    *(torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_of_any_dtype_is_compared_bit_for_bit(dtype, kept):
    model = nn.Linear(2, 1)
    for name, value in {"some": torch.tensor([0.0, 1.0, 1.0]), "one": torch.ones(())}.items():
        model.register_buffer(name, value.to(dtype), persistent=kept or name != "some")
    for name in ("none", "strange"):
        value = torch.ones(0) if name == "none" else torch.tensor([float("nan"), -0.0])
        model.register_buffer(name, value)
    before = copy.deepcopy(model.state_dict())

    def step():  # so that the buffer is seen to change, and is no constant
        model.some.copy_(torch.tensor([1.0, 1.0, 0.0]).to(dtype))
        model(torch.ones(1, 2)).sum().backward()

    report = ln.audit(model, None, step, probes=["checkpoint"], select=["LRN807"])
    assert [f.where for f in report.findings] == ([] if kept else [["some"]])
    assert "LRN807" not in report.skipped
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_what_a_hook_renames_on_the_way_is_lost():
    def rename(module, state, prefix, *_):
        for key in list(state):
            if key.endswith("scale"):
                state[f"{key}_"] = state.pop(key)
        state[f"{prefix}scale"] = torch.zeros(1)

    model = Table()
    model.register_load_state_dict_pre_hook(rename)
    report = ln.audit(model, probes=["checkpoint"])
    (finding,) = [f for f in report.findings if f.code == "LRN807"]
    assert "load_state_dict refuses it" in finding.found

    def forget(module, state, prefix, *_):
        state[f"{prefix}scale"] = torch.zeros(1)

    model = Table()
    model.register_load_state_dict_pre_hook(forget)
    (finding,) = [f for f in ln.audit(model, probes=["checkpoint"]).findings if f.code == "LRN807"]
    assert (finding.where, finding.found) == (["scale"], "another value after loading")


# --- fill -----------------------------------------------------------------------------------------


def test_memory_that_nobody_fills_is_found_each_time(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make(fill=False):\n"
        "    model = nn.Linear(2, 1)\n"
        "    model.token = nn.Parameter(torch.empty(2))\n"
        "    model.table = nn.Parameter(torch.Tensor(3))\n"
        "    if fill:\n"
        "        nn.init.zeros_(model.token), nn.init.ones_(model.table)\n"
        "    return model\n"
        "def filled(): return make(True)\n"
    )
    assert run_audit(f"{tmp_path / 'net.py'}:make") == 1
    said = capsys.readouterr().out
    assert "LRN501" in said
    assert "token, table" in said
    assert run_audit(f"{tmp_path / 'net.py'}:filled") == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_probe_that_does_not_exist_is_refused():
    with pytest.raises(LearnablesError, match="no such probe"):
        ln.audit(nn.Linear(1, 1), probes=["gradients"])
