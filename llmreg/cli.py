"""The command line: parse, call, print. No logic; nothing is imported before a command needs it.

Exit codes: 0 done; 2 the recipe or the arguments are wrong; 130 and 143 stopped by Ctrl-C and SIGTERM; 1 anything else.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="llmreg",
    help="Fine-tune language models with the SVD-based and regularised methods of the literature.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, a .yaml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="For example training.max_steps=20 model.name=pocket"),
]
AdapterFolder = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter.")]
NewFolder = Annotated[str, typer.Argument(metavar="DIR", help="Where to write; empty or new.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen; download and write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in output.dir.")
    ] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Continue from this one, such as checkpoint-40.")] = None,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="Resume under a changed recipe.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter, with scores before and after, into the recipe's output folder."""
    from .recipes import load_recipe

    if dry_run and (resume or checkpoint):
        raise typer.BadParameter("--dry-run and --resume exclude each other.")
    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from .recipes import preview

        _print_result(preview(loaded), as_json)
        return
    from .recipes import run

    _print_result(run(loaded, resume=checkpoint or resume, allow_changes=allow_changes), as_json)


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a recipe and print it with its defaults; loads no model and no data, writes nothing."""
    from .recipes import dump_recipe, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from .recipes import plan

    settled = plan(loaded)
    if as_json:
        _print_json({"recipe": loaded.resolved(), "exported_rank": settled.exported_rank})
    else:
        rank = f"rank {settled.exported_rank}" if settled.ranks_known else f"ranks up to {settled.exported_rank}"
        typer.echo(f"# {recipe} is valid; the adapter is published with {rank}.")
        typer.echo(dump_recipe(loaded), nl=False)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all are listed without it.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods and regularisers, or show one: what, when, when not, cost, defaults, paper, recipe."""
    from . import tables
    from .methods import catalogue, get_method
    from .terms import TERMS

    if name is None:
        rows = list(catalogue().values())
        if as_json:
            _print_json([row.as_dict() for row in rows] + [term.as_dict() for term in TERMS.values()])
        else:
            _print(tables.method_list(rows))
            _print(tables.term_list(TERMS.values()))
    elif as_json:
        _print_json((TERMS.get(name) or get_method(name)).as_dict())
    else:
        _print(tables.term_page(TERMS[name]) if name in TERMS else tables.method_page(get_method(name)))


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, from which editors complete and check."""
    from .recipes import recipe_schema

    _print_json(recipe_schema())


@app.command()
def init(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe, a .yaml file.")] = None,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="The cache; by default where train looks.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what the cache holds.")] = False,
    as_json: Json = False,
) -> None:
    """Decompose the weights of a recipe (or calibrate on its data) once, offline, so that training starts at once;
    without a recipe, list the cache."""
    from dataclasses import asdict

    from .recipes import starting

    if clear:
        count, size = starting.clear_starts(output)
        calibrations, more = starting.clear_statistics() if output is None else (0, 0)
        if recipe is None:
            if as_json:
                _print_json({"removed": count + calibrations, "bytes": size + more})
                return
            typer.echo(f"removed {count} starts, {_size(size)}")
            if calibrations:
                typer.echo(f"removed {calibrations} calibrations, {_size(more)}")
            return
    if recipe is None:
        _print_json(starting.list_starts(output)) if as_json else _print(starting.starts_table(output))
        if not as_json and output is None and (line := starting.statistics_line()):
            typer.echo(line)
        return
    from .recipes import load_recipe

    report = starting.prepare_starts(load_recipe(recipe, overrides or []), output)
    if as_json:
        _print_json(asdict(report))
    elif isinstance(report, starting.StatisticsReport):
        done = "found there" if report.found else "gathered"
        typer.echo(
            f"{report.path}: statistics of {report.model} for {report.method} on {report.data} {done} in "
            f"{report.seconds:.1f} s, {report.tokens:,} tokens, {report.inputs} inputs of {report.layers} layers; it "
            f"holds {report.entries} calibration{'' if report.entries == 1 else 's'}, {_size(report.bytes)}"
        )
    else:
        typer.echo(
            f"{report.path}: {report.layers} layers of {report.model} by {report.method} in {report.seconds:.1f} s, "
            f"{report.found} of them found; it holds {report.entries} starts, {_size(report.bytes)}"
        )


@app.command("eval")
def evaluate(
    source: Annotated[str, typer.Argument(metavar="RECIPE|ADAPTER", help="A recipe, a run's folder, or an adapter.")],
    overrides: Overrides = None,
    merged: Annotated[bool, typer.Option("--merged/--no-merged", help="Also measure the merged model.")] = True,
    as_json: Json = False,
) -> None:
    """Measure base, adapter and merged model: task scores, perplexity, and what was forgotten."""
    from .recipes import evaluate as measure

    _print_result(measure(source, overrides or [], merged=merged), as_json)


@app.command()
def export(
    adapter: AdapterFolder,
    folder: NewFolder,
    rank: Annotated[int | None, typer.Option(help="Recompress every layer to at most this rank.")] = None,
    dtype: Dtype = None,
    check: Annotated[str | None, typer.Option(help="vllm: fail unless vLLM can serve the result.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub id, for tiny adapters only.")] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Consent to the error of an adapter beside a quantised residual.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a saved adapter as plain LoRA of a chosen rank and dtype."""
    from dataclasses import asdict

    from .hub.export import export_lora

    report = export_lora(
        _path(adapter), _path(folder), rank=rank, dtype=dtype, check=check, base=base, approximate=approximate
    )
    if as_json:
        _print_json({"path": folder, **asdict(report)})
    else:
        served = f"; serve it with vLLM's --max-lora-rank {report.vllm_rank}" if report.vllm_rank else ""
        typer.echo(
            f"{folder}: plain LoRA of rank {report.rank} in {report.dtype}, relative error {report.relative_error:.1e}"
            f"{served}"
        )
        if report.approximation is not None:
            typer.echo(f"an approximation: {report.approximation.in_words()}")


