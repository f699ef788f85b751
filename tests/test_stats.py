"""statistics against a slow, obvious twin: a Python loop over float64 numbers."""

import math
import warnings
from dataclasses import fields
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels import kernel as kernel
from torch import Tensor
from torch._subclasses import FakeTensorMode

import learnables as ln
from learnables._native import statistics as native
from learnables._native import statistics_torch
from learnables.arguments import describe
from learnables.errors import ArgumentError, LearnablesError
from learnables.stats import BINS, FORCE, Statistics, backend, bin_edges, magnitudes, statistics

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EIGHTHS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
OTHERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
OTHERS += (torch.uint16, torch.uint32, torch.uint64)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -2.0)
SPECIAL += (1e-45, -1e-40, 1.1754943508222875e-38, 3.4028234663852886e38, -3.3895313892515355e38)
SPECIAL += (6e-8, 6.1e-5, 65504.0, 1e-320, 1e-60, -1e60, 1.7976931348623157e308, 0.99999999)


def bin_of(value: float) -> int:
    """The defining sentence of the bins, in Python."""
    sign = 256 * (math.copysign(1.0, value) < 0)
    if not math.isfinite(value):
        return sign + 255
    if value == 0:
        return sign
    return sign + min(max(math.frexp(value)[1] - 1 + 127, 0), 255)


def twin(values: list[float]) -> dict[str, float | list[int]]:
    """All fields of one row, one value at a time."""
    finite = [v for v in values if math.isfinite(v)]
    histogram = [0] * BINS
    for value in values:
        # The sign of a NaN is whatever its maker left there; the caller folds the two bins.
        histogram[bin_of(value)] += 1
    return {
        "count": len(values),
        "sum": sum(map(Fraction, finite)),
        "sum_of_squares": sum(Fraction(v) ** 2 for v in finite),
        "absmax": max((abs(v) for v in finite), default=0.0),
        "min": min(finite, default=math.inf),
        "max": max(finite, default=-math.inf),
        "zeros": sum(v == 0 for v in finite),
        "nonfinite": len(values) - len(finite),
        "histogram": histogram,
    }


def fold_nonfinite(histogram: list[int]) -> list[int]:
    """Both signs of the last bin together, because NaN has no sign that survives a cast."""
    folded = list(histogram)
    folded[255], folded[511] = folded[255] + folded[511], 0
    return folded


def values_of(x: Tensor) -> list[float]:
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.resolve_neg().double().reshape(-1).tolist()


def assert_row(seen: Statistics, row: int, values: list[float]) -> None:
    wanted = twin(values)
    for name in ("count", "absmax", "min", "max", "zeros", "nonfinite"):
        assert getattr(seen, name)[row].item() == wanted[name], name
    if wanted["absmax"] < 1e150:  # else float64 itself overflows
        total = sum(abs(Fraction(v)) for v in values if math.isfinite(v))
        squares = seen.sum_of_squares[row].item()
        assert abs(Fraction(seen.sum[row].item()) - wanted["sum"]) <= Fraction(1e-12) * total
        assert math.isclose(squares, wanted["sum_of_squares"], rel_tol=1e-12, abs_tol=1e-307)
    assert fold_nonfinite(seen.histogram[row].tolist()) == fold_nonfinite(wanted["histogram"])


