"""What a run leaves behind: the adapter with its card, the export, the recipe and the reports; each by rename."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..adapters.residual import residual_errors
from ..evaluation.html_report import write_html
from ..evaluation.measure import Measurement, Suite
from ..evaluation.report import Report, machine, peak_memory_mib
from ..files import commit_folder, staged_folder, write_json, write_text
from ..hub import read_sidecar
from ..hub.card import write_card
from ..hub.spectra import update_spectra
from ..versions import library_versions
from .conflicts import largest_rank, quantizes_residual
from .data import Classes
from .load import dump_recipe
from .planning import Plan
from .schema import Recipe
from .tasks import TASKS

__all__ = ["Scores", "refuse_diverged", "report_of", "save_adapter", "write_reports"]

Scores = dict[tuple[str, str], float]


def refuse_diverged(recipe: Recipe, model: Any) -> None:
    """Refuse to save an adapter that holds NaN or infinite values.

    Raises:
        RecipeError: it does.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
            raise recipe.error(
                ("training", "learning_rate"),
                "the training diverged: the adapter holds NaN or infinite values and is not saved; lower "
                "training.learning_rate, or add warmup_steps.",
            )


def save_adapter(settled: Plan, model: Any, folder: Path) -> dict[str, Any] | None:
    """Write `adapter/`, and `lora/` if the recipe gives a rank or dtype; returns the facts of that export."""
    from peft.utils import CONFIG_NAME

    output = settled.recipe.output
    adapter = folder / "adapter"
    with staged_folder(adapter) as staging:
        model.save_pretrained(str(staging))
        commit_folder(staging, adapter, marker=CONFIG_NAME)
    if not output.rank and not output.dtype:
        return None
    from ..hub import export_lora

    shutil.rmtree(folder / "lora", ignore_errors=True)  # of a run that was interrupted after it
    approximate = quantizes_residual(settled.adapter)
    done = export_lora(adapter, folder / "lora", rank=output.rank, dtype=output.dtype, approximate=approximate)
    return {
        "path": str(folder / "lora"),
        "rank": done.rank,
        "dtype": done.dtype,
        "relative_error": done.relative_error,
    }


def write_reports(report: Report, folder: Path) -> None:
    """Write `recipe.yaml`, the cards, `report.html`, and last `report.json`."""
    assert report.recipe is not None
    values = report.as_dict()
    write_text(folder / "recipe.yaml", report.recipe)
    for name in ("adapter", "lora"):
        if (folder / name).is_dir():
            write_card(folder / name, recipe=report.recipe, report=values)
    write_html(values, folder / "report.html")
    write_json(folder / "report.json", values)


def report_of(
    settled: Plan,
    trainer: Any,
    outcome: Any,
    folder: Path,
    *,
    classes: Classes | None,
    suites: dict[str, list[Suite]],
    before: Scores,
    after: Scores,
    **facts: Any,
) -> Report:
    """The report of a run whose adapter is saved; `facts` are its remaining fields."""
    recipe, model, adapter = settled.recipe, trainer.model, folder / "adapter"
    sidecar = read_sidecar(adapter)
    trainable, total = model.get_nb_trainable_parameters()
    curve = tuple(_logged(line) for line in trainer.state.log_history if "loss" in line)
    return Report(
        method=settled.method.name,
        model=recipe.model.name,
        seed=recipe.seed,
        measurements=_paired(suites, before, after),
        steps=int(outcome.global_step),
        train_loss=_mean_loss(curve, float(outcome.training_loss)),
        losses=curve,
        regularizers=_terms(trainer.state.log_history),
        trainable_parameters=trainable,
        total_parameters=total,
        adapter_bytes=(adapter / "adapter_model.safetensors").stat().st_size,
        rank=settled.method.rank_of(settled.adapter) * largest_rank(trainer.model.peft_config["default"]),
        form=settled.method.form_of(settled.adapter),
        vectors=_vectors(trainer.model),
        residual=_residual(trainer.model),
        start_hash=(sidecar.start_hash or None) if sidecar else None,
        peak_memory_mib=peak_memory_mib(),
        adapter=str(adapter),
        load=_how_to_load(settled, adapter, classes),
        versions=library_versions(),
        machine=machine(),
        singular_values=update_spectra(adapter),
        recipe=dump_recipe(recipe),
        classes=None if classes is None else classes.names,
        **facts,
    )


