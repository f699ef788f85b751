"""What a family of models says about itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Anatomy:
    """Where a model's stack of blocks lies.

    Attributes:
        blocks: Path of the list of blocks, such as ``encoder.layer``.
        width: Size D of the token vectors (B, N, D) that go through them.
    """

    blocks: str
    width: int
