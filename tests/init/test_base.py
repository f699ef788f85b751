import copy
import pickle
from pathlib import Path

import pytest
import torch
from tests.gloo import spawn
from torch import nn
from torch.distributed.fsdp import fully_shard

import learnables as ln
from learnables import init
from learnables.entries import entries
from learnables.errors import LearnablesError
from learnables.init.base import initialise_

EVERY = [
    init.arange(1),
    init.constant(2.0),
    init.delta_orthogonal(),
    init.identity(),
    init.kaiming_normal(),
    init.kaiming_uniform(nonlinearity="tanh"),
    init.lecun_normal(),
    init.log(init.arange(1)),
    init.log_uniform(1e-3, 1.0),
    init.normal(0.1),
    init.ones(),
    init.orthogonal(2.0),
    init.softplus_inverse(init.log_uniform(1e-3, 1.0)),
    init.trunc_normal(),
    init.uniform(),
    init.variance_scaling(2.0, "fan_out", "trunc_normal"),
    init.xavier_normal(),
    init.xavier_uniform(),
    init.zeros(),
]


def fresh(**kw) -> torch.Tensor:
    return torch.full((6, 5, 3, 3), float("nan"), **kw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", EVERY, ids=repr)
def test_fills_everything_reproducibly(one: init.Initializer, dtype: torch.dtype) -> None:
    x, y = (one(fresh(dtype=dtype), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.isfinite(x).all()
    assert torch.equal(x, y)
    assert x.dtype == dtype


@pytest.mark.parametrize("one", EVERY, ids=repr)
def test_draws_from_the_generator_only(one: init.Initializer) -> None:
    before = torch.get_rng_state()
    one(fresh(), generator=torch.Generator().manual_seed(5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("one", EVERY, ids=repr)
def test_deterministic_says_the_truth(one: init.Initializer) -> None:
    x, y = (one(fresh(), generator=torch.Generator().manual_seed(k)) for k in range(2))
    if one.deterministic:
        assert torch.equal(x, y)
    elif not (isinstance(one, init.log) and one.of.deterministic):
        assert not torch.equal(x, y)


@pytest.mark.parametrize("one", EVERY, ids=repr)
def test_survives_pickle_and_copy_and_compares_by_value(one: init.Initializer) -> None:
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert hash(one) == hash(copy.deepcopy(one))


@pytest.mark.parametrize("one", EVERY, ids=repr)
def test_a_gradient_is_neither_recorded_nor_needed(one: init.Initializer) -> None:
    x = nn.Parameter(fresh())
    assert one(x) is x
    assert x.grad_fn is None
    assert x.requires_grad


def test_a_meta_tensor_is_left_alone() -> None:
    assert init.orthogonal()(torch.empty(3, 3, device="meta")).device.type == "meta"


def test_functions_of_torch_are_accepted_also_in_half_precision() -> None:
    x = initialise_(torch.empty(8, 8, dtype=torch.bfloat16), nn.init.orthogonal_)
    assert (x.float() @ x.float().T - torch.eye(8)).abs().max() < 0.05


def test_a_generator_reaches_a_function_of_torch_or_is_refused() -> None:
    x = initialise_(torch.empty(4), nn.init.normal_, generator=torch.Generator().manual_seed(1))
    y = nn.init.normal_(torch.empty(4), generator=torch.Generator().manual_seed(1))
    assert torch.equal(x, y)
    with pytest.raises(LearnablesError, match="takes no generator"):
        initialise_(torch.empty(4), nn.init.zeros_, generator=torch.Generator())


@pytest.mark.parametrize(
    "family", [init.trunc_normal, init.zeros, init.xavier_normal, init.constant]
)
def test_a_family_without_parentheses_is_refused_rather_than_ignored(family) -> None:
    with pytest.raises(LearnablesError, match="made by a call"):
        ln.parameter(3, 3, init=family)


class Sharded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square = ln.parameter(5, 4, init=init.orthogonal())
        self.drawn = ln.parameter(7, 3, init=init.trunc_normal(1.0), weight_decay="init")
        self.small = ln.parameter(6, dtype=torch.bfloat16, init=init.normal())


def _draw_sharded(rank: int, folder: Path) -> None:
    with torch.device("meta"):
        model = Sharded()
    fully_shard(model)
    model.to_empty(device="cpu")
    # Ranks that disagree, as they do when randomness is seeded by rank: rank 0 decides.
    init.reset_(model, generator=torch.Generator().manual_seed(3 + rank))
    found = {name: param.full_tensor() for name, param in model.named_parameters()}
    found["initial"] = next(e.initial for e in entries(model) if e.initial is not None).to_local()
    torch.save(found, folder / f"{rank}.pt")


def test_a_sharded_parameter_gets_what_one_process_would_draw(tmp_path: Path) -> None:
    spawn(_draw_sharded, 2, tmp_path)
    alone = Sharded()
    init.reset_(alone, generator=torch.Generator().manual_seed(3))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, param in alone.named_parameters():
            assert torch.equal(found[name], param), (rank, name)
        assert torch.equal(found["initial"], alone.drawn[4 * rank : 4 * rank + 4])


def test_prints_as_one_would_type_it() -> None:
    shown = {
        "trunc_normal(0.02)": init.trunc_normal(),
        "uniform(-0.1, 0.1)": init.uniform(-0.1, 0.1),
        "variance_scaling(2, 'fan_out')": init.variance_scaling(2.0, "fan_out"),
        "log(arange(1))": init.log(init.arange(1)),
        "like(…, 'moments')": init.like(torch.zeros(2), "moments"),
        "identity(1)": init.identity(),
    }
    assert {text: repr(one) for text, one in shown.items()} == {text: text for text in shown}


class Halves(init.Initializer):
    """Somebody's own."""

    def fill_(self, x, *, role, generator) -> None:
        x.fill_(0.5)

    def wanted_std(self, shape, *, role=None) -> float:
        return 0.0


def test_your_own_initialiser_needs_two_methods() -> None:
    assert ln.parameter(2, init=Halves(), dtype=torch.bfloat16).tolist() == [0.5, 0.5]
    assert "Halves" in repr(Halves())
