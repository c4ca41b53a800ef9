"""Running a recipe: load, measure, train with TRL, measure again, save; every file appears whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LlmregError
from ..evaluation.measure import Measurement, Suite, measure
from ..evaluation.report import Report, machine, peak_memory_mib
from ..files import commit_folder, staged_folder, write_json, write_text
from ..versions import library_versions
from .base_model import load_base
from .data import TrainingData, load_training_data, located, scoring_rows
from .load import dump_recipe
from .planning import Plan, plan
from .quiet import quiet
from .schema import Recipe

__all__ = ["run"]


@dataclass
class _Clock:
    """Seconds spent under each name."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load", "init", "evaluate", "train", "save"), 0.0)
    )
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def split(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self.started}


def run(recipe: Recipe) -> Report:
    """Train what the recipe says and write `adapter/`, `recipe.yaml` and `report.json` into its output folder.

    Args:
        recipe: from `load_recipe` or `make_recipe`.

    Raises:
        RecipeError: the recipe, its data or its model are wrong; nothing is left behind.
        LlmregError: a weight or layer that the method cannot work on.
    """
    clock = _Clock()
    with quiet(), clock.timing("load"):
        settled = plan(recipe)
    with quiet(), _claimed(recipe) as folder:
        gpu = not settled.training.use_cpu
        with clock.timing("load"):
            data, suites = load_training_data(recipe), _suites(recipe)
            model, tokenizer = load_base(recipe, gpu=gpu)
            _check_chat_template(recipe, data, tokenizer)
        with clock.timing("evaluate"):
            before = _measure(recipe, model, tokenizer, suites)
        with clock.timing("init"):
            trainer = _trainer(settled, model, tokenizer, data)
        heldout = _Heldout(trainer, data.heldout is not None)
        with clock.timing("evaluate"):
            heldout.measure("before")
        with clock.timing("train"):
            outcome = _train(trainer)
        with clock.timing("evaluate"):
            after = _measure(recipe, trainer.model, tokenizer, suites)
            heldout.measure("after")
        with clock.timing("save"):
            export = _save(settled, trainer.model, folder)
        report = Report(
            measurements=_paired(suites, before, after),
            heldout_loss=heldout.losses or None,
            export=export,
            seconds=clock.split(),
            **_facts(settled, trainer, outcome, folder),
        )
        write_json(folder / "report.json", report.as_dict())
    return report


@contextmanager
def _claimed(recipe: Recipe) -> Iterator[Path]:
    """The output folder; what is still empty in it when the run ends or is interrupted is removed."""
    folder = Path(recipe.output.dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise recipe.error(("output", "dir"), f"{folder} cannot be created: {error.strerror}.") from None
    try:
        yield folder
    finally:
        for empty in (folder / "checkpoints", folder):
            try:
                empty.rmdir()
            except OSError:  # not empty, or never made
                pass


# -- evaluation -----------------------------------------------------------------------------------------------


def _suites(recipe: Recipe) -> dict[str, list[Suite]]:
    """What is measured, by role; a source that is both is measured once, as a task."""
    suites: dict[str, list[Suite]] = {"task": [], "forgetting": []}
    for role, key in (("task", "tasks"), ("forgetting", "forgetting")):
        for index, name in enumerate(getattr(recipe.evaluation, key)):
            with located(recipe, "evaluation", key, index):
                suites[role].append(Suite(name, scoring_rows(recipe, name)))
    return suites


def _measure(recipe: Recipe, model: Any, tokenizer: Any, suites: dict[str, list[Suite]]) -> dict[str, float]:
    settings = recipe.evaluation
    unique = {suite.name: suite for role in suites.values() for suite in role}
    with located(recipe, "evaluation"):
        return measure(
            model,
            tokenizer,
            list(unique.values()),
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
        )


def _paired(
    suites: dict[str, list[Suite]], before: dict[str, float], after: dict[str, float]
) -> tuple[Measurement, ...]:
    return tuple(
        Measurement(suite.name, suite.metric, role, len(suite.rows), before[suite.name], after[suite.name])
        for role, members in suites.items()
        for suite in members
    )


class _Heldout:
    """The trainer's own loss on the held-out rows, before and after."""

    def __init__(self, trainer: Any, wanted: bool) -> None:
        self.trainer = trainer
        self.wanted = wanted
        self.losses: dict[str, float] = {}

    def measure(self, when: str) -> None:
        if self.wanted:
            self.losses[when] = float(self.trainer.evaluate()["eval_loss"])


# -- training -------------------------------------------------------------------------------------------------


def _check_chat_template(recipe: Recipe, data: TrainingData, tokenizer: Any) -> None:
    first = data.train[0]
    conversational = any(isinstance(first.get(key), list) for key in ("messages", "conversations", "prompt"))
    if conversational and tokenizer.chat_template is None and not recipe.training.get("chat_template_path"):
        raise recipe.error(
            ("data", "train"),
            f"the rows are conversations, but the tokenizer of {recipe.model.name} has no chat template; write "
            "training.chat_template_path, or give prompt and completion as text.",
        )


def _trainer(settled: Plan, model: Any, tokenizer: Any, data: TrainingData) -> Any:
    from trl import SFTTrainer

    from .progress_callback import use_training_bar

    recipe = settled.recipe
    try:
        trainer = SFTTrainer(
            model=model,
            args=settled.training,
            train_dataset=data.train,
            eval_dataset=data.heldout,
            processing_class=tokenizer,
            peft_config=settled.adapter,
        )
    except LlmregError as error:
        raise recipe.error(("adapter",), str(error)) from None
    except ValueError as error:
        raise _why_not(recipe, model, error) from None
    if not len(trainer.train_dataset):
        raise recipe.error(
            ("training", "max_length"),
            f"no row has a token to learn within max_length {settled.training.max_length}: the prompts fill it; raise "
            "training.max_length.",
        )
    use_training_bar(trainer)
    return trainer


def _why_not(recipe: Recipe, model: Any, error: ValueError) -> Exception:
    """PEFT's and TRL's refusals in one sentence, at the field they are about."""
    import torch

    text = " ".join(str(error).split())
    if "target" in text.lower() and "modules" in text.lower():
        layers = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        return recipe.error(
            ("adapter", "target_modules"),
            f"target_modules {recipe.adapter.settings.get('target_modules')!r} matches no layer of the model; its "
            f"linear layers are {', '.join(sorted(layers))}, and all-linear stands for all but the head.",
        )
    named = [name for name in recipe.training if name in text]
    return recipe.error(("training", named[0]) if named else (), text if text.endswith(".") else f"{text}.")


def _train(trainer: Any) -> Any:
    from .progress_callback import TrainingBar

    bars = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TrainingBar)]
    try:
        return trainer.train()
    finally:
        for bar in bars:
            bar.close()


