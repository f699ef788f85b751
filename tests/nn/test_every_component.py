"""What holds for all components; the catalogue's examples stand for them."""

import copy
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gloo import one_process_group
from tests.nn.catalogue import (
    BEGIN,
    ELSEWHERE,
    END,
    EXAMPLES,
    PAGES,
    Example,
    documented,
    written_in,
)
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import learnables as ln
import learnables.nn
from learnables.entries import entries
from learnables.nn import Component

every = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


def outputs(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def lively(component: Component) -> Component:
    """Away from the start, where gates are shut and tables empty, so that mistakes show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for param in component.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return component


def test_the_catalogue_holds_every_component() -> None:
    public = {name for name in learnables.nn.__all__ if name not in ELSEWHERE}
    kinds = {n for n in public if isinstance(getattr(learnables.nn, n), type)}
    assert kinds == set(EXAMPLES)


@every
def test_every_parameter_is_declared_with_start_and_decay(example: Example) -> None:
    for entry in entries(example.make()):
        note = entry.places[0].note
        assert isinstance(note.get("init"), ln.init.Initializer), entry.name
        assert note.get("weight_decay") in (True, False, "init"), entry.name
        assert entry.param.ndim >= 1, f"{entry.name}: FSDP refuses 0-dim parameters"
        assert (entry.initial is not None) == (note.get("weight_decay") == "init")


@every
def test_no_component_has_a_buffer(example: Example) -> None:
    assert not list(example.make().buffers())


@every
def test_the_docstring_states_the_shape_of_every_parameter(example: Example) -> None:
    component = example.make()
    sizes = dict(pair.split("=") for pair in example.sizes.split())
    shapes = documented(type(component))
    assert set(shapes) == {name for name, _ in component.named_parameters()}
    for name, param in component.named_parameters():
        written = shapes[name].replace("·", "*").replace("−", "-").replace("[+ 3]", "+ 3")
        for letter, size in sizes.items():
            written = written.replace(f"2{letter} ", f"2 * {size} ").replace(letter, size)
        written = written.replace(")(", ") * (")
        wanted = eval(written, {})  # arithmetic of our own docstrings
        assert tuple(param.shape) == (wanted if isinstance(wanted, tuple) else (wanted,))


@every
def test_the_docstring_names_its_source(example: Example) -> None:
    page = inspect.getdoc(type(example.make())) or ""
    assert "Example:" in page
    assert "Source:" in page or type(example.make()) is ln.nn.ColorMatrix


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_has_the_dtype_of_the_input(example: Example, dtype: torch.dtype) -> None:
    component, inputs = lively(example.make()), cast(example.inputs(), dtype)
    wanted = torch.float32 if isinstance(component, ln.nn.StateSpaceVectors) else dtype
    assert {y.dtype for y in outputs(component(**inputs))} == {wanted}
    stored = {y.dtype for y in outputs(component.to(dtype)(**inputs))}
    assert stored == {wanted}


@every
def test_gradients_are_right(example: Example) -> None:
    torch.manual_seed(0)
    component, inputs = lively(example.make()).double(), cast(example.inputs(), torch.float64)
    floats = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    for name in floats:
        inputs[name].requires_grad_()
    names = [name for name, _ in component.named_parameters()]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        if isinstance(inputs.get("generator"), torch.Generator):
            inputs["generator"].manual_seed(0)
        params = dict(zip(names, values[: len(names)], strict=True))
        given = dict(zip(floats, values[len(names) :], strict=True))
        return tuple(outputs(torch.func.functional_call(component, params, (), inputs | given)))

    values = [*component.parameters(), *(inputs[name] for name in floats)]
    assert torch.autograd.gradcheck(run, values, fast_mode=True)
    torch.autograd.backward([y.sum() for y in run(*values)])
    assert all(param.grad is not None for param in component.parameters())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every
@pytest.mark.usefixtures("fresh_compiler")
# torch's compiler instantiates every autograd.Function it traces, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break(example: Example) -> None:
    torch.manual_seed(0)
    component, inputs = lively(example.make()), example.inputs()
    if "generator" in inputs:
        pytest.skip("torch.compile cannot take a torch.Generator as an argument")
    eager = outputs(component(**inputs))
    compiled = outputs(torch.compile(component, fullgraph=True, backend="eager")(**inputs))
    torch.testing.assert_close(compiled, eager)
    torch.autograd.backward([y.sum() for y in compiled])
    assert all(param.grad is not None for param in component.parameters())


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_is_whole_and_independent(example: Example, how) -> None:
    component = lively(example.make())
    twin = how(component)
    for ours, theirs in zip(entries(component), entries(twin), strict=True):
        assert torch.equal(ours.param, theirs.param)
        assert ours.param.data_ptr() != theirs.param.data_ptr()
        for field in ("init", "weight_decay", "resize", "compute_dtype", "role", "tags"):
            mine, other = (e.places[0].note.get(field) for e in (ours, theirs))
            assert repr(mine) == repr(other), field
    torch.manual_seed(0)
    inputs = example.inputs()
    if "generator" not in inputs:
        torch.testing.assert_close(outputs(twin(**inputs)), outputs(component(**inputs)))
    twin.load_state_dict(component.state_dict())


@every
def test_meta_construction_and_to_empty_end_as_declared(example: Example) -> None:
    with torch.device("meta"):
        component = example.make()
    component.to_empty(device="cpu")
    with torch.no_grad():
        for param in component.parameters():
            param.fill_(float("nan"))
    component.reset_parameters()
    assert all(torch.isfinite(param).all() for param in component.parameters())
    report = ln.init.report(component)
    assert len(report.rows) == len(list(component.parameters()))
    assert not report.off, report


@every
def test_a_checkpoint_of_bare_tensors_loads(example: Example) -> None:
    first, second = lively(example.make()), example.make()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_page_is_up_to_date(page: Path) -> None:
    written = page.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert written == written_in(page), "run: python -m tests.nn.catalogue"


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    with one_process_group():
        yield


@every
@pytest.mark.usefixtures("process_group")
# Some outputs are views; FSDP2 warns that they must not be changed in place, which nothing does.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_trains_while_sharded_by_fsdp2(example: Example) -> None:
    torch.manual_seed(0)
    component, inputs = lively(example.make()), example.inputs()
    eager = outputs(copy.deepcopy(component)(**copy.copy(inputs)))
    fully_shard(component)
    if "generator" in inputs:
        inputs["generator"].manual_seed(0)
    sharded = outputs(component(**inputs))
    torch.testing.assert_close(sharded, eager)
    torch.autograd.backward([y.sum() for y in sharded])
    assert all(param.grad is not None for param in component.parameters())
    for entry in entries(component):  # the declarations are still there
        assert entry.places[0].note.get("weight_decay") in (True, False, "init")
