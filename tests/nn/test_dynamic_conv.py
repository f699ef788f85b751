import pytest
import torch
from torch import nn

import learnables as ln
from learnables.errors import LearnablesError, ShapeError


def a_layer(**options):
    options = {"bases": 3, "hidden_features": 6, **options}
    return ln.nn.DynamicConv2d(4, 6, 3, condition_features=5, **options)


@pytest.mark.parametrize("form", ["materialised", "reassociated", None])
@pytest.mark.parametrize("geometry", [{}, {"padding": 1, "stride": 2}, {"dilation": 2}])
@pytest.mark.parametrize("base", [True, False])
def test_each_sample_meets_its_own_kernel(form, geometry, base) -> None:
    layer = a_layer(form=form, base=base, **geometry).double()
    x, condition = torch.randn(3, 4, 7, 6).double(), torch.randn(3, 5).double()
    leaves = [x.requires_grad_(), condition.requires_grad_(), *layer.parameters()]
    y = layer(x, condition)
    kernels = layer.weights(condition)
    wanted = torch.cat(
        [nn.functional.conv2d(x[b : b + 1], kernels[b], layer.bias, **geometry) for b in range(3)]
    )
    torch.testing.assert_close(y, wanted)
    g = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(wanted, leaves, g)
    )


def test_large_images_are_mixed_first_and_small_ones_last() -> None:
    layer = ln.nn.DynamicConv2d(64, 64, 3, condition_features=5, padding=1)
    used = []
    layer._reassociated = lambda a, x: used.append("reassociated") or x
    layer.weights = lambda *_: used.append("materialised") or torch.zeros(len(_[0]), 64, 64, 3, 3)
    layer(torch.zeros(64, 64, 2, 2), torch.zeros(64, 5))
    layer(torch.zeros(2, 64, 64, 64), torch.zeros(2, 5))
    assert used == ["reassociated", "materialised"]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "linear"])
def test_the_first_output_is_as_large_as_that_of_a_convolution(gate) -> None:
    torch.manual_seed(0)
    x, condition = torch.randn(64, 32, 8, 8), torch.randn(64, 24)
    wanted = nn.Conv2d(32, 48, 3, bias=False)(x).std().item()
    layer = ln.nn.DynamicConv2d(32, 48, 3, condition_features=24, gate=gate, bias=False)
    assert layer(x, condition).std().item() == pytest.approx(wanted, rel=0.1)
    assert not ln.init.report(layer).off


def test_compiles_whole() -> None:
    layer = a_layer()
    x, condition = torch.randn(3, 4, 7, 6), torch.randn(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, condition), layer(x, condition))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"x \(3, 4, 7, 6\), condition \(2, 5\)"):
        a_layer()(torch.zeros(3, 4, 7, 6), torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=r"x \(3, 5, 7, 6\)"):
        a_layer()(torch.zeros(3, 5, 7, 6), torch.zeros(3, 5))
    with pytest.raises(LearnablesError, match="kernel_size=0"):
        ln.nn.DynamicConv2d(4, 6, 0, condition_features=5)
    with pytest.raises(LearnablesError, match="form='chunked'"):
        a_layer(form="chunked")