# -- results --------------------------------------------------------------------------------------------------


def _save(settled: Plan, model: Any, folder: Path) -> dict[str, Any] | None:
    """Write the adapter (and the export, if a rank or dtype is given), then the recipe; each by rename."""
    from peft.utils import CONFIG_NAME

    output = settled.recipe.output
    adapter = folder / "adapter"
    with staged_folder(adapter) as staging:
        model.save_pretrained(str(staging))
        commit_folder(staging, adapter, marker=CONFIG_NAME)
    export = None
    if output.rank or output.dtype:
        from ..hub import export_lora

        done = export_lora(adapter, folder / "lora", rank=output.rank, dtype=output.dtype)
        export = {
            "path": str(folder / "lora"),
            "rank": done.rank,
            "dtype": done.dtype,
            "relative_error": done.relative_error,
        }
    write_text(folder / "recipe.yaml", dump_recipe(settled.recipe))
    return export


def _facts(settled: Plan, trainer: Any, outcome: Any, folder: Path) -> dict[str, Any]:
    """Everything of the report that is not a score, a time or the export."""
    from ..hub import read_sidecar

    recipe, model, adapter = settled.recipe, trainer.model, folder / "adapter"
    sidecar = read_sidecar(adapter)
    trainable, total = model.get_nb_trainable_parameters()
    curve = [
        {key: float(line[key]) for key in ("step", "loss", "learning_rate") if key in line}
        for line in trainer.state.log_history
        if "loss" in line
    ]
    return {
        "method": settled.method.name,
        "model": recipe.model.name,
        "seed": recipe.seed,
        "steps": int(outcome.global_step),
        "train_loss": float(outcome.training_loss),
        "losses": tuple(curve),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "rank": settled.method.saved_rank * max([settled.adapter.r, *(settled.adapter.rank_pattern or {}).values()]),
        "start_hash": sidecar.start_hash if sidecar else None,
        "peak_memory_mib": peak_memory_mib(),
        "adapter": str(adapter),
        "load": _how_to_load(recipe, adapter),
        "versions": library_versions(),
        "machine": machine(),
    }


def _how_to_load(recipe: Recipe, adapter: Path) -> tuple[str, ...]:
    base = (
        "llmreg.pocket.load_model()"
        if recipe.model.name == "pocket"
        else f"transformers.AutoModelForCausalLM.from_pretrained({recipe.model.name!r})"
    )
    return (f"base = {base}", f"model = peft.PeftModel.from_pretrained(base, {str(adapter)!r})")
