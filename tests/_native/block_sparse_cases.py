"""Block-sparse products of any shape, drawn from a seed, by the native kernel and by its twin.

Also a script: ``python -m tests._native.block_sparse_cases 100`` walks through a hundred of them,
which ``test_block_sparse_memory.py`` does with every access to memory checked.
"""

import random
import sys

import torch
from torch import Tensor

from learnables._native import block_sparse as native
from learnables.sparse import Layout, reference
from learnables.sparse.layout import Index

SQUARE = (8, 16, 32, 64, 128)
SAMPLES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 23, 24, 25, 31, 100, 527, 528, 529, 700)
ROUND_OFF = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Case:
    """One drawn product: a layout, its tensors, an instruction set."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        made = torch.Generator().manual_seed(seed)
        side = chance.choice(SQUARE)
        odd = (chance.randint(1, 140), chance.randint(1, 140))
        p, q = chance.choice([(side, side), odd])
        out, inp = chance.randint(p, 4 * p + 3), chance.randint(q, 4 * q + 3)
        filled = torch.rand(-(-out // p), -(-inp // q), generator=made)
        self.layout = Layout(out, inp, (p, q), filled < chance.choice([0, 0.1, 0.3, 0.6, 1]))
        self.dtype = chance.choice(list(ROUND_OFF))
        self.level = chance.choice([native.BASELINE, native.AVX2, native.AVX512])
        samples = chance.choice(SAMPLES)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made).to(self.dtype)

        self.weight = draw(*self.layout.weight_shape)
        self.x, self.g = draw(samples, inp), draw(samples, out)
        self.bias = chance.choice([None, draw(out)])
        self.chance = chance

    def products(self, index: Index) -> list[Tensor | None]:
        """All three, by the native kernel; None where it refuses the index."""
        layout = self.layout
        return [
            native.product(self.x, self.weight, index, self.bias, layout.out_features, self.level),
            native.transposed_product(self.g, self.weight, index, layout.in_features, self.level),
            native.sampled_product(self.g, self.x, index, layout.block, self.level),
        ]

    def exact(self) -> list[Tensor]:
        """The same in float64, through the dense matrix."""
        x, weight, g = (t.double() for t in (self.x, self.weight, self.g))
        bias = None if self.bias is None else self.bias.double()
        layout, way = self.layout, {"way": "filled in"}
        return [
            reference.product(x, weight, layout.index, layout.out_features, bias, **way),
            reference.transposed_product(g, weight, layout.index, layout.in_features, **way),
            reference.sampled_product(g, x, layout.index, layout.block, **way),
        ]

    def damaged(self) -> Index:
        """Its index with one number overwritten, as a bad file has it."""
        index = self.layout.index
        name = self.chance.choice(index._fields)
        part = getattr(index, name).clone()
        if part.numel():
            at = self.chance.randrange(part.numel())
            part[at] = self.chance.choice([-1, 0, part.numel() + 7, 10**9, 2**62])
        return index._replace(**{name: part})


def check(seed: int) -> None:
    """The kernel gives what its twin gives, and survives a damaged index."""
    case = Case(seed)
    for ours, exact in zip(case.products(case.layout.index), case.exact(), strict=True):
        assert ours is not None
        assert ours.shape == exact.shape
        most = exact.abs().amax() if exact.numel() else 0.0
        unit = ROUND_OFF[case.dtype]
        assert ((ours.double() - exact).abs() <= unit * (exact.abs() + most) + unit).all()
    case.products(case.damaged())


if __name__ == "__main__":
    torch.set_num_threads(2)
    for seed in range(int(sys.argv[1])):
        check(seed)
    print("cases:", sys.argv[1])
