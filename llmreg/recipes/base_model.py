"""Loading the base model and tokenizer that a recipe names; safetensors only, no code from repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .data import located
from .schema import Recipe

__all__ = ["load_base", "name_or_path"]


def name_or_path(recipe: Recipe) -> str:
    """What `from_pretrained` is given: the packaged folder for `pocket`, else the name with `~` expanded."""
    if recipe.model.name == "pocket":
        from .. import pocket

        return str(pocket.path())
    name = recipe.model.name
    return str(Path(name).expanduser()) if name.startswith("~") else name


def load_base(recipe: Recipe, *, gpu: bool) -> tuple[Any, Any]:
    """Load model and tokenizer.

    Args:
        gpu: load onto (and compute on) the GPU.

    Raises:
        RecipeError: no such model, no safetensors, or a repository that cannot be reached.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, revision = name_or_path(recipe), recipe.model.revision
    with located(recipe, "model", "name"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(
                name,
                revision=revision,
                dtype=_dtype(recipe, gpu),
                quantization_config=_quantization(recipe, gpu),
                device_map={"": 0} if gpu else None,
                use_safetensors=True,
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())[:400].rstrip(".")
            raise RecipeError(f"the model {recipe.model.name} cannot be loaded: {reason}.") from None
    if tokenizer.eos_token_id is None:
        raise recipe.error(
            ("model", "name"), f"the tokenizer of {recipe.model.name} has no end-of-sequence token, which sft needs."
        )
    return model, tokenizer


def _dtype(recipe: Recipe, gpu: bool) -> Any:
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
