import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from learnables.dynamic import FORMS, mix
from learnables.dynamic.cost import by_samples, chunk_of, samples_of, tile_of
from learnables.errors import ShapeError

sizes = st.tuples(st.integers(0, 5), st.integers(0, 5), *[st.integers(1, 6)] * 3)  # B T I O K


def leaves(B, T, I, O, K, **options):  # noqa: E741
    options = {"dtype": torch.float64, "requires_grad": True, **options}
    return [torch.randn(shape, **options) for shape in ((B, K), (K, I, O), (B, T, I))]


def by_loop(h, bank, x):
    """The slow, obvious twin: sample by sample, its own matrix."""
    weights = [sum(h_k * matrix for h_k, matrix in zip(h_b, bank, strict=True)) for h_b in h]
    if not len(x):
        return x.new_zeros(*x.shape[:2], bank.shape[2]) + 0 * (x.sum() + h.sum() + bank.sum())
    return torch.stack([x_b @ weight for x_b, weight in zip(x, weights, strict=True)])


@given(size=sizes, form=st.sampled_from([*FORMS, None]))
@example(size=(0, 1, 1, 1, 1), form="chunked")
@example(size=(1, 0, 1, 1, 1), form="chunked")
def test_every_form_gives_each_sample_its_own_product(size, form) -> None:
    h, bank, x = leaves(*size)
    ours, theirs = mix(h, bank, x, form=form), by_loop(h, bank, x)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (h, bank, x), g), torch.autograd.grad(theirs, (h, bank, x), g)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "size", [(130, 1, 3, 2, 4), (3, 2, 129, 2, 2), (2, 70, 2, 3, 2), (5, 90, 3, 2, 2)]
)
def test_loops_over_pieces_lose_nothing(form, size) -> None:
    B, T, I, O, K = size  # noqa: E741
    assert chunk_of(B, I, O) < I or tile_of(T, I, K) >= B or form == "materialised"
    h, bank, x = leaves(*size)
    torch.testing.assert_close(mix(h, bank, x, form=form), by_loop(h, bank, x))
    g = torch.randn(B, T, O, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(mix(h, bank, x, form=form), (h, bank, x), g),
        torch.autograd.grad(mix(h, bank, x, form="materialised"), (h, bank, x), g),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_whole_weights_of_some_samples_at_a_time_lose_nothing(dtype) -> None:
    B, T, I, O, _ = size = 4, 256, 520, 520, 2  # noqa: E741
    assert by_samples(*size)
    assert samples_of(B, I, O) == 1
    h, bank, x = leaves(*size, dtype=dtype)
    g = torch.randn(B, T, O, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (h, bank, x)]
    y, wanted = mix(h, bank, x, form="chunked"), by_loop(*exact)
    ours = [y, *torch.autograd.grad(y, (h, bank, x), g)]
    theirs = [wanted, *torch.autograd.grad(wanted, exact, g.double())]
    for one, other in zip(ours, theirs, strict=True):
        off = (one.double() - other).abs().max() / other.abs().max()
        assert off <= 4 * torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 100)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_right_to_second_order(form) -> None:
    inputs = leaves(3, 2, 4, 3, 2)
    torch.autograd.gradcheck(lambda *args: mix(*args, form=form), inputs)
    torch.autograd.gradgradcheck(lambda *args: mix(*args, form=form), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_asked_for_is_differentiated(form) -> None:
    for wanted in range(3):
        inputs = [t.detach() for t in leaves(3, 2, 4, 3, 2)]
        inputs[wanted].requires_grad_()
        mix(*inputs, form=form).sum().backward()
        whole = [t.detach().requires_grad_() for t in inputs]
        by_loop(*whole).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
        torch.testing.assert_close(inputs[wanted].grad, whole[wanted].grad)


@pytest.mark.parametrize("form", ["chunked", "reassociated"])
def test_nothing_but_the_inputs_is_kept_for_backward(form) -> None:
    inputs = leaves(64, 1, 32, 32, 4)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mix(*inputs, form=form)
    assert set(kept) <= {t.untyped_storage().data_ptr() for t in inputs}


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_accumulates_in_single(form) -> None:
    inputs = leaves(4, 3, 256, 8, 2, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours, theirs = mix(*inputs, form=form), by_loop(*exact)
    assert ours.dtype == torch.bfloat16
    # materialised rounds the generated weights too
    limit = (8 if form == "materialised" else 4) * torch.finfo(torch.bfloat16).eps
    assert (ours.double() - theirs).abs().max() <= limit * theirs.abs().max()
    g = torch.randn_like(ours)
    got = torch.autograd.grad(ours, inputs, g)
    for grad, wanted in zip(got, torch.autograd.grad(theirs, exact, g.double()), strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 2), (2, 4, 5), (4, 1, 4)),
        ((3, 2), (3, 4, 5), (3, 1, 4)),
        ((3, 2), (2, 4, 5), (3, 1, 5)),
        ((3, 2), (2, 4, 5), (3, 4)),
        ((2,), (2, 4, 5), (3, 1, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes) -> None:
    with pytest.raises(ShapeError, match=r"wanted: \(B, K\), \(K, I, O\), \(B, T, I\)"):
        mix(*map(torch.zeros, shapes))


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("chunked", (3, 2, 4, 5, 2)),
        ("chunked", (2, 40, 4, 5, 2)),
        ("reassociated", (3, 2, 4, 5, 2)),
    ],
)
def test_operators_keep_torchs_contract(form, size) -> None:
    inputs = leaves(*size, dtype=torch.float32)
    torch.library.opcheck(torch.ops.learnables.generated_product.default, (*inputs, form))


@pytest.mark.parametrize("form", FORMS)
def test_compiled_whole_and_equal(form) -> None:
    inputs = leaves(3, 2, 4, 5, 2, dtype=torch.float32)
    compiled = torch.compile(
        lambda *args: mix(*args, form=form), fullgraph=True, backend="aot_eager"
    )
    g = torch.randn(3, 2, 5)
    ours, theirs = (f(*inputs) for f in (compiled, lambda *args: mix(*args, form=form)))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g)
    )
