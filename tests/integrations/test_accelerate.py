"""Our groups through Accelerate's ``prepare``; attachments and watch on what it returns."""

from pathlib import Path

import torch
from torch import Tensor, nn

import learnables as ln
from learnables.watching import Run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = ln.parameter(4, init=ln.init.ones(), constraint=ln.sets.Box(0.5, 1.05))
        self.fc = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * self.scale)


def test_groups_constraints_and_watch_work_while_it_accumulates(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from learnables.integrations import accelerate as ours

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.ones(64, 1) * 5)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    model, optimizer, loader = ours.prepare(
        accelerator, Net(), loader, optimizer=torch.optim.SGD, lr=0.1, weight_decay=0.1
    )
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert decay == {"fc.weight": 0.1, "fc.bias": 0.0, "scale": 0.0}
    options = {"every": 1, "budget": None}
    watcher = ours.watch(accelerator, model, optimizer, to=tmp_path, **options)
    with watcher, ln.observe(model, optimizer.optimizer, steps=4) as seen:
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - y).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            assert model.scale.detach().max() <= 1.05, "projected after the step"
    assert seen.report is not None
    assert seen.report.ok, seen.report

    assert [o.step for o in Run(watcher.path).observations] == [1, 2, 3, 4]


class Colours(nn.Module):
    """Decays toward its own random values, which Accelerate alone does not save."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = ln.parameter(torch.rand(4, 4), weight_decay="init")
        self.fc = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x @ self.colour)


def test_a_saved_state_goes_on_bit_equal_with_what_was_declared(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from learnables.integrations import accelerate as ours

    def built(seed: int) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        torch.manual_seed(seed)
        accelerator = Accelerator(cpu=True)
        model, optimizer = ours.prepare(accelerator, Colours(), lr=0.1, weight_decay=0.5)
        ours.keep_declared(accelerator, model, optimizer)
        return accelerator, model, optimizer

    def train(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for i in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            accelerator.backward(model(x).square().mean())
            optimizer.step()

    first = built(0)
    train(*first)
    first[0].save_state(str(tmp_path / "state"))
    train(*first)
    wanted = [p.detach().clone() for p in first[1].parameters()]
    second = built(1)
    second[0].load_state(str(tmp_path / "state"))
    train(*second)
    torch.testing.assert_close([p.detach() for p in second[1].parameters()], wanted, rtol=0, atol=0)
