"""Augmentation of a whole batch of tensors at once, with its own chance for every image.

Chance and work are apart: `Augmentation.draw` draws all numbers for a *global* batch on the CPU,
`augment` applies a slice of them on any device. So the images of step s depend on (seed, s) alone,
whatever the number of processes, of micro-batches, or of interruptions.

B batch · C channels · H, W height and width · K classes
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Padding: TypeAlias = Literal["zeros", "border", "reflection"]


@dataclass(frozen=True)
class Augmentation:
    """How strongly images are changed; the default changes nothing.

    Attributes:
        rotate: Largest angle to either side, in degrees.
        scale: Largest relative change of size: 0.1 draws from [0.9, 1.1].
        shear: Largest shear, in degrees.
        shift: Largest shift, as a share of height and width.
        flip: Whether half of the images are mirrored left to right.
        erase: Chance that a rectangle of 2–20 % of the image is set to the mean.
        mixup: Parameter of the Beta distribution of the mixing weight; 0 is off.
        cutmix: The same for the share of the image that is not pasted over; 0 is off.
        mix_chance: Chance that an image is mixed at all, by one of the two that are on.
        padding: What lies beyond the border of a moved image.

    Source:
        Zhong et al., *Random Erasing*, arXiv:1708.04896; Zhang et al., *mixup*, arXiv:1710.09412;
        Yun et al., *CutMix*, arXiv:1905.04899.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    flip: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_chance: float = 0.5
    padding: Padding = "zeros"

    def draw(self, count: int, rng: np.random.Generator) -> "Draws":
        """Draw what happens to each of ``count`` images; the same ``rng`` draws the same."""
        uniform = rng.uniform(-1.0, 1.0, size=(6, count))
        angle, shear = math.radians(self.rotate) * uniform[0], math.radians(self.shear) * uniform[1]
        size, flipped = 1.0 + self.scale * uniform[2], rng.random(count) < 0.5 * self.flip
        a, b, c, d = np.cos(angle), -np.sin(angle + shear), np.sin(angle), np.cos(angle + shear)
        mirror = np.where(flipped, -1.0, 1.0)
        # affine_grid maps output to input positions in [-1, 1]: a shift by the width is 2.
        x_row = [mirror * a / size, b / size, 2 * self.shift * uniform[3]]
        y_row = [mirror * c / size, d / size, 2 * self.shift * uniform[4]]
        theta = np.stack([*x_row, *y_row])
        erased = _boxes(rng, rng.uniform(0.02, 0.2, count), rng.random(count) < self.erase)

        on = [alpha for alpha in (self.mixup, self.cutmix) if alpha > 0]
        mixed = rng.random(count) < (self.mix_chance if on else 0.0)
        cut = np.full(count, self.cutmix > 0)
        if len(on) == 2:
            cut = rng.random(count) < 0.5
        keep_mixup = rng.beta(self.mixup or 1.0, self.mixup or 1.0, count)
        keep_cutmix = rng.beta(self.cutmix or 1.0, self.cutmix or 1.0, count)
        pasted = _boxes(rng, 1.0 - keep_cutmix, mixed & cut, aspect=False)
        return Draws(
            moves=_is_moving(self),
            erases=self.erase > 0,
            mixes=bool(on),
            padding=self.padding,
            theta=_tensor(theta.T).view(count, 2, 3),
            erased=_tensor(erased.T),
            keep=_tensor(np.where(mixed & ~cut, keep_mixup, 1.0)),
            pasted=_tensor(pasted.T),
        )


@dataclass(frozen=True, eq=False)
class Draws:
    """What happens to each image of a batch; boxes are (top, bottom, left, right) in [0, 1].

    Attributes:
        moves: Whether any image is moved.
        erases: Whether any image may lose a rectangle.
        mixes: Whether images may be mixed.
        padding: What lies beyond the border of a moved image.
        theta: Affine maps from output to input positions. Shape ``(B, 2, 3)``.
        erased: Boxes that are set to the mean; empty where nothing is. Shape ``(B, 4)``.
        keep: Mixup's weight of the image itself, 1 where it is not mixed. Shape ``(B,)``.
        pasted: Boxes that show the partner; empty where nothing is pasted. Shape ``(B, 4)``.
    """

    moves: bool
    erases: bool
    mixes: bool
    padding: Padding
    theta: Tensor
    erased: Tensor
    keep: Tensor
    pasted: Tensor

    def part(self, rows: slice, device: torch.device | str = "cpu") -> "Draws":
        """The draws of the images in ``rows``, on ``device``."""
        return Draws(
            self.moves,
            self.erases,
            self.mixes,
            self.padding,
            *(t[rows].to(device) for t in (self.theta, self.erased, self.keep, self.pasted)),
        )


