"""Loading the base model and tokenizer that a recipe names; safetensors only, no code from repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .data import Classes, located
from .schema import Recipe
from .tasks import TASKS

__all__ = ["base_dtype", "load_base", "load_saved", "name_or_path"]


def name_or_path(recipe: Recipe) -> str:
    """What `from_pretrained` is given: the packaged folder for `pocket`, else the name with `~` expanded."""
    if recipe.model.name == "pocket":
        from .. import pocket

        return str(pocket.path())
    name = recipe.model.name
    return str(Path(name).expanduser()) if name.startswith("~") else name


def load_base(recipe: Recipe, *, gpu: bool, classes: Classes | None = None) -> tuple[Any, Any]:
    """Load model and tokenizer.

    Args:
        gpu: load onto (and compute on) the GPU.
        classes: of a classification, whose new head the recipe's seed decides. What the checkpoint
            does not hold is listed in the model's `new_modules`.

    Raises:
        RecipeError: no such model, no safetensors, or a repository that cannot be reached.
    """
    import transformers

    auto_class = getattr(transformers, TASKS[recipe.task].auto_class)
    transformers.set_seed(recipe.seed)
    name, revision = name_or_path(recipe), recipe.model.revision
    with located(recipe, "model", "name"):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
            model, loading = auto_class.from_pretrained(
                name,
                revision=revision,
                dtype=base_dtype(recipe, gpu),
                quantization_config=_quantization(recipe, gpu),
                device_map={"": 0} if gpu else None,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_labels(classes),
            )
        except RuntimeError as error:
            if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
                raise
            number = len(classes.names) if classes else 0
            raise RecipeError(
                f"the checkpoint of {recipe.model.name} does not fit: it has a head for another number of classes than "
                f"the data's {number}; give the base model without its head."
            ) from None
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())[:400].rstrip(".")
            raise RecipeError(f"the model {recipe.model.name} cannot be loaded: {reason}.") from None
    missing = sorted(loading["missing_keys"])
    if classes is None and missing:
        raise recipe.error(
            ("model", "name"), f"{recipe.model.name} has no weights for {', '.join(missing[:3])}; it is no causal LM."
        )
    model.new_modules = [key.rpartition(".")[0] for key in missing]
    if classes is not None:
        _settle_padding(recipe, model, tokenizer)
    elif tokenizer.eos_token_id is None:
        raise recipe.error(
            ("model", "name"),
            f"the tokenizer of {recipe.model.name} has no end-of-sequence token, which {recipe.task} needs.",
        )
    return model, tokenizer


def load_saved(recipe: Recipe, folder: Path) -> Any:
    """A model that lies in `folder` as it is to be used, such as the `residual/` of an adapter."""
    import transformers

    auto_class = getattr(transformers, TASKS[recipe.task].auto_class)
    return auto_class.from_pretrained(folder, trust_remote_code=False, local_files_only=True).eval()


def _labels(classes: Classes | None) -> dict[str, Any]:
    if classes is None:
        return {}
    names = dict(enumerate(classes.names))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


def _settle_padding(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """A decoder classifies at the last token that is no padding, so it must know the padding token."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise recipe.error(
                ("model", "name"),
                f"the tokenizer of {recipe.model.name} has no padding token, which classification needs.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def base_dtype(recipe: Recipe, gpu: bool) -> Any:
    """The dtype of the weights that are not quantised."""
    import torch

    if recipe.model.dtype != "auto":
        return getattr(torch, recipe.model.dtype)
    return torch.bfloat16 if gpu and recipe.model.name != "pocket" else torch.float32


def _quantization(recipe: Recipe, gpu: bool) -> Any:
    """bitsandbytes' config; float32 arithmetic on a CPU, where bfloat16 is several times slower."""
    import torch
    from transformers import BitsAndBytesConfig

    if recipe.model.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if recipe.model.quantization == "int8" else None
