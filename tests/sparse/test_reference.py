import pytest
import torch
from tests.sparse.families import MASKS, SIZES, layout_of
from torch.nn import functional as F

from learnables.sparse import Layout, random, reference

every_layout = pytest.mark.parametrize(
    ("mask", "size"), [(mask, size) for mask in MASKS for size in SIZES]
)


def by_slices(weight, layout):
    """The slow, obvious twin: each block written where it belongs."""
    (p, q), dense = layout.block, torch.zeros(layout.out_features, layout.in_features).to(weight)
    for block, (row, column) in zip(weight, layout.mask.nonzero().tolist(), strict=True):
        place = dense[row * p : (row + 1) * p, column * q : (column + 1) * q]
        place += block[: place.shape[0], : place.shape[1]]
    return dense


def sampled(dense, layout):
    (p, q), (R, C) = layout.block, layout.grid
    whole = F.pad(dense, (0, C * q - dense.shape[1], 0, R * p - dense.shape[0]))
    return whole.view(R, p, C, q).transpose(1, 2)[layout.mask]


@every_layout
def test_every_way_gives_the_dense_result(mask, size) -> None:
    layout = layout_of(mask, size)
    weight = torch.randn(layout.weight_shape, dtype=torch.float64)
    dense, index = by_slices(weight, layout), layout.index
    O, I = dense.shape  # noqa: E741
    close = torch.testing.assert_close
    close(reference.dense(weight, index, (O, I)), dense)
    for samples in (0, 1, 7):
        x, g = torch.randn(samples, I).double(), torch.randn(samples, O).double()
        bias = torch.randn(O).double()
        for way in (*reference.WAYS, None):
            close(reference.product(x, weight, index, O, bias, way=way), F.linear(x, dense, bias))
            close(reference.product(x, weight, index, O, way=way), F.linear(x, dense))
            close(reference.transposed_product(g, weight, index, I, way=way), g @ dense)
            got = reference.sampled_product(g, x, index, layout.block, way=way)
            close(got, sampled(g.T @ x, layout))


@pytest.mark.parametrize("way", reference.WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(way, dtype) -> None:
    """As exact as the dense product of the same numbers, which accumulates in fp32."""
    if way == "one by one":
        pytest.skip("rounds after each block; never chosen for half precision")
    layout = Layout(64, 512, 16, random(4, 32, 0.5))
    weight = torch.randn(layout.weight_shape).to(dtype)
    x, g = torch.randn(40, 512).to(dtype), torch.randn(40, 64).to(dtype)
    exact = by_slices(weight.double(), layout)
    ulp = torch.finfo(dtype).eps
    for got, wanted in (
        (reference.product(x, weight, layout.index, 64, way=way), x.double() @ exact.T),
        (
            reference.transposed_product(g, weight, layout.index, 512, way=way),
            g.double() @ exact,
        ),
        (
            reference.sampled_product(g, x, layout.index, (16, 16), way=way),
            sampled(g.double().T @ x.double(), layout),
        ),
    ):
        off = (got.double() - wanted).abs()
        if way == "batched":  # products of single blocks are rounded before they are added up
            assert off.max() <= 2 * ulp * wanted.abs().max()
        else:
            assert (off <= ulp * wanted.abs() + 1e-3 * ulp * wanted.abs().max()).all()


def test_batches_larger_than_a_gather_are_tiled(monkeypatch) -> None:
    layout = Layout(12, 8, 4, random(3, 2, 0.5))
    weight, x = torch.randn(layout.weight_shape), torch.randn(50, 8)
    g, whole = torch.randn(50, 12), (reference.product, reference.sampled_product)
    before = (
        whole[0](x, weight, layout.index, 12, way="batched"),
        whole[1](g, x, layout.index, (4, 4), way="batched"),
    )
    monkeypatch.setattr(reference, "_GATHER_CPU", 64)
    torch.testing.assert_close(whole[0](x, weight, layout.index, 12, way="batched"), before[0])
    after = whole[1](g, x, layout.index, (4, 4), way="batched")
    torch.testing.assert_close(after, before[1])


def test_the_way_follows_batch_dtype_and_block() -> None:
    def way(samples, block, density, dtype=torch.float32, sampled=False):
        cells = 256 // block
        layout = Layout(256, 256, block, random(cells, cells, density))
        weight = torch.empty(layout.weight_shape, dtype=dtype)
        x = torch.empty(samples, 256, dtype=dtype)
        return reference.choose(x, weight, layout.index, sampled=sampled)

    assert way(1, 64, 0.25) == "batched"
    assert way(512, 64, 0.25) == "one by one"
    assert way(512, 32, 0.25) == "panels"
    assert way(4096, 32, 0.25) == "one by one"
    assert way(512, 16, 0.25, sampled=True) == way(2048, 32, 0.5, sampled=True) == "panels"
    assert way(8192, 32, 0.5, sampled=True) == way(2048, 32, 0.5) == "one by one"
    assert way(512, 64, 0.25, sampled=True) == "one by one"
    assert way(512, 64, 0.25, torch.bfloat16) == "panels"
    assert way(64, 16, 0.25) == "panels"
    assert way(512, 8, 0.5) == way(512, 64, 1.0) == "filled in"
