import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from learnables import init
from learnables.errors import ShapeError


def defect(x: torch.Tensor) -> float:
    """Largest ‖short Gram − I‖ of a batch of matrices."""
    x = x.to(torch.complex128 if x.is_complex() else torch.float64)
    gram = x @ x.mH if x.shape[-2] <= x.shape[-1] else x.mH @ x
    return float((gram - torch.eye(gram.shape[-1], dtype=x.dtype)).flatten(-2).norm(dim=-1).max())


def test_a_stack_of_48_gives_48_orthogonal_matrices_where_torch_gives_none() -> None:
    assert defect(init.orthogonal()(torch.empty(48, 64, 64))) < 2e-5
    assert defect(nn.init.orthogonal_(torch.empty(48, 64, 64))) > 1


@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    batch=st.sampled_from([(), (3,), (2, 2, 2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128]),
    seed=st.integers(0, 2**16),
)
def test_rows_or_columns_are_orthonormal(n, m, batch, dtype, seed) -> None:
    x = torch.empty(*batch, n, m, dtype=dtype)
    role = "linear" if batch else None
    assert defect(
        init.orthogonal()(x, role=role, generator=torch.Generator().manual_seed(seed))
    ) < (1e-4 if dtype in (torch.float32, torch.complex64) else 1e-12)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_is_as_orthogonal_as_rounding_allows(dtype, floor) -> None:
    assert defect(init.orthogonal()(torch.empty(64, 64, dtype=dtype)).double()) < floor


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (6, 3, 3, 3)], ids=str)
def test_torch_gives_the_same_matrix(shape) -> None:
    x = init.orthogonal(1.5)(torch.empty(shape), generator=torch.Generator().manual_seed(4))
    y = nn.init.orthogonal_(torch.empty(shape), 1.5, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(x, y)


def test_a_convolution_is_one_matrix_and_a_stack_many() -> None:
    conv = init.orthogonal()(torch.empty(4, 8, 3), role="conv")
    assert defect(conv.flatten(1)) < 1e-5
    stack = init.orthogonal()(torch.empty(4, 8, 3), role="experts")
    assert defect(stack) < 1e-5


def test_the_draw_is_even_over_all_orthogonal_matrices() -> None:
    x = init.orthogonal()(torch.empty(20_000, 2, 2), generator=torch.Generator().manual_seed(0))
    # Haar on O(2): the angle of the first column is uniform, determinants are fair.
    angle = torch.atan2(x[:, 1, 0], x[:, 0, 0])
    shares = torch.histc(angle, 8, -torch.pi, torch.pi) / len(x)
    torch.testing.assert_close(shares, torch.full((8,), 0.125), atol=0.01, rtol=0)
    assert torch.linalg.det(x).mean().abs() < 0.03


def test_wanted_std_is_the_one_found() -> None:
    for shape, role in (((40, 90), None), ((90, 40), None), ((5, 30, 60), "experts")):
        x = init.orthogonal(2.0)(torch.empty(shape), role=role)
        wanted = init.orthogonal(2.0).wanted_std(x.shape, role=role)
        assert x.std(correction=0).item() == pytest.approx(wanted, rel=0.05)
    conv = init.delta_orthogonal()(torch.empty(64, 32, 3, 3))
    wanted = init.delta_orthogonal().wanted_std(conv.shape)
    assert conv.std(correction=0).item() == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_delta_orthogonal_keeps_the_length_of_every_image(dims: int) -> None:
    torch.manual_seed(0)
    conv = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[dims]
    weight = init.delta_orthogonal()(torch.empty(6, 4, *[3] * dims))
    x = torch.randn(5, 4, *[4] * dims)
    y = conv(x, weight, padding=1)
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (8, 4, 2, 2), (8, 4)], ids=str)
def test_delta_orthogonal_refuses_what_cannot_keep_lengths(shape) -> None:
    with pytest.raises(ShapeError, match="does not narrow"):
        init.delta_orthogonal()(torch.empty(shape))


def test_a_vector_is_refused() -> None:
    with pytest.raises(ShapeError, match="two dimensions"):
        init.orthogonal()(torch.empty(4))
