"""What ``learnables train vit`` does with its options."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnables.errors import LearnablesError
from learnables.recipes.vit.config import choose, read_changes

INTERRUPTED = 130  # what a shell reports after Ctrl-C
_FREE = {"device", "strategy"}  # where and how it is computed, which a resumed run may change


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
        changes.keys() - _FREE or data is not None or preset is not None or name is not None
    ):
        raise LearnablesError(
            "a resumed run keeps its settings",
            found="--resume with other options than --device and --strategy",
            wanted="the same settings, so that the run ends as it would have ended",
            mend=f"learnables train vit --resume {resume}",
        )
    if data is not None and Path(data).is_dir():
        data = str(Path(data).resolve())  # so that --resume finds it from anywhere
    config = choose(data, preset, changes) if resume is None else None

    import torch

    from learnables.recipes.vit.crew import assemble
    from learnables.recipes.vit.train import begin, forget, read_config, train

    if threads is not None:
        torch.set_num_threads(threads)
    if config is None:
        assert resume is not None
        config = dataclasses.replace(read_config(resume), **read_changes(changes))
    with assemble(config.device) as crew:
        if resume is None:
            folder, goes_on = begin(out, name or Path(config.data).name, crew)
        else:
            folder, goes_on = resume, True
        try:
            result = train(config, folder, resume=goes_on, crew=crew)
        except LearnablesError:
            if crew.leads:
                forget(folder)
            raise
    if not crew.leads:
        return 0 if result.finished else INTERRUPTED
    if not result.finished:
        print(
            f"stopped after step {result.steps}; go on with: "
            f"learnables train vit --resume {shlex.quote(str(folder))}"
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
