"""The command line. Each command imports what it needs inside, so that ``--help`` is quick."""

from collections.abc import Callable
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape

if TYPE_CHECKING:
    import torch

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Commands(typer.Typer):
    """Commands whose help is the prose of their docstring.

    Left to itself, typer prints the section ``Raises:`` too, breaks lines where the source does,
    and takes ``[tool.learnables]`` for markup.
    """

    def command(self, *args: Any, **options: Any) -> Callable[[_Command], _Command]:
        def register(function: _Command) -> _Command:
            prose = (getdoc(function) or "").partition("\nRaises:")[0]
            paragraphs = [" ".join(escape(p).split()) for p in prose.strip().split("\n\n")]
            made = super(_Commands, self).command(*args, help="\n\n".join(paragraphs), **options)
            return made(function)

        return register


app = _Commands(
    name="learnables",
    help="Build, prove, constrain, scale and watch the parameters you write yourself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def learnables(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="As the command version."
        ),
    ] = False,
) -> None:
    """Build, prove, constrain, scale and watch the parameters you write yourself."""


# --- prove: run, audit, rules, explain, inspect, sweep ---------------------------------------

_Select = Annotated[
    list[str] | None,
    typer.Option(
        help="Only rules with these codes, beginnings of codes or names: LRN2,no-gradient."
    ),
]
_Ignore = Annotated[list[str] | None, typer.Option(help="No rules with these.")]
_Format = Annotated[
    str, typer.Option("--format", help="text, json, jsonl, sarif, github or junit.")
]
_Output = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Write the report to this file.")
]


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
def run(
    script: Annotated[str, typer.Argument(help="The script, or with -m the module.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="What the script is given.", metavar="ARGS")
    ] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Iterations to observe: 4.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the script after the report.")] = False,
    fail: Annotated[
        bool,
        typer.Option("--fail", help="Exit with 1 on findings, with 2 if nothing could be judged."),
    ] = False,
    format: _Format = "text",
    output: _Output = None,
    select: _Select = None,
    ignore: _Ignore = None,
) -> None:
    """Run an unmodified training script and say which of its parameters do not train, and why.

    The first iterations are observed; the report goes to standard error while the script goes on as
    if nothing had been. Its exit code is kept. Options of ours come before SCRIPT; what follows is
    the script's. With torchrun: torchrun … -m learnables run SCRIPT.

    Raises:
        Exit: With the exit code of the script.
    """
    from learnables.auditing.script import run_script

    code = run_script(
        script,
        arguments or (),
        is_module=module,
        steps=steps,
        stop=stop,
        fail=fail,
        format=format,
        output=output,
        select=select or (),
        ignore=ignore or (),
    )
    raise typer.Exit(code)


@app.command()
def audit(
    factory: Annotated[
        str,
        typer.Argument(
            help="pkg.module:name or file.py:name; it returns a model, or (model, optimizer, step)."
        ),
    ],
    steps: Annotated[int | None, typer.Option(min=1, help="Iterations to observe: 4.")] = None,
    format: _Format = "text",
    output: _Output = None,
    select: _Select = None,
    ignore: _Ignore = None,
    baseline: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Report only what is not in this file.")
    ] = None,
    write_baseline: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write what is found to this file, and succeed."),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(help="An experiment to make besides: gradient, batch, checkpoint."),
    ] = None,
) -> None:
    """Say for every parameter whether it trains as its author thinks, and if not, why.

    Defaults come from [tool.learnables] in pyproject.toml. Exit code 0: clean; 1: findings; 2: it
    could not run.

    Raises:
        Exit: With that code.
    """
    from learnables.auditing.command import run_audit

    code = run_audit(
        factory,
        steps=steps,
        format=format,
        output=output,
        select=select or (),
        ignore=ignore or (),
        baseline=baseline,
        new_baseline=write_baseline,
        probes=probe or (),
    )
    raise typer.Exit(code)


@app.command()
def rules(select: _Select = None) -> None:
    """List the rules of the audit."""
    from learnables.auditing.command import print_rules

    print_rules(select or ())


@app.command()
def explain(
    rule: Annotated[str, typer.Argument(help="A code or a name: LRN201, no-gradient.")],
) -> None:
    """Print the page of a rule: why it matters, an example, and the mend."""
    from learnables.auditing.command import explain

    explain(rule)


