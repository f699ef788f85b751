"""What is handed over wrong is refused by name, by every function that takes it."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import learnables as ln
from learnables.arguments import (
    describe,
    optimizers_in,
    require_flag,
    require_kind,
    require_module,
    require_path,
    require_share,
    require_whole,
    towards_a_dtype,
)
from learnables.errors import ArgumentError, LearnablesError, PolicyError
from learnables.init.base import Initializer
from learnables.models.vit import ViT, ViTConfig
from learnables.notes import notes_of


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def call(function: Callable[..., Any], tmp_path: Path, **wrong: Any) -> Any:
    """Call a public function with what it needs, except for what is wrong."""
    model, optimizer = model_and_optimizer()
    right = {
        "model": model,
        "optimizer": optimizer,
        "selector": "0.weight",
        "set": ln.sets.NonNegative(),
        "name": "added",
        "component": ln.nn.LayerScale(4),
        "at": "0",
        "optimizer_fn": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        "path": tmp_path / "file",
        "target": "2.weight",
        "source": "0.weight",
        "image_size": (8, 8),
        "channels": 1,
        "classes": 3,
        "code": "LRN201",
        "reason": "meant",
    }
    named = inspect.signature(function).parameters
    return function(**{**{k: v for k, v in right.items() if k in named}, **wrong})


def taking(argument: str) -> list[Any]:
    functions = [getattr(ln, name) for name in ln.__all__]
    return [
        pytest.param(f, id=f.__name__)
        for f in functions
        if inspect.isfunction(f) and argument in inspect.signature(f).parameters
    ]


NO_MODULES = [[nn.Linear(2, 2)], nn.Linear, {"weight": torch.ones(2)}, "model", 3, torch.ones(2)]


@pytest.mark.parametrize("function", taking("model"))
@pytest.mark.parametrize("wrong", NO_MODULES, ids=describe)
def test_what_is_no_module_is_refused_by_every_function_that_takes_a_model(
    function: Callable[..., Any], wrong: object, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"model is no module\n  where: model") as error:
        call(function, tmp_path, model=wrong)
    assert error.value.found == describe(wrong)


@pytest.mark.parametrize("function", taking("optimizer"))
@pytest.mark.parametrize("wrong", ["adamw", 3, [nn.Linear(2, 2)], torch.optim.SGD], ids=describe)
def test_what_is_no_optimizer_is_refused_by_every_function_that_takes_one(
    function: Callable[..., Any], wrong: object, tmp_path: Path
) -> None:
    if function is ln.load_checkpoint:
        ln.save_checkpoint(tmp_path / "file", model_and_optimizer()[0])
    with pytest.raises(LearnablesError) as error:
        call(function, tmp_path, optimizer=wrong)
    assert "optimizer" in error.value.what


@pytest.mark.parametrize("function", taking("selector"))
@pytest.mark.parametrize("wrong", [None, 3, nn.Linear(2, 2), torch.ones(2), [3]], ids=describe)
def test_what_is_no_selector_is_refused_by_every_function_that_takes_one(
    function: Callable[..., Any], wrong: object, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="where: selector"):
        call(function, tmp_path, selector=wrong)


@pytest.mark.parametrize("function", [ln.audit, ln.observe])
@pytest.mark.parametrize("argument", ["modules", "copies", "loaded", "intent"])
def test_the_audit_says_which_of_its_arguments_is_of_another_kind(
    function: Callable[..., Any], argument: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=rf"{argument} is of another kind") as error:
        call(function, tmp_path, **{argument: [3]})
    assert error.value.mend.startswith(f"{argument}=")
    scope = {"ln": ln, "criterion": nn.Linear(1, 1), "ema_model": nn.Linear(1, 1), "state": {}}
    mended = eval(error.value.mend.partition("=")[2], scope)
    call(function, tmp_path, **{argument: mended})


@pytest.mark.parametrize("function", [ln.audit, ln.observe])
@pytest.mark.parametrize("argument", ["select", "ignore"])
def test_a_rule_that_there_is_not_is_refused_rather_than_nothing_judged(
    function: Callable[..., Any], argument: str, tmp_path: Path
) -> None:
    with pytest.raises(LearnablesError, match="there is no such rule\n  found: 'LRN20l'"):
        call(function, tmp_path, **{argument: ["LRN20l"]})
    with pytest.raises(ArgumentError, match=f"where: {argument}"):
        call(function, tmp_path, **{argument: [201]})


def test_one_code_without_a_list_selects_its_rule() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    for said in ("LRN201", ["LRN201"], "missing-from-optimizer", "LRN3, LRN2"):
        assert [f.code for f in ln.audit(model, optimizer, select=said).findings] == ["LRN201"]
        assert not ln.audit(model, optimizer, ignore=said).findings


def test_a_silence_of_no_rule_is_refused() -> None:
    with pytest.raises(LearnablesError, match="there is no such rule"):
        ln.silence("LRN20l", "*", reason="a typo")


@pytest.mark.parametrize("wrong", [None, 3, ["0.weight"]], ids=describe)
def test_a_name_that_is_no_text_is_refused(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="where: name"):
        call(ln.graft, tmp_path, name=wrong)
    with pytest.raises(ArgumentError, match="where: target"):
        call(ln.untie, tmp_path, target=wrong)


@pytest.mark.parametrize("argument", ["lr", "weight_decay", "layer_decay"])
def test_a_number_that_a_file_gave_as_text_is_refused_with_its_mend(
    argument: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    right = {"model": model, "lr": 0.1}
    with pytest.raises(ArgumentError, match=f"{argument} is no number") as error:
        call(ln.param_groups, tmp_path, **{**right, argument: "5e-1"})
    mended = eval(error.value.mend.partition("=")[2])
    call(ln.param_groups, tmp_path, **{**right, argument: mended})
    call(ln.param_groups, tmp_path, **{**right, "lr": torch.tensor(1e-3)})
    for wrong in ("fast", True, [0.5], torch.ones(2), 1j):
        with pytest.raises(ArgumentError, match=f"{argument} is no number") as error:
            call(ln.param_groups, tmp_path, **{**right, argument: wrong})
        assert not error.value.mend


@pytest.mark.parametrize("argument", ["lr", "weight_decay"])
@pytest.mark.parametrize("wrong", [-0.5, float("nan"), float("inf"), torch.tensor(-0.5)])
def test_a_rate_that_is_negative_or_not_finite_is_refused(
    argument: str, wrong: float, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match=rf"where: {argument}\n") as error:
        call(ln.param_groups, tmp_path, **{argument: wrong})
    assert error.value.mend == (f"{argument}=0.5" if wrong == -0.5 else "")
    call(ln.param_groups, tmp_path, **{argument: 0.0})


@pytest.mark.parametrize("function", [ln.param_groups, ln.inventory])
@pytest.mark.parametrize("wrong", [3, "*", {"*": 3}, [3]], ids=describe)
def test_a_policy_of_another_kind_is_refused_with_one_that_is_right(
    function: Callable[..., Any], wrong: object, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match="pairs selectors with fields") as error:
        call(function, tmp_path, policy=wrong)
    model = nn.Module()
    model.scale = nn.Module()
    model.scale.gamma = nn.Parameter(torch.ones(2))
    mended = eval(error.value.mend.partition("=")[2])
    call(function, tmp_path, model=model, policy=mended)


def state_of(model: nn.Module) -> tuple[list[str], list[bool], dict[str, list[str]]]:
    """Everything that a refused call could have changed: names, what trains, hooks and modes."""
    return (
        list(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
        {name: [*vars(m), *map(repr, vars(m).values())] for name, m in model.named_modules()},
    )


NO_PLACES = [3, [3], [None], b"0", {"0": 1}, [], (), True, nn.Linear(1, 1), torch.ones(2)]
NO_COMPONENTS = [[nn.Linear(4, 4)], {"scale": 3}, {"scale": nn.Linear}, {3: nn.Linear(4, 4)}, "x"]


@pytest.mark.parametrize("wrong", NO_PLACES, ids=describe)
def test_what_is_no_place_is_refused_before_the_model_is_touched(
    wrong: object, tmp_path: Path
) -> None:
    model, _ = model_and_optimizer()
    before = state_of(model)
    with pytest.raises(ArgumentError, match="where: at") as error:
        call(ln.graft, tmp_path, model=model, at=wrong)
    assert state_of(model) == before
    if isinstance(wrong, int) and wrong is not True:
        model.append(nn.Linear(4, 4))
        call(ln.graft, tmp_path, model=model, at=eval(error.value.mend.partition("=")[2]))


@pytest.mark.parametrize("wrong", [nn.Linear, None, 3, len, nn.Parameter(torch.ones(4))])
def test_a_component_that_is_no_module_is_refused_by_its_own_name(
    wrong: object, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="component is no module") as error:
        call(ln.graft, tmp_path, component=wrong)
    assert error.value.mend.startswith("component = Linear(") or wrong is not nn.Linear


@pytest.mark.parametrize("wrong", [3, ["output"], True, "Output", b"output"], ids=describe)
def test_a_way_that_there_is_not_is_refused(wrong: object, tmp_path: Path) -> None:
    model, _ = model_and_optimizer()
    before = state_of(model)
    with pytest.raises(LearnablesError, match="'tokens', 'input', 'output'"):
        call(ln.graft, tmp_path, model=model, where=wrong)
    for function in (ln.freeze, ln.train_only):
        with pytest.raises(LearnablesError, match="'statistics', 'eval', 'nothing'"):
            call(function, tmp_path, model=model, stays=wrong)
    assert state_of(model) == before


@pytest.mark.parametrize("wrong", [3, None, b"delta", "", ["delta"]], ids=describe)
def test_what_is_no_path_is_refused_by_both_functions_of_deltas(
    wrong: object, tmp_path: Path
) -> None:
    model, _ = model_and_optimizer()
    call(ln.graft, tmp_path, model=model)
    for function in (ln.save_delta, ln.load_delta):
        with pytest.raises(ArgumentError, match="where: path"):
            call(function, tmp_path, model=model, path=wrong)


@pytest.mark.parametrize("wrong", NO_COMPONENTS, ids=describe)
def test_components_of_another_kind_are_refused_before_the_model_is_touched(
    wrong: object, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, _ = model_and_optimizer()
    ln.graft(model, "scale", ln.nn.LayerScale(4), at="0")
    ln.save_delta(model, tmp_path / "file")
    torch.manual_seed(0)
    base, _ = model_and_optimizer()
    before = state_of(base)
    with pytest.raises(ArgumentError):
        call(ln.load_delta, tmp_path, model=base, components=wrong)
    assert state_of(base) == before
    call(ln.load_delta, tmp_path, model=base, components={"scale": ln.nn.LayerScale(4)})


@pytest.mark.parametrize("function", [ln.inventory, ln.param_groups, ln.attach, ln.save_checkpoint])
def test_a_lazy_model_is_told_to_see_a_batch_first(
    function: Callable[..., Any], tmp_path: Path
) -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(LearnablesError, match=r"a lazy parameter has no .*\n  where: 0.weight"):
        call(function, tmp_path, model=model)
    model(torch.ones(2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    also = {"optimizer": optimizer} if function is not ln.inventory else {}
    if function is ln.param_groups:
        also = {"lr": 0.1}
    call(function, tmp_path, model=model, **also)


def test_a_lazy_model_can_be_audited() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    optimizer = torch.optim.SGD([model[0].bias], lr=0.1)
    found = ln.audit(model, optimizer, select="LRN201").findings
    assert "lazy, without a shape yet" in found[0].found


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "None"),
        (nn.Linear, "the class Linear"),
        ([], "an empty list"),
        ((nn.Linear(1, 1), 3), "a tuple of Linear, int"),
        ("name", "'name', of type str"),
        (torch.ones(2), "of type Tensor"),
    ],
)
def test_a_value_is_described_by_what_it_is(wrong: object, words: str) -> None:
    assert describe(wrong) == words


def test_the_mend_for_a_list_of_modules_is_a_module() -> None:
    model: Any = [nn.Linear(1, 1)]
    with pytest.raises(ArgumentError) as error:
        require_module(model)
    scope: dict[str, Any] = {"nn": nn, "model": model}
    exec(error.value.mend, scope)
    require_module(scope["model"])


def test_one_several_or_no_optimizers_are_a_list() -> None:
    _, one = model_and_optimizer()
    _, two = model_and_optimizer()
    assert optimizers_in(None) == []
    assert optimizers_in(one) == [one]
    assert optimizers_in((one, two)) == [one, two]
    assert optimizers_in(o for o in (one, two)) == [one, two]


def test_an_argument_of_another_kind_is_a_type_error_too() -> None:
    with pytest.raises(TypeError, match=re.escape("found: of type Tensor")):
        require_module(Tensor())


@pytest.mark.parametrize("one", [3, np.int64(3), torch.tensor(3), torch.tensor([3])], ids=describe)
def test_whatever_counts_is_a_whole_number(one: object) -> None:
    assert require_whole(one, "steps", least=3) == 3
    assert type(require_whole(one, "steps", least=3)) is int
    with pytest.raises(LearnablesError, match="steps is too small") as error:
        require_whole(one, "steps", least=4)
    assert not isinstance(error.value, TypeError)


@pytest.mark.parametrize("wrong", ["3", 3.0, True, None, [3], torch.ones(2).long()], ids=describe)
def test_what_only_looks_like_a_whole_number_is_none(wrong: object) -> None:
    with pytest.raises(ArgumentError, match="steps is no whole number") as error:
        require_whole(wrong, "steps", least=1)
    assert re.fullmatch(r"steps=[1-3]", error.value.mend)


@pytest.mark.parametrize("wrong", ["no", 0, 1, None, np.True_, torch.tensor(True)], ids=describe)
def test_a_flag_is_true_or_false(wrong: object) -> None:
    for right in (True, False):
        require_flag(right, "histogram")
    with pytest.raises(ArgumentError, match="where: histogram"):
        require_flag(wrong, "histogram")


@pytest.mark.parametrize("wrong", [3, None, b"runs", "", ["runs"]], ids=describe)
def test_a_path_is_a_text_or_a_path(wrong: object) -> None:
    for right in ("runs", Path("runs")):
        require_path(right, "to", wanted="a folder", mend='to="runs"')
    with pytest.raises(ArgumentError, match=r"to is no path[\s\S]*mend: to=\"runs\""):
        require_path(wrong, "to", wanted="a folder", mend='to="runs"')


def test_one_of_several_kinds_will_do() -> None:
    require_kind(3, "size", int, tuple, wanted="a size", mend="size=3")
    require_kind((3, 4), "size", int, tuple, wanted="a size", mend="size=3")
    with pytest.raises(ArgumentError, match="size is of another kind"):
        require_kind("3", "size", int, tuple, wanted="a size", mend="size=3")


def constructors() -> list[Any]:
    """Each argument of each component, set and initialiser that is annotated with a plain kind."""
    plain = {int, float, bool, str, int | tuple[int, int], tuple[int, int], int | None, str | None}
    plain |= {torch.dtype | None, torch.device | str | None, torch.Generator | None, float | None}
    plain |= {Tensor, Callable[[Tensor], Tensor]}
    return [
        pytest.param(made, name, id=f"{made.__name__}({name})")
        for package in (ln.nn, ln.sets, ln.init)
        for made in (getattr(package, name) for name in package.__all__)
        if inspect.isclass(made) and issubclass(made, (nn.Module, ln.sets.Set, Initializer))
        for name, takes in inspect.signature(made).parameters.items()
        if takes.annotation in plain and takes.kind is not takes.VAR_POSITIONAL
    ]


@pytest.mark.parametrize(("made", "name"), constructors())
def test_what_is_of_another_kind_is_refused_by_every_constructor(
    made: Callable[..., Any], name: str
) -> None:
    # What else it needs is not handed over: the argument is judged before anything is built.
    with pytest.raises(ArgumentError) as error:
        made(**{name: object()})
    assert error.value.where == name
    assert error.value.wanted


@pytest.mark.parametrize(
    "call",
    [
        lambda: ln.nn.LayerScale(-1),
        lambda: ln.nn.RelativeBias((2, -2), 2),
        lambda: ln.nn.Prompts(2, 4, dropout=1.5),
        lambda: ln.nn.RotaryFrequencies(2, 4, theta=-1.0),
    ],
)
def test_a_size_or_a_share_that_cannot_be_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(LearnablesError, match=r"-1|-2|1\.5") as error:
        call()
    assert not isinstance(error.value, ArgumentError)


def test_sizes_of_any_integer_kind_and_numbers_of_any_real_kind_are_taken() -> None:
    assert ln.nn.LayerScale(np.int64(4), np.float32(0.5)).gamma.shape == (4,)
    assert ln.sets.Ball(1).radius == 1
    require_share(0, "dropout")


class Scale(ln.nn.LayerScale):  # somebody's own, whose annotation is a habit
    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, dim: int) -> None:
        super().__init__(len(dim))


def test_annotations_of_other_peoples_subclasses_bind_nobody() -> None:
    assert Scale([1, 2, 3]).gamma.shape == (3,)


@pytest.mark.parametrize(
    ("said", "where", "mend"),
    [
        ({"requires_grad": "no"}, "requires_grad", "requires_grad=True"),
        ({"dtype": "bf16"}, "dtype", "dtype=torch.bfloat16"),
        ({"dtype": "torch.float16"}, "dtype", "dtype=torch.float16"),
        ({"dtype": torch.int64}, "dtype", ""),
        ({"device": "gpu"}, "device", "device='cuda'"),
        ({"storage_dtype": "fp32"}, "storage_dtype", "storage_dtype=torch.float32"),
        ({"compute_dtype": "autcast"}, "compute_dtype", "compute_dtype='autocast'"),
        ({"rounding": "khan"}, "rounding", "rounding='kahan'"),
        ({"role": "expert"}, "role", "role='experts'"),
        ({"weight_decay": "intial"}, "weight_decay", "weight_decay='init'"),
        ({"constraint": ln.sets.Simplex}, "constraint", "constraint=Simplex(…)"),
    ],
    ids=str,
)
def test_a_declaration_that_means_nothing_is_told_what_was_meant(
    said: dict[str, Any], where: str, mend: str
) -> None:
    with pytest.raises(LearnablesError) as error:
        ln.parameter(4, 4, **said)
    assert (error.value.where, error.value.mend) == (where, mend)
    if where not in ("requires_grad", "dtype", "device"):
        model, _ = model_and_optimizer()
        with pytest.raises(LearnablesError) as error:
            ln.annotate(model, "0.weight", **said)
        assert (error.value.where, error.value.mend) == (where, mend)
        assert not notes_of(model[0])


def test_a_misspelled_field_is_told_the_nearest() -> None:
    model, _ = model_and_optimizer()
    with pytest.raises(PolicyError) as error:
        ln.annotate(model, "0.weight", weight_decy=0.0)
    assert error.value.mend == "weight_decay=0.0"


def test_only_names_of_dtypes_lead_to_one() -> None:
    assert towards_a_dtype("fp16", "dtype") == "dtype=torch.float16"
    assert [towards_a_dtype(x, "dtype") for x in ("nn", "floaty", 3, None)] == ["", "", "", ""]


WRONG_ARGUMENTS = [
    (ln.tie, {"transpose": "yes"}),
    (ln.tie, {"target": 3}),
    (ln.canonicalize_, {"separate": "no"}),
    (ln.constrain, {"view": 3}),
    (ln.constrain, {"lazy": "1e-3"}),
    (ln.constrain, {"momentum": "yes"}),
    (ln.save_checkpoint, {"path": None}),
    (ln.save_checkpoint, {"also": "ema"}),
    (ln.save_checkpoint, {"step": 3.5}),
    (ln.save_checkpoint, {"extra": "epoch"}),
    (ln.save_checkpoint, {"random_state": "no"}),
    (ln.save_checkpoint, {"sharded": "no"}),
    (ln.load_checkpoint, {"path": 3}),
    (ln.load_checkpoint, {"also": 3}),
    (ln.load_checkpoint, {"rename": "trunk"}),
    (ln.load_checkpoint, {"allow": 3}),
    (ln.prepare, {"units": "blocks.*"}),
    (ln.prepare, {"methods": "encode"}),
    (ln.audit, {"step": 3}),
    (ln.audit, {"steps": 3.5}),
    (ln.audit, {"ddp": "model"}),
    (ln.audit, {"probes": 3}),
    (ln.observe, {"steps": "4"}),
    (ln.observe, {"on_report": "print"}),
    (ln.Checkpoints, {"folder": None}),
    (ln.Checkpoints, {"folder": "runs", "keep": "3"}),
    (ln.Intent, {"frozen": "backbone"}),
    (ln.sparse.random, {"rows": "4"}),
    (ln.sparse.banded, {"density": "half"}),
    (ln.sparse.butterfly, {"columns": 3.5}),
    (ln.sparse.n_of_m, {"generator": 0}),
    (ln.sparse.largest, {"scores": [1.0]}),
    (ViTConfig, {"image_size": 32}),
    (ViTConfig, {"qk_norm": "yes"}),
    (ViT, {"config": {"dim": 64}}),
]


@pytest.mark.parametrize(
    ("function", "wrong"), WRONG_ARGUMENTS, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_a_plausible_mistake_is_named_and_nothing_is_done(
    function: Callable[..., Any], wrong: dict[str, Any], tmp_path: Path
) -> None:
    if function is ln.load_checkpoint and "path" not in wrong:
        ln.save_checkpoint(tmp_path / "file", *model_and_optimizer())
    before = sorted(tmp_path.iterdir())
    model, optimizer = model_and_optimizer()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    takes = inspect.signature(function).parameters
    held = {"model": model, "optimizer": optimizer}
    ours = {name: value for name, value in held.items() if name in takes}
    with pytest.raises(ArgumentError) as error:
        call(function, tmp_path, **ours, **wrong)
    *_, argument = wrong
    assert error.value.where == argument
    assert error.value.wanted
    assert sorted(tmp_path.iterdir()) == before
    assert model.state_dict().keys() == state.keys()
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, state[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [{"stem": "pach"}, {"pool": "avg"}, {"heads": 0}, {"drop_path": 1.5}, {"mlp_ratio": -1.0}],
    ids=str,
)
def test_a_vit_of_no_meaning_is_refused_by_its_field(wrong: dict[str, Any]) -> None:
    (field,) = wrong
    with pytest.raises(LearnablesError) as error:
        ViTConfig(image_size=(8, 8), channels=1, classes=3, **wrong)
    assert error.value.where == field
    assert field != "stem" or error.value.mend == "stem='patch'"


def test_values_that_ranks_shall_have_are_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(LearnablesError, match="values is none of its choices"):
        call(ln.prepare, tmp_path, values="rank0")
