"""Block-sparse matrices: which blocks there are, and products whose cost is theirs alone."""

from learnables.sparse.layout import Layout
from learnables.sparse.masks import banded, butterfly, largest, n_of_m, random
from learnables.sparse.product import block_sparse_linear

__all__ = ["Layout", "banded", "block_sparse_linear", "butterfly", "largest", "n_of_m", "random"]
