"""The catalogues as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from .methods import Method
from .terms import Term

__all__ = ["method_list", "method_page", "term_list", "term_page"]


def method_list(rows: Iterable[Method]) -> Table:
    table = Table("method", "kind", "what it does", "paper")
    for row in rows:
        table.add_row(row.name, row.kind, row.what, f"arXiv {row.paper.arxiv}")
    return table


def method_page(row: Method) -> Table:
    table = _page(row)
    table.add_row("needs", ", ".join(row.needs) or "nothing beyond the base install")
    forms = [f"{row.saved_form} of rank {'r' if row.saved_rank == 1 else f'{row.saved_rank} r'}"]
    forms += [f"{form} of rank r ({choice})" for choice, form in row.other_forms.items()]
    table.add_row("saved as", " or ".join(forms))
    table.add_row("paper", f"{row.paper.title}, arXiv {row.paper.arxiv}, section {row.paper.section}")
    table.add_row("config", row.config.replace(":", "."))
    table.add_row("recipe", row.recipe)
    return table


def term_list(rows: Iterable[Term]) -> Table:
    table = Table("regularizer", "tasks", "what it does", "paper")
    for row in rows:
        table.add_row(row.name, ", ".join(row.tasks), row.what, f"arXiv {row.paper.arxiv}" if row.paper else "")
    return table


def term_page(row: Term) -> Table:
    table = _page(row)
    table.add_row("tasks", ", ".join(row.tasks))
    if row.paper:
        table.add_row("paper", f"{row.paper.title}, arXiv {row.paper.arxiv}, section {row.paper.section}")
    table.add_row("class", row.config.replace(":", "."))
    if row.recipe:
        table.add_row("recipe", row.recipe)
    return table


def _page(row: Any) -> Table:
    table = Table(title=f"{row.title} ({row.name})", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for label in ("what", "when", "when_not", "cost"):
        table.add_row(label.replace("_", " "), getattr(row, label))
    table.add_row("defaults", ", ".join(f"{key}: {value}" for key, value in row.defaults.items()))
    return table
