"""The conflicts of law 6: combinations that are refused before a model is loaded, each with what to write instead."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from ..hub.serving import REFUSED, VLLM_RANKS, served_rank, targets_embedding
from ..methods import Method
from .schema import Recipe
from .sources import check_name, columns_problem
from .tasks import TASKS

__all__ = [
    "VLLM_RANKS",
    "check_adapter",
    "check_calibration",
    "check_environment",
    "check_output",
    "check_sources",
    "check_training",
    "chooses_ranks",
    "largest_rank",
    "quantizes_residual",
    "served_rank",
]

_AT_LEAST_ONE = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_length".split()
_NOT_NEGATIVE = "learning_rate weight_decay max_grad_norm warmup_steps dataloader_num_workers adam_epsilon".split()
_TRACKERS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard", "mlflow": "mlflow"}


def check_adapter(recipe: Recipe, method: Method, config: Any) -> int:
    """Rank, alpha, targets, and whether the result can be served; returns the exported rank.

    Raises:
        RecipeError: with where it was written.
    """
    ranks = _ranks(config)
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            where = ("adapter", "r") if name == "r" else ("adapter", "rank_pattern", name)
            raise recipe.error(where, f"a rank must be a positive integer, not {rank!r}.")
    if not getattr(config, "lora_alpha", 1) > 0:
        raise recipe.error(
            ("adapter", "lora_alpha"),
            f"lora_alpha {config.lora_alpha!r} would switch the adapter off or around; write a positive number.",
        )
    if _targets_head(config.target_modules):
        raise recipe.error(
            ("adapter", "target_modules"),
            "lm_head cannot be a target: it is often tied to the embeddings and servers do not load it; remove it, or "
            "list it in modules_to_save to train a copy.",
        )
    if method.kind == "bone":
        _check_bone(recipe, config)
    if quantizes_residual(config):
        _check_residual(recipe)
    output, form = recipe.output, method.form_of(config)
    if output.serve and form != "plain LoRA" and not (output.rank or output.dtype):
        raise recipe.error(
            ("output", "serve"),
            f"vLLM serves LoRA, and {method.name} is saved here as {form}; write output.rank, which exports one"
            + ("." if quantizes_residual(config) else " (exact at r)."),
        )
    exported = exported_rank(recipe, method, config)
    if recipe.output.serve == "vllm":
        _check_vllm(recipe, method, config, exported)
    return exported


def exported_rank(recipe: Recipe, method: Method, config: Any) -> int:
    """The largest rank in what is published; an upper bound where ranks are chosen from data."""
    if getattr(config, "variant", None) == "mini" and (recipe.output.rank or recipe.output.dtype):
        saved = min(config.r, config.mini_r)  # as LoRA
    else:
        saved = (2 if _approximate(recipe, config) else method.rank_of(config)) * round(
            getattr(config, "rho", 1) * largest_rank(config)
        )
    return min(saved, recipe.output.rank) if recipe.output.rank else saved


def largest_rank(config: Any) -> int:
    """The largest rank that an adapter's config gives a layer."""
    return max(_ranks(config).values())


def chooses_ranks(config: Any) -> bool:
    """Whether ranks are chosen from calibration data, so that the config does not tell them yet."""
    return bool(getattr(config, "redistributes", bool)())


def quantizes_residual(config: Any) -> bool:
    """Whether the base comes to hold what the adapter does not carry, quantised (QPiSSA)."""
    return bool(getattr(config, "quantizes_residual", bool)())


def _approximate(recipe: Recipe, config: Any) -> bool:
    """Whether a plain LoRA is exported that is only near what was trained."""
    return quantizes_residual(config) and bool(recipe.output.rank or recipe.output.dtype)


def _check_residual(recipe: Recipe) -> None:
    """Refuse a quantised residual without a quantised base, and where the base must serve as reference."""
    if recipe.model.quantization is None:
        raise recipe.error(
            ("adapter", "residual"),
            "residual: quantized quantises what the adapter does not carry, as the base is quantised, and this base is "
            "not; write model.quantization: nf4 or int8, or remove adapter.residual.",
        )
    if _has_reference(recipe):
        raise recipe.error(
            ("adapter", "residual"),
            f"residual: quantized changes the base, so that a disabled adapter is no reference for {recipe.task}; "
            "write residual: difference, or train with task sft.",
        )


