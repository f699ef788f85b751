"""What ``learnables run`` does: an unmodified script, with its first iterations observed.

Nothing here imports torch before the script does, because scripts set environment variables first.
"""

import atexit
import builtins
import importlib.machinery
import importlib.util
import io
import os
import runpy
import signal
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnables.auditing.settings import Settings, read_settings
from learnables.errors import LearnablesError

if TYPE_CHECKING:
    from learnables.auditing.report import Report
    from learnables.auditing.run import Observation

WAIT_FOR_RANKS = 30.0
"""Seconds that rank 0 waits for what the other ranks found."""


def run_script(
    target: str,
    arguments: Sequence[str],
    *,
    is_module: bool = False,
    steps: int | None = None,
    stop: bool = False,
    fail: bool = False,
    format: str = "text",
    output: Path | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> int:
    """Run a script as Python would, judge its first iterations, and return its exit code.

    Args:
        target: Path of a script, of a folder or an archive with a ``__main__.py``, or, with
            ``is_module``, the name of a module.
        arguments: What the script finds behind its name in ``sys.argv``.
        is_module: As ``python -m`` does.
        steps: How many iterations to observe; by the settings when not given.
        stop: End the script after the report.
        fail: Return 1 where something was found, 2 where nothing could be judged.
        format: How the report is written.
        output: File for the report; standard error when not given, ``-`` for standard output.
        select: Only rules with these codes, prefixes of codes or names.
        ignore: No rules with these.

    Raises:
        LearnablesError: There is no such script, format or rule.
        SystemExit: As the script raised it.
    """
    settings = read_settings()
    if format != "text" or tuple(select) or tuple(ignore) or settings.select or settings.ignore:
        from learnables.auditing.command import checked
        from learnables.auditing.writers import check_format

        check_format(format)
        settings = checked(settings, select, ignore)
    if not is_module and not Path(target).exists():
        raise LearnablesError("there is no such script", found=target, wanted="a Python file")
    speaker = _Speaker(target, settings, steps or settings.steps, stop, format, output)
    leaving: SystemExit | None = None
    code = 0
    with _when_imported("torch", speaker.listen):
        try:
            _execute(target, arguments, is_module=is_module)
        except SystemExit as error:
            leaving = error
            code = _code_of(error)
        except BaseException as error:  # shown as Python would show it
            speaker.end(error)
            code = _show(error)
    speaker.end(leaving)
    if fail and code == 0:
        return speaker.verdict
    if leaving is not None:
        raise leaving
    return code


def _code_of(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    return leaving.code if isinstance(leaving.code, int) else 1


# -- as Python would ------------------------------------------------------------------------------


def _execute(target: str, arguments: Sequence[str], *, is_module: bool) -> None:
    """Run ``target`` as ``__main__``."""
    sys.argv = [target, *arguments]
    if is_module:
        _set_first_path(os.getcwd())  # noqa: PTH109 - sys.path holds strings
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    path = Path(target)
    if not path.is_file() or path.suffix in (".zip", ".pyz"):
        del sys.path[:1]  # runpy puts the folder or the archive there
        runpy.run_path(target, run_name="__main__")
        return
    _set_first_path(str(path.resolve().parent))
    file = os.path.abspath(target)  # noqa: PTH100 - a link stays a link, as in Python
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __file__=file,
        __builtins__=builtins,
        __loader__=importlib.machinery.SourceFileLoader("__main__", file),
        __package__=None,
        __spec__=None,
        __cached__=None,
    )
    sys.modules["__main__"] = main  # stays there: threads and exit handlers may look into it
    with io.open_code(file) as source:
        code = compile(source.read(), file, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [folder]


def _show(error: BaseException) -> int:
    """Print the traceback without our frames; the exit code Python would give."""
    from learnables.auditing.factory import trimmed

    error.__traceback__ = trimmed(error)
    sys.excepthook(type(error), error, error.__traceback__)
    if not isinstance(error, KeyboardInterrupt):
        return 1
    atexit.register(_die_of_interrupt)
    return 130


def _die_of_interrupt() -> None:
    """End as Python does after Ctrl-C, so that a shell loop around us ends too."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


class _when_imported:  # noqa: N801 - reads as what it does
    """Call ``then`` right after a module was imported for the first time."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def __enter__(self) -> None:
        if self.name in sys.modules:
            self.then()
        else:
            sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find the module with the other finders, and wrap its loader."""
        if name != self.name:
            return None
        self.__exit__()
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run, then = spec.loader.exec_module, self.then

        def exec_module(module: types.ModuleType) -> None:
            run(module)
            then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# -- looking and speaking -------------------------------------------------------------------------


class _Speaker:
    """Opens the observation once torch is there, and says what it found."""

    def __init__(
        self,
        target: str,
        settings: Settings,
        steps: int,
        stop: bool,
        format: str,
        output: Path | None,
    ) -> None:
        self.target, self.settings, self.steps = target, settings, steps
        self.stop, self.format, self.output = stop, format, output
        self.observation: Observation | None = None
        self.report: Report | None = None
        self.has_failed = self.has_ended = False

    @property
    def verdict(self) -> int:
        """0 clean, 1 findings, 2 nothing could be judged."""
        if self.report is None or self.has_failed:
            return 2
        return 0 if self.report.ok else 1

    def listen(self) -> None:
        """Begin to wait for training."""
        from learnables.auditing.run import observe

        self.settings.put_into_force()
        self.observation = observe(
            steps=self.steps,
            select=self.settings.select,
            ignore=self.settings.ignore,
            on_report=self.tell,
        )
        self.observation.on_failure = self.fail
        self.observation.__enter__()
        os.register_at_fork(after_in_child=self.observation.abandon)  # data loaders fork

    def end(self, error: BaseException | None) -> None:
        """The script is over: say what was seen, if that has not happened yet."""
        if self.has_ended:
            return
        self.has_ended = True
        if self.observation is not None:
            self.observation.__exit__(type(error) if error is not None else None, error, None)
        if self.report is None and not self.has_failed:
            self.say(_nothing_seen(self.observation))

    def tell(self, report: "Report") -> None:
        """Write the report; rank 0 speaks for all ranks.

        Raises:
            SystemExit: The script is to stop now.
        """
        if report.iterations == 0:
            return
        try:
            self.report, rank = _of_all_ranks(report)
            known = self.settings.baseline
            if known is not None:
                from learnables.auditing.baseline import read_baseline, without_known

                self.report = without_known(self.report, read_baseline(known), str(known))
            if rank == 0:
                self.write()
        except (LearnablesError, OSError) as error:
            self.fail(error)
        if self.stop and not self.has_ended:
            raise SystemExit(0)

    def write(self) -> None:
        """Print the report, or put it into its file."""
        from learnables.auditing.writers import emit

        assert self.report is not None
        to_stdout = str(self.output) == "-"
        if self.output is None or to_stdout:
            sys.stdout.flush()
            if self.format == "text":
                self.say(f"after {self.report.iterations} iterations of {self.target}\n")
            emit(self.report, self.format, None, sys.stdout if to_stdout else sys.stderr)
        else:
            emit(self.report, self.format, self.output)
            self.say(f"{self.report.summary}; written to {self.output}")

    def fail(self, error: Exception) -> None:
        """Say that the audit could not be made; the script goes on."""
        self.has_failed = True
        if isinstance(error, (LearnablesError, OSError)):
            self.say(str(error))
            return
        import traceback

        told = "".join(traceback.format_exception(error))
        self.say(f"the audit failed, the script goes on:\n{told}")

    def say(self, words: str) -> None:
        """One line on standard error, from rank 0 only."""
        if _rank() == 0:
            print(f"\nlearnables: {words}", file=sys.stderr, flush=True)


def _nothing_seen(observation: "Observation | None") -> str:
    if observation is None:
        return "the script is over and did not import torch; there is nothing to judge"
    if observation.steps_missed:
        return (
            f"{observation.steps_missed} optimizer steps were seen, but no module that holds their "
            "parameters was called, so there is nothing to name"
        )
    return (
        "the script is over and no optimizer stepped, so there is nothing to judge; what child "
        "processes train is seen only when torchrun starts them: torchrun … -m learnables run …"
    )


def _rank() -> int:
    if "torch" in sys.modules:
        from learnables._torch import rank_and_world

        rank, world = rank_and_world()
        if world > 1:
            return rank
    return int(os.environ.get("RANK", "0") or 0)


def _of_all_ranks(report: "Report") -> tuple["Report", int]:
    """On rank 0 the report with what only other ranks found; on the others their own."""
    import json
    from datetime import timedelta

    from learnables._torch import rank_and_world, shared_store
    from learnables.auditing.report import Report
    from learnables.auditing.rule import Finding

    rank, world = rank_and_world()
    if world == 1:
        return report, _rank()
    store = shared_store()
    if rank != 0:
        store.set(f"learnables/report/{rank}", json.dumps(report.to_dict()["findings"]))
        return report, rank
    findings = list(report.findings)
    missing = []
    for other in range(1, world):
        key = f"learnables/report/{other}"
        try:
            store.wait([key], timedelta(seconds=WAIT_FOR_RANKS))
        except RuntimeError:  # the backend's own error for a timeout
            missing.append(f"what rank {other} saw: it gave no report in {WAIT_FOR_RANKS:.0f} s")
            continue
        for said in json.loads(store.get(key)):
            said.pop("quote")
            finding = Finding(**said)
            if all((f.code, f.where) != (finding.code, finding.where) for f in findings):
                said["found"] = f"on rank {other}: {finding.found}"
                findings.append(Finding(**said))
    return (
        Report(
            findings,
            skipped=report.skipped,
            parameters=report.parameters,
            not_restored=[*report.not_restored, *missing],
            silenced=report.silenced,
            iterations=report.iterations,
            crashed=report.crashed,
        ),
        0,
    )
