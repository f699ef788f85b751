import torch
from torch import nn

import learnables as ln


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = ln.parameter(1, 1, 4096, init=ln.init.trunc_normal(0.02))
        self.bank = ln.parameter(4, 64, 128, init=ln.init.kaiming_normal(), role="experts")
        self.unitary = ln.parameter(8, 8, dtype=torch.complex64, init=ln.init.orthogonal())
        self.eye = ln.parameter(3, 3, init=ln.init.identity())
        self.by_torch = ln.parameter(9, 9, init=nn.init.orthogonal_)
        self.small = ln.parameter(2, init=ln.init.normal(1.0))
        self.third = ln.parameter(7, init=ln.init.constant(1 / 3))
        self.plain = nn.Linear(4, 4)


def test_a_fresh_model_is_as_declared_in_every_precision() -> None:
    torch.manual_seed(0)
    for dtype in (None, torch.float64, torch.bfloat16, torch.float16):
        model = Model()
        if dtype is not None:
            model.unitary = None  # Module.to would discard its imaginary part
            model.to(dtype)
        report = ln.init.report(model)
        assert not report.off, report
        assert len(report.rows) == (7 if dtype is None else 6)


def test_a_parameter_that_something_else_refilled_is_off() -> None:
    model = Model()
    with torch.no_grad():
        model.token.normal_()
        model.bank.normal_(0, 0.02)
        model.eye.mul_(1.001)
    assert [row.name for row in ln.init.report(model).off] == ["token", "bank", "eye"]


def test_nonfinite_memory_is_off() -> None:
    model = Model()
    with torch.no_grad():
        model.small.fill_(float("nan"))
    assert [row.name for row in ln.init.report(model).off] == ["small"]


def test_prints_a_table_with_wanted_and_found() -> None:
    torch.manual_seed(0)
    lines = str(ln.init.report(Model())).splitlines()
    assert lines[0].split()[:2] == ["parameter", "shape"]
    assert "4×64×128" in lines[2]
    assert "0.177" in lines[2]
    assert lines[-1] == "7 declared, 0 off"


def test_an_undeclared_model_gives_an_empty_report() -> None:
    assert str(ln.init.report(nn.Linear(2, 2))).endswith("0 declared, 0 off")
