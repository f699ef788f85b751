"""What an alarm says: the five parts of every message here, with the step and the rank."""

from dataclasses import dataclass

from learnables.errors import lay_out, visible


@dataclass(frozen=True)
class Alarm:
    """Something in a running training that a person would want to know now.

    Attributes:
        kind: Name of the pattern, e.g. ``"non-finite"``.
        severity: ``"error"`` or ``"warning"``.
        step: Optimizer step at which it was seen.
        name: Qualified name of the parameter; empty where the whole run is meant.
        rank: Rank that saw it; None where the numbers are those of all ranks together.
        what: One sentence.
        found: The number that was seen.
        wanted: What would have been expected.
        mend: What to type or look at.
    """

    kind: str
    severity: str
    step: int
    name: str
    what: str
    found: str = ""
    wanted: str = ""
    mend: str = ""
    rank: int | None = None

    def parts(self) -> dict[str, str]:
        """The five parts, as the errors of this package take them; each is one line to be seen."""
        where = f"{self.name or 'the run'}, step {self.step}"
        where += f", rank {self.rank}" if self.rank is not None else ""
        parts = {
            "what": f"{self.kind}: {self.what}",
            "where": where,
            "found": self.found,
            "wanted": self.wanted,
            "mend": self.mend,
        }
        return {part: visible(text) for part, text in parts.items()}

    def __str__(self) -> str:
        """The message in five parts."""
        return lay_out(**self.parts())
