"""Memory is laid out as declared, in place, and stays so; the values stay too."""

import copy
import io
import pickle

import pytest
import torch
from tests.gloo import one_process_group
from torch import nn
from torch.distributed.fsdp import fully_shard

import learnables as ln
from learnables.errors import LearnablesError, LearnablesWarning, PolicyError
from learnables.runtime.layout import canonicalize_
from learnables.strides import wanted_strides

LAYOUTS = {
    "column-major": lambda w: w.t().contiguous().t(),
    "every second column": lambda w: torch.stack([w, w], dim=-1).flatten(1)[:, ::2],
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 24).reshape(4, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_repaired_model_steps_bit_equal_to_one_that_was_never_strided(layout) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    strided = copy.deepcopy(plain)
    ours = torch.optim.AdamW(strided.parameters(), fused=True)
    theirs = torch.optim.AdamW(plain.parameters(), fused=True)
    step(strided, ours)
    step(plain, theirs)
    weight = strided.weight
    before = weight.detach().clone()
    weight.data = layout(weight.data)
    ours.state[weight]["exp_avg"] = layout(ours.state[weight]["exp_avg"])
    assert canonicalize_(strided, ours) == ["weight"]
    assert strided.weight is weight
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0)
    for _ in range(3):
        step(strided, ours)
        step(plain, theirs)
    torch.testing.assert_close(strided.weight, plain.weight, rtol=0, atol=0)
    assert ours.state[weight]["exp_avg"].stride() == weight.stride()


def test_without_repair_the_fused_step_is_wrong() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    strided = copy.deepcopy(plain)
    ours = torch.optim.AdamW(strided.parameters(), fused=True, lr=0.1)
    theirs = torch.optim.AdamW(plain.parameters(), fused=True, lr=0.1)
    strided.weight.data = LAYOUTS["every second column"](strided.weight.data)
    step(strided, ours)
    step(plain, theirs)
    assert not torch.allclose(strided.weight, plain.weight)


def test_odd_strides_of_dimensions_of_size_1_are_mended() -> None:
    model = nn.Module()
    model.token = nn.Parameter(torch.zeros(8).as_strided((1, 1, 8), (1, 1, 1)))
    assert canonicalize_(model) == ["token"]
    assert model.token.stride() == (8, 8, 1)
    assert canonicalize_(model) == []


def test_state_that_kept_old_strides_under_channels_last_is_mended() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    turned = copy.deepcopy(plain)
    ours = torch.optim.AdamW(turned.parameters(), fused=True, lr=0.1)
    theirs = torch.optim.AdamW(plain.parameters(), fused=True, lr=0.1)
    images = torch.linspace(-1, 1, 75).reshape(1, 3, 5, 5)
    for time in range(4):
        for model, optimizer in ((turned, ours), (plain, theirs)):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        if time == 0:
            turned.to(memory_format=torch.channels_last)
            assert canonicalize_(turned, ours) == ["weight"]
    torch.testing.assert_close(turned.weight, plain.weight, rtol=0, atol=0)


# --- what was declared is kept -------------------------------------------------------------------


