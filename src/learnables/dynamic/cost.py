"""Which of the exact forms of a generated weight's product is the quickest for a shape.

Shapes: B samples, T rows of each, I in features, O out features, K coefficients of each sample.
"""

FORMS = ("materialised", "chunked", "reassociated")
"""The ways to compute the same thing; see `learnables.dynamic.mix`."""

# One multiply-add of a large matrix product is 1; entries that are written and read back cost as
# many, forward and backward together. Fitted on one core of an AMD EPYC by benchmarks/dynamic.py.
_MATERIALISED_ENTRY = 400.0
_CHUNKED_ENTRY = 170.0
_REASSOCIATED_ENTRY = 50.0
_CALL = 2e6  # what one more round of a loop costs


def estimate(form: str, B: int, T: int, I: int, O: int, K: int) -> float:  # noqa: E741
    """What ``form`` costs forward and backward, in multiply-adds of a large matrix product.

    Generating is B·K·I·O each way and applying B·T·I·O; re-associated, everything is B·T·K·I·O.
    Beside the arithmetic, what counts is how many entries go out to memory and come back: the
    generated weights, or the products of coefficients and inputs.
    """
    generate, apply = float(B) * K * I * O, float(B) * T * I * O
    if form == "materialised":
        return 3 * generate + 3 * apply + _MATERIALISED_ENTRY * B * I * O
    if form == "chunked":
        rounds = 2 * -(-I // chunk_of(B, I, O))
        return 4 * generate + 3 * apply + _CHUNKED_ENTRY * B * I * O + _CALL * rounds
    rounds = 2 * -(-B // tile_of(T, I, K))
    return 3 * T * generate + _REASSOCIATED_ENTRY * B * T * K * I + _CALL * rounds


def quickest(forms: tuple[str, ...], B: int, T: int, I: int, O: int, K: int) -> str:  # noqa: E741
    """The form with the lowest `estimate`.

    Example:
        >>> quickest(FORMS, 256, 1, 256, 256, 8), quickest(FORMS, 256, 64, 256, 256, 8)
        ('reassociated', 'chunked')
    """
    return min(forms, key=lambda form: estimate(form, B, T, I, O, K))


def chunk_of(B: int, I: int, O: int) -> int:  # noqa: E741
    """How many input features' weights of all samples are generated at once: about 1 MiB."""
    return min(I, max(1, (1 << 18) // max(B * O, 1), -(-I // 64)))


def tile_of(T: int, I: int, K: int) -> int:  # noqa: E741
    """How many samples are multiplied out at once: at least 64 rows, at most about 4 MiB."""
    return max(1, -(-64 // max(T, 1)), (1 << 20) // max(T * I * K, 1))
