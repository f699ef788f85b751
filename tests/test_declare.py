import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import learnables as ln
from learnables.errors import PolicyError, ShapeError


def test_it_is_a_plain_parameter_with_a_plain_key() -> None:
    model = nn.Module()
    model.token = ln.parameter(1, 1, 8)
    assert type(model.token) is nn.Parameter
    assert list(model.state_dict()) == ["token"]
    assert not hasattr(model.token, "_learnables_note")


def test_an_empty_shape_has_one_element_and_loads_from_and_into_a_scalar() -> None:
    ours, theirs = nn.Module(), nn.Module()
    ours.scale = ln.parameter()
    theirs.scale = nn.Parameter(torch.tensor(2.5))
    assert ours.scale.shape == (1,)
    ours.load_state_dict(theirs.state_dict())
    assert ours.scale.item() == 2.5
    theirs.load_state_dict({"scale": torch.tensor([3.5])})
    assert theirs.scale.item() == 3.5


def test_a_tensor_is_copied_so_that_two_parameters_never_share_memory() -> None:
    value = torch.ones(3)
    first, second = ln.parameter(value), ln.parameter(value)
    assert len({value.data_ptr(), first.data_ptr(), second.data_ptr()}) == 3
    expanded = ln.parameter(torch.ones(1).expand(4))
    assert expanded.is_contiguous()
    assert expanded.untyped_storage().nbytes() == 16


@pytest.mark.parametrize("shape", [(-1,), (2.0,), (3, torch.zeros(2))])
def test_a_shape_that_is_none_is_refused(shape) -> None:
    with pytest.raises(ShapeError, match="wanted: "):
        ln.parameter(*shape)


def test_a_shape_may_be_a_tuple() -> None:
    assert ln.parameter((2, 3)).shape == (2, 3)
    assert ln.parameter(torch.Size([2, 3])).shape == (2, 3)


def test_a_generator_makes_it_reproducible_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        a, b = (
            ln.parameter(5, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))
            for _ in range(2)
        )
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_torchs_own_initialisers_are_accepted() -> None:
    assert ln.parameter(3, init=nn.init.ones_).tolist() == [1, 1, 1]


def test_importing_and_declaring_installs_one_hook_and_only_when_first_used(tmp_path) -> None:
    import subprocess
    import sys

    code = (
        "from torch.nn.modules import module as m\n"
        "hooks = m._global_parameter_registration_hooks\n"
        "import learnables as ln\n"
        "assert not hooks\n"
        "ln.parameter(3); ln.parameter(3)\n"
        "assert len(hooks) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch_module is not None


def test_a_policy_is_checked_where_it_is_written() -> None:
    with pytest.raises(PolicyError, match="weight_decay has a value that means nothing"):
        ln.parameter(3, weight_decay="never")


def test_resize_acts_in_a_plain_load_state_dict_also_of_a_copy() -> None:
    import copy
    import pickle

    model = nn.Module()
    model.table = ln.parameter(3, 2, resize=_first_rows)
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        m.load_state_dict({"table": torch.arange(10.0).view(5, 2)})
        assert m.table.tolist() == [[0, 1], [2, 3], [4, 5]]
    plain = nn.Module()
    plain.table = ln.parameter(3, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict({"table": torch.zeros(5, 2)})


def _first_rows(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return value[: shape[0]]


class Scaled(nn.Module):
    def __init__(self, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gamma = ln.parameter(4, init=nn.init.ones_, compute_dtype=compute_dtype)
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail:
            raise ValueError("as asked")
        return self.linear(x) * self.gamma


# Where the owner is itself the compiled root, dynamo asks the cast tensor for its .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", [False, True])
def test_cast_at_use_keeps_the_residual_stream_in_low_precision(compiled: bool) -> None:
    for dtype, stream in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = Scaled(dtype)
        torch._dynamo.reset()  # dynamo does not guard on hooks: one class, two kinds of instances
        call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(torch.ones(2, 4))
        assert y.dtype == stream
        y.float().sum().backward()
        assert model.gamma.dtype == model.gamma.grad.dtype == torch.float32
        assert model.gamma.grad.abs().sum() > 0
        assert "gamma" not in model.__dict__


def test_cast_at_use_ends_with_an_exception_and_survives_copies() -> None:
    import copy
    import pickle

    for model in (m := Scaled(torch.float64), copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert model(torch.ones(2, 4)).dtype == torch.float64
        model.fail = True
        with pytest.raises(ValueError, match="as asked"):
            model(torch.ones(2, 4))
        assert isinstance(model.gamma, nn.Parameter)
        assert model.gamma.dtype == torch.float32


def test_cast_at_use_works_under_fsdp2_and_functional_call() -> None:
    from tests.gloo import one_process_group
    from torch.distributed.fsdp import fully_shard

    model = Scaled(torch.float64)
    swapped = {"gamma": torch.full((4,), 2.0, requires_grad=True)}
    y = torch.func.functional_call(model, swapped, torch.ones(2, 4))
    assert y.dtype == torch.float64
    (grad,) = torch.autograd.grad(y.sum(), swapped["gamma"])
    assert grad.dtype == torch.float32
    with one_process_group():
        fully_shard(model)
        y = model(torch.ones(2, 4))
        assert y.dtype == torch.float64
        y.sum().backward()
        assert model.gamma.grad is not None
