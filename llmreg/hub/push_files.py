"""The files of a saved adapter that are published, checked, and without what is only this machine's.

The config loses the local path of its base, the card, recipe and report have neutral names (`privacy.py`); weights,
sidecar, tokenizer and templates go as they are. Nothing is written: an edited file is bytes in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..adapters.registry import QUANTIZED_RESIDUAL
from ..errors import AdapterFileError, RecipeError
from .bone_io import read_bone
from .card import card_of
from .card_facts import gather, parse_recipe, read_config
from .privacy import hub_id, neutral, neutral_text
from .residual_io import residual_files
from .sidecar import FACTORS_NAME, SIDECAR_NAME, Sidecar, read_sidecar

__all__ = ["CARD", "adapter_folder", "check_card", "contents", "one_line"]

CARD, _RECIPE, _REPORT = "README.md", "recipe.yaml", "report.json"
_TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model spiece.model "
    "sentencepiece.bpe.model vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json"
).split()
_TEMPLATES = "additional_chat_templates"
#: What a run calls the folders of its adapters; `recipe.yaml` and `report.json` lie in the folder above.
_OF_A_RUN = ("adapter", "lora")
_UNFILLED = "[More Information Needed]"  # PEFT's own card, which nobody has filled in


def adapter_folder(folder: Path) -> Path:
    """The folder that holds the adapter itself: `folder`, or its `adapter/` where it is a run's output folder.

    Raises:
        AdapterFileError: no such folder.
    """
    if not folder.is_dir():
        raise AdapterFileError(
            f"{folder} is not a folder; give the folder of a saved adapter, or a run's output folder."
        )
    inner = folder / "adapter"
    return inner if not (folder / CONFIG_NAME).exists() and (inner / CONFIG_NAME).is_file() else folder


def _check_adapter(folder: Path) -> tuple[dict[str, Any], Sidecar | None]:
    """Refuse a folder whose adapter is not whole, down to the digests of its sidecar."""
    config = read_config(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, SIDECAR_NAME, FACTORS_NAME):
        if (folder / name).is_symlink():
            raise AdapterFileError(f"{folder / name} is a link, and links are not pushed; copy the file itself there.")
    if not weights.is_file():
        pickle = f"; {WEIGHTS_NAME} is a pickle, which is never pushed" if (folder / WEIGHTS_NAME).exists() else ""
        raise AdapterFileError(f"{weights} is missing{pickle}; save the adapter as safetensors.")
    try:
        with safe_open(weights, framework="pt") as file:
            if not list(file.keys()):
                raise ValueError("it holds no tensor")
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterFileError(
            f"{weights} is not a whole safetensors file ({error}); copy the adapter again."
        ) from None
    sidecar = read_sidecar(folder)
    if sidecar and read_bone(folder, sidecar) is None:
        sidecar.adapter_config()
        sidecar.load_factors()
    elif not sidecar and (folder / FACTORS_NAME).exists():
        raise AdapterFileError(
            f"{folder} has {FACTORS_NAME} but no {SIDECAR_NAME}; copy the whole adapter again, or remove "
            f"{FACTORS_NAME} to push a plain LoRA."
        )
    return config, sidecar


def contents(folder: Path, *, online: bool) -> dict[str, bytes | Path]:
    """Every file of the commit by name: a path where it goes as it is, bytes where local names were taken out.

    Args:
        folder: of the adapter itself. online: the Hub may be asked for the base's licence, if a card is written.

    Raises:
        AdapterFileError: the adapter is not whole. RecipeError: its card, recipe or report cannot be read.
    """
    config, sidecar = _check_adapter(folder)
    files: dict[str, bytes | Path] = {
        CONFIG_NAME: _edited(folder / CONFIG_NAME, _public_config(config, sidecar), config),
        SAFETENSORS_WEIGHTS_NAME: folder / SAFETENSORS_WEIGHTS_NAME,
    }
    if sidecar:
        files |= {name: folder / name for name in (SIDECAR_NAME, *sidecar.files)}
    if config["peft_type"] == QUANTIZED_RESIDUAL.value:
        for path in residual_files(folder, sidecar):
            files[path.relative_to(folder).as_posix()] = _residual_file(path)
    templates = sorted((folder / _TEMPLATES).glob("*.jinja")) if not (folder / _TEMPLATES).is_symlink() else []
    for path in [*(folder / name for name in _TOKENIZER), *templates]:
        if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            files[path.relative_to(folder).as_posix()] = _tokenizer_file(path)
    recipe, report = _of_the_run(folder)
    facts = gather(config, sidecar, recipe or {}, report or {})
    if recipe is not None:
        files[_RECIPE] = yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True).encode()
    if report is not None:
        files[_REPORT] = _json(facts.report)
    files[CARD] = _card(folder, recipe, report, online=online)
    return files


def _public_config(config: Mapping[str, Any], sidecar: Sidecar | None) -> dict[str, Any]:
    """The config with the base's Hub id or nothing, and without other files of this machine."""
    base = hub_id(sidecar.base.name if sidecar and sidecar.base.source else config.get("base_model_name_or_path"))
    modules = ("target_modules", "exclude_modules", "layers_pattern")  # regular expressions, never paths
    public = {key: value if key in modules else _without_local(value) for key, value in config.items()}
    return {**public, "base_model_name_or_path": base}