@pytest.fixture(params=["torch", "native"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once with each backend forced."""
    if request.param == "native":
        request.getfixturevalue("kernel")
    monkeypatch.setenv(FORCE, request.param)
    return request.param


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHTHS], ids=str)
@given(data=st.data())
def test_agrees_with_a_loop_over_every_value(dtype: torch.dtype, data: st.DataObject) -> None:
    numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.floats(-1, 1))
    lists = data.draw(st.lists(st.lists(numbers, max_size=40), max_size=4))
    tensors = [torch.tensor(values, dtype=torch.float64).to(dtype) for values in lists]
    seen = statistics(tensors)
    assert len(seen) == len(tensors)
    for row, x in enumerate(tensors):
        assert_row(seen, row, values_of(x))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [*OTHERS, *COMPLEX], ids=str)
def test_integers_booleans_and_complex_numbers_are_read_as_real_numbers(dtype) -> None:
    x = torch.tensor([0, 1, 2, 3, 100, 0, 7])
    x = (x * (1 + 2j)).to(dtype) if dtype.is_complex else x.to(dtype)
    assert_row(statistics([x]), 0, values_of(x))


def test_integers_that_float64_has_not_are_rounded_to_it() -> None:
    """What the docstring says of int64 beyond 2^53, and that nothing between is lost."""
    x = torch.tensor([2**53, -(2**53) + 1, 2**53 + 1, 2**63 - 1, 2**24 + 1, 0])
    assert_row(statistics([x]), 0, [float(v) for v in x.tolist()])


def test_powers_of_two_are_counted_as_a_format_without_a_mantissa_has_them() -> None:
    x = torch.tensor([0.25, 1.0, 2.0**100, torch.nan]).to(torch.float8_e8m0fnu)
    assert_row(statistics([x]), 0, x.double().tolist())


def strided() -> dict[str, Tensor]:
    base = torch.randn(6, 8)
    z = torch.randn(5, dtype=torch.complex64)
    return {
        "empty": torch.zeros(0, 3),
        "0-dim": torch.tensor(-3.0),
        "transposed": base.t(),
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 0, 2, 1),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(4, 1).expand(4, 7),
        "sliced": base[1:5:2, 2:7],
        "every second": torch.randn(20)[1::2],
        "overlapping": torch.randn(10).unfold(0, 4, 1),
        "conjugate": z.conj(),
        "negative bit": z.conj().imag,
        "transposed half": base.bfloat16().t(),
        "needs a gradient": base.clone().requires_grad_() * 2,
        "parameter": torch.nn.Parameter(base.clone()),
    }


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", strided())
def test_any_strides_are_read_right(name: str) -> None:
    x = strided()[name]
    seen = statistics([x])
    assert_row(seen, 0, values_of(x))
    assert not seen.sum.requires_grad


class Subclass(Tensor):
    """What people make to mark a tensor; its memory is its own."""


NAMES = (
    *("COO, duplicates", "COO with dense rows", "COO of nothing", "COO, complex"),
    *("COO, bfloat16", "COO, bool", "CSR", "CSC", "CSR, integers", "BSR, whole blocks"),
    *("BSC, whole blocks", "masked", "nested", "nested and turned", "jagged", "MKL-DNN"),
    *("a subclass", "a buffer", "made in inference mode"),
)


def layouts() -> dict[str, tuple[Tensor, list[float]]]:
    """Tensors that are not strided, or no plain Tensor, and the values that they hold."""
    square = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    twice = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, -5.0], (4,))
    rows = torch.sparse_coo_tensor([[0, 2]], [[1.0, 2.0], [0.0, torch.inf]], (3, 2))
    blocks = torch.block_diag(square, torch.zeros(2, 2)).to_sparse_bsr((2, 2))
    hidden = torch.masked.masked_tensor(torch.arange(3.0), torch.tensor([True, False, True]))
    parts = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])]
    nested = torch.nested.nested_tensor(parts)
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    return {
        "COO, duplicates": (twice, [3.0, -5.0]),
        "COO with dense rows": (rows, [1.0, 2.0, 0.0, math.inf]),
        "COO of nothing": (torch.zeros(3).to_sparse(), []),
        "COO, complex": ((square * (1 - 2j)).to_sparse(), [2.0, -4.0, 3.0, -6.0]),
        "COO, bfloat16": (square.bfloat16().to_sparse(), [2.0, 3.0]),
        "COO, bool": (square.bool().to_sparse(), [1.0, 1.0]),
        "CSR": (square.to_sparse_csr(), [2.0, 3.0]),
        "CSC": (square.to_sparse_csc(), [2.0, 3.0]),
        "CSR, integers": (square.long().to_sparse_csr(), [2.0, 3.0]),
        "BSR, whole blocks": (blocks, [0.0, 2.0, 3.0, 0.0]),
        "BSC, whole blocks": (blocks.to_dense().to_sparse_bsc((2, 2)), [0.0, 2.0, 3.0, 0.0]),
        "masked": (hidden, [0.0, 2.0]),
        "nested": (nested, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        "nested and turned": (nested.transpose(1, 2), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        "jagged": (jagged, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        "MKL-DNN": (torch.eye(2).to_mkldnn(), [1.0, 0.0, 0.0, 1.0]),
        "a subclass": (square.as_subclass(Subclass), [0.0, 2.0, 3.0, 0.0]),
        "a buffer": (torch.nn.Buffer(square), [0.0, 2.0, 3.0, 0.0]),
        "made in inference mode": (torch.inference_mode()(torch.ones)(2), [1.0, 1.0]),
    }


BETA = [
    "ignore:Sparse ... tensor support is in beta",
    "ignore:Sparse invariant checks are implicitly disabled",
    "ignore:The PyTorch API of MaskedTensors is in prototype",
    "ignore:The PyTorch API of nested tensors is in prototype",
]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", NAMES)
def test_the_values_of_any_layout_are_read_right(name: str) -> None:
    with warnings.catch_warnings():
        for beta in BETA:
            warnings.filterwarnings(*beta.split(":"))
        known = layouts()
        assert tuple(known) == NAMES
        x, values = known[name]
        seen = statistics([torch.ones(2), x, torch.zeros(1)])
    assert_row(seen, 1, values)
    assert seen.count.tolist() == [2, len(values), 1]
    assert type(seen.sum) is Tensor


class Refuses(Tensor):
    """A subclass that has no operations, as packed formats of other libraries have few."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("isfinite", "aminmax", "to"):
            raise NotImplementedError(f"no {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def traced() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(2)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (None, "only tensors"),
        (1.0, "only tensors"),
        ([torch.zeros(2)], "only tensors"),
        (torch.zeros(2, device="meta"), "meta tensor"),
        (torch.nn.UninitializedParameter(), "lazy parameter"),
        (traced(), "fake tensor"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "packs its values"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.uint4), "packs its values"),
        (quantised(), "packs its values"),
        (torch.ones(2).as_subclass(Refuses), r"cannot be read[\s\S]*found: Refuses"),
        (torch.ones(1 << 16).as_subclass(Refuses), r"cannot be read[\s\S]*found: Refuses"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(bad, says: str) -> None:
    with pytest.raises(LearnablesError, match=says) as caught:
        statistics([torch.zeros(2), bad])
    assert caught.value.where == "tensors[1]"
    assert caught.value.mend


def under_fake_tensors(x: Tensor) -> Statistics:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return statistics([x])


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    "call",
    [
        torch.vmap(lambda x: statistics([x]).sum),
        torch.func.grad(lambda x: statistics([x]).sum.sum()),
        under_fake_tensors,  # the kernel wrote to the address of what has none
    ],
    ids=["vmap", "grad", "fake tensors"],
)
def test_where_no_tensor_has_values_it_refuses(call) -> None:
    with pytest.raises(LearnablesError, match="no values to look at here") as caught:
        call(torch.ones(3, 2))
    assert caught.value.found
    assert caught.value.mend


@pytest.mark.parametrize("function", [statistics, magnitudes])
@pytest.mark.parametrize(
    "wrong", [3, None, {"w": torch.ones(2)}, torch.nn.Linear(2, 1)], ids=describe
)
def test_what_is_no_list_of_tensors_is_refused_by_its_name(function, wrong: object) -> None:
    with pytest.raises(ArgumentError, match="where: tensors") as caught:
        function(wrong)
    scope = {"ln": ln, "tensors": wrong, "module": wrong, "tensor": torch.ones(2)}
    assert len(eval(caught.value.mend, scope)) > 0


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [("histogram", "no"), ("histogram", 1), ("threads", "2"), ("threads", 2.0), ("threads", True)],
)
def test_an_argument_of_another_kind_is_refused_by_its_name(argument, wrong) -> None:
    with pytest.raises(ArgumentError, match=f"where: {argument}"):
        statistics([torch.ones(2)], **{argument: wrong})


def test_no_thread_is_too_few() -> None:
    with pytest.raises(LearnablesError, match="threads is too small"):
        statistics([torch.ones(2)], threads=0)


@pytest.mark.parametrize("wrong", ["float16", torch.int8, None, torch.complex64], ids=str)
def test_a_share_is_that_of_a_floating_dtype(wrong) -> None:
    seen = statistics([torch.ones(2)])
    for share in (seen.below, seen.above):
        with pytest.raises(ArgumentError, match="where: dtype"):
            share(wrong)
    with pytest.raises(ArgumentError, match="where: other"):
        seen.merge(wrong)


def test_a_lone_tensor_is_one_row() -> None:
    assert statistics(torch.zeros(3, 2)).count.tolist() == [6]


def test_no_tensors_give_no_rows() -> None:
    none = statistics([])
    assert len(none) == 0
    assert none.total().count.tolist() == [0]
    assert len(Statistics.unpack(none.pack(), 0)) == 0


def assert_same(a: Statistics, b: Statistics, rtol: float = 0.0) -> None:
    for field in fields(Statistics):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert (left is None) == (right is None), field.name
        if left is not None:
            exact = not field.name.startswith("sum")
            torch.testing.assert_close(
                left, right, rtol=0 if exact else rtol, atol=0 if exact else rtol, msg=field.name
            )


parts = st.lists(
    st.lists(st.one_of(st.sampled_from(SPECIAL[:12]), st.floats(-1e3, 1e3)), max_size=20),
    min_size=1,
    max_size=4,
)


@given(parts=parts)
def test_statistics_of_a_concatenation_are_the_merge_of_its_parts(parts) -> None:
    tensors = [torch.tensor(p, dtype=torch.float64).float() for p in parts]
    whole = statistics([torch.cat(tensors)])
    merged = statistics([tensors[0]])
    for x in tensors[1:]:
        merged = merged.merge(statistics([x]))
    assert_same(whole, merged, rtol=1e-12)
    assert_same(whole, statistics(tensors).total(), rtol=1e-12)


@given(parts=parts, histogram=st.booleans())
def test_packing_loses_nothing(parts, histogram: bool) -> None:
    seen = statistics([torch.tensor(p, dtype=torch.float32) for p in parts], histogram=histogram)
    assert_same(seen, Statistics.unpack(seen.pack(), len(seen)))
    assert_same(seen, Statistics.cat([seen[i] for i in range(len(seen))]))


def test_unpacking_something_else_is_refused() -> None:
    with pytest.raises(LearnablesError, match="no packed statistics"):
        Statistics.unpack(torch.zeros(9), 1)


def test_merging_different_lists_is_refused() -> None:
    with pytest.raises(LearnablesError, match="not merged"):
        statistics([torch.zeros(1)]).merge(statistics([]))


def test_derived_numbers_are_those_of_torch() -> None:
    x = torch.randn(1000, dtype=torch.float64) + 3
    seen = statistics([x])
    torch.testing.assert_close(seen.norm()[0], x.norm())
    torch.testing.assert_close(seen.mean()[0], x.mean())
    torch.testing.assert_close(seen.std()[0], x.std(correction=0))
    torch.testing.assert_close(seen.rms()[0], x.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, *EIGHTHS[:2]], ids=str)
