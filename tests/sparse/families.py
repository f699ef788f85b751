"""One layout of every family of masks, at sizes that are and are not multiples of the block."""

import torch

from learnables.sparse import Layout, banded, butterfly, n_of_m, random

SIZES = {  # name: (out_features, in_features, block)
    "whole": (12, 8, 4),
    "rectangular": (9, 8, (3, 2)),
    "ragged": (10, 14, 4),
    "single": (5, 6, (5, 6)),
}


def empty_row_and_column(rows, columns):
    mask = torch.ones(rows, columns)
    mask[0], mask[:, -1] = 0, 0
    return mask


def one_block(rows, columns):
    mask = torch.zeros(rows, columns)
    mask[-1, 0] = 1
    return mask


MASKS = {
    "random": lambda R, C: random(R, C, 0.5),
    "banded": lambda R, C: banded(R, C, 0.4),
    "butterfly": butterfly,
    "2:4": lambda R, C: n_of_m(R, C, 2, 4),
    "full": torch.ones,
    "nothing": torch.zeros,
    "one block": one_block,
    "empty row and column": empty_row_and_column,
}


def layout_of(mask: str, size: str) -> Layout:
    out_features, in_features, block = SIZES[size]
    p, q = (block, block) if isinstance(block, int) else block
    grid = MASKS[mask](-(-out_features // p), -(-in_features // q))
    return Layout(out_features, in_features, block, grid)
