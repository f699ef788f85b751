import torch
from torch import nn

from learnables.entries import entries


def test_a_module_shared_under_two_names_gives_its_parameters_both() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert [e.names for e in entries(model)] == [
        ("a.weight", "b.weight"),
        ("a.bias", "b.bias"),
    ]


def test_storage_tells_views_from_copies() -> None:
    base = torch.zeros(4)
    model = nn.ParameterDict(
        {"a": nn.Parameter(base), "b": nn.Parameter(base[1:]), "c": nn.Parameter(base.clone())}
    )
    a, b, c = entries(model)
    assert a.storage == b.storage != c.storage


def test_meta_parameters_do_not_look_as_if_they_shared_memory() -> None:
    model = nn.Linear(2, 2, device="meta")
    weight, bias = entries(model)
    assert weight.storage != bias.storage
    assert "meta" in weight.looks


def test_the_first_name_is_the_one_torch_gives() -> None:
    model = nn.Transformer(8, 2, 1, 1, 8, batch_first=True)
    assert [e.name for e in entries(model)] == [name for name, _ in model.named_parameters()]
