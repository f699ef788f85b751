"""What ``learnables train vit`` does with its options."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from learnables.errors import LearnablesError
from learnables.recipes.vit.config import choose, read_changes

INTERRUPTED = 130  # what a shell reports after Ctrl-C


def run(
    given: Mapping[str, Any],
    settings: Sequence[str] = (),
    *,
    data: str | None = None,
    preset: str | None = None,
    name: str | None = None,
    out: Path = Path("runs"),
    resume: Path | None = None,
    threads: int | None = None,
) -> int:
    """Train, or resume, and say how it went.

    Args:
        given: Fields of the config that have an option of their own.
        settings: ``field=value`` for the others.
        data: The data set.
        preset: The preset.
        name: Name of the run.
        out: Where runs go.
        resume: Folder of the run to go on with.
        threads: CPU threads.

    Returns:
        The exit code: 0, or 130 where the run was interrupted.

    Raises:
        LearnablesError: Something is not as needed; the message says what.
    """
    changes = {**given, **_parsed(settings)}
    if resume is not None and (
        changes.keys() - {"device"} or data is not None or preset is not None or name is not None
    ):
        raise LearnablesError(
            "a resumed run keeps its settings",
            found="--resume with other options than --device",
            wanted="the same settings, so that the run ends as it would have ended",
            mend=f"learnables train vit --resume {resume}",
        )
    if data is not None and Path(data).is_dir():
        data = str(Path(data).resolve())  # so that --resume finds it from anywhere
    config = choose(data, preset, changes) if resume is None else None

    import torch

    from learnables.recipes.vit.train import new_folder, read_config, train

    if threads is not None:
        torch.set_num_threads(threads)
    leads = int(os.environ.get("RANK", "0")) == 0
    if config is None:
        assert resume is not None
        folder = resume
        config = dataclasses.replace(read_config(folder), **read_changes(changes))
    else:
        stem = name or Path(config.data).name
        folder = new_folder(out, stem) if leads else out / stem

    try:
        result = train(config, folder, resume=resume is not None)
    except LearnablesError:
        with suppress(OSError):
            folder.rmdir()  # nothing was written: leave no empty folder behind
        raise
    if not leads:
        return 0 if result.finished else INTERRUPTED
    if not result.finished:
        print(
            f"stopped after step {result.steps}; go on with: learnables train vit --resume {folder}"
        )
        return INTERRUPTED
    print(
        f"test accuracy {result.accuracy:.2%}, {result.parameters:,} parameters, "
        f"{result.seconds:.0f} s; report: {folder / 'report.html'}"
    )
    return 0


def _parsed(settings: Sequence[str]) -> dict[str, str]:
    changes = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals:
            raise LearnablesError(
                "a setting needs a value",
                found=f"--set {setting}",
                wanted="--set field=value",
                mend=f"learnables train vit --set {field}=1",
            )
        changes[field.strip().replace("-", "_")] = value.strip()
    return changes
