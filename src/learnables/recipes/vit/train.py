"""Train a ViT from scratch: audited before, watched during, written down after.

Read it from `train` down. Nothing that is random depends on what was random before: the order of
the images, their augmentation and the dropped branches of step s follow from (seed, s) alone. So a
run that was interrupted goes on bit for bit, and one process and many see the same images.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnables import __version__
from learnables._torch import gather
from learnables.auditing.report import Report
from learnables.auditing.run import audit
from learnables.errors import CheckpointError, LearnablesError, MissingExtraError
from learnables.launch import prepare, shard_
from learnables.models.vit import ViT, ViTConfig
from learnables.policy.groups import param_groups
from learnables.recipes.vit.augment import Augmentation, augment
from learnables.recipes.vit.config import Config
from learnables.recipes.vit.crew import Crew, assemble
from learnables.recipes.vit.data import ImageSet, Split, load_images
from learnables.recipes.vit.interrupt import Interrupt
from learnables.recipes.vit.measure import (
    Measured,
    measure,
    mistakes,
    pictures_of_weights,
    position_similarity,
)
from learnables.recipes.vit.progress import Bar, Display, Silent
from learnables.report.html import write_html
from learnables.runtime.atomic import replace_file
from learnables.runtime.checkpoint import save_checkpoint
from learnables.runtime.restoring import load_checkpoint
from learnables.watching.recorder import Watcher, watch
from learnables.watching.schema import SUFFIX
from learnables.watching.sinks.tensorboard import TensorBoard

_ORDER, _AUGMENT, _STEP = range(3)  # what a random number is for
_READ_EVERY = 10  # steps between two readings of the loss, which make a GPU wait


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        folder: Where it lies.
        finished: False where it was interrupted and can be resumed.
        steps: Optimizer steps done.
        accuracy: Share of the test images that are classified right, after the last step; of the
            averaged weights where ``ema`` is on. Chosen by nothing: there is no best epoch.
        parameters: Number of parameters.
        seconds: Wall time of the training loop of the last session, evaluation included.
    """

    folder: Path
    finished: bool
    steps: int
    accuracy: float
    parameters: int
    seconds: float


def train(
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    show: bool = True,
    crew: Crew | None = None,
) -> Result:
    """Train, and leave in ``folder`` everything that is worth keeping.

    Args:
        config: What to do.
        folder: Where to; see `new_folder`. Only rank 0 writes.
        resume: Go on where the run in ``folder`` stopped.
        show: Whether to talk.
        crew: Who trains, where they have assembled already.

    Returns:
        How it ended.

    Raises:
        AuditFailed: The model would not train as meant; nothing was trained.
        LearnablesError: The device, the data or the checkpoint is not as needed, or the loss
            became infinite.
    """
    with ExitStack() as stack:
        crew = crew or stack.enter_context(assemble(config.device))
        images = load_images(
            config.data,
            config.data_dir,
            image_size=config.image_size,
            channels=config.channels,
        )
        _check_batch(config, crew, images)
        job = Job(config, crew, images)
        done = job.load(folder / "checkpoint.safetensors") if resume else 0
        display: Display = Bar(job.steps, done, config.epochs) if show and crew.leads else Silent()
        display.say(job.introduction())

        report = job.audit(done)
        display.say(f"audit: {report.summary}")
        report.raise_for_errors()  # training what cannot learn would only cost time

        if crew.leads:
            _write_json(folder / "config.json", _description(config))
        job.save(folder / "checkpoint.safetensors", done)  # a disk without room shows now
        interrupt = stack.enter_context(Interrupt(patient=crew.size > 1))
        watcher = stack.enter_context(job.watch(folder, done, display))
        watcher.log_document("config", _description(config), step=done)
        watcher.log_document("audit", report.to_json(), step=done)
        with display:
            step, measured, seconds = loop(job, done, folder, watcher, display, interrupt)

        finished = step == job.steps
        accuracy = measured.accuracy if measured else math.nan
        result = Result(folder, finished, step, accuracy, job.parameters, seconds)
        watcher.flush()
        job.save(folder / "checkpoint.safetensors", step)
        if finished and measured:
            _draw(job, step, measured, watcher)
        watcher.close()
        if finished:
            job.save_model(folder / "model.safetensors")
        if finished and crew.leads:
            _write_json(folder / "result.json", {**asdict(result), "folder": folder.name})
            write_html(folder, folder / "report.html")
        return result