def test_below_is_the_share_that_a_cast_turns_into_zero(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = torch.randn(4096).mul(4).exp2() * torch.randn(4096).sign() * info.tiny * info.eps
    x[:100] = 0
    lost = ((x.to(dtype) == 0) & (x != 0)).sum().double() / (x != 0).sum()
    assert 0.1 < lost < 0.9
    torch.testing.assert_close(statistics([x]).below(dtype)[0], lost)
    small = (x.abs() < info.tiny).logical_and(x != 0).sum().double() / (x != 0).sum()
    torch.testing.assert_close(statistics([x]).below(dtype, normal=True)[0], small)


def test_below_counts_subnormals_where_the_bins_end() -> None:
    x = torch.tensor([1e-40, 1.0, 0.0, math.nan])
    assert statistics([x]).below(torch.bfloat16).item() == 0.5


def test_above_is_the_share_that_is_too_large() -> None:
    x = torch.tensor([1.0, 65504.0, 65536.0, 1e30, math.inf, 0.0])
    assert statistics([x]).above(torch.float16).item() == 0.5
    assert statistics([x.double() * 1e300]).above(torch.float32).item() == 1.0


def test_shares_need_the_histogram() -> None:
    with pytest.raises(LearnablesError, match="reads the histogram"):
        statistics([torch.ones(1)], histogram=False).below(torch.float16)


def test_edges_bound_the_bins() -> None:
    edges = bin_edges()
    assert edges[0] == 0
    assert edges[127] == 1
    assert edges[256] == math.inf
    for k in (1, 100, 127, 254):
        assert bin_of(edges[k].item()) == k
        assert bin_of(math.nextafter(edges[k].item(), 0.0)) == k - 1


@pytest.mark.usefixtures("forced")
def test_equal_numbers_are_summed_right() -> None:
    """Their rounding errors all point the same way."""
    x = torch.full((1_000_000,), 0.1)
    seen = statistics([x])
    torch.testing.assert_close(seen.sum[0], x.double().sum(), rtol=1e-6, atol=0)
    squares = x.double().square().sum()
    torch.testing.assert_close(seen.sum_of_squares[0], squares, rtol=1e-6, atol=0)
    torch.testing.assert_close(magnitudes([x]).norm[0], squares.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 0.0, math.nan])
