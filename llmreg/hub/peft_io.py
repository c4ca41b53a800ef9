"""Saving and loading through PEFT's own calls: the four methods of `PeftModel` that llmreg wraps, all of them here.

`save_pretrained`   writes plain LoRA (Bone: see `bone_io`) and the sidecar, by rename; pickle is refused.
`from_pretrained`, `load_adapter`   mount a folder that has a sidecar as the method it was trained by, verified.
`add_adapter`       lets additive and plain LoRA adapters share a model (PEFT compares peft types here).

Models without an adapter of llmreg's, and folders without a sidecar, go straight to PEFT.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.tuners.lora.model import LoraModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.peft_types import PeftType
from safetensors import safe_open

from ..adapters.bone_config import BoneConfig
from ..adapters.config import AdditiveConfig
from ..adapters.data_start import waiting_layers
from ..adapters.loading import checking_start, exact_factors, saved_factors, saving, without_start
from ..adapters.model import adopt, live_factors
from ..adapters.registry import ADDITIVE, check_peft_version
from ..adapters.tiny import check_vectors, is_tiny, vector_checks
from ..adapters.tuner_calls import TunerCalls
from ..errors import AdapterFileError, UnsupportedError
from ..files import commit_folder, staged_folder, write_json
from .base_records import bare_record, base_record, remember_base
from .bone_io import SavedBone, check_same_bone, finish_bone, is_block, layers_of, read_bone
from .residual_io import (
    RESIDUAL_NAME,
    check_residual,
    clear_residual,
    is_residual,
    mount_residual,
    residual_content,
    residual_record,
    write_residual,
    writes_residual,
)
from .sidecar import FACTORS_NAME, SIDECAR_NAME, Sidecar, read_sidecar, write_sidecar

__all__ = ["find_sidecar", "install"]

logger = logging.getLogger("llmreg")
# PEFT's own, also for a module that is imported a second time: it wraps them, and not its forerunner's wrappers.
_ORIGINAL = PeftModel.__dict__.get("_llmreg_original") or {
    name: getattr(PeftModel, name) for name in ("save_pretrained", "load_adapter", "add_adapter")
} | {"from_pretrained": PeftModel.__dict__["from_pretrained"].__func__}
_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


def install() -> None:
    """Wrap the four methods (idempotent)."""
    check_peft_version()
    if getattr(PeftModel, "_llmreg_installed", None) is install:
        return
    PeftModel.save_pretrained = functools.wraps(_ORIGINAL["save_pretrained"])(save_pretrained)
    PeftModel.load_adapter = functools.wraps(_ORIGINAL["load_adapter"])(load_adapter)
    PeftModel.add_adapter = functools.wraps(_ORIGINAL["add_adapter"])(add_adapter)
    PeftModel.from_pretrained = classmethod(functools.wraps(_ORIGINAL["from_pretrained"])(from_pretrained))
    PeftModel._llmreg_installed, PeftModel._llmreg_original = install, _ORIGINAL
    TunerCalls.before_merge[:] = [remember_base]


# -- saving -----------------------------------------------------------------------------------------------------


def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
    """PEFT's `save_pretrained`; additive adapters are written as plain LoRA with a sidecar, whole or not at all."""
    original = _ORIGINAL["save_pretrained"]
    call = inspect.signature(original).bind(self, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    names = given["selected_adapters"] or list(self.peft_config)
    additive = [name for name in names if isinstance(self.peft_config.get(name), AdditiveConfig | BoneConfig)]
    target = Path(given["save_directory"])
    plain = [target if name == "default" else target / name for name in names if name not in additive]
    if not given["is_main_process"] or target.is_file():  # PEFT refuses a file
        return original(*call.args, **call.kwargs)
    if not additive:
        _drop_sidecars(plain)
        return original(*call.args, **call.kwargs)
    for name in additive:
        if waiting_layers(self, name):
            raise UnsupportedError(
                f"The adapter {name!r} starts from data and has seen none, so there is nothing to save; call "
                "llmreg.initialize first."
            )
    if not given["safe_serialization"]:
        raise UnsupportedError("safe_serialization=False would write a pickle; leave it out to write safetensors.")
    if given["path_initial_model_for_weight_conversion"] is not None:
        raise UnsupportedError(
            "path_initial_model_for_weight_conversion is not needed: plain LoRA is written anyway; leave it out."
        )
    with staged_folder(target) as staging:
        if (target / "README.md").is_file():
            shutil.copy(target / "README.md", staging)  # PEFT amends a card that is there
        given["save_directory"] = str(staging)
        with saving():
            original(*call.args, **call.kwargs)
        if writes_residual(self, names, target):
            write_residual(self, staging / RESIDUAL_NAME)
        for name in additive:
            folder = staging if name == "default" else staging / name
            _finish(self, name, folder, staging, given["kwargs"].get("state_dict"))
        _drop_sidecars(plain)
        clear_residual(target)
        commit_folder(staging, target, marker=CONFIG_NAME)
    return None


def _drop_sidecars(folders: list[Path]) -> None:
    """Remove what belongs to older adapters of llmreg's from folders that are about to hold a plain LoRA."""
    for folder in filter(Path.is_dir, folders):
        clear_residual(folder)
        for name in (SIDECAR_NAME, FACTORS_NAME):
            (folder / name).unlink(missing_ok=True)


def _finish(model: PeftModel, name: str, folder: Path, root: Path, state_dict: dict[str, Any] | None) -> None:
    """Give a folder that PEFT has written its plain LoRA config and its sidecar; a residual lies in `root`."""
    config = model.peft_config[name]
    if isinstance(config, BoneConfig):
        with safe_open(str(folder / SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
            finish_bone(model, name, folder, base_record(model, layers_of(file.keys())))
        return
    written = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    with saving():
        config.saved_config().save_pretrained(str(folder))
    plain = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    plain.update({key: written[key] for key in ("auto_mapping", "base_model_name_or_path", "inference_mode")})
    plain = {
        key: sorted(value) if isinstance(value, list) and key.endswith("_modules") else value
        for key, value in plain.items()
    }
    write_json(folder / CONFIG_NAME, plain)
    factors = live_factors(model, name, state_dict)
    layers = [key.split(".lora_")[0] for key in factors]
    if is_residual(config):
        place = root / RESIDUAL_NAME
        content = residual_content(model, name, place if place.is_dir() else None)
        write_sidecar(folder, config, factors, residual_record(model, layers), residual=content)
        return
    base = base_record(model, layers)
    if is_tiny(config):
        if base.stored_bytes is None:
            raise UnsupportedError("storage='tiny' needs a base whose bytes can be hashed; set storage='lora'.")
        factors = {key: value for key, value in factors.items() if ".lora_S." in key} | vector_checks(model, name)
    write_sidecar(folder, config, factors, base)


# -- loading ----------------------------------------------------------------------------------------------------


def find_sidecar(model_id: Any, **hub: Any) -> Sidecar | None:
    """The sidecar of a local folder or a Hub repository; None for an adapter that llmreg did not write.

    Args:
        model_id: folder or Hub id. hub: `subfolder`, `revision`, `cache_dir`, `token` as in `from_pretrained`.
    """
    folder = Path(model_id) / (hub.get("subfolder") or "")
    if folder.is_dir():
        sidecar = read_sidecar(folder)
        if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file() and sidecar:
            raise AdapterFileError(f"{folder / WEIGHTS_NAME} is a pickle; llmreg adapters are safetensors only.")
        return sidecar
    try:
        path = hf_hub_download(str(model_id), SIDECAR_NAME, **hub)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    sidecar = read_sidecar(Path(path).parent)
    assert sidecar is not None
    for name in (CONFIG_NAME, *sidecar.files):
        try:
            hf_hub_download(str(model_id), name, **hub)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise AdapterFileError(
                f"{model_id} has a {SIDECAR_NAME}, but its {name} cannot be had ({type(error).__name__}); push the "
                "whole adapter folder, or download it again."
            ) from error
    return sidecar


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}


def from_pretrained(cls: type[PeftModel], model: Any, model_id: Any, *args: Any, **kwargs: Any) -> PeftModel:
    """PEFT's `from_pretrained`; a folder with a sidecar is verified first and mounted as its method."""
    original = _ORIGINAL["from_pretrained"]
    call = inspect.signature(original).bind(cls, model, model_id, *args, **kwargs)
    call.apply_defaults()
    sidecar = find_sidecar(model_id, **_hub_arguments(call.arguments["kwargs"]))
    given = call.arguments["config"]
    if not (given is None or is_tiny(given) or getattr(given, "needs_sidecar", False)):
        return original(*call.args, **call.kwargs)
    bone = read_bone(model_id, sidecar, **_hub_arguments(call.arguments["kwargs"]))
    if bone is not None:
        _check_bone(bone, model)
        call.arguments["config"] = bone.config
        with saved_factors(bone.tensors):
            return original(*call.args, **call.kwargs)
    if sidecar is None:
        return original(*call.args, **call.kwargs)
    config = sidecar.adapter_config()
    factors = sidecar.load_factors()
    _check_base(sidecar, model, factors)
    _check_whole_modules(sidecar, model)
    call.arguments["config"] = config
    with _mounting(config, factors), saved_factors(factors):
        if is_tiny(config):
            call.arguments["low_cpu_mem_usage"] = False  # the vectors are computed, not loaded
        loaded = original(*call.args, **call.kwargs)
    if is_residual(config):
        mount_residual(loaded, call.arguments["adapter_name"], sidecar)
    return loaded


def _mounting(config: Any, factors: dict[str, Any]) -> AbstractContextManager:
    """What an adapter is injected in, whose factors are then loaded: unset, or tiny, with vectors that are checked."""
    if not is_tiny(config):
        return without_start()
    return checking_start({key: value for key, value in factors.items() if ".lora_S." not in key})


def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """PEFT's `load_adapter`; a folder with a sidecar is mounted as its method, or resumed into a live adapter."""
    original = _ORIGINAL["load_adapter"]
    call = inspect.signature(original).bind(self, model_id, adapter_name, *args, **kwargs)
    call.apply_defaults()
    live = self.peft_config.get(adapter_name)
    if exact_factors() is not None:  # from `from_pretrained` above, which has verified them
        return original(*call.args, **call.kwargs)
    sidecar = find_sidecar(model_id, **_hub_arguments(call.arguments["kwargs"]))
    if live is not None and not isinstance(live, AdditiveConfig | BoneConfig):
        return original(*call.args, **call.kwargs)
    bone = read_bone(model_id, sidecar, **_hub_arguments(call.arguments["kwargs"]))
    if bone is not None and (live is None or sidecar is not None):
        return _load_bone(self, bone, live, call)
    if sidecar is None:
        if live is None:
            return original(*call.args, **call.kwargs)
        raise AdapterFileError(
            f"{model_id} has no {SIDECAR_NAME}, so the {live.method} adapter {adapter_name!r} cannot continue from it; "
            "resume from a folder that llmreg saved, or load it under another name"
            + ("." if isinstance(live, BoneConfig) or is_tiny(live) else " as a plain LoRA.")
        )
    factors = sidecar.load_factors()
    if live is None:
        _mount(self, sidecar, factors, call.arguments)
    else:
        _check_same_adapter(live, sidecar)
        _check_base(sidecar, self, factors, live=True)
        _check_same_layers(self, adapter_name, sidecar, factors)
        if is_tiny(live):
            check_vectors(self, adapter_name, {key: part for key, part in factors.items() if ".lora_S." not in key})
        call.arguments["autocast_adapter_dtype"] = False  # PEFT would turn what trains in bf16 into fp32
    with saved_factors(factors):
        result = original(*call.args, **call.kwargs)
    if live is None and is_residual(self.peft_config[adapter_name]):
        mount_residual(self, adapter_name, sidecar)
    return result


def _load_bone(model: PeftModel, bone: SavedBone, live: Any, call: inspect.BoundArguments) -> Any:
    """Mount a Bone adapter beside others, or resume it into the live one of its name."""
    _check_bone(bone, model)
    with saved_factors(bone.tensors):
        if live is None:
            _add(model, bone.config, bone.tensors, call.arguments)
        else:
            check_same_bone(live, call.arguments["adapter_name"], model, bone)
            call.arguments["autocast_adapter_dtype"] = False  # PEFT would turn what trains in bf16 into fp32
        return _ORIGINAL["load_adapter"](*call.args, **call.kwargs)


def _check_bone(bone: SavedBone, model: Any) -> None:
    """Refuse a base that the adapter was not trained on, or does not fit, before anything is touched."""
    if bone.sidecar is not None:
        _check_base(bone.sidecar, model, bone.tensors)
        _check_whole_modules(bone.sidecar, model)
    bone.check_layers(model)


def _mount(model: PeftModel, sidecar: Sidecar, factors: dict[str, Any], given: dict[str, Any]) -> None:
    """Add the adapter of `sidecar` to a wrapped model, factors unset."""
    _check_base(sidecar, model, factors)
    _add(model, sidecar.adapter_config(), factors, given)


def _add(model: PeftModel, config: Any, factors: dict[str, Any], given: dict[str, Any]) -> None:
    config.inference_mode = not given["is_trainable"]
    model._check_new_adapter_config(config, is_trainable=given["is_trainable"])
    with _mounting(config, factors):
        model.add_adapter(
            given["adapter_name"],
            config,
            low_cpu_mem_usage=given["low_cpu_mem_usage"] and not is_tiny(config),
            autocast_adapter_dtype=given["autocast_adapter_dtype"],
        )
    if given["is_trainable"]:
        model.set_requires_grad(given["adapter_name"])


def _check_same_adapter(live: AdditiveConfig, sidecar: Sidecar) -> None:
    saved = sidecar.adapter_config()
    for name in ("method", "residual", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        mine, theirs = getattr(live, name, None), getattr(saved, name, None)
        if mine != theirs:
            raise AdapterFileError(
                f"{sidecar.folder} holds an adapter with {name}={theirs!r}, the one to resume has {mine!r}; "
                f"set {name}={theirs!r}."
            )


def _check_same_layers(model: PeftModel, adapter_name: str, sidecar: Sidecar, factors: dict[str, Any]) -> None:
    other = sorted(_layer_names(live_factors(model, adapter_name)) ^ _layer_names(factors))
    if other:
        raise AdapterFileError(
            f"{sidecar.folder} and the adapter to resume do not have the same layers: {other[0]!r} is in one of them "
            "only; set target_modules as in the saved adapter."
        )


def _layer_names(factors: dict[str, Any]) -> set[str]:
    return {key.split(".lora_")[0] for key in factors if ".lora_" in key}


def _check_base(sidecar: Sidecar, model: Any, factors: dict[str, Any], *, live: bool = False) -> None:
    """Refuse another base before anything is touched; log a note where the storage differs."""
    layers = layers_of(factors) or sorted(_layer_names(factors))
    tiny, residual = sidecar.config.get("storage") == "tiny", sidecar.config.get("residual") == "quantized"
    if isinstance(model, PeftModel):
        base = base_record(model, layers)
    else:
        bare = [name.removeprefix("base_model.model.") for name in layers]
        base = bare_record(model, bare, sidecar.base.source, hashed=tiny or residual)
    note = check_residual(sidecar, base, live=live) if residual else sidecar.check_base(base)
    if tiny:
        sidecar.check_same_bytes(base)
    if note:
        logger.info("%s: %s", sidecar.folder, note)


def _check_whole_modules(sidecar: Sidecar, model: Any) -> None:
    """Refuse a model without the modules that the adapter brings whole; PEFT would drop them without a word."""
    modules = {name.removeprefix("base_model.model.") for name, _ in model.named_modules()}
    with safe_open(str(sidecar.folder / SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        names = list(file.keys())
    keys = [name.removeprefix("base_model.model.") for name in names if ".lora_" not in name and not is_block(name)]
    lost = [key for key in keys if ".token_adapter." not in key and key.rpartition(".")[0] not in modules]
    if lost:
        raise AdapterFileError(
            f"{sidecar.folder} brings {lost[0]!r}, and {type(model).__name__} has no such module; load the base by the "
            "class that the adapter was trained on, for classification AutoModelForSequenceClassification."
        )


# -- several adapters --------------------------------------------------------------------------------------------


def add_adapter(self: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
    """PEFT's `add_adapter`, which wants one peft type a model; here additive and plain LoRA count as one."""
    types = {self.peft_type, peft_config.peft_type}
    mixes = types == {PeftType.LORA, ADDITIVE} and isinstance(self.base_model, LoraModel)
    mixes = mixes and adapter_name not in self.peft_config  # else PEFT refuses the name; the model stays as it is
    if mixes and isinstance(peft_config, AdditiveConfig):
        adopt(self.base_model)
    with _temporary_type(self, peft_config.peft_type) if mixes else nullcontext():
        _ORIGINAL["add_adapter"](self, adapter_name, peft_config, *args, **kwargs)


class _temporary_type:
    """While it lasts, a `PeftModel` says that it is of another peft type."""

    def __init__(self, model: PeftModel, peft_type: PeftType) -> None:
        self.model, self.peft_type = model, peft_type

    def __enter__(self) -> None:
        self.before, self.model.peft_type = self.model.peft_type, self.peft_type

    def __exit__(self, *exception: object) -> None:
        self.model.peft_type = self.before
