"""What is known of a saved adapter, for its card: its configs, its sidecar, the run's recipe and report, its base.

Names of this machine are gone from it (`privacy.py`), and what is not known is None or empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from peft.utils import CONFIG_NAME

from ..errors import AdapterFileError, LlmregError, RecipeError
from ..methods import Method, get_method
from .privacy import LocalNames, hub_id, is_pocket_folder, neutral_text
from .sidecar import Sidecar

__all__ = ["Facts", "gather", "license_of_base", "parse_recipe", "read_config"]

_PIPELINES = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
_ENDINGS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


@dataclass(frozen=True)
class Facts:
    """What a card tells, free of local names: `config` of PEFT, and what is known beside it."""

    config: Mapping[str, Any]
    sidecar: Sidecar | None
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    license: Mapping[str, str]
    relative_error: float | None
    approximation: str | None
    exported: bool
    base: str | None
    revision: str | None
    is_pocket: bool
    method: Method | None
    method_name: str | None

    @property
    def rank(self) -> int | None:
        """The largest rank of the saved adapter."""
        return _largest_rank(self.config)

    @property
    def trained_rank(self) -> int | None:
        adapter = self.recipe.get("adapter")
        written = adapter if isinstance(adapter, Mapping) else {}
        known = _largest_rank(self.sidecar.config) if self.sidecar else _largest_rank(written)
        return known or (self.rank if self.method and self.method.kind == "lora" and not self.exported else None)

    @property
    def task(self) -> tuple[str | None, str]:
        """The pipeline tag, and the class of transformers that loads the base."""
        name = self.config.get("task_type")
        architecture = str((self.config.get("auto_mapping") or {}).get("base_model_class", ""))
        name = name or next((task for ending, task in _ENDINGS.items() if architecture.endswith(ending)), None)
        return _PIPELINES.get(str(name), (None, "AutoModel"))


def read_config(adapter: Path) -> dict[str, Any]:
    """The content of a saved adapter's config.

    Raises:
        AdapterFileError: there is none, or it is damaged.
    """
    path = adapter / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
            raise ValueError("it names no peft_type")
    except FileNotFoundError:
        raise AdapterFileError(f"{adapter} holds no adapter: {CONFIG_NAME} is missing; give a saved one.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged ({error}); copy the adapter again.") from None
    return config


def parse_recipe(recipe: str | None) -> dict[str, Any] | None:
    """The recipe as a mapping.

    Raises:
        RecipeError: it is none.
    """
    if recipe is None:
        return None
    try:
        values = yaml.safe_load(recipe)
    except (yaml.YAMLError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RecipeError("the recipe for the model card is not a mapping in YAML; give the text of a recipe.")
    return values


def gather(
    config: Mapping[str, Any],
    sidecar: Sidecar | None,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    license: Mapping[str, str] | None = None,
    relative_error: float | None = None,
    approximation: str | None = None,
    exported: bool = False,
) -> Facts:
    """The facts of one adapter, as `model_card` is given them."""
    names = LocalNames()
    base, revision = _base(config, sidecar, recipe)
    written = recipe.get("model")
    chosen = written.get("name") if isinstance(written, Mapping) else report.get("model")
    is_pocket = chosen == "pocket" or is_pocket_folder(config.get("base_model_name_or_path"))
    recipe, report = names.recipe(recipe), names.report(report)
    if base is None and not is_pocket:  # what looks like a Hub id was a folder when it was trained
        if isinstance(written, Mapping):
            recipe["model"]["name"] = "local-model"
        if "model" in report:
            report["model"] = "local-model"
    adapter = recipe.get("adapter")
    name = sidecar.method if sidecar else adapter.get("method") if isinstance(adapter, Mapping) else None
    name = name or report.get("method")
    try:
        method = get_method(name) if isinstance(name, str) else None
    except LlmregError:
        method = None
    name = name if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,40}", name) else None
    base, revision = (None, None) if is_pocket else (base, revision)
    return Facts(
        config=config,
        sidecar=sidecar,
        recipe=recipe,
        report=report,
        license=license or {},
        relative_error=relative_error,
        approximation=approximation,
        exported=exported,
        base=base,
        revision=revision,
        is_pocket=is_pocket,
        method=method,
        method_name=name,
    )


def _base(config: Mapping, sidecar: Sidecar | None, recipe: Mapping) -> tuple[str | None, str | None]:
    """Hub id and revision of the base; the sidecar knows best, since it was written where the base was."""
    if sidecar and sidecar.base.source:
        base, revision = hub_id(sidecar.base.name), sidecar.base.revision
    else:
        base, revision = hub_id(config.get("base_model_name_or_path")), config.get("revision")
        written = recipe.get("model")
        if base and not revision and isinstance(written, Mapping) and written.get("name") == base:
            revision = written.get("revision")
    if not (base and isinstance(revision, str) and re.fullmatch(r"\w[\w./-]{0,79}", revision)):
        return base, None
    return base, revision if neutral_text(revision) == revision else None


def license_of_base(config: Mapping, sidecar: Sidecar | None, *, online: bool) -> dict[str, str]:
    """The licence of the base as its card here or its page on the Hub says; empty where neither can be read."""
    where = config.get("base_model_name_or_path")
    base, revision = _base(config, sidecar, {})
    data: Any = None
    try:
        local = Path(where) / "README.md" if isinstance(where, str) else None
        cached = try_to_load_from_cache(base, "README.md", revision=revision) if base else None
        path = local if local and local.is_file() else cached if isinstance(cached, str) else None
        if path:
            data = ModelCard.load(path, ignore_metadata_errors=True).data
        elif base and online:
            data = HfApi().model_info(base, revision=revision, timeout=5).card_data
    except Exception:  # whatever keeps it from being known, the card says that it is not
        return {}
    found = {key: data.get(key) for key in ("license", "license_name", "license_link")} if data else {}
    if not re.fullmatch(r"[a-z0-9.-]{1,40}", str(found.get("license"))) or not found.get("license"):
        return {}
    link = str(found.get("license_link"))
    if not link.startswith("https://"):
        found["license_link"] = (
            f"https://huggingface.co/{base}/blob/main/{link}" if base and link == "LICENSE" else None
        )
    return {key: str(value) for key, value in found.items() if value}


def _largest_rank(config: Mapping[str, Any]) -> int | None:
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    known = [rank for rank in ranks if isinstance(rank, int) and not isinstance(rank, bool)]
    return max(known) if known and isinstance(config.get("r"), int) else None