def test_large_tensors_are_summed_right(scale: float) -> None:
    x = torch.randn(300_001) * scale
    x[::1000] = 0.0
    seen, quick, exact = statistics([x]), magnitudes([x]), x.double().nan_to_num(0.0)
    torch.testing.assert_close(seen.sum[0], exact.sum(), rtol=0, atol=1e-7 * exact.abs().sum())
    torch.testing.assert_close(seen.sum_of_squares[0], exact.square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(quick.norm[0], exact.norm(), rtol=1e-6, atol=0)
    for name in ("absmax", "min", "max", "nonfinite"):
        assert torch.equal(getattr(quick, name), getattr(seen, name)), name
    assert seen.zeros.item() == (x == 0).sum()


def test_backend_says_who_looks_and_why(kernel, monkeypatch) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    assert backend() == backend(torch.zeros(2).half())
    assert backend().name == "native"
    assert backend(torch.zeros(2, dtype=torch.int8)) == ("torch", "dtype torch.int8")
    monkeypatch.setenv(FORCE, "torch")
    assert backend() == ("torch", f"{FORCE}=torch")
    monkeypatch.setenv(FORCE, "fortran")
    with pytest.raises(LearnablesError, match="no backend has this name"):
        statistics([torch.zeros(2)])


def test_a_forced_kernel_that_is_not_there_is_an_error(monkeypatch) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    monkeypatch.setattr(native, "available", lambda: (False, "statistics.c was not built"))
    assert backend() == ("torch", "statistics.c was not built")
    monkeypatch.setenv(FORCE, "native")
    with pytest.raises(LearnablesError, match="forced, and cannot look"):
        statistics([torch.zeros(2)])


def test_rows_keep_their_order_when_backends_mix(kernel) -> None:
    mixed = [torch.full((n,), n, dtype=t) for n, t in enumerate(FLOATS + OTHERS[:4], start=1)]
    seen = statistics(mixed)
    for row, x in enumerate(mixed):
        assert_row(seen, row, values_of(x))


def test_without_the_synchronising_road_the_numbers_are_the_same() -> None:
    """What devices without a kernel of ours run, on the CPU."""
    x = torch.tensor([v for v in SPECIAL if abs(v) < 1e150 or not math.isfinite(v)])
    for part in (x, x.double(), x.half(), x[:0], x[x.isnan()], torch.arange(-5, 5)):
        bins = torch.zeros(BINS, dtype=torch.int64)
        seen = torch.stack([n.double() for n in statistics_torch._look_at_once(part, bins)])
        wanted = statistics([part])
        torch.testing.assert_close(
            seen, wanted.pack()[[1, 2, -3, -2, -1, 3, 4]] * torch.tensor([1, 1, 1, -1, 1, 1, 1])
        )
        torch.testing.assert_close(bins, wanted.histogram[0])


def test_a_row_of_nothing_finite_changes_nothing_when_merged() -> None:
    some, none = statistics([torch.randn(5)]), statistics([torch.tensor([math.nan])])
    merged = some.merge(none)
    assert merged.nonfinite.item() == 1
    assert merged.min.item() == some.min.item()
    assert merged.absmax.item() == some.absmax.item()
    assert math.isnan(none.mean().item())


def test_what_is_printed_is_a_line_per_row_and_no_histogram():
    seen = ln.statistics([torch.tensor([1.0, 2.0, 0.0, math.nan]), torch.zeros(0)])
    assert repr(seen).splitlines() == [
        "Statistics: 2 rows, histograms",
        "       count        mean         std         min         max     zeros nonfinite",
        "           4           1      0.8165           0           2         1         1",
        "           0         nan         nan         inf        -inf         0         0",
    ]
    many = repr(ln.statistics([torch.ones(1)] * 40, histogram=False)).splitlines()
    assert many[0] == "Statistics: 40 rows"
    assert (len(many), many[-1].strip()) == (33, "… 10 more")
    assert max(map(len, many)) <= 80
