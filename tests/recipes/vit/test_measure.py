import pytest
import torch
from torch import nn

from learnables.models.vit import ViT, ViTConfig
from learnables.recipes.vit.crew import Crew
from learnables.recipes.vit.data import Split
from learnables.recipes.vit.measure import (
    measure,
    mistakes,
    pictures_of_weights,
    position_similarity,
)

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Class = brightness in four steps; sure where bright."""

    def forward(self, x):
        level = x.mean((1, 2, 3)) * 3.999
        scores = torch.zeros(len(x), 4)
        scores[torch.arange(len(x)), level.long()] = 1 + level
        return scores


def split(count=40):
    images = torch.arange(count, dtype=torch.uint8).mul(255 // count)
    labels = (images.long() * 4 // 256).clone()
    labels[[3, 30]] = 2 - labels[[3, 30]]
    return Split(images.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), labels)


def test_confusion_counts_every_image_once_in_any_number_of_processes():
    alone = measure(Brightness(), split(), 4, Crew(CPU), batch=7)
    assert int(alone.confusion.sum()) == 40
    assert int(alone.confusion.diagonal().sum()) == 38
    assert alone.accuracy == pytest.approx(38 / 40)

    class Third(Crew):
        def add(self, x):
            return x

    parts = [measure(Brightness(), split(), 4, Third(CPU, rank, 3)).confusion for rank in range(3)]
    torch.testing.assert_close(sum(parts), alone.confusion)


def test_mistakes_come_with_the_most_confident_first():
    images = split()
    measured = measure(Brightness(), images, 4, Crew(CPU))
    pictures, labels = mistakes(measured, images, ("a", "b", "c", "d"))
    assert pictures.shape == (2, 4, 4, 1)
    assert int(pictures[0, 0, 0, 0]) > int(pictures[1, 0, 0, 0])
    assert labels[1].startswith("c taken for a (")


def test_training_mode_is_kept():
    model = Brightness().train()
    measure(model, split(), 4, Crew(CPU))
    assert model.training


def test_neighbours_on_a_smooth_table_look_alike():
    model = ViT(ViTConfig(image_size=(8, 12), channels=1, classes=2, patch_size=2, dim=8))
    maps = position_similarity(model)
    assert maps.shape == (4, 6, 4, 6)
    torch.testing.assert_close(maps[2, 3, 2, 3], torch.tensor(1.0))
    table = model.positions.table[0].view(4, 6, 8)
    expected = nn.functional.cosine_similarity(table[1, 2], table[3, 5], dim=0)
    torch.testing.assert_close(maps[1, 2, 3, 5], expected)


def test_first_and_last_matrix_of_each_role_is_pictured():
    model = ViT(
        ViTConfig(image_size=(8, 8), channels=1, classes=3, patch_size=2, dim=100, heads=4, depth=3)
    )
    pictures = dict(pictures_of_weights(model, limit=99))
    names = {title.removeprefix("weight ").partition("[")[0] for title in pictures}
    every = {name for name, p in model.named_parameters() if sum(n > 1 for n in p.shape) == 2}
    assert names == {name for name in every if not name.startswith("blocks.1.")}
    head = model.get_parameter("head.weight").detach()
    assert torch.equal(pictures["weight head.weight[::1, ::2]"], head[:, ::2])
    table = model.get_parameter("positions.table").detach()[0]
    assert torch.equal(pictures["weight positions.table[::1, ::2]"], table[:, ::2])
    assert all(max(picture.shape) <= 64 for picture in pictures.values())
    assert len(list(pictures_of_weights(model))) <= 12