def _has_reference(recipe: Recipe) -> bool:
    """Whether the training compares with the base, seen through a disabled adapter."""
    return recipe.task == "dpo" or (recipe.task == "grpo" and recipe.training.get("beta", 0.0) != 0)


def _ranks(config: Any) -> dict[str, Any]:
    return {"r": config.r, **(getattr(config, "rank_pattern", None) or {})}


def _check_bone(recipe: Recipe, config: Any) -> None:
    """Refuse to export what is no LoRA."""
    output = recipe.output
    asked = next((name for name in ("rank", "dtype", "serve") if getattr(output, name)), None)
    if config.variant == "bat" and asked:
        raise recipe.error(
            ("output", asked),
            f"output.{asked} asks for a LoRA, and a 'bat' adapter's update has full rank; remove it, or write "
            "adapter.variant: bone.",
        )


def _check_vllm(recipe: Recipe, method: Method, config: Any, exported: int) -> None:
    if recipe.task == "classification":
        raise recipe.error(
            ("output", "serve"), "vLLM does not load adapters that bring a classification head; remove output.serve."
        )
    if served_rank(exported) is None:
        saved = method.rank_of(config)
        times = f" ({saved} x r)" if saved > 1 and not recipe.output.rank else ""
        raise recipe.error(
            ("output", "serve"),
            f"the exported rank is {exported}{times}, and vLLM serves ranks up to {VLLM_RANKS[-1]}; write output.rank: "
            f"{VLLM_RANKS[-1]} or smaller, or lower adapter.r.",
        )
    for name in REFUSED:
        if getattr(config, name, None):
            raise recipe.error(
                ("adapter", name), f"vLLM does not load adapters with {name}; remove it or output.serve."
            )
    embedding = targets_embedding(config.target_modules)
    if embedding:
        raise recipe.error(
            ("adapter", "target_modules"), f"vLLM does not adapt {embedding}, an embedding or head; remove the target."
        )
    if config.bias != "none":
        raise recipe.error(("adapter", "bias"), "vLLM does not load adapters with biases; write bias: none.")
    if getattr(config, "energy", None) is not None and not recipe.output.rank:
        raise recipe.error(
            ("adapter", "energy"),
            "energy chooses a rank for each layer, which is not known before and which vLLM would misread; write "
            "output.rank, or give adapter.r instead.",
        )
    if chooses_ranks(config) and not recipe.output.rank:
        name = next(name for name in ("rho", "dynamic_ranks") if hasattr(config, name))
        raise recipe.error(
            ("adapter", name),
            f"{name}={getattr(config, name)} gives each layer a rank of its own, which vLLM would misread; write "
            f"output.rank: {exported}, or adapter.{name}: {1 if name == 'rho' else 'false'}.",
        )
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name, None)]
    if patterns and not recipe.output.rank:
        name = patterns[0]
        raise recipe.error(
            ("adapter", name),
            f"vLLM scales every layer by one lora_alpha / r and would misread {name}; write output.rank, which folds "
            "the scaling in, or remove it.",
        )


def check_calibration(recipe: Recipe, method: Method, config: Any) -> None:
    """Data for a method that takes none, settings that contradict each other, and starts that fit no task or base.

    Raises:
        RecipeError: with where it was written.
    """
    written = recipe.calibration
    if not method.takes_data():
        if written is not None:
            raise recipe.error(
                ("calibration",),
                f"{method.name} takes no calibration data; remove the section, or choose corda, eva or eora.",
                at_key=True,
            )
        return
    if method.name == "corda" and config.mode == "kpm" and (written is None or written.data is None):
        raise recipe.error(
            ("adapter", "mode"), "kpm keeps what calibration data shows; write calibration.data, for example a corpus."
        )
    if method.name == "eora":
        _check_eora(recipe)
    if written is None:
        return
    if written.exact and written.sketch:
        raise recipe.error(
            ("calibration", "sketch"),
            f"exact: true and sketch: {written.sketch} contradict each other; remove one of them.",
        )
    only_of_data = [name for name in ("split", "config", "max_length") if getattr(written, name) is not None]
    if written.data is None and only_of_data:
        raise recipe.error(
            ("calibration", only_of_data[0]),
            f"{only_of_data[0]} is about calibration.data, which is not given; write that, or remove "
            f"{only_of_data[0]} to calibrate on the rows of the training as they are.",
        )


