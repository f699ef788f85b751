"""What a trained model gets right and wrong, as numbers and pictures."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from learnables._torch import gather
from learnables.entries import Entry, entries
from learnables.models.vit import ViT
from learnables.recipes.vit.crew import Crew
from learnables.recipes.vit.data import Split


@dataclass(frozen=True, eq=False)
class Measured:
    """How a model does on some images.

    Attributes:
        confusion: Row = true class, column = predicted class, entry = images. Shape ``(K, K)``.
        predicted: Predicted class of the images that this process saw. Shape ``(n,)``.
        scores: Largest softmax probability of each. Shape ``(n,)``.
        rows: Which images those were. Shape ``(n,)``.
    """

    confusion: Tensor
    predicted: Tensor
    scores: Tensor
    rows: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images whose class is right."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum())


@torch.no_grad()  # not inference_mode, in which FSDP2 would gather what no later backward may use
def measure(
    model: nn.Module, split: Split, classes: int, crew: Crew, batch: int = 1000
) -> Measured:
    """Run a model over all images; each process takes its share.

    Args:
        model: Takes images in [0, 1]. Its training mode is kept.
        split: The images.
        classes: K.
        crew: Who works; all processes must call.
        batch: Images at a time.
    """
    was_training = model.training
    model.eval()
    rows = torch.arange(crew.rank, len(split), crew.size)
    # Each process calls the model equally often, as FSDP2 gathers its parameters in each call.
    share = -(-len(split) // crew.size)
    filled = torch.cat([rows, rows.new_zeros(share - len(rows))])
    predicted, best = [torch.empty(0, dtype=torch.long)], [torch.empty(0)]
    for part in torch.split(filled, batch):
        x = split.images[part.to(split.images.device)].to(crew.device).float() / 255
        probability, label = model(x).float().softmax(1).max(1)
        predicted.append(label.cpu())
        best.append(probability.cpu())
    model.train(was_training)
    if isinstance(model, FSDPModule):
        model.reshard()  # without a backward the root stays gathered, and state dicts are wrong
    guess, scores = torch.cat(predicted)[: len(rows)], torch.cat(best)[: len(rows)]
    pairs = split.labels.cpu()[rows] * classes + guess
    counts = pairs.bincount(minlength=classes**2).view(classes, classes)
    confusion = crew.add(counts.to(crew.device)).cpu()
    return Measured(confusion, guess, scores, rows)


def mistakes(
    measured: Measured, split: Split, classes: tuple[str, ...], most: int = 48
) -> tuple[Tensor, list[str]]:
    """The images that were most confidently taken for something else, and what for.

    Returns:
        uint8 images of shape ``(n, H, W, C)`` with C 1 or 3, and one label for each.
    """
    truth = split.labels.cpu()[measured.rows]
    wrong = (measured.predicted != truth).nonzero().flatten()
    wrong = wrong[measured.scores[wrong].argsort(descending=True)][:most]
    labels = [
        f"{classes[int(truth[i])]} taken for {classes[int(measured.predicted[i])]}"
        f" ({float(measured.scores[i]):.0%})"
        for i in wrong
    ]
    images = split.images.cpu()[measured.rows[wrong]].permute(0, 2, 3, 1)
    return images.contiguous(), labels


def position_similarity(model: ViT) -> Tensor:
    """Cosine similarity of each position to every other. Shape ``(h, w, h, w)``.

    A model that has found out which patches are neighbours shows a spot in each map. All processes
    must call where the model is sharded.
    """
    h, w = model.config.grid
    table = gather(model.positions.table.detach())[0, -h * w :].float()
    table = nn.functional.normalize(table, dim=1)
    return (table @ table.t()).view(h, w, h, w).cpu()


_SIDE = 64  # rows and columns of a weight's picture


def pictures_of_weights(model: nn.Module, limit: int = 12) -> Iterator[tuple[str, Tensor]]:
    """Matrices of the model, small enough for a page: what they are, and the values.

    Of the parameters whose names differ in their first number only, the first and the last are
    taken. A matrix of more than 64 rows or columns is sampled, and its title says which of them are
    shown. All processes must call, and take all, where the model is sharded.

    Args:
        model: Any model.
        limit: How many at most.
    """
    roles: dict[str, list[Entry]] = {}
    for entry in entries(model):
        if sum(side > 1 for side in entry.shape) == 2:
            roles.setdefault(re.sub(r"\d+", "*", entry.name, count=1), []).append(entry)
    chosen = [e for same in roles.values() for e in (same[:1] + same[1:][-1:])]
    for entry in chosen[:limit]:
        rows, columns = (side for side in entry.shape if side > 1)
        down, across = -(-rows // _SIDE), -(-columns // _SIDE)
        sampled = f"[::{down}, ::{across}]" if max(down, across) > 1 else ""
        whole = gather(entry.param.detach()).reshape(rows, columns)
        yield f"weight {entry.name}{sampled}", whole[::down, ::across].float().cpu()