def loop(
    job: "Job",
    done: int,
    folder: Path,
    watcher: Watcher,
    display: Display,
    interrupt: Interrupt,
) -> tuple[int, Measured | None, float]:
    """Step until the end or the interrupt: steps done, the last measurement, seconds.

    Raises:
        LearnablesError: The loss is not finite.
    """
    config, crew = job.config, job.crew
    losses: list[Tensor] = []
    measured: Measured | None = None
    begun = saved = time.monotonic()
    step, stop = done, False
    while step < job.steps and not stop:
        losses.append(job.step(step))
        step += 1
        ends_epoch = step % job.steps_per_epoch == 0 or step == job.steps
        if step % _READ_EVERY == 0 or ends_epoch or (interrupt.requested and crew.size == 1):
            loss = float(crew.add(torch.stack(losses).mean())) / crew.size
            if not math.isfinite(loss) and config.precision != "fp16":
                raise LearnablesError(
                    "the loss is not finite any more",
                    where=f"step {step}",
                    found=f"loss {loss}",
                    wanted="a finite loss",
                    mend="a lower --lr, or --precision fp32",
                )
            display.step(step, loss)
            watcher.log_scalars(step, {"loss/train": loss, "lr": job.rate(step - 1)})
            losses, stop = [], crew.any(interrupt.requested)
        if ends_epoch:
            measured = job.measure()
            epoch = math.ceil(step / job.steps_per_epoch)
            display.epoch(epoch, measured.accuracy)
            watcher.log_scalars(step, {"accuracy/test": measured.accuracy})
            due = crew.leads and time.monotonic() - saved >= config.save_seconds
            if not stop and crew.any(due):  # a sharded model is saved by all of them together
                watcher.flush()  # a run that goes on from here must not lack what came before
                _save_if_possible(job, folder, step, display)
                saved = time.monotonic()
    if measured is None and step == job.steps:  # a run that had finished before
        measured = job.measure()
    return step, measured, time.monotonic() - begun