@app.command()
def inspect(
    file: Annotated[
        Path, typer.Argument(help="A checkpoint: of learnables, any safetensors, of torch.save.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="pkg.module:factory or file.py:factory; compare with what it builds."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Another file: how far has each tensor moved from it?")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
    output: _Output = None,
) -> None:
    """Look into a checkpoint: what it holds, whether it fits a model, what never left its start.

    Nothing in the file is executed. Exit code 0: clean; 1: something is missing, unexpected,
    mis-shaped, not finite, untied or untrained; 2: it could not be read.

    Raises:
        Exit: With that code.
    """
    from learnables.auditing.inspection import run_inspect

    raise typer.Exit(run_inspect(file, model=model, base=base, format=format, output=output))


@app.command()
def sweep(
    library: Annotated[str, typer.Argument(help="timm or transformers.")],
    pattern: Annotated[
        list[str] | None, typer.Option(help="Only architectures that fit this glob: vit_*.")
    ] = None,
    decay: Annotated[
        bool,
        typer.Option("--decay", help="Say whom the library's own groups decay, and ours do not."),
    ] = False,
    format: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
    output: _Output = None,
    select: _Select = None,
    ignore: _Ignore = None,
) -> None:
    """Audit every architecture of an installed library on the meta device, without a step.

    Exit code 0: clean; 1: findings; 2: nothing could be built.

    Raises:
        Exit: With that code.
    """
    from learnables.integrations.sweep import run_sweep

    code = run_sweep(
        library,
        pattern or (),
        decay=decay,
        format=format,
        output=output,
        select=select or (),
        ignore=ignore or (),
    )
    raise typer.Exit(code)


# --- train -----------------------------------------------------------------------------------

train = _Commands(help="Train a model from scratch with a recipe.", no_args_is_help=True)
app.add_typer(train, name="train")


@train.command()
def vit(
    data: Annotated[
        str | None,
        typer.Option(help="digits (default), fashion-mnist, or a folder of images."),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Where the files of fashion-mnist lie.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="digits, fashion-mnist, fashion-mnist-gpu or folder; by --data if not said."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step, over all processes and micro-batches.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Micro-batches per process and step.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="Compile the model with torch.compile.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is random.")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto (default), cpu, cuda, cuda:1, mps.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="ddp (default) or fsdp2: how the processes of torchrun share the model."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop after this many steps: a dry run.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting: --set dim=96 --set mixup=0.2; see docs/en/vit.md."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; that of the data if not said.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where runs go.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run to go on with; only how it is computed may change: "
            "--device, --strategy, --threads."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per process; torch decides if not said.")
    ] = None,
) -> None:
    """Train a Vision Transformer: audited before the first step, watched, with a report at the end.

    Under torchrun, the processes that it starts train one model together.

    Raises:
        Exit: With code 130, after Ctrl-C.
    """
    from learnables.recipes.vit.command import run

    given = {
        "data_dir": data_dir,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "lr": lr,
        "precision": precision,
        "compile": compile,
        "seed": seed,
        "device": device,
        "strategy": strategy,
        "max_steps": max_steps,
    }
    code = run(
        {key: value for key, value in given.items() if value is not None},
        set_ or [],
        data=data,
        preset=preset,
        name=name,
        out=out,
        resume=resume,
        threads=threads,
    )
    if code:
        raise typer.Exit(code)


# --- watch: report, watch, runs, compare, export ----------------------------------------------

_Run = Annotated[Path, typer.Argument(help="A run's folder, or its database.")]


@app.command()
def report(
    run: _Run,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; report.html beside the run.")
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="error or warning: exit with 1 where there is one.")
    ] = None,
) -> None:
    """Write a run as one offline HTML file.

    Raises:
        Exit: With 1 where --fail-on asks for it.
    """
    from learnables.report.command import write_report

    raise typer.Exit(write_report(run, output, fail_on))


@app.command()
def watch(
    run: _Run,
    port: Annotated[int, typer.Option(help="Port on localhost; any that is free.")] = 0,
    terminal: Annotated[bool, typer.Option("--terminal", help="Here, not in a browser.")] = False,
) -> None:
    """Follow a run while it trains: a page on localhost, or this terminal."""
    from learnables.report.command import watch_run

    watch_run(run, port, terminal)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look for runs.")] = Path("runs"),
) -> None:
    """List runs: when, how far, the last numbers, what is wrong."""
    from learnables.report.command import list_runs

    list_runs(folder)


@app.command()
def compare(a: _Run, b: _Run) -> None:
    """Say which parameters of two runs differ, and since when.

    Raises:
        Exit: With 1 where any differs.
    """
    from learnables.report.command import print_comparison

    raise typer.Exit(print_comparison(a, b))


@app.command()
def export(
    run: _Run,
    to: Annotated[str, typer.Option(help="tensorboard, jsonl, csv, trackio or wandb.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to.")] = None,
) -> None:
    """Hand a run to another tool."""
    from learnables.report.command import export_run

    export_run(run, to, output)


# --- measure: bench ----------------------------------------------------------------------------

