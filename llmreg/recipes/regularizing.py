"""A recipe's `regularizers`: checked before the model loads, built for the trainer."""

from __future__ import annotations

from typing import Any

from ..errors import LlmregError
from .fields import check_fields
from .load import suggestion
from .schema import Recipe

__all__ = ["build_regularizers", "known_regularizers", "load_teacher"]


def build_regularizers(recipe: Recipe, adapter: Any) -> list[Any]:
    """The regularisers that the recipe lists; `adapter` is its config.

    Raises:
        RecipeError: an unknown name or field (with a suggestion), a value that it does not take, or a regulariser that
            the task, the data's format or the adapter leave without what it needs.
    """
    built: list[Any] = []
    for index, entry in enumerate(recipe.regularizers):
        section, place = f"regularizers.{index}", ("regularizers", index)
        known = known_regularizers()
        if entry.name not in known:
            message = f"there is no regulariser {entry.name!r}; {suggestion(entry.name, known)}"
            raise recipe.error((*place, "name"), message)
        kind = known[entry.name]
        check_fields(recipe, section, entry.settings, kind, managed={}, at=place)
        try:
            one = kind(**entry.settings)
        except LlmregError as error:
            named = next((name for name in entry.settings if name in str(error)), None)
            raise recipe.error((*place, named) if named else place, str(error)) from None
        if hasattr(one, "for_task"):
            one = one.for_task("nlu" if recipe.task == "classification" else "nlg")
        if any(other.name == one.name for other in built):
            raise recipe.error(place, f"{one.name} is listed twice; write it once.")
        _check(recipe, index, one, adapter)
        built.append(one)
    _check_asked(recipe, adapter, built)
    return built


def load_teacher(recipe: Recipe) -> Any:
    """The classifier that the consistency regulariser compares with; None where none is named."""
    named = [(index, entry.teacher) for index, entry in enumerate(recipe.regularizers) if entry.teacher]
    if not named:
        return None
    from transformers import AutoModelForSequenceClassification

    index, name = named[0]
    try:
        return AutoModelForSequenceClassification.from_pretrained(name).requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise recipe.error(
            ("regularizers", index, "teacher"), f"the teacher {name!r} cannot be loaded: {reason}"
        ) from None


def known_regularizers() -> dict[str, Any]:
    """Classes by the names that recipes write."""
    from ..regularizers import REGULARIZERS
    from ..trainers import TunerRegularizer

    return {**REGULARIZERS, TunerRegularizer.name: TunerRegularizer}


def _check(recipe: Recipe, index: int, one: Any, adapter: Any) -> None:
    place = ("regularizers", index)
    entry = recipe.regularizers[index]
    needs: frozenset[str] = getattr(one, "needs", frozenset())
    classifies = recipe.task == "classification"
    if "advantages" in needs and recipe.task != "grpo":
        raise recipe.error(place, f"{one.name} needs advantages, which only task: grpo has; remove it.")
    if "logits" in needs and not classifies:
        raise recipe.error(place, f"{one.name} is about a classifier's logits here; write task: classification.")
    if classifies and needs & {"hidden", "log_probs"}:
        raise recipe.error(place, f"{one.name} is about next tokens, which a classifier has not; remove it.")
    _check_training(recipe, one)
    if entry.teacher and not (classifies and "teacher" in needs):
        raise recipe.error(
            (*place, "teacher"), "only the consistency of a classifier takes a teacher; the base is it else; remove it."
        )
    if classifies and "teacher" in needs and not entry.teacher and one.weight:
        raise recipe.error(
            place,
            f"{one.name} needs a teacher with a trained head here, and the base's head is new; write teacher: PATH.",
        )
    if "teacher" in needs and getattr(adapter, "residual", None) == "quantized":
        raise recipe.error(
            place,
            f"{one.name} takes the disabled adapter's base as its teacher, and residual: quantized changes that base; "
            "write adapter.residual: difference.",
        )
    if one.name == "orthonormal" and not _has_factors(adapter, one):
        raise recipe.error(
            place,
            "orthonormal keeps orthonormal factors so, and would destroy others; write adapter.method: sorsa, or for "
            "factors like PiSSA's target: initial_gram.",
        )


def _has_factors(adapter: Any, one: Any) -> bool:
    from ..adapters import AdditiveConfig
    from ..trainers.factor_terms import regularized_factors

    return isinstance(adapter, AdditiveConfig) and bool(regularized_factors(adapter, one))


def _check_training(recipe: Recipe, one: Any) -> None:
    """What a term and a field of `training` cannot be together, listed or asked for by the adapter."""
    training = recipe.training
    needs: frozenset[str] = getattr(one, "needs", frozenset())
    packed = next((name for name in ("packing", "padding_free") if training.get(name)), None)
    if "rows" in needs and packed:
        raise recipe.error(
            ("training", packed),
            f"{one.name} is a statistic of rows, and packing mixes documents in them; write false.",
        )
    if training.get("fp16") and not getattr(one, "decoupled", False):
        raise recipe.error(
            ("training", "fp16"),
            f"fp16 scales the loss, and the gradient of {one.name} is added to it; write bf16: true, or neither.",
        )
    if training.get("use_liger_kernel") and one.name != "orthonormal":
        raise recipe.error(
            ("training", "use_liger_kernel"),
            f"Liger's fused loss passes by the output that {one.name} is of; remove it.",
        )


def _check_asked(recipe: Recipe, adapter: Any, built: list[Any]) -> None:
    """What the adapter's config asks for by itself."""
    asked: list[Any] = getattr(adapter, "regularizers", list)()
    names = [one.name for one in built]
    missing = [one.name for one in asked if one.name not in names]
    if built and missing:
        raise recipe.error(
            ("regularizers",),
            f"{recipe.adapter.method} asks for {', '.join(missing)} too, and this list takes the place of what it asks "
            "for; list them, or write adapter.weights: null for none of its own.",
        )
    for one in asked if not built else ():
        _check_training(recipe, one)
        if recipe.task == "classification" and "teacher" in getattr(one, "needs", ()):
            raise recipe.error(
                ("adapter", one.name),
                f"{one.name} of a classifier needs a teacher with a trained head, and the base's head is new; write "
                f"adapter.{one.name}: 0, or list the regularizers, this one with a teacher.",
            )