def _check_eora(recipe: Recipe) -> None:
    if recipe.model.quantization is None:
        raise recipe.error(
            ("adapter", "method"),
            "eora makes up for quantisation, and the model is not quantised; write model.quantization: nf4 or int8, or "
            "choose another method.",
        )
    if _has_reference(recipe):
        raise recipe.error(
            ("adapter", "method"),
            f"eora does not start at the base: its disabled adapter, {recipe.task.upper()}'s reference, is the "
            "quantised model and not where the policy starts; choose another method, or task sft.",
        )


def _targets_head(targets: Any) -> bool:
    if isinstance(targets, str):
        if targets == "all-linear":
            return False
        try:
            return re.fullmatch(targets, "lm_head") is not None
        except re.error:
            return False
    return any(target.split(".")[-1] == "lm_head" for target in targets or ())


def check_training(recipe: Recipe, training: Any) -> None:
    """Numbers that no training can use, and evaluation during training without rows for it.

    Raises:
        RecipeError: with where it was written.
    """
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for name in names:
            value = getattr(training, name, None)
            if value is not None and value < least:
                raise recipe.error(("training", name), f"training.{name} must be at least {least}, not {value}.")
    if training.max_steps == 0 or training.max_steps < -1:
        raise recipe.error(
            ("training", "max_steps"),
            f"training.max_steps must be positive, not {training.max_steps}; remove it to train for num_train_epochs.",
        )
    if training.max_steps == -1 and not training.num_train_epochs > 0:
        raise recipe.error(
            ("training", "num_train_epochs"),
            f"training.num_train_epochs must be positive, not {training.num_train_epochs}.",
        )
    strategy = getattr(training.eval_strategy, "value", training.eval_strategy)
    if strategy != "no" and not (recipe.data.test or recipe.evaluation.heldout):
        raise recipe.error(
            ("training", "eval_strategy"),
            f"eval_strategy {strategy!r} needs rows to evaluate on; write data.test or evaluation.heldout.",
        )


def check_environment(recipe: Recipe, training: Any) -> None:
    """Extras that the recipe needs and this environment lacks.

    Raises:
        RecipeError: with the install command.
    """
    if recipe.model.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise recipe.error(
            ("model", "quantization"),
            f"quantization {recipe.model.quantization} needs bitsandbytes; run pip install 'llmreg[quant]', or remove "
            "model.quantization.",
        )
    trackers = training.report_to if isinstance(training.report_to, list) else [training.report_to]
    for tracker in trackers:
        package = _TRACKERS.get(tracker)
        if package and importlib.util.find_spec(package) is None:
            raise recipe.error(
                ("training", "report_to"), f"report_to {tracker} needs the package; run pip install {package}."
            )


def check_sources(recipe: Recipe) -> None:
    """Local files that do not exist, pocket tasks that are unknown, names that are neither file nor Hub id.

    Raises:
        RecipeError: with where it was written.
    """
    named: list[tuple[tuple[str | int, ...], str]] = [(("data", "train"), recipe.data.train)]
    if recipe.data.test:
        named.append((("data", "test"), recipe.data.test))
    if recipe.calibration and recipe.calibration.data:
        named.append((("calibration", "data"), recipe.calibration.data))
    for key in ("tasks", "forgetting"):
        named.extend((("evaluation", key, i), name) for i, name in enumerate(getattr(recipe.evaluation, key)))
    for location, name in named:
        problem = check_name(name)
        if problem:
            raise recipe.error(location, problem)
    if recipe.data.columns is not None:
        problem = columns_problem(recipe.data.columns, TASKS[recipe.task].formats)
        if problem:
            raise recipe.error(("data", "columns"), problem)
    model = recipe.model.name
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if model != "pocket" and looks_local and not Path(model).expanduser().is_dir():
        raise recipe.error(
            ("model", "name"), f"the model folder {model} does not exist; give a folder, a Hub id, or pocket."
        )
    if recipe.data.test and recipe.evaluation.heldout:
        raise recipe.error(
            ("evaluation", "heldout"), "data.test already gives the held-out rows; remove one of the two."
        )


def check_output(recipe: Recipe) -> None:
    """An output folder that holds something already.

    Raises:
        RecipeError: with where it was written.
    """
    folder = Path(recipe.output.dir).expanduser()
    try:
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise recipe.error(("output", "dir"), f"the folder {str(folder)[:80]!r} cannot be used: {reason}.") from None
    if occupied:
        raise recipe.error(("output", "dir"), f"{folder} is not an empty folder; empty it or write another output.dir.")
