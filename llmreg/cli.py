"""The command line: parse, call, print. No logic; nothing is imported before a command needs it.

Exit codes: 0 done; 2 the recipe or the arguments are wrong; 130 and 143 stopped by Ctrl-C and SIGTERM; 1 anything else.
"""

from __future__ import annotations

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
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train an adapter, with scores before and after, into the recipe's output folder."""
    from .recipes import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from .recipes import run

    report = run(loaded)
    if as_json:
        _print_json(report.as_dict())
    else:
        _print(*report.renderables())


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
        typer.echo(f"# {recipe} is valid; the adapter is published with rank {settled.exported_rank}.")
        typer.echo(dump_recipe(loaded), nl=False)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all are listed without it.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or show one: what, when, when not, cost, defaults, paper, recipe."""
    from .methods import catalogue, get_method

    if name is None:
        rows = list(catalogue().values())
        if as_json:
            _print_json([row.as_dict() for row in rows])
        else:
            _print(_method_list(rows))
    elif as_json:
        _print_json(get_method(name).as_dict())
    else:
        _print(_method_page(get_method(name)))


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to write; empty or new.")],
    rank: Annotated[int | None, typer.Option(help="Recompress every layer to at most this rank.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: Json = False,
) -> None:
    """Write a saved adapter as plain LoRA of a chosen rank and dtype."""
    from dataclasses import asdict

    from .hub.export import export_lora

    report = export_lora(Path(adapter).expanduser(), Path(folder).expanduser(), rank=rank, dtype=dtype)
    if as_json:
        _print_json({"path": folder, **asdict(report)})
    else:
        typer.echo(
            f"{folder}: plain LoRA of rank {report.rank} in {report.dtype}, relative error {report.relative_error:.1e}"
        )


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
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the argument parser
            _complain(f"{error.format_message()} See llmreg --help.")
            return 2
        from .errors import LlmregError

        if isinstance(error, LlmregError):
            _complain(str(error))
            return 2
        raise


def _stopped(number: int, frame: Any) -> None:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    _complain(f"stopped by {name}; nothing half-written was left behind.")
    raise SystemExit(128 + number)


def _complain(message: str) -> None:
    sys.stderr.write(f"llmreg: {message}\n")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def _print(*renderables: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for renderable in renderables:
        console.print(renderable, soft_wrap=isinstance(renderable, str))


def _method_list(rows: list[Any]) -> Any:
    from rich.table import Table

    table = Table("method", "kind", "what it does", "paper")
    for row in rows:
        table.add_row(row.name, row.kind, row.what, f"arXiv {row.paper.arxiv}")
    return table


def _method_page(row: Any) -> Any:
    from rich.table import Table

    table = Table(title=f"{row.title} ({row.name})", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for label in ("what", "when", "when_not", "cost"):
        table.add_row(label.replace("_", " "), getattr(row, label))
    table.add_row("defaults", ", ".join(f"{key}: {value}" for key, value in row.defaults.items()))
    table.add_row("needs", ", ".join(row.needs) or "nothing beyond the base install")
    table.add_row("saved as", f"plain LoRA of rank {'r' if row.saved_rank == 1 else f'{row.saved_rank} r'}")
    table.add_row("paper", f"{row.paper.title}, arXiv {row.paper.arxiv}, section {row.paper.section}")
    table.add_row("config", row.config.replace(":", "."))
    table.add_row("recipe", row.recipe)
    return table