def augment(
    x_BCHW: Tensor, y_B: Tensor, draws: Draws, *, classes: int, mean_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Move, erase and mix the images of a batch as drawn.

    Image 2k is mixed with image 2k + 1 of the same batch and the other way round, so batches that
    are cut at even places, over processes or micro-batches, mix the same pairs.

    Args:
        x_BCHW: Images in [0, 1], 0 is black. Any floating dtype.
        y_B: Labels. Shape ``(B,)``.
        draws: From `Augmentation.draw`, for B images.
        classes: K, the number of classes.
        mean_C: What erased pixels are set to. Shape ``(C,)``.

    Returns:
        Images of the same shape, and the share of each class in each image, ``(B, K)``.
    """
    target_BK = F.one_hot(y_B, classes).to(x_BCHW.dtype)
    height, width = x_BCHW.shape[-2:]
    if draws.moves:
        grid = F.affine_grid(draws.theta.to(x_BCHW.dtype), list(x_BCHW.shape), align_corners=False)
        x_BCHW = F.grid_sample(x_BCHW, grid, padding_mode=draws.padding, align_corners=False)
    if draws.erases:
        mean_C11 = mean_C.to(x_BCHW.dtype)[:, None, None]
        x_BCHW = torch.where(_inside(draws.erased, height, width), mean_C11, x_BCHW)
    if draws.mixes:
        partner = torch.arange(len(y_B), device=y_B.device) ^ 1
        partner[partner == len(y_B)] = len(y_B) - 1
        pasted_B1HW = _inside(draws.pasted, height, width)
        keep_B = draws.keep.to(x_BCHW.dtype)
        keep_B111 = keep_B[:, None, None, None]
        both = keep_B111 * x_BCHW + (1 - keep_B111) * x_BCHW[partner]
        x_BCHW = torch.where(pasted_B1HW, x_BCHW[partner], both)
        own_B1 = (keep_B * (1 - pasted_B1HW.to(keep_B.dtype).mean((1, 2, 3))))[:, None]
        target_BK = own_B1 * target_BK + (1 - own_B1) * target_BK[partner]
    return x_BCHW, target_BK


def _inside(box_B4: Tensor, height: int, width: int) -> Tensor:
    """Which pixels have their centre in the box. Shape ``(B, 1, H, W)``, bool."""
    rows = (torch.arange(height, device=box_B4.device) + 0.5) / height
    columns = (torch.arange(width, device=box_B4.device) + 0.5) / width
    top, bottom, left, right = box_B4[:, :, None].unbind(1)  # each (B, 1)
    in_rows = (rows >= top) & (rows < bottom)  # (B, H)
    in_columns = (columns >= left) & (columns < right)  # (B, W)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _boxes(
    rng: np.random.Generator, area: np.ndarray, wanted: np.ndarray, *, aspect: bool = True
) -> np.ndarray:
    """Boxes of the given share of the image around uniform centres, cut at the border. (4, B)."""
    count = len(area)
    ratio = np.exp(rng.uniform(-1.2, 1.2, count)) if aspect else np.ones(count)  # 0.3 … 3.3
    half_height = np.sqrt(area * ratio) / 2 * wanted
    half_width = np.sqrt(area / ratio) / 2 * wanted
    y, x = rng.random(count), rng.random(count)
    box = np.stack([y - half_height, y + half_height, x - half_width, x + half_width])
    return box.clip(0.0, 1.0)


def _is_moving(a: Augmentation) -> bool:
    return bool(a.rotate or a.scale or a.shear or a.shift or a.flip)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