bench = _Commands(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("sparse")
def bench_sparse(
    in_features: Annotated[int, typer.Option("--in", min=1, help="Features in.")] = 1024,
    out_features: Annotated[int, typer.Option("--out", min=1, help="Features out.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 512,
    block: Annotated[int, typer.Option(min=1, help="Side of a block.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; all when left out.")] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="For each layer.")] = 1.0,
) -> None:
    """Which linear layer pays here: dense, block-sparse, low-rank or dynamic, forward and backward.

    Raises:
        BadParameter: There is no such floating dtype or device, or the block does not fit.
    """
    from learnables.errors import LayoutError
    from learnables.nn.comparison import compare

    kind = _set_up(dtype, threads, device)
    try:
        found = compare(
            in_features,
            out_features,
            batch,
            block=block,
            dtype=kind,
            device=device,
            seconds=seconds,
        )
    except LayoutError as error:
        raise typer.BadParameter(str(error), param_hint="--block") from error
    typer.echo(str(found))


@bench.command("layout")
def bench_layout(
    in_features: Annotated[int, typer.Option("--in", min=1, help="Features or channels.")] = 1024,
    out_features: Annotated[int, typer.Option("--out", min=1, help="Features or channels.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 512,
    kernel: Annotated[
        int | None, typer.Option(min=1, help="Side of a convolution's kernel; else a matrix.")
    ] = None,
    side: Annotated[int, typer.Option(min=1, help="Of the images, with --kernel.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; all when left out.")] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="For each number of the table.")] = 1.0,
) -> None:
    """Whether the memory layout of a weight matters here, beside how much the measuring wavers.

    Raises:
        BadParameter: There is no such floating dtype or device, or the kernel is larger than the
            images.
    """
    from learnables.runtime.layout_comparison import compare_layouts

    kind = _set_up(dtype, threads, device)
    if kernel is not None and kernel > side:
        raise typer.BadParameter(f"images of {side} x {side} are smaller", param_hint="--kernel")
    found = compare_layouts(
        in_features,
        out_features,
        batch,
        kernel=kernel,
        side=side,
        dtype=kind,
        device=device,
        seconds=seconds,
    )
    typer.echo(str(found))


def _set_up(dtype: str, threads: int | None, device: str) -> "torch.dtype":
    """The dtype of that name, after the number of threads is set.

    Raises:
        BadParameter: There is no such floating dtype, or no such device.
    """
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise typer.BadParameter(f"{dtype} is no floating dtype of torch", param_hint="--dtype")
    _require_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    return kind


def _require_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        BadParameter: It is not.
    """
    from learnables.errors import LearnablesError
    from learnables.recipes.vit.crew import find_device

    try:
        find_device(device)
    except LearnablesError as error:
        raise typer.BadParameter(
            f"{error.found}; wanted: {error.wanted}", param_hint="--device"
        ) from error


@bench.command("ranks")
def bench_ranks(
    ranks: Annotated[
        list[int] | None, typer.Option(min=1, help="Processes of a group; 2 and 4 if not said.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu over gloo, or cuda over NCCL.")] = "cpu",
) -> None:
    """Whether audit, statistics, watch, projections and checkpoints agree on one and many ranks.

    Raises:
        BadParameter: There is no such device.
        Exit: With 1 where an answer differs.
    """
    from learnables.testing.ranks import compare_ranks_with_one

    _require_device(device)
    table = compare_ranks_with_one(ranks or (2, 4), device=device)
    typer.echo(str(table))
    if not table.all_equal:
        raise typer.Exit(1)


@app.command()
def plan(
    factory: Annotated[
        str,
        typer.Argument(help="pkg.module:name or file.py:name; a model, or (model, optimizer)."),
    ],
    ranks: Annotated[int, typer.Option(min=1, help="How many processes.")] = 8,
    strategy: Annotated[str, typer.Option(help="fsdp2, ddp or none.")] = "fsdp2",
    format: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """Memory and communication of each rank, reckoned without the memory and without the ranks.

    The model is built on the meta device. Activations are not counted.

    Raises:
        BadParameter: There is no such format.
        Exit: With 2 where the factory fails.
    """
    import json

    import torch

    from learnables.auditing.factory import UsersError, build
    from learnables.footprint import footprint

    if format not in ("text", "json"):
        raise typer.BadParameter(f"{format!r} is not text or json", param_hint="--format")
    try:
        with torch.device("meta"):
            built = build(factory)
    except UsersError as error:
        typer.echo(error.told, err=True, nl=False)
        typer.echo(
            "This ran on the meta device, where tensors have no values: what needs some belongs "
            'under `if __name__ == "__main__":`.',
            err=True,
        )
        raise typer.Exit(2) from error
    held = built.get("optimizers") or built.get("optimizer") or ()
    found = footprint(built["model"], held, strategy, ranks=ranks)  # type: ignore[arg-type]
    typer.echo(str(found) if format == "text" else json.dumps(found.to_json(), indent=2))


@app.command()
def version() -> None:
    """Print the versions of learnables, torch and Python."""
    import platform

    import torch

    from learnables import __version__

    typer.echo(
        f"learnables {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
