import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from learnables.recipes.vit.augment import Augmentation, augment

MEAN = torch.tensor([0.25, 0.75])


def images(count=8, size=(9, 7)):
    return torch.rand(count, 2, *size, generator=torch.Generator().manual_seed(0))


def run(recipe, x, seed=0, y=None):
    y = torch.arange(len(x)) % 3 if y is None else y
    return augment(x, y, recipe.draw(len(x), np.random.default_rng(seed)), classes=3, mean_C=MEAN)


def test_default_changes_nothing():
    x = images()
    out, target = run(Augmentation(), x)
    torch.testing.assert_close(out, x, rtol=0, atol=0)
    torch.testing.assert_close(target, F.one_hot(torch.arange(8) % 3, 3).float())


def test_every_image_gets_its_own_draw_and_the_same_seed_the_same():
    recipe = Augmentation(rotate=20, scale=0.2, shear=10, shift=0.1, flip=True, erase=0.5)
    x = images(1).expand(16, -1, -1, -1)
    out, _ = run(recipe, x)
    assert len({tuple(image.flatten().tolist()) for image in out}) == 16
    torch.testing.assert_close(run(recipe, x)[0], out, rtol=0, atol=0)
    assert not torch.equal(run(recipe, x, seed=1)[0], out)


def test_flip_mirrors_left_to_right_and_half_of_them():
    x = images(400)
    out, _ = run(Augmentation(flip=True), x)
    mirrored = (out - x.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    kept = (out - x).abs().amax((1, 2, 3)) < 1e-5
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_shift_moves_by_whole_pixels_as_slicing_does(padding):
    recipe = Augmentation(shift=1.0, padding=padding)
    x = images(1, (8, 8))
    draws = recipe.draw(1, np.random.default_rng(0))
    theta = torch.tensor([[[1.0, 0.0, 2 * 3 / 8], [0.0, 1.0, -2 * 2 / 8]]])  # 3 right, 2 up
    draws = type(draws)(**{**vars(draws), "theta": theta})
    out, _ = augment(x, torch.zeros(1, dtype=torch.long), draws, classes=1, mean_C=MEAN)
    torch.testing.assert_close(out[..., 2:, :5], x[..., :6, 3:], atol=1e-5, rtol=0)
    if padding == "zeros":
        assert not out[..., :2, :].any()


def test_rotation_by_a_right_angle_agrees_with_rot90():
    recipe = Augmentation(rotate=90)

    class Extreme:
        """A generator that always draws the largest angle, and nothing else."""

        def __getattr__(self, name):
            return getattr(np.random.default_rng(0), name)

        def uniform(self, low, high, size):
            return np.array([np.ones(1)] + [np.zeros(1)] * 5) if size == (6, 1) else np.zeros(size)

    x = images(1, (6, 6))
    draws = recipe.draw(1, Extreme())
    out, _ = augment(x, torch.zeros(1, dtype=torch.long), draws, classes=1, mean_C=MEAN)
    turned = [torch.rot90(x, k, (2, 3)) for k in (1, 3)]
    assert min((out - t).abs().max() for t in turned) < 1e-4


@pytest.mark.parametrize("field", ["rotate", "scale", "shear", "shift"])
def test_strength_bounds_what_is_drawn(field):
    bound = {"rotate": 30.0, "scale": 0.3, "shear": 20.0, "shift": 0.25}[field]
    theta = Augmentation(**{field: bound}).draw(500, np.random.default_rng(0)).theta
    a, c = theta[:, 0, 0], theta[:, 1, 0]
    size = 1 / torch.hypot(a, c)
    angle = torch.atan2(c, a).abs() * 180 / math.pi
    shift = theta[:, :, 2].abs().amax(1) / 2
    limits = {"rotate": (angle, bound), "scale": ((size - 1).abs(), bound), "shift": (shift, bound)}
    for name, (values, limit) in limits.items():
        assert values.max() <= (limit if name == field else 0) + 1e-4
        assert name != field or values.max() > 0.9 * limit


def test_erased_rectangle_has_the_mean_and_the_drawn_size():
    x = images(600, (20, 20))
    out, _ = run(Augmentation(erase=1.0), x)
    changed = (out != x).any(1)
    assert (out.transpose(0, 1)[:, changed] == MEAN[:, None]).all()
    share = changed.float().mean((1, 2))
    assert share.max() <= 0.25  # 0.2, plus what pixel centres add
    assert share.mean() > 0.03
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert (rows * columns == changed.sum((1, 2))).all()  # rectangles


def test_mixup_is_the_weighted_sum_of_neighbours_and_their_labels():
    x = images(6)
    recipe = Augmentation(mixup=1.0, mix_chance=1.0)
    draws = recipe.draw(6, np.random.default_rng(3))
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    out, target = augment(x, y, draws, classes=3, mean_C=MEAN)
    for i, partner in enumerate([1, 0, 3, 2, 5, 4]):
        keep = draws.keep[i]
        torch.testing.assert_close(out[i], keep * x[i] + (1 - keep) * x[partner])
        expected = keep * F.one_hot(y[i], 3) + (1 - keep) * F.one_hot(y[partner], 3)
        torch.testing.assert_close(target[i], expected)


def test_cutmix_labels_are_the_shares_of_the_pixels():
    x = torch.stack([torch.full((2, 12, 12), float(i)) for i in range(8)])
    y = torch.arange(8)
    draws = Augmentation(cutmix=1.0, mix_chance=1.0).draw(8, np.random.default_rng(0))
    out, target = augment(x, y, draws, classes=8, mean_C=MEAN)
    for i in range(8):
        for label in (i, i ^ 1):
            share = (out[i, 0] == label).float().mean()
            torch.testing.assert_close(target[i, label], share)
    assert (target.diagonal() < 1).any()


def test_labels_of_any_mixture_add_up_to_one_and_some_images_stay():
    recipe = Augmentation(mixup=0.4, cutmix=1.0, mix_chance=0.6)
    x = images(301)  # odd: the last image has no partner
    out, target = run(recipe, x)
    torch.testing.assert_close(target.sum(1), torch.ones(301))
    kept = (out == x).flatten(1).all(1).float().mean()
    assert 0.3 < kept < 0.6


def test_parts_of_a_batch_are_augmented_as_in_the_whole():
    recipe = Augmentation(rotate=9, shift=0.1, flip=True, erase=0.5, mixup=0.5, cutmix=0.5)
    x, y = images(12), torch.arange(12) % 3
    draws = recipe.draw(12, np.random.default_rng(0))
    whole = augment(x, y, draws, classes=3, mean_C=MEAN)
    for rows in (slice(0, 4), slice(4, 12)):
        part = augment(x[rows], y[rows], draws.part(rows), classes=3, mean_C=MEAN)
        torch.testing.assert_close(part[0], whole[0][rows])
        torch.testing.assert_close(part[1], whole[1][rows])