class Job:
    """A model, its optimizer and its images, and what one step does to them.

    Args:
        config: What to do.
        crew: Who does it.
        images: What is learned from.
        change: What is done to the model before anything is built for it, such as `sparsify`.
    """

    def __init__(
        self,
        config: Config,
        crew: Crew,
        images: ImageSet,
        change: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self.config, self.crew, self.images = config, crew, images
        torch.manual_seed(config.seed)  # the same first values in every process
        channels, height, width = images.shape
        mean, std = images.moments()
        shape = ViTConfig(
            **{
                **config.part(ViTConfig),
                "image_size": (height, width),
                "channels": channels,
                "classes": len(images.classes),
            }
        )
        self.model = ViT(shape, mean, std).to(crew.device)
        if change is not None:
            change(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())

        self.scaler = torch.amp.GradScaler(crew.device.type, enabled=config.precision == "fp16")
        self.average = _average(self.model, config.ema) if config.ema else None
        strategy = config.strategy if crew.size > 1 else "none"
        if self.average is not None and strategy == "fsdp2":
            shard_(self.average.module)  # a copy of what is sharded cannot be made
        # What is declared is carried out from here: the colour matrix decays toward the identity.
        self.runner, self.optimizer, _ = prepare(self.model, self._adam, strategy)
        groups = self.optimizer.param_groups
        self.scales = [group["lr"] / config.lr if config.lr else 1.0 for group in groups]
        is_ddp = isinstance(self.runner, nn.parallel.DistributedDataParallel)
        self.ddp = self.runner if is_ddp else None
        if config.compile:
            self.runner = _compiled(self.runner)

        self.augmentation = Augmentation(**config.part(Augmentation))
        self.train = _placed(images.train, crew.device)
        self.test = _placed(images.test, crew.device)
        self.mean = mean.to(crew.device)
        self._order = -1, torch.empty(0, dtype=torch.long)  # of one epoch, and which
        self.steps_per_epoch = len(images.train) // config.batch_size
        steps = self.steps_per_epoch * config.epochs
        self.steps = min(steps, config.max_steps) if config.max_steps else steps

    def _adam(self, _: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        groups = param_groups(self.model, lr=config.lr, weight_decay=config.weight_decay)
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))

    # --- one step -----------------------------------------------------------------------------

    def step(self, step: int) -> Tensor:
        """Do optimizer step ``step``, counted from 0; return the loss of this process's images."""
        config, device = self.config, self.crew.device
        rate = self.rate(step)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = rate * scale
        torch.manual_seed(self._seed(step))
        rows, draws = self._batch(step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for part, last in self._micro_batches():
            x_BCHW, y_B = self._pictures(rows[part])
            x_BCHW, target_BK = augment(
                x_BCHW,
                y_B,
                draws.part(part, device),
                classes=len(self.images.classes),
                mean_C=self.mean,
            )
            # Gradients are summed over micro-batches, and averaged over processes only once.
            with self._reducing(last):
                with self._autocast():
                    scores_BK = self.runner(x_BCHW)
                loss = F.cross_entropy(
                    scores_BK.float(), target_BK, label_smoothing=config.label_smoothing
                )
                loss = loss / config.accumulate
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return total

    def rate(self, step: int) -> float:
        """The learning rate of a step: a straight rise, then half a cosine down to 0."""
        warmup = max(1, round(self.config.warmup * self.steps))
        if step < warmup:
            return self.config.lr * (step + 1) / warmup
        # A finished run that is resumed to be measured is audited at its last step, not past it.
        step = min(step, self.steps - 1)
        progress = max(0.0, (step - warmup) / max(1, self.steps - warmup))
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def _batch(self, step: int) -> tuple[Tensor, Any]:
        """The images of a step over all processes, and what happens to each."""
        size = self.config.batch_size
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.config.seed, _ORDER, epoch])
            self._order = epoch, torch.from_numpy(rng.permutation(len(self.images.train)))
        rows = self._order[1][at * size : (at + 1) * size]
        rng = np.random.default_rng([self.config.seed, _AUGMENT, step])
        return rows, self.augmentation.draw(size, rng)

    @contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """Whether the backward in this ``with`` hands its gradients over to the other processes."""
        if isinstance(self.ddp, nn.parallel.DistributedDataParallel) and not last:
            with self.ddp.no_sync():
                yield
        else:
            yield

    def _seed(self, step: int) -> int:
        sequence = np.random.SeedSequence([self.config.seed, _STEP, step, self.crew.rank])
        return int(sequence.generate_state(1)[0])

    def _micro_batches(self) -> Iterator[tuple[slice, bool]]:
        """This process's rows of a batch, cut up; and whether a cut is the last."""
        parts = self.config.accumulate
        size = self.config.batch_size // (self.crew.size * parts)
        first = self.crew.rank * parts
        for i in range(first, first + parts):
            yield slice(i * size, (i + 1) * size), i == first + parts - 1

    def _pictures(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.to(self.train.images.device)
        device = self.crew.device
        pixels = self.train.images[rows].to(device, non_blocking=True)
        return pixels.float() / 255, self.train.labels[rows].to(device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        kinds = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
        precision = self.config.precision
        return torch.autocast(self.crew.device.type, kinds[precision], precision != "fp32")

    # --- around the steps ---------------------------------------------------------------------

    @property
    def result(self) -> nn.Module:
        """The model that is measured and kept: the averaged one where there is one."""
        return self.model if self.average is None else self.average.module

    def measure(self) -> Measured:
        """How the result does on the test images; all processes must call."""
        return measure(self.result, self.test, len(self.images.classes), self.crew)

    def audit(self, done: int) -> Report:
        """Observe some real steps, and put everything back as it was."""
        self.model.train()
        # Not from step 0, whose learning rate is too small to tell a step from rounding.
        upcoming = count(max(done, round(self.config.warmup * self.steps)))
        copies = None if self.average is None else {"average": self.average}
        # What is compiled runs as plain Python under an audit anyway, and warns of its hooks.
        runner, self.runner = self.runner, self.ddp or self.model
        try:
            return audit(
                self.model,
                self.optimizer,
                lambda: self.step(next(upcoming)),
                scaler=self.scaler if self.scaler.is_enabled() else None,
                ddp=self.ddp,
                copies=copies,
            )
        finally:
            self.runner = runner

    def watch(self, folder: Path, done: int, display: Display) -> Watcher:
        """The recorder of this run."""
        every = self.config.watch_every
        sinks = []
        if self.crew.leads:
            try:
                sinks = [TensorBoard(folder / "tensorboard")]
            except MissingExtraError as error:  # the run database holds the same numbers
                display.say(str(error))
        return watch(
            self.model,
            self.optimizer,
            every=every or 2 * self.steps + 1,
            to=folder,
            sinks=sinks,
            budget=self.config.watch_budget or None,
            scaler=self.scaler if self.scaler.is_enabled() else None,
            step=done,
            resume=any(folder.glob(f"run*{SUFFIX}")),
        )

    def save(self, path: Path, step: int) -> None:
        """Write all that `load` needs; all processes must call."""
        save_checkpoint(
            path,
            self.model,
            self.optimizer,
            also=self._also(),
            step=step,
            extra={"config": self.config.to_json()},
            random_state=False,  # each step seeds its own
        )

    def load(self, path: Path) -> int:
        """Take over a checkpoint of the same run; return how many steps it has done.

        Raises:
            CheckpointError: It is missing, damaged, or of another run.
        """
        restored = load_checkpoint(
            path, self.model, self.optimizer, also=self._also(), random_state=False
        )
        step = restored.step
        if step is None or not 0 <= step <= self.steps:
            raise CheckpointError(
                "the checkpoint is not one of this run",
                where=str(path),
                found=f"step {step}",
                wanted=f"a step from 0 to {self.steps}",
            )
        return step

    def save_model(self, path: Path) -> None:
        """Write the result alone, with what is needed to use it; all processes must call."""
        extra = {"model": asdict(self.model.config), "classes": list(self.images.classes)}
        save_checkpoint(path, self.result, extra=extra, random_state=False)

    def _also(self) -> dict[str, Any]:
        also: dict[str, Any] = {"average": self.average, "scaler": self.scaler}
        if not self.scaler.is_enabled():
            del also["scaler"]
        return {name: part for name, part in also.items() if part is not None}

    def introduction(self) -> str:
        """Two lines for the terminal."""
        channels, height, width = self.images.shape
        return (
            f"{self.images.name}: {len(self.images.train):,} training and "
            f"{len(self.images.test):,} test images of {height}×{width}×{channels}\n"
            f"ViT: {self.parameters:,} parameters, {self.steps:,} steps on "
            f"{self.crew.size} × {self.crew.device}"
            + (f", {self.config.strategy}" if self.crew.size > 1 else "")
        )


def _average(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)


def _compiled(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


def _placed(split: Split, device: torch.device, limit: int = 2 << 30) -> Split:
    """The images on the device, where they do not fill it."""
    if split.images.nbytes > limit:
        return split
    return Split(split.images.to(device), split.labels.to(device))


def _check_batch(config: Config, crew: Crew, images: ImageSet) -> None:
    parts = crew.size * config.accumulate
    if config.batch_size > len(images.train):
        raise LearnablesError(
            "a batch is larger than the training set",
            found=f"batch_size={config.batch_size}, {len(images.train)} training images",
            wanted="at least one batch in an epoch",
            mend=f"learnables train vit --batch-size {max(parts, len(images.train) // 4)}",
        )
    unit = parts * (2 if config.mixup or config.cutmix else 1)  # mixing goes by pairs
    if config.batch_size % unit:
        raise LearnablesError(
            "a batch cannot be cut into equal parts",
            found=f"batch_size={config.batch_size}, {crew.size} processes × "
            f"{config.accumulate} micro-batches",
            wanted=f"a multiple of {unit}",
            mend=f"learnables train vit --batch-size {-(-config.batch_size // unit) * unit}",
        )


def _save_if_possible(job: Job, folder: Path, step: int, display: Display) -> None:
    """A full disk must not end hours of training: say so, and try again at the next epoch."""
    try:
        job.save(folder / "checkpoint.safetensors", step)
    except CheckpointError as error:
        display.say(str(error))


def _draw(job: Job, step: int, measured: Measured, watcher: Watcher) -> None:
    """The pictures of the report; all processes must call."""
    result = job.result
    assert isinstance(result, ViT)
    similarity = position_similarity(result)
    has_color = job.config.color_matrix
    color = gather(result.get_parameter("color_matrix.matrix").detach()) if has_color else None
    weights = [(name, w) for name, w in pictures_of_weights(result) if "color_matrix" not in name]
    if not job.crew.leads:
        return
    watcher.log_document("classes", list(job.images.classes), step=step)
    watcher.log_table("confusion", measured.confusion, step)
    watcher.log_table("position similarity", similarity, step)
    if color is not None:
        watcher.log_table("color matrix", color, step)
    for name, values in weights:
        watcher.log_table(name, values, step)
    wrong, labels = mistakes(measured, job.images.test, job.images.classes)
    if labels and wrong.shape[3] in (1, 3):
        watcher.log_images("misclassified", wrong, labels, step)


# --- the folder of a run ------------------------------------------------------------------------


def begin(out: Path, stem: str, crew: Crew) -> tuple[Path, bool]:
    """The folder of the run that this launch is to do, and whether to resume what lies in it.

    A launch of torchrun that starts its processes again, as ``--max-restarts`` has it do when one
    dies, goes on in the folder of its first attempt. The leader decides for all.

    Args:
        out: Where runs go.
        stem: What a new folder is called.
        crew: Who trains; all must call.
    """
    launch, attempt = (os.environ.get(f"TORCHELASTIC_{x}", "") for x in ("RUN_ID", "RESTART_COUNT"))
    said = ""
    if crew.leads:
        ours = [p.parent for p in out.glob(f"{stem}*/{_LAUNCH}") if _read_text(p) == launch]
        if launch and attempt not in ("", "0") and ours:
            folder = max(ours, key=lambda path: (path / _LAUNCH).stat().st_mtime)
            resume = (folder / "checkpoint.safetensors").exists()
        else:
            folder, resume = new_folder(out, stem), False
            if launch:
                (folder / _LAUNCH).write_text(launch, encoding="utf-8")
        said = json.dumps([str(folder), resume])
    found: list[Any] = json.loads(crew.hear(said))
    return Path(found[0]), bool(found[1])


def forget(folder: Path) -> None:
    """Remove the folder of a run that has written nothing, and leave any other as it is."""
    with suppress(OSError):
        if all(path.name == _LAUNCH for path in folder.iterdir()):
            (folder / _LAUNCH).unlink(missing_ok=True)
            folder.rmdir()


_LAUNCH = "launch.txt"  # which launch of torchrun a folder belongs to


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def new_folder(out: Path, name: str) -> Path:
    """A new folder ``out/name``, or ``out/name-2`` and so on where that is taken.

    Raises:
        LearnablesError: It cannot be made.
    """
    number = 1
    while True:
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise LearnablesError(
                "the folder of the run cannot be made",
                where=str(folder),
                found=str(error),
                wanted="a place that can be written to",
                mend="learnables train vit --out another/folder",
            ) from error
        else:
            return folder


def read_config(folder: Path) -> Config:
    """The config of the run in ``folder``.

    Raises:
        CheckpointError: There is no run, or its ``config.json`` is damaged.
    """
    path = folder / "config.json"
    try:
        return Config.from_json(json.loads(path.read_text(encoding="utf-8"))["config"])
    except FileNotFoundError as error:
        raise CheckpointError(
            "there is no run to resume",
            where=str(folder),
            found="no config.json",
            wanted="a folder that learnables train wrote",
            mend="learnables runs",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, LearnablesError) as error:
        raise CheckpointError(
            "the run is damaged: its settings cannot be read",
            where=str(path),
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            wanted="the JSON that learnables train wrote",
            mend="train anew",
        ) from error


def _description(config: Config) -> dict[str, Any]:
    return {
        "config": config.to_json(),
        "learnables": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=2) + "\n"
    replace_file(path, partial(_write_text, text))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
