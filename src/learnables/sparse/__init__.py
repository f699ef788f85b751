"""Block-sparse matrices: which blocks there are, and products whose cost is theirs alone."""

from learnables.sparse.evolution import Change, Evolution, evolve
from learnables.sparse.kernels import Backend, backend
from learnables.sparse.layout import Layout
from learnables.sparse.masks import banded, butterfly, largest, n_of_m, random
from learnables.sparse.product import block_sparse_linear
from learnables.sparse.topology import SET, Prune, RigL, Rule

__all__ = [
    "SET",
    "Backend",
    "Change",
    "Evolution",
    "Layout",
    "Prune",
    "RigL",
    "Rule",
    "backend",
    "banded",
    "block_sparse_linear",
    "butterfly",
    "evolve",
    "largest",
    "n_of_m",
    "random",
]
