"""What ``[tool.learnables]`` in ``pyproject.toml`` says about audits."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from learnables.errors import LearnablesError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "pyproject.toml"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Defaults of the command line and of the pytest plugin.

    Attributes:
        select: Only rules with these codes, prefixes of codes or names; None means all.
        ignore: No rules with these.
        steps: How many iterations to observe.
        baseline: File of findings that are known, relative to the file that names it.
        silence: Tables with ``code``, ``selector`` and ``reason``, as for `ln.silence`.
        home: The folder of the file these come from.
    """

    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    steps: int = 4
    baseline: Path | None = None
    silence: tuple[Mapping[str, str], ...] = ()
    home: Path | None = None

    def put_into_force(self) -> None:
        """Silence what the file silences, for the rest of the process."""
        from learnables.auditing.silence import silence  # imports torch, and reading must not

        for said in self.silence:
            silence(said["code"], said["selector"], reason=said["reason"])


def read_settings(folder: Path | None = None) -> Settings:
    """The table of the nearest ``pyproject.toml`` that has one, from ``folder`` upwards.

    Args:
        folder: Where to begin; the working folder when not given.

    Raises:
        LearnablesError: The file is no TOML, or the table has a key or a value it may not have.
    """
    start = (folder or Path.cwd()).resolve()
    for home in (start, *start.parents):
        file = home / FILE
        if not file.is_file():
            continue
        try:
            said = tomllib.loads(file.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise LearnablesError(
                "the settings cannot be read", where=str(file), found=str(error), wanted="TOML"
            ) from None
        table = said.get("tool", {}).get("learnables")
        if table is not None:
            return _settings(table, file)
    return Settings()


def _settings(table: Any, file: Path) -> Settings:
    allowed = [f.name for f in fields(Settings) if f.name != "home"]
    if not isinstance(table, dict) or set(table) - set(allowed):
        unknown = sorted(set(table) - set(allowed)) if isinstance(table, dict) else table
        raise _wrong(file, "", f"{unknown}", f"keys out of {', '.join(allowed)}")
    for key in ("select", "ignore"):
        if not _is_strings(table.get(key, [])):
            raise _wrong(file, key, repr(table[key]), 'a list like ["LRN2", "no-gradient"]')
    steps = table.get("steps", 4)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise _wrong(file, "steps", repr(steps), "a number ≥ 1")
    baseline = table.get("baseline")
    if not isinstance(baseline, (str, type(None))):
        raise _wrong(file, "baseline", repr(baseline), "the name of a file")
    silenced = table.get("silence", [])
    parts = {"code", "selector", "reason"}
    if not isinstance(silenced, list) or not all(
        isinstance(s, dict) and set(s) == parts and _is_strings(list(s.values())) for s in silenced
    ):
        raise _wrong(file, "silence", repr(silenced), "tables with code, selector and reason")
    return Settings(
        select=tuple(table["select"]) if "select" in table else None,
        ignore=tuple(table.get("ignore", ())),
        steps=steps,
        baseline=file.parent / baseline if baseline else None,
        silence=tuple(silenced),
        home=file.parent,
    )


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _wrong(file: Path, key: str, found: str, wanted: str) -> LearnablesError:
    where = f"[tool.learnables]{f' {key}' if key else ''} in {file}"
    return LearnablesError("a setting is not one", where=where, found=found, wanted=wanted)
