"""A folder of checkpoints that keeps the last few and the best one."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

from torch import nn
from torch.optim import Optimizer

from learnables.arguments import require_as_annotated
from learnables.errors import CheckpointError, LearnablesError, warn
from learnables.runtime.checkpoint import (
    Checkpoint,
    is_rank_zero,
    open_checkpoint,
    save_checkpoint,
)
from learnables.runtime.restoring import restore
from learnables.runtime.sharded import sweep
from learnables.runtime.untrusted import read_meta

_NAME = re.compile(r"step-(\d+)\.safetensors")
_SCORE = "score"


@final
class Checkpoints:
    """The checkpoints of one training in one folder: the newest ones and the best.

    There is no list beside the files that could contradict them: the step stands in a file's name,
    the score in its header. An old file goes only after a new one is on the disk, so whenever a
    process dies, there is one to go on from.

    Args:
        folder: Where the files are; made by the first `save`.
        keep: How many of the newest to keep; at least 1.
        best: ``"max"`` or ``"min"``: keep the one of the highest or lowest score besides.

    Raises:
        LearnablesError: ``keep`` is less than 1, or ``best`` is neither.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> kept = ln.Checkpoints(tempfile.mkdtemp(), keep=2, best="max")
        >>> for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.4, 0.5], start=1):
        ...     _ = kept.save(model, step=step, score=accuracy)
        >>> kept.steps
        [2, 4, 5]
        >>> kept.load(model).step, kept.load(model, which="best").step
        (5, 2)
    """

    def __init__(
        self, folder: str | Path, keep: int = 3, best: Literal["min", "max"] | None = None
    ) -> None:
        require_as_annotated(type(self), (folder, keep), {})
        if keep < 1:
            raise LearnablesError(
                "at least the newest checkpoint is kept", found=f"keep={keep}", wanted="keep ≥ 1"
            )
        if best not in (None, "min", "max"):
            raise LearnablesError(
                "the best score is the least or the greatest",
                found=f"best={best!r}",
                wanted="'min', 'max' or None",
            )
        self.folder, self._keep = Path(folder), keep
        self._sign = 0 if best is None else {"max": 1, "min": -1}[best]

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, ascending."""
        return sorted(self._paths())

    @property
    def latest(self) -> Path | None:
        """The checkpoint of the highest step."""
        paths = self._paths()
        return paths[max(paths)] if paths else None

    @property
    def best(self) -> Path | None:
        """The checkpoint of the best score; of equal ones the newest."""
        return self._best(self._paths())

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        *,
        step: int,
        score: float | None = None,
        **more: Any,
    ) -> Path:
        """Write a checkpoint, then delete those that are neither new nor best.

        Args:
            model: As in `learnables.save_checkpoint`, which writes it.
            optimizer: Likewise.
            step: How far training is; the name of the file.
            score: What decides which one is best; ``extra["score"]`` of what is loaded.
            **more: Further arguments of `learnables.save_checkpoint`.

        Returns:
            The file.

        Raises:
            CheckpointError: It cannot be written; all older ones are there then.
        """
        extra = dict(more.pop("extra", None) or {})
        if score is not None:
            extra[_SCORE] = float(score)
        path = self.folder / f"step-{step:09d}.safetensors"
        save_checkpoint(path, model, optimizer, step=step, extra=extra, **more)
        if is_rank_zero():
            paths = self._paths()
            kept = {path, self._best(paths), *(paths[s] for s in sorted(paths)[-self._keep :])}
            for old in paths.values():
                if old not in kept:
                    old.unlink(missing_ok=True)
                    sweep(old, keep=None)
        return path

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        *,
        which: Literal["latest", "best"] = "latest",
        **more: Any,
    ) -> Checkpoint:
        """Load the newest checkpoint that is whole, or the best.

        A damaged one is passed over with a warning for the next older one.

        Args:
            model: As in `learnables.load_checkpoint`.
            optimizer: Likewise.
            which: ``"latest"`` or ``"best"``.
            **more: Further arguments of `learnables.load_checkpoint`.

        Raises:
            CheckpointError: There is none that is whole, or it is of another model.
        """
        paths = self._paths()
        newest_first = [paths[step] for step in sorted(paths, reverse=True)]
        best = self._best(paths)
        wanted = newest_first if which == "latest" else [best] if best is not None else []
        for path in wanted:
            try:
                checkpoint = open_checkpoint(path)
            except CheckpointError as error:
                warn(
                    "a checkpoint cannot be read; an older one is taken",
                    where=str(path),
                    found=f"{error.what}: {error.found}",
                )
                continue
            return restore(checkpoint, model, optimizer, **more)
        raise CheckpointError(
            "there is no checkpoint to go on from",
            where=str(self.folder),
            found=f"{len(paths)} files" + (", none of them whole" if wanted else ""),
            wanted=f"one that Checkpoints.save wrote{', with a score' * (which == 'best')}",
        )

    def _paths(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        named = {path: _NAME.fullmatch(path.name) for path in self.folder.iterdir()}
        return {int(match[1]): path for path, match in named.items() if match}

    def _best(self, paths: dict[int, Path]) -> Path | None:
        if not self._sign:
            return None
        scores = {path: self._score(path) for _, path in sorted(paths.items())}
        known = {path: score for path, score in scores.items() if not math.isnan(score)}
        return max(reversed(known), key=known.__getitem__) if known else None

    def _score(self, path: Path) -> float:
        try:
            score = read_meta(path)["extra"].get(_SCORE)
        except CheckpointError:  # a damaged file is not the best
            return math.nan
        if isinstance(score, dict):  # how ±inf and nan are written
            score = float(str(score.get("is", "nan")))
        return self._sign * float(score) if isinstance(score, (int, float)) else math.nan
