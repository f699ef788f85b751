"""The errors this library raises, and the five-part sentence they share with audit findings."""

import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


def visible(text: str) -> str:
    r"""``text`` on one line, with everything that is not seen spelt out: ``\x1b``, ``\u202e``.

    For terminals, and the first step of most others. Unicode decides what is seen: controls, what
    overrides the direction of text, unpaired surrogates, what has no meaning and every space but
    the plain one are spelt.

    Example:
        >>> print(visible("a\x1b[31mb"))
        a\x1b[31mb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _spelt(ord(c)) for c in text)


def _spelt(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def lay_out(what: str, **parts: str) -> str:
    """Write ``what`` on one line, then each non-empty part indented below it.

    They name parameters, and a name may hold what commands a terminal: it is spelt out.
    """
    lines = [what, *(f"  {key}: {text}" for key, text in parts.items() if text)]
    return "\n".join(visible(part) for line in lines for part in line.split("\n"))


class LearnablesError(Exception):
    """Base class; catch this to catch everything we raise on purpose.

    Args:
        what: What happened, one sentence without advice.
        where: Qualified name of the parameter, e.g. ``blocks.3.attn.qkv.weight``.
        found: The shape, dtype or value that was seen.
        wanted: What would have been accepted.
        mend: One action that repairs it, as a call the reader can type.
    """

    def __init__(
        self, what: str, *, where: str = "", found: str = "", wanted: str = "", mend: str = ""
    ) -> None:
        self.what, self.where, self.found, self.wanted, self.mend = what, where, found, wanted, mend
        super().__init__(lay_out(what, where=where, found=found, wanted=wanted, mend=mend))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by parts, so that an error crosses process borders whole."""
        return (_rebuild, (type(self), self.what, self.where, self.found, self.wanted, self.mend))


def _rebuild(
    kind: type[LearnablesError], what: str, where: str, found: str, wanted: str, mend: str
) -> LearnablesError:
    return kind(what, where=where, found=found, wanted=wanted, mend=mend)


class ArgumentError(LearnablesError, TypeError):
    """What was handed over is of another kind than the argument takes."""


class ShapeError(LearnablesError, ValueError):
    """A tensor does not have the shape the operation needs."""


class SelectionError(LearnablesError, LookupError):
    """A selector picks nothing, or not what the call needs."""


class PolicyError(LearnablesError, ValueError):
    """What was declared about a parameter is wrong, or two declarations disagree."""


class ConstraintError(LearnablesError, ValueError):
    """A set, a view or a mode does not fit the parameter it is put on."""


class LayoutError(LearnablesError, ValueError):
    """A mask, a density, a block size or an index that describes no block-sparse matrix."""


class CheckpointError(LearnablesError, RuntimeError):
    """A file cannot be saved or does not fit what it is loaded into."""


class RunError(LearnablesError, RuntimeError):
    """A run database is missing, damaged, of a newer version, or does not hold what is asked."""


class DataError(LearnablesError, RuntimeError):
    """A data set is unknown, missing or damaged."""


class MissingExtraError(LearnablesError, ImportError):
    """An optional package is needed and not installed."""


class AuditFailed(LearnablesError, AssertionError):  # noqa: N818 - reads as what happened
    """An audit ended with findings of severity error."""


class LearnablesWarning(UserWarning):
    """Something works, but probably not as meant; same five parts as an error."""


def warn(what: str, *, where: str = "", found: str = "", wanted: str = "", mend: str = "") -> None:
    """Warn in the five-part form, pointing at the nearest line outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    text = lay_out(what, where=where, found=found, wanted=wanted, mend=mend)
    warnings.warn(text, LearnablesWarning, stacklevel=level - 1)


def need_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """Build the error for an optional ``package`` that ``pip install learnables[extra]`` brings."""
    return MissingExtraError(
        f"{purpose} needs the package {package}, which is not installed",
        found=f"import {package} failed",
        wanted=f"the extra [{extra}]",
        mend=f"pip install 'learnables[{extra}]'",
    )
