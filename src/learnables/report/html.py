"""`learnables.write_html`: one offline page."""

import base64
import contextlib
import hashlib
import math
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from learnables import __version__
from learnables.arguments import describe, require_path
from learnables.auditing.report import Report
from learnables.errors import ArgumentError, RunError
from learnables.report.content import Content, content
from learnables.watching.run import Run
from learnables.watching.sinks.escape import html, json_in_script, visible


def write_html(run_or_report: "Run | Report | str | os.PathLike[str]", path: "str | Path") -> Path:
    """Write one HTML file that needs no network and nothing beside it.

    The first screen says what is wrong and what to type. Then come the curves, one row per
    parameter with its policy, findings, norms, update ratio and magnitudes over time, and the
    pictures that were logged. A content-security policy forbids the page all network; scripts and
    styles are allowed by their hash.

    Args:
        run_or_report: A run's folder or database, a `learnables.watching.Run`, or the report of an
            audit. A run that holds a report shows both.
        path: The file to write; replaced whole or not at all.

    Returns:
        The path.

    Raises:
        ArgumentError: It is none of these, or ``path`` is no path.
        RunError: The run cannot be read, or the file cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> report = ln.audit(nn.Linear(2, 2))
        >>> ln.write_html(report, mkdtemp() + "/report.html").name
        'report.html'
    """
    mend = 'ln.write_html(run_or_report, "page.html")'
    require_path(path, "path", wanted="the file to write", mend=mend)
    if isinstance(run_or_report, (str, os.PathLike)):
        run_or_report = Run(run_or_report)
    text = render(run_or_report)
    path = Path(path)
    draft = path.parent / f"{path.name}.part"
    try:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise RunError(
            "the page cannot be written",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            wanted="a file in a folder that can be written to",
            mend=mend,
        ) from error
    return path


def render(run_or_report: "Run | Report", live: bool = False) -> str:
    """The page as text; a live one listens for news from the server that it comes from.

    Raises:
        ArgumentError: There is nothing in it to write a page of.
    """
    if isinstance(run_or_report, Run):
        page = content(run_or_report)
    elif callable(getattr(run_or_report, "to_dict", None)):
        page = content(None, run_or_report.to_dict())
    else:
        raise ArgumentError(
            "this is nothing to write a page of",
            where="run_or_report",
            found=describe(run_or_report),
            wanted="a run, its folder, or the report of an audit",
            mend="ln.write_html('runs/run', 'page.html')",
        )
    style, script, uplot = _asset("uPlot.min.css") + _asset("page.css"), *_scripts()
    policy = content_security_policy(live)
    from markupsafe import Markup

    text: str = _template().render(
        page=page,
        live=live,
        policy=policy,
        marks={"good": "✓", "warning": "!", "error": "×"},
        style=Markup(style),
        script=Markup(script),
        uplot=Markup(uplot),
        data=Markup(json_in_script(_data(page))),
        figures=Markup(page.figures.text()),
        version=__version__,
    )
    return text


def content_security_policy(live: bool = False) -> str:
    """What the page may do: run these scripts, use this style, show inline images; no network."""
    style = _asset("uPlot.min.css") + _asset("page.css")
    scripts = " ".join(map(_hash, _scripts()))
    connect = "; connect-src 'self'" if live else ""
    return (
        f"default-src 'none'; script-src {scripts}; style-src {_hash(style)}; img-src data:; "
        f"base-uri 'none'; form-action 'none'{connect}"
    )


def _data(page: Content) -> dict[str, Any]:
    return {
        "figures": page.figures.index,
        "names": [visible(row.name) for row in page.rows],
        "index": page.index,
        "charts": page.charts,
        "pictures": page.pictures,
        "gallery": page.gallery,
    }


def _scripts() -> tuple[str, str]:
    return _asset("page.js"), _asset("uPlot.iife.min.js")


@cache
def _asset(name: str) -> str:
    return (resources.files("learnables.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def _template() -> Any:
    from jinja2 import Environment
    from markupsafe import Markup

    def path(name: str) -> Markup:
        """A name with its modules paler than itself, and places to break the line."""
        *modules, last = visible(name).split(".")
        head = "".join(f"{html(module)}.<wbr>" for module in modules)
        return Markup(f'<span class="path">{head}</span>' if head else "") + Markup(html(last))

    def lines(text: str) -> Markup:
        return Markup("\n".join(map(html, text.split("\n"))))

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        # The one way a text gets onto the page; the few ready-made pieces are Markup already.
        finalize=lambda x: Markup(html(x)) if type(x) is str else x,
    )
    environment.filters |= {
        "path": path,
        "lines": lines,
        "short": lambda x: "–" if x is None else _short(x),
        "share": lambda x: f"{x:.1%}",
        "number": lambda x: "" if x is None or math.isnan(x) else repr(float(x)),
    }
    source = resources.files("learnables.report") / "page.html"
    return environment.from_string(source.read_text(encoding="utf-8"))


def _short(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