class Picture(nn.Module):
    """A kernel that is declared channels last, and a table of positions that is declared not."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = ln.parameter(
            4, 3, 3, 3, init=ln.init.normal(0.3), memory_format=torch.channels_last
        )
        self.table = ln.parameter(
            1, 4, 5, 5, init=ln.init.normal(0.3), memory_format=torch.contiguous_format
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = nn.functional.conv2d(x, self.kernel, padding=1) + self.table
        return self.head(x.mean((2, 3)))


LAST = wanted_strides((4, 3, 3, 3), torch.channels_last)
FIRST = wanted_strides((1, 4, 5, 5))


def picture(seed: int = 0) -> Picture:
    torch.manual_seed(seed)
    return Picture()


def walk(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.linspace(-1, 1, 150).reshape(2, 3, 5, 5)
        model(images).square().sum().backward()
        optimizer.step()


def through_assign(model: Picture) -> Picture:
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state["kernel"] = state["kernel"].contiguous()
    state["table"] = state["table"].to(memory_format=torch.channels_last)
    other = picture(seed=1)
    other.load_state_dict(state, assign=True)
    return other


def through_copying(model: Picture) -> Picture:
    other = picture(seed=1)
    other.load_state_dict({name: x.contiguous() for name, x in model.state_dict().items()})
    return other


def through_meta(model: Picture) -> Picture:
    with torch.device("meta"):
        other = Picture()
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


def through_a_file(model: Picture) -> Picture:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "to(channels_last)": lambda m: m.to(memory_format=torch.channels_last),
    "to(contiguous_format)": lambda m: m.to(memory_format=torch.contiguous_format),
    "to(float64) and back": lambda m: m.double().float(),
    "load_state_dict": through_copying,
    "load_state_dict(assign=True)": through_assign,
    "meta device and to_empty": through_meta,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_a_file,
    "deepcopy, to(contiguous_format)": lambda m: copy.deepcopy(m).to(
        memory_format=torch.contiguous_format
    ),
    "as a part of another model": lambda m: nn.Sequential(m).to(
        memory_format=torch.contiguous_format
    )[0],
    "ln.prepare": lambda m: ln.prepare(m, lambda m: torch.optim.SGD(m.parameters())).model,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_declared_layout_is_kept_through(way) -> None:
    model = picture()
    images = torch.randn(2, 3, 5, 5)
    wanted = model(images)
    model(images).sum().backward()
    other = way(model)
    assert other.kernel.stride() == LAST
    assert other.table.stride() == FIRST
    torch.testing.assert_close(other(images), wanted)
    if other is model:
        assert other.kernel.grad.stride() == LAST
        assert other.table.grad.stride() == FIRST


@pytest.mark.parametrize("swap", [False, True])
def test_a_declared_layout_is_kept_where_conversion_makes_new_parameters(swap) -> None:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(swap)
    try:
        model = picture().to(memory_format=torch.contiguous_format)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    assert model.kernel.stride() == LAST


def test_assigning_parameters_keeps_them_parameters() -> None:
    model = picture()
    state = dict(model.named_parameters())
    state["kernel"] = nn.Parameter(state["kernel"].detach().contiguous())
    model.load_state_dict({**model.state_dict(), **state}, assign=True)
    assert model.kernel.stride() == LAST
    assert isinstance(model.kernel, nn.Parameter)
    assert model.table is state["table"]  # fits already: the very object that was handed over


def test_a_tied_and_declared_parameter_keeps_tie_and_layout() -> None:
    model = nn.ModuleDict({"a": picture(), "b": picture(seed=1)})
    ln.tie(model, "b.kernel", "a.kernel")
    model.to(memory_format=torch.contiguous_format)
    assert model["a"].kernel is model["b"].kernel
    assert model["a"].kernel.stride() == LAST


def test_an_annotated_layout_is_carried_out_at_once_and_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    value = model[0].weight.detach().clone()
    ln.annotate(model, "0.weight", memory_format=torch.channels_last)
    assert model[0].weight.stride() == LAST
    assert model[1].weight.is_contiguous()
    model.to(memory_format=torch.contiguous_format)
    assert model[0].weight.stride() == LAST
    torch.testing.assert_close(model[0].weight.detach(), value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "declare",
    [
        lambda: ln.parameter(3, 4, memory_format=torch.channels_last),
        lambda: ln.parameter(3, 4, 5, 6, memory_format=torch.channels_last_3d),
        lambda: ln.parameter(3, 4, 5, 6, memory_format=torch.preserve_format),
        lambda: ln.annotate(nn.Conv2d(3, 4, 3), "*", memory_format=torch.channels_last),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(declare) -> None:
    with pytest.raises(PolicyError, match=r"torch\.channels_last"):
        declare()


def test_a_refused_annotation_moves_nothing() -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(PolicyError, match="bias"):
        ln.annotate(model, "*", memory_format=torch.channels_last)
    assert model.weight.is_contiguous()


def test_a_tensor_with_odd_strides_is_declared_without_them() -> None:
    odd = torch.zeros(8).as_strided((1, 1, 8), (1, 1, 1))
    assert ln.parameter(odd).stride() == (8, 8, 1)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_training_has_the_layout_and_goes_on_bit_equal(kept, fused, tmp_path) -> None:
    def adam(model):
        return torch.optim.AdamW(ln.param_groups(model, lr=0.1), fused=fused)

    model = picture()
    optimizer = adam(model)
    walk(model, optimizer, 2)
    files = ln.Checkpoints(tmp_path / "kept")
    if kept:
        files.save(model, optimizer, step=2)
    else:
        ln.save_checkpoint(tmp_path / "one.safetensors", model, optimizer)
    walk(model, optimizer, 2)
    again = picture(seed=1)
    optimizer_again = adam(again)
    if kept:
        files.load(again, optimizer_again)
    else:
        ln.load_checkpoint(tmp_path / "one.safetensors", again, optimizer_again)
    assert again.kernel.stride() == optimizer_again.state[again.kernel]["exp_avg"].stride() == LAST
    walk(again, optimizer_again, 2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_under_ddp_the_layout_stays_and_under_fsdp2_its_loss_is_told() -> None:
    with one_process_group():
        wrapped, _, _ = ln.prepare(picture(), lambda m: torch.optim.SGD(m.parameters()), "ddp")
        assert wrapped.module.kernel.stride() == LAST
        with pytest.warns(LearnablesWarning, match=r"declared layout is lost[\s\S]*kernel"):
            ln.prepare(picture(), lambda m: torch.optim.SGD(m.parameters()), "fsdp2")


def test_prepare_mends_gaps_and_leaves_channels_last_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(6, 5))
    model[1].weight = nn.Parameter(torch.zeros(5, 12)[:, ::2])
    ln.prepare(model, lambda m: torch.optim.SGD(m.parameters()))
    assert model[0].weight.stride() == LAST
    assert model[1].weight.stride() == (6, 1)


# --- canonicalize_ -------------------------------------------------------------------------------


def test_declared_layouts_are_restored_and_gradients_and_state_follow() -> None:
    model = picture()
    optimizer = torch.optim.AdamW(model.parameters())
    walk(model, optimizer)
    assert ln.canonicalize_(model, optimizer) == []
    grad = model.kernel.grad
    model.kernel.data = model.kernel.data.contiguous()
    model.table.grad.data = model.table.grad.to(memory_format=torch.channels_last)
    moments = optimizer.state[model.head.weight]
    moments["exp_avg_sq"] = moments["exp_avg_sq"].t().contiguous().t()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert ln.canonicalize_(model, [optimizer]) == ["kernel", "table", "head.weight"]
    assert model.kernel.stride() == grad.stride() == LAST
    assert model.kernel.grad is grad
    assert model.table.grad.stride() == FIRST
    assert moments["exp_avg_sq"].stride() == (4, 1)
    assert ln.canonicalize_(model, optimizer) == []
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)


def test_state_is_moved_without_touching_the_state_dict_it_was_loaded_from() -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    state = saved["state"][0]
    state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
    optimizer.load_state_dict(saved)
    assert ln.canonicalize_(model, optimizer) == ["weight"]
    assert state["momentum_buffer"].stride() == (1, 2)
    assert optimizer.state[model.weight]["momentum_buffer"].stride() == (3, 1)


def test_undeclared_convolutions_may_stay_channels_last_with_all_that_is_theirs() -> None:
    model = nn.Conv2d(3, 4, 3, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
    assert ln.canonicalize_(model, optimizer, undeclared="dense") == ["weight"]
    state = optimizer.state[model.weight]
    assert model.weight.stride() == model.weight.grad.stride() == state["exp_avg"].stride() == LAST
    assert ln.canonicalize_(model, optimizer) == ["weight"]
    assert model.weight.is_contiguous()


def test_a_slice_is_no_dense_block_also_where_dense_is_enough() -> None:
    model = nn.Module()
    model.slice = nn.Parameter(torch.zeros(4, 8)[:, ::2])
    assert ln.canonicalize_(model, undeclared="dense") == ["slice"]


def test_thirds_of_one_matrix_are_parted_without_a_question() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    model = nn.Module()
    model.q, model.k, model.v = (nn.Parameter(part) for part in whole.chunk(3, dim=1))
    assert ln.canonicalize_(model) == ["q", "k", "v"]
    torch.testing.assert_close(torch.cat([model.q, model.k, model.v], dim=1).detach(), whole)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 3


def sharing_parameters() -> nn.Module:
    model = nn.Module()
    whole = torch.zeros(4, 4)
    model.a, model.b = nn.Parameter(whole.t()), nn.Parameter(whole)
    return model


def sharing_a_buffer() -> nn.Module:
    model = nn.Module()
    whole = torch.zeros(4, 8)
    model.register_buffer("whole", whole)
    model.a = nn.Parameter(whole[:, ::2])
    return model


def sharing_an_attribute() -> nn.Module:
    model = nn.Module()
    model.whole = torch.zeros(4, 8)
    model.a = nn.Parameter(model.whole[:, ::2])
    return model


@pytest.mark.parametrize("build", [sharing_parameters, sharing_a_buffer, sharing_an_attribute])
def test_shared_elements_are_not_parted_in_silence(build) -> None:
    model = build()
    other = "b" if hasattr(model, "b") else "whole"
    with pytest.raises(LearnablesError, match="shares elements") as caught:
        ln.canonicalize_(model)
    assert caught.value.where == f"a, {other}"
    assert not model.a.is_contiguous()
    exec(caught.value.mend, {"ln": ln, "model": model})
    assert ln.canonicalize_(model) == []


def sharing_a_transpose() -> nn.Module:
    model = nn.Module()
    whole = torch.arange(12.0).reshape(3, 4)
    model.b, model.a = nn.Parameter(whole), nn.Parameter(whole.t())
    return model


def sharing_all() -> nn.Module:
    model = nn.Module()
    whole = torch.arange(12.0).reshape(3, 4).t()
    model.b, model.a = nn.Parameter(whole), nn.Parameter(whole)
    return model


@pytest.mark.parametrize("build", [sharing_a_transpose, sharing_all])
def test_one_matrix_under_two_names_is_to_be_tied(build) -> None:
    model = build()
    a, b = model.a.detach().clone(), model.b.detach().clone()
    with pytest.raises(LearnablesError, match="shares elements") as caught:
        ln.canonicalize_(model)
    assert "ln.tie" in caught.value.mend
    exec(caught.value.mend, {"ln": ln, "model": model})
    ln.canonicalize_(model)
    assert len(list(model.parameters())) == 1
    torch.testing.assert_close((model.a.detach(), model.b.detach()), (a, b), rtol=0, atol=0)


def test_what_need_not_move_may_share() -> None:
    model = nn.Module()
    whole = torch.zeros(4, 4)
    model.a, model.b = nn.Parameter(whole), nn.Parameter(whole[1:])
    assert ln.canonicalize_(model) == []


def on_meta() -> nn.Module:
    return nn.Linear(2, 2, device="meta")


def lazy() -> nn.Module:
    return nn.LazyLinear(2)


@pytest.mark.parametrize("build", [on_meta, lazy])
def test_a_parameter_without_memory_is_refused(build) -> None:
    with pytest.raises(LearnablesError, match=r"no memory[\s\S]*weight[\s\S]*to_empty"):
        ln.canonicalize_(build())


def test_a_sharded_model_is_refused_and_a_wrapped_one_where_it_would_move() -> None:
    with one_process_group():
        sharded = fully_shard(nn.Linear(2, 2))
        with pytest.raises(LearnablesError, match=r"sharded parameter[\s\S]*weight[\s\S]*Shard"):
            ln.canonicalize_(sharded)
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
        optimizer = torch.optim.SGD(wrapped.parameters(), momentum=0.9)
        wrapped(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        state = optimizer.state[wrapped.module.weight]
        state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
        assert ln.canonicalize_(wrapped, optimizer) == ["module.weight"]  # only the state moves
        wrapped.module.weight.data = wrapped.module.weight.data.t().contiguous().t()
        with pytest.raises(LearnablesError, match=r"buckets[\s\S]*module\.weight"):
            ln.canonicalize_(wrapped, optimizer)


def test_an_unknown_word_for_undeclared_parameters_is_refused() -> None:
    with pytest.raises(LearnablesError, match="'row-major' or 'dense'"):
        ln.canonicalize_(nn.Linear(2, 2), undeclared="any")


def test_a_compiled_model_goes_on_after_the_move() -> None:
    model = nn.Linear(4, 4)
    model.weight.data = torch.randn(4, 4).t()
    x = torch.randn(2, 4)
    wanted = model(x)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), wanted)
    assert ln.canonicalize_(compiled) == ["_orig_mod.weight"]
    torch.testing.assert_close(compiled(x), wanted)
