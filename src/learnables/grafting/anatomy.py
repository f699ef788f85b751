"""What a family of models says about itself."""

from dataclasses import dataclass, replace
from typing import final


@final
@dataclass(frozen=True)
class Anatomy:
    """Where things lie in a model.

    Attributes:
        blocks: Path or glob of the list of blocks, such as ``encoder.layer``.
        width: Size D of the token vectors (B, N, D) that go through them; of the last stage, where
            stages differ.
        prefix: How many class and register tokens are in front of the others.
        attention: Glob of the modules that take an additive mask of attention, or empty.
        entrance: Path of the module that takes ``input_ids`` and a cache, in decoders; tokens are
            put in front of what its embedding makes, so that positions, the causal mask and the
            cache count them. None where tokens are put in before the first block.
        embedding: Path of that embedding.
        refuses: Why no tokens can be put in, or empty.
    """

    blocks: str
    width: int
    prefix: int = 0
    attention: str = ""
    entrance: str | None = None
    embedding: str = ""
    refuses: str = ""

    def inside(self, path: str) -> "Anatomy":
        """The same for the model that has this one at ``path``."""
        if not path:
            return self
        front = f"{path}."
        return replace(
            self,
            blocks=front + self.blocks,
            attention=self.attention and front + self.attention,
            entrance=None if self.entrance is None else (front + self.entrance).rstrip("."),
            embedding=self.embedding and front + self.embedding,
        )
