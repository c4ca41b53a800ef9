"""What a run came to: one report, as JSON for machines and as a short table for people."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .measure import Measurement

__all__ = ["Report", "calibration_facts", "machine", "peak_memory_mib"]


@dataclass(frozen=True)
class Report:
    """The result of `llmreg.recipes.run`.

    Attributes:
        method, model, seed: of the recipe.
        measurements: scores before and after, tasks first.
        heldout_loss: {"before", "after"}, the mean of the training loss on the held-out rows, or None.
        steps, train_loss: optimizer steps, and the mean training loss over them.
        losses: the loss curve, one {"step", "loss", "learning_rate"} a log line; of grpo also {"reward", "reward_std",
            "entropy", "kl", "completions/mean_length"} and "rewards/<name>/mean" of each reward.
        trainable_parameters, total_parameters: of the model with its adapter.
        adapter_bytes: size of the adapter's weights file.
        rank, form: of the saved adapter; the form is "plain LoRA" for most methods.
        start_hash: SHA-256 of the starting factors; None for methods that start from noise.
        peak_memory_mib: {"process"} and, with a GPU, {"gpu"}.
        seconds: {"load", "init", "evaluate", "train", "save", "total"}.
        adapter: its folder. export: None, or {"path", "rank", "dtype", "relative_error"}.
        load: two lines of Python that load the adapter.
        versions, machine: of the libraries, and of what it ran on.
        regularizers: None, or {name: [[step, value], ...]} as they were logged.
        singular_values: None, or {layer: [values, largest first]} of what the adapter adds to it.
        recipe: None, or the whole recipe as YAML.
        classes: of a classification, in the order of their numbers, else None.
        vectors: None, or of SVFit's frozen vectors {"dtype", "error"}: the largest relative error of a layer's.
        residual: None, or of a quantised residual {"layers", "quantized_error", "error"}: the distance from the
            full-precision weights over their norm, of the quantised base and of what training starts from.
        calibration: None, or of a method that starts from data {"data", "tokens", "batches", "passes", "inputs",
            "exact", "sketched", "reason", "cached", "seconds", "ranks"}: how many distinct layer inputs were summed
            exactly and how many sketched, why, whether from the cache, and the ranks that were chosen, by layer.
        changed_on_resume: None for a run in one piece; else what differs from the recipe of its checkpoint.
    """

    method: str
    model: str
    seed: int
    measurements: tuple[Measurement, ...]
    heldout_loss: dict[str, float] | None
    steps: int
    train_loss: float
    losses: tuple[dict[str, float], ...]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    rank: int
    start_hash: str | None
    peak_memory_mib: dict[str, float]
    seconds: dict[str, float]
    adapter: str
    export: dict[str, Any] | None
    load: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    regularizers: dict[str, list[list[float]]] | None = None
    singular_values: dict[str, list[float]] | None = None
    recipe: str | None = None
    classes: tuple[str, ...] | None = None
    changed_on_resume: tuple[str, ...] | None = None
    form: str = "plain LoRA"
    vectors: dict[str, Any] | None = None
    residual: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        values = asdict(self)
        for row, measurement in zip(values["measurements"], self.measurements, strict=True):
            row["forgetting"] = measurement.forgotten
        return values

    def renderables(self) -> list[Any]:
        """What `rich` prints: a table of scores, what it cost, and how to load the adapter."""
        from rich.markup import escape

        seconds = ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items() if name != "total")
        memory = ", ".join(f"{value:,.0f} MiB ({name})" for name, value in self.peak_memory_mib.items())
        share = self.trainable_parameters / self.total_parameters
        lines = [
            f"[bold]Trained[/]   {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.1%}), "
            f"{self.steps:,} steps",
            f"[bold]Time[/]      {self.seconds['total']:.0f} s ({seconds})",
            f"[bold]Memory[/]    {memory} at the peak",
            f"[bold]Adapter[/]   {escape(self.adapter)} ({self.form} of rank {self.rank}, {_size(self.adapter_bytes)})",
        ]
        if self.calibration:
            said = "; ".join(f"{name} {value}" for name, value in calibration_facts(self.calibration))
            lines.append(f"[bold]Start[/]     {escape(said)}")
        if self.vectors:
            lines.append(
                f"[bold]Vectors[/]   frozen in {self.vectors['dtype']}, relative rounding error "
                f"{self.vectors['error']:.1e}"
            )
        if self.residual:
            lines.append(
                f"[bold]Residual[/]  off the full-precision weights by {self.residual['error']:.1%} at the start, "
                f"quantised alone by {self.residual['quantized_error']:.1%}"
            )
        if self.export:
            rank, dtype, error = (self.export[key] for key in ("rank", "dtype", "relative_error"))
            lines.append(
                f"[bold]Exported[/]  {escape(self.export['path'])} (rank {rank}, {dtype}, relative error {error:.1e})"
            )
        if self.changed_on_resume:
            lines.append(f"[bold]Changed[/]   since the checkpoint: {escape('; '.join(self.changed_on_resume))}")
        if self.recipe is not None:
            lines.append(f"[bold]Report[/]    {escape(os.path.join(os.path.dirname(self.adapter), 'report.html'))}")
        lines.append("[bold]Load it[/]   " + "\n          ".join(escape(line) for line in self.load))
        table = self._table()
        return [table, *lines] if table.row_count else list(lines)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{self.method} on {self.model}", title_justify="left")
        table.add_column("score")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        for row in self.measurements:
            table.add_row(*_cells(row))
        if self.heldout_loss:
            before, after = self.heldout_loss["before"], self.heldout_loss["after"]
            table.add_row("held-out loss", f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
        return table


def calibration_facts(calibration: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `Report.calibration` says, in words; empty for methods that need no data."""
    if not calibration:
        return []
    counts = {name: int(calibration[name]) for name in ("tokens", "batches", "inputs", "exact", "sketched")}
    form = f"{counts['inputs']:,}, {calibration['reason']}"
    if counts["exact"] and counts["sketched"]:  # an input that is narrow is cheaper exact than sketched
        form += f"; {counts['exact']:,} exact, {counts['sketched']:,} sketched"
    facts = [
        ("data", str(calibration["data"])),
        ("tokens", f"{counts['tokens']:,} in {counts['batches']:,} batches"),
        ("distinct inputs", form),
        ("seconds", f"{calibration['seconds']:.1f}{', statistics from the cache' if calibration['cached'] else ''}"),
    ]
    ranks = [int(rank) for rank in (calibration.get("ranks") or {}).values()]
    if ranks:
        none = f", none for {ranks.count(0)} layers" if 0 in ranks else ""
        given = [rank for rank in ranks if rank]
        facts.append(("ranks chosen", f"{min(given)} to {max(given)}, {sum(ranks):,} in all{none}"))
    return facts


def _cells(row: Measurement) -> tuple[str, str, str, str]:
    label = f"{row.name} ({row.metric}{', forgetting' if row.role == 'forgetting' else ''})"
    if row.metric != "perplexity":
        change = 100 * (row.after - row.before)
        return label, f"{row.before:.1%}", f"{row.after:.1%}", f"{change:+.1f} points"
    return label, f"{row.before:.2f}", f"{row.after:.2f}", f"{row.after - row.before:+.2f}"


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def machine() -> dict[str, Any]:
    """What the run's times mean something on: system, cores, threads, GPU. No host name."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def peak_memory_mib() -> dict[str, float]:
    """The largest memory so far of this process (resident) and of its tensors on the GPU, in MiB."""
    import torch

    peak: dict[str, float] = {}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    except ImportError:  # Windows has no such figure
        pass
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return peak