def _without_local(value: Any) -> Any:
    """None for text that is, as a whole or in part, a local path or a secret."""
    if isinstance(value, Mapping):
        return {key: _without_local(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_local(item) for item in value]
    return None if isinstance(value, str) and neutral_text(value) != value else value


def _residual_file(path: Path) -> bytes | Path:
    if path.name != "config.json":
        return path
    settings = json.loads(path.read_text(encoding="utf-8"))
    return _edited(path, _without_local(settings), settings)


def _tokenizer_file(path: Path) -> bytes | Path:
    if path.name != "tokenizer_config.json":
        return path
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged ({error}); copy it again, or remove it.") from None
    if not isinstance(settings, dict):
        return path
    local = {key for key, value in settings.items() if key.endswith(("name_or_path", "_file")) and not hub_id(value)}
    return _edited(path, {key: value for key, value in settings.items() if key not in local}, settings)


def _edited(path: Path, public: Mapping[str, Any], original: Mapping[str, Any]) -> bytes | Path:
    return path if public == original else _json(public)


def _json(value: Any) -> bytes:
    """`value` as JSON; NaN and infinity, which JSON does not have, become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _of_the_run(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Recipe and report of the run that wrote the adapter: beside its files, or in the run's folder above."""
    places = [folder, folder.parent] if folder.name in _OF_A_RUN else [folder]
    found: dict[str, Path] = {}
    for name in (_RECIPE, _REPORT):
        paths = (place / name for place in places)
        path = next((path for path in paths if path.is_file() and not path.is_symlink()), None)
        if path:
            found[name] = path
    try:
        recipe = parse_recipe(found[_RECIPE].read_text(encoding="utf-8")) if _RECIPE in found else None
        report = json.loads(found[_REPORT].read_text(encoding="utf-8")) if _REPORT in found else None
        if report is not None and not isinstance(report, dict):
            raise ValueError("it is no mapping")
    except (RecipeError, ValueError, OSError, RecursionError) as error:
        raise RecipeError(
            f"{' or '.join(map(str, found.values()))} is damaged ({error}); restore it, or remove it to push without."
        ) from None
    return recipe, report


def _card(
    folder: Path, recipe: Mapping[str, Any] | None, report: Mapping[str, Any] | None, *, online: bool
) -> bytes | Path:
    """The folder's own card, without local names; a new one where there is none or PEFT's was never filled in."""
    path = folder / CARD
    if path.is_file() and not path.is_symlink():
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read ({error}); write it again, or remove it.") from None
        if _UNFILLED not in text:
            public = _neutral_card(text)
            return path if public == text else public.encode()
    written = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True) if recipe is not None else None
    return card_of(folder, recipe=written, report=report, online=online).encode()


def _neutral_card(text: str) -> str:
    """A card without local paths; a base model or tag that is one is dropped, since the Hub takes ids only."""
    if neutral_text(text) == text:
        return text
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError):
        return neutral_text(text)  # `check_card` says what is wrong with it
    if isinstance(card.data.get("base_model"), str):
        card.data["base_model"] = hub_id(card.data["base_model"])
    if isinstance(card.data.get("tags"), list):
        card.data["tags"] = [tag for tag in card.data["tags"] if neutral(tag) == tag]
    return neutral_text(str(card))


def check_card(text: str) -> None:
    """What huggingface_hub can tell of a card without the network.

    Raises:
        RecipeError: its metadata are missing or wrong.
    """
    try:
        card = ModelCard(text)
        if not card.data.to_dict():
            raise ValueError("it has no metadata block, which begins and ends with a line of ---")
        ModelCard(str(card))
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"the metadata of {CARD} is not valid: {one_line(error)}; correct it, or remove the file."
        ) from None
    bad = [
        name for name in ("base_model", "license", "library_name", "pipeline_tag") if not _is_text(card.data.get(name))
    ]
    if bad:
        raise RecipeError(
            f"the metadata of {CARD} is not valid: {bad[0]} must be text; correct it, or remove the file."
        )


def _is_text(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def one_line(error: object) -> str:
    """What an error says, on one line, without local paths and secrets."""
    return neutral_text(" ".join(str(error).split()))[:300].rstrip(".")
