"""What the benchmarks share: a description of the machine, test matrices with a known spectrum, tables."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llmreg.versions import library_versions

__all__ = ["machine", "power_law_matrix", "print_table"]


def machine() -> dict[str, Any]:
    """Processor, cores, GPU, Python and library versions, and today's date."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": library_versions(),
        "date": datetime.date.today().isoformat(),
    }


def power_law_matrix(
    out_features: int, in_features: int, *, exponent: float, generator: torch.Generator
) -> torch.Tensor:
    """`(out, in)` fp32 matrix with random singular vectors and singular values k^-exponent."""
    rank = min(out_features, in_features)
    U, _ = torch.linalg.qr(torch.randn(out_features, rank, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(in_features, rank, generator=generator))
    return (U * torch.arange(1, rank + 1, dtype=torch.float32) ** -exponent) @ V.t()


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table with numbers to the right."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