@app.command()
def merge(
    adapter: AdapterFolder,
    folder: NewFolder,
    base: Annotated[str | None, typer.Option(help="Folder or Hub id; by default the adapter's own base.")] = None,
    dtype: Dtype = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare logits of adapter and merged model.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write the base model with a saved adapter merged in, shard by shard."""
    from dataclasses import asdict

    from .hub.merge import merge as merge_into

    report = merge_into(_path(adapter), _path(folder), base=base, dtype=dtype, check=check)
    if as_json:
        _print_json(asdict(report))
    else:
        typer.echo(
            f"{folder}: {report.base}, {report.merged + report.replaced} tensors changed, {report.copied} copied, "
            f"{_size(report.bytes)}"
        )
        if report.parity is None:
            typer.echo(f"logits not compared: {report.parity_skipped}")
        else:
            errors = ", ".join(f"{form} {report.parity[form]['relative']:.1e}" for form in ("exported", "merged"))
            typer.echo(f"relative error of the logits against the adapter on its base: {errors}")


@app.command()
def push(
    adapter: AdapterFolder,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; private without it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; no network.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    as_json: Json = False,
) -> None:
    """Publish a saved adapter on the Hub, with its card; private unless told otherwise."""
    from dataclasses import asdict

    from .hub.push import push as push_to

    report = push_to(
        _path(adapter),
        repository,
        private=not public,
        dry_run=dry_run,
        revision=revision,
        commit_message=message,
        create_pr=create_pr,
    )
    if as_json:
        _print_json(asdict(report))
        return
    for name, size in report.files.items():
        typer.echo(f"  {_size(size):>10}  {name}")
    done = "would be uploaded" if dry_run else "uploaded"
    kind = "private" if report.private else "public"
    typer.echo(f"{_size(report.total_bytes)} {done} to {kind} {report.url or report.repo_id}")


def main() -> None:
    """The console script: every mistake of the user's is one message on stderr and exit code 2, without a traceback."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopped)
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        return int(app(args=arguments, prog_name="llmreg", standalone_mode=False) or 0)
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `llmreg methods | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        from .errors import TrainingStopped

        if isinstance(error, TrainingStopped):
            _complain(str(error))
            return 143
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the argument parser
            _complain(f"{error.format_message()} See llmreg --help.")
            return 2
        from .errors import LlmregError

        if isinstance(error, LlmregError):
            _complain(str(error))
            return 1 if isinstance(error, OSError) else 2  # the Hub or the network is no mistake of the user's
        reason = _storage_problem(error)
        if reason:
            _complain(f"{reason}; make room or give another folder.")
            return 2
        raise


def _storage_problem(error: BaseException) -> str | None:
    """What is wrong with the disk, if that stopped the command; libraries wrap the system's error in their own."""
    if isinstance(error, PermissionError):
        return f"{error.filename}: {error.strerror}"
    cause: BaseException | None = error
    while cause is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if getattr(cause, "errno", None) == number or f"os error {number})" in str(cause):
                file = getattr(cause, "filename", None)
                return f"{file}: {os.strerror(number)}" if file else os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None


def _stopped(number: int, frame: Any) -> None:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    _complain(f"stopped by {name}.")
    raise SystemExit(128 + number)


def _path(folder: str) -> Path:
    return Path(folder).expanduser()


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _print_result(result: Any, as_json: bool) -> None:
    """A result that has `as_dict` and `renderables`."""
    if as_json:
        _print_json(result.as_dict())
    else:
        _print(*result.renderables())


def _complain(message: str) -> None:
    sys.stderr.write(f"llmreg: {message}\n")


def _print_json(value: Any) -> None:
    from .files import finite

    sys.stdout.write(json.dumps(finite(value), indent=2, default=str, allow_nan=False) + "\n")


def _print(*renderables: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for renderable in renderables:
        console.print(renderable, soft_wrap=isinstance(renderable, str))
