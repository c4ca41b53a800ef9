"""Measuring an adapter that exists: the base, the adapter and the merged model on the sources of a recipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..errors import AdapterFileError, RecipeError
from ..evaluation.measure import Suite, forgetting
from ..evaluation.report import machine
from ..hub.residual_io import RESIDUAL_NAME
from ..quiet import quiet
from ..versions import library_versions
from .base_model import load_base, load_saved
from .data import load_training_data
from .load import load_recipe, make_recipe
from .planning import plan
from .running import measure_suites, suites_of
from .schema import Recipe
from .tasks import TASKS

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        model: the base. adapter: its folder, or None.
        scores: one a source and metric: {"name", "metric", "role", "rows", "base", "adapter", "merged", "forgetting"};
            `adapter` and `merged` are None where they were not measured (an adapter beside a quantised residual is not
            merged). `forgetting` is positive where something was
            lost: of exact match and accuracies the fall, of perplexity the rise of the mean loss in nats a token, as
            PEFT's method comparison defines it.
        seconds: of the whole. versions, machine: of the libraries, and of what it ran on.
    """

    model: str
    adapter: str | None
    scores: tuple[dict[str, Any], ...]
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as plain values."""
        return asdict(self)

    def renderables(self) -> list[Any]:
        """What `rich` prints: one table."""
        from rich.table import Table

        table = Table(title=f"{self.adapter or 'no adapter'} on {self.model}", title_justify="left")
        table.add_column("score")
        for column in ("base", "adapter", "merged", "forgetting"):
            table.add_column(column, justify="right")
        for row in self.scores:
            label = f"{row['name']} ({row['metric']}, {row['rows']} rows)"
            values = [_cell(row["metric"], row[column]) for column in ("base", "adapter", "merged")]
            lost = row["forgetting"]
            table.add_row(label, *values, "" if lost is None else f"{lost:+.3f}")
        return [table]


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if metric == "perplexity" else f"{value:.1%}"


def evaluate(source: str | Path, overrides: Sequence[str] = (), *, merged: bool = True) -> Evaluation:
    """Measure on the recipe's `evaluation` sources, before (the base), with the adapter, and with it merged in.

    Args:
        source: a recipe (its `output.dir/adapter` is measured if it is there), the output folder of a run, or an
            adapter: a folder or a Hub id. An adapter without a recipe beside it needs `evaluation.tasks=[...]`.
        overrides: as of `load_recipe`.
        merged: also merge the adapter into the weights in memory, and measure that.

    Raises:
        RecipeError: nothing to measure, or what `load_recipe` refuses.
        AdapterFileError: a damaged adapter, or one of another base.
    """
    started = time.perf_counter()
    recipe, adapter = _resolved(source, overrides)
    if not (recipe.evaluation.tasks or recipe.evaluation.forgetting):
        raise recipe.error(
            ("evaluation",), "there is nothing to measure; write evaluation.tasks=[...] or evaluation.forgetting=[...]."
        )
    with quiet():
        settled = plan(recipe, new_output=False)
        classes = load_training_data(recipe).classes if recipe.task == "classification" else None
        suites = suites_of(recipe, classes)
        model, tokenizer = load_base(recipe, gpu=not settled.training.use_cpu, classes=classes)
        scores = {"base": measure_suites(recipe, model, tokenizer, suites), "adapter": {}, "merged": {}}
        if adapter is not None:
            from peft import PeftModel

            beside = Path(adapter) / RESIDUAL_NAME
            if beside.is_dir():  # the base that this adapter belongs to came with it, and it is not merged
                model, merged = load_saved(recipe, beside), False
            model = PeftModel.from_pretrained(model, adapter)
            scores["adapter"] = measure_suites(recipe, model, tokenizer, suites)
            if merged:
                model.base_model.merge_adapter()
                scores["merged"] = measure_suites(recipe, model, tokenizer, suites)
    return Evaluation(
        model=recipe.model.name,
        adapter=adapter,
        scores=tuple(_rows(suites, scores)),
        seconds=time.perf_counter() - started,
        versions=library_versions(),
        machine=machine(),
    )


def _rows(suites: dict[str, list[Suite]], scores: dict[str, dict[tuple[str, str], float]]) -> list[dict[str, Any]]:
    rows = []
    for role, members in suites.items():
        for suite in members:
            for metric in suite.metrics:
                values = {form: measured.get((suite.name, metric)) for form, measured in scores.items()}
                lost = None
                if role == "forgetting" and values["base"] is not None and values["adapter"] is not None:
                    lost = forgetting(metric, values["base"], values["adapter"])
                identity = {"name": suite.name, "metric": metric, "role": role, "rows": len(suite.rows)}
                rows.append({**identity, **values, "forgetting": lost})
    return rows


def _resolved(source: str | Path, overrides: Sequence[str]) -> tuple[Recipe, str | None]:
    """The recipe to measure by, and the adapter's folder or Hub id."""
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        recipe = load_recipe(source, overrides)
        folder = Path(recipe.output.dir).expanduser() / "adapter"
        return recipe, str(folder) if folder.is_dir() else None
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    if adapter.is_dir() and not (adapter / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise AdapterFileError(f"{adapter} holds no {SAFETENSORS_WEIGHTS_NAME}; give a folder with a saved adapter.")
    for folder in dict.fromkeys((path, adapter.parent)):
        if adapter.is_dir() and (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml", overrides), str(adapter)
    if not path.is_dir() and str(source).count("/") != 1:
        raise RecipeError(f"{source} is neither a recipe, a folder nor a Hub id; give one of them.")
    return _recipe_for(str(path) if path.is_dir() else str(source), overrides), str(
        adapter if path.is_dir() else source
    )


def _recipe_for(adapter: str, overrides: Sequence[str]) -> Recipe:
    """A recipe that only measures, for an adapter that comes without one."""
    from huggingface_hub import hf_hub_download
    from peft import PeftConfig

    try:
        if not Path(adapter).is_dir():  # PEFT would load a pickle where there is no safetensors file
            hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME)
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"{adapter} holds no adapter that PEFT can read: {reason}.") from None
    tasks = {kind.peft_task_type: name for name, kind in reversed(TASKS.items())}
    values: dict[str, Any] = {
        "model": {"name": config.base_model_name_or_path, "revision": config.revision},
        "task": tasks.get(str(getattr(config.task_type, "value", config.task_type)), "sft"),
        "data": {"train": "pocket/word-problems"},
        "adapter": {"method": "lora"},
        "output": {"dir": "."},
    }
    if not config.base_model_name_or_path:
        if not any(override.startswith("model.name=") for override in overrides):
            raise RecipeError(f"{adapter} does not name its base; write model.name=... after it.")
        values["model"] = {"name": "pocket"}  # replaced by the override
    return make_recipe(values, overrides, name=adapter)