def _logged(line: dict[str, Any]) -> dict[str, float]:
    """What the report keeps of a log line; of grpo the rewards too, in all and of each function."""
    names = ("step", "loss", "learning_rate", "reward", "reward_std", "entropy", "kl", "completions/mean_length")
    kept = (*names, *(name for name in line if name.startswith("rewards/") and name.endswith("/mean")))
    return {name: float(line[name]) for name in kept if line.get(name) is not None}


def _terms(history: list[dict[str, Any]]) -> dict[str, list[list[float]]] | None:
    """What the regularisers logged, by name."""
    prefix = "regularizer/"
    terms: dict[str, list[list[float]]] = {}
    for line in history:
        for name, value in line.items():
            if name.startswith(prefix):
                terms.setdefault(name.removeprefix(prefix), []).append([float(line["step"]), float(value)])
    return terms or None


def _vectors(model: Any) -> dict[str, Any] | None:
    """In what SVFit keeps its vectors, and how far that rounds them."""
    layers = [module for module in model.modules() if "default" in getattr(module, "vector_error", ())]
    if not layers:
        return None
    dtypes = {str(layer.lora_A0["default"].weight.dtype).removeprefix("torch.") for layer in layers}
    error = max(layer.vector_error["default"] for layer in layers)
    return {"dtype": "+".join(sorted(dtypes)), "error": error}


def _residual(model: Any) -> dict[str, Any] | None:
    """How far quantising was from the full-precision weights, and how far base and adapter are at the start."""
    errors = residual_errors(model).values()
    if not errors:
        return None
    norms = {name: sum(getattr(one, name) ** 2 for one in errors) ** 0.5 for name in ("qlora", "kept", "weight")}
    return {
        "layers": len(errors),
        "quantized_error": norms["qlora"] / norms["weight"],
        "error": norms["kept"] / norms["weight"],
    }


def _paired(suites: dict[str, list[Suite]], before: Scores, after: Scores) -> tuple[Measurement, ...]:
    return tuple(
        Measurement(suite.name, metric, role, len(suite.rows), before[suite.name, metric], after[suite.name, metric])
        for role, members in suites.items()
        for suite in members
        for metric in suite.metrics
    )


def _mean_loss(curve: tuple[dict[str, float], ...], otherwise: float) -> float:
    """The mean over all steps that were logged; transformers' own forgets the steps before a resume."""
    steps = [0.0, *(line["step"] for line in curve)]
    weights = [after - before for before, after in pairwise(steps)]
    if not sum(weights):
        return otherwise
    return sum(weight * line["loss"] for weight, line in zip(weights, curve, strict=True)) / sum(weights)


def _how_to_load(settled: Plan, adapter: Path, classes: Classes | None) -> tuple[str, ...]:
    recipe = settled.recipe
    if quantizes_residual(settled.adapter):
        base = f"transformers.{TASKS[recipe.task].auto_class}.from_pretrained({str(adapter / 'residual')!r})"
        return (f"base = {base}", f"model = peft.PeftModel.from_pretrained(base, {str(adapter)!r})")
    name = "llmreg.pocket.path()" if recipe.model.name == "pocket" else repr(recipe.model.name)
    base = f"transformers.{TASKS[recipe.task].auto_class}.from_pretrained({name})"
    if classes is not None:
        base = f"{base[:-1]}, num_labels={len(classes.names)})"
    elif recipe.model.name == "pocket":
        base = "llmreg.pocket.load_model()"
    return (f"base = {base}", f"model = peft.PeftModel.from_pretrained(base, {str(adapter)!r})")
