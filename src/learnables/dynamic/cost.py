"""Which of the exact forms of a generated weight's product is the quickest for a shape.

Shapes: B samples, T rows of each, I in features, O out features, K coefficients of each sample.
"""

FORMS = ("materialised", "chunked", "reassociated")
"""The ways to compute the same thing; see `learnables.dynamic.mix`."""

# Nanoseconds of one core of an AMD EPYC with AVX-512 for one unit of each of `work`, forward and
# backward together. Fitted by `benchmarks/dynamic.py --fit`, least squares of relative errors. Only
# their ratios decide; those hold on other machines as far as arithmetic and memory grow alike.
_COST = {
    "materialised": {
        "calls": 73_000.0,
        "multiply": 0.038,
        "apply": 0.028,
        "entries": 1.2,
        "entries beyond the cache": 3.9,
        "bank": 0.4,
        "samples": 44.0,
        "rows": 2.2,
    },
    "chunked": {
        "calls": 116_000.0,
        "rounds": 28_000.0,
        "multiply": 0.033,
        "apply": 0.035,
        "entries": 1.2,
        "bank": 0.7,
        "samples": 760.0,
        "rows": 1.7,
        "outputs": 0.55,
    },
    "reassociated": {
        "rounds": 190_000.0,
        "multiply": 0.030,
        "entries": 4.0,
        "bank": 0.75,
        "rows": 0.6,
    },
}
# A convolution in as many groups as samples brings each sample's kernel into another order.
_GROUPED_ENTRY, _GROUPED_BEYOND = 3.3, 11.0
_CACHED = 1 << 21  # entries, 8 MiB of float32, that come back from a cache


def estimate(form: str, B: int, T: int, I: int, O: int, K: int) -> float:  # noqa: E741
    """What ``form`` costs forward and backward, in nanoseconds of the core it was fitted on."""
    cost = _COST[form]
    return sum(cost[name] * amount for name, amount in work(form, B, T, I, O, K).items())


def work(form: str, B: int, T: int, I: int, O: int, K: int) -> dict[str, float]:  # noqa: E741
    """What ``form`` has to do, forward and backward, by kind of work.

    * ``multiply``: multiply-adds that generate, thrice B·K·I·O, once more where weights are made
      again; re-associated, all of them, thrice B·T·K·I·O.
    * ``apply``: multiply-adds of the inputs with the generated weights, thrice B·T·I·O.
    * ``entries``: what goes out to memory and comes back: the generated weights, or the products
      of coefficients and inputs.
    * ``bank``, ``rows``: entries of the matrices, as often as they are read, and of the inputs and
      outputs.
    * ``outputs``: entries of the output, once for each piece of the weights that adds to them.
    * ``samples``, ``rounds``, ``calls``: what is done once for each, whatever its size.
    """
    generate, apply, bank = float(B) * K * I * O, float(B) * T * I * O, float(K) * I * O
    rows = float(B) * T * (I + O)
    if form == "materialised":
        entries = float(B) * I * O
        return {
            "calls": 1,
            "multiply": 3 * generate,
            "apply": 3 * apply,
            "entries": entries,
            "entries beyond the cache": max(0.0, entries - _CACHED),
            "bank": bank,
            "samples": B,
            "rows": rows,
        }
    if form == "chunked":
        whole = by_samples(B, T, I, O, K)
        rounds = -(-B // samples_of(B, I, O)) if whole else -(-I // chunk_of(B, I, O))
        return {
            "calls": 1,
            "rounds": rounds,
            "multiply": 4 * generate,
            "apply": 3 * apply,
            "entries": float(B) * I * O,
            "bank": bank * rounds if whole else bank,
            "samples": B if whole else B * rounds,
            "rows": rows,
            "outputs": 0.0 if whole else float(B) * T * O * rounds,
        }
    return {
        "rounds": -(-B // tile_of(T, I, K)),
        "multiply": 3 * T * generate,
        "entries": float(B) * T * K * I,
        "bank": bank,
        "rows": rows,
    }


def quickest(forms: tuple[str, ...], B: int, T: int, I: int, O: int, K: int) -> str:  # noqa: E741
    """The form with the lowest `estimate`.

    Example:
        >>> quickest(FORMS, 256, 1, 256, 256, 8), quickest(FORMS, 256, 64, 256, 256, 8)
        ('reassociated', 'chunked')
        >>> quickest(FORMS, 8, 16, 64, 64, 8)
        'materialised'
    """
    return min(forms, key=lambda form: estimate(form, B, T, I, O, K))


def quickest_convolution(B: int, T: int, C: int, taps: int, O: int, K: int) -> str:  # noqa: E741
    """Whether kernels are mixed first, ``"materialised"``, or what they give, ``"reassociated"``.

    Args:
        B: Samples.
        T: Places that the kernel comes to.
        C: Channels in.
        taps: Places that it covers at a time.
        O: Channels out.
        K: Kernels to mix.

    Example:
        >>> quickest_convolution(64, 4, 64, 9, 64, 8), quickest_convolution(2, 4096, 64, 9, 64, 8)
        ('reassociated', 'materialised')
    """
    entries = float(B) * C * taps * O
    mixed_first = estimate("materialised", B, T, C * taps, O, K)
    mixed_first += _GROUPED_ENTRY * entries + _GROUPED_BEYOND * max(0.0, entries - _CACHED / 2)
    mixed_last = work("reassociated", B, T, C * taps, O, K)
    mixed_last["entries"] /= taps  # the images are multiplied out, not what the kernel sees of them
    cost = _COST["reassociated"]
    return min(
        ("materialised", mixed_first),
        ("reassociated", sum(cost[name] * amount for name, amount in mixed_last.items())),
        key=lambda pair: pair[1],
    )[0]


def chunk_of(B: int, I: int, O: int) -> int:  # noqa: E741
    """How many input features' weights of all samples are generated at once: about 1 MiB."""
    return min(I, max(1, (1 << 18) // max(B * O, 1), -(-I // 64)))


def samples_of(B: int, I: int, O: int) -> int:  # noqa: E741
    """How many samples' whole weights are generated at once: about 1 MiB."""
    return min(max(B, 1), max(1, (1 << 18) // (I * O), -(-B // 64)))


def by_samples(B: int, T: int, I: int, O: int, K: int) -> bool:  # noqa: E741
    """Whether to make whole weights of some samples rather than some rows of all weights.

    The one reads all matrices A in every round, the other adds to all outputs in every round.
    """
    reads = K * I * O * -(-B // samples_of(B, I, O))
    return reads < B * T * O * -(-I // chunk_of(B, I, O))


def tile_of(T: int, I: int, K: int) -> int:  # noqa: E741
    """How many samples are multiplied out at once: at least 64 rows, at most about 4 MiB."""
    return max(1, -(-64 // max(T, 1)), (1 << 20) // max(T * I * K, 1))
