"""Bone adapters on disk: written as PEFT's `MISS` or as `BONE`, read back verified, and `BONE` of older PEFT imported.

adapter_model.safetensors     <layer>.miss_block (or .bone_block), the trained tensors themselves, bit-exact
adapter_config.json           a plain MissConfig where plain PEFT computes the same function, else a BoneConfig
llmreg.json                   as for every method (`sidecar.py`), with the layers' shapes; no file of factors

PEFT up to 0.18 saved the peft type `BONE`: 2-D tensors are row sharing, 3-D ones the block-affine form, whatever the
config says (its `init_weights` was True for both at first). Current PEFT meets these folders with a `KeyError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, MissConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.bone_config import BoneConfig
from ..adapters.bone_layer import BoneLinear, block_shape
from ..adapters.bone_model import STORED_NAMES, bone_layers
from ..errors import AdapterFileError, LlmregError, UnsupportedError
from ..files import write_json
from ..weights import is_supported, storage_of
from .sidecar import SIDECAR_NAME, BaseRecord, Sidecar, write_content

__all__ = ["SavedBone", "as_lora", "check_same_bone", "finish_bone", "is_block", "layers_of", "read_bone"]

_ENDINGS = tuple(f".{name}" for name in STORED_NAMES.values())
#: Fields that the two configs share by name.
_COMMON = tuple(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save bias".split()
)
#: `init_weights` of a MissConfig by variant.
_INIT = {"bone": True, "bat": "bat", "mini": "mini"}


@dataclass(frozen=True)
class SavedBone:
    """A saved Bone adapter that was read and checked: its config, its tensors, and the sidecar if it has one."""

    folder: Path
    config: BoneConfig
    tensors: dict[str, Tensor]
    sidecar: Sidecar | None

    def blocks(self) -> dict[str, Tensor]:
        """The adapter's tensors by layer, without those of whole modules."""
        return _blocks(self.tensors)

    def check_layers(self, model: nn.Module) -> None:
        """Refuse tensors that do not fit the layers of `model` (bare, or wrapped by PEFT).

        Raises:
            AdapterFileError: a layer that is not there, or a shape that its weight rules out.
        """
        modules = dict(model.named_modules())
        for name, block in self.blocks().items():
            module: Any = modules.get(name) or modules.get(name.removeprefix("base_model.model."))
            if module is None:
                raise AdapterFileError(f"{self.folder} has a tensor for layer {name!r}, which this base model lacks.")
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if not is_supported(base):
                continue  # injection refuses it by name
            try:
                expected = block_shape(self.config, *storage_of(base).shape, name)
            except UnsupportedError as error:
                raise AdapterFileError(f"{self.folder} does not fit this base model: {error}") from None
            if tuple(block.shape) != expected:
                raise AdapterFileError(
                    f"{self.folder} has a tensor of shape {tuple(block.shape)} for layer {name!r}, where variant "
                    f"{self.config.variant!r} with r={self.config.r} has {expected}; load the base it was trained on, "
                    "or copy the adapter again."
                )


def _blocks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.rpartition(".")[0]: value for key, value in tensors.items() if key.endswith(_ENDINGS)}


def is_block(key: str) -> bool:
    """Whether a stored tensor is a Bone adapter's own, and not of a module that was trained whole."""
    return key.endswith(_ENDINGS)


def layers_of(keys: Iterable[str]) -> list[str]:
    """Names of the adapted layers among an adapter's keys."""
    return [key.rpartition(".")[0] for key in keys if is_block(key)]


# -- saving ---------------------------------------------------------------------------------------------------------


def finish_bone(model: nn.Module, name: str, folder: Path, base: BaseRecord) -> None:
    """Give a folder that PEFT has written its final config and its sidecar."""
    config: BoneConfig = model.peft_config[name]  # type: ignore[index, assignment]
    path = folder / CONFIG_NAME
    written = json.loads(path.read_text(encoding="utf-8"))
    with_tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    if any(key.endswith(".miss_block") for key in with_tensors):
        kept = {key: written[key] for key in _COMMON if key != "peft_type"}
        miss = MissConfig(miss_dropout=config.bone_dropout, mini_r=config.mini_r, init_weights=_INIT[config.variant])
        written = {**miss.to_dict(), **kept, "peft_type": "MISS"}
    lists = ("target_modules", "exclude_modules", "modules_to_save")
    listed = {key: sorted(written[key]) for key in lists if isinstance(written[key], list | set)}
    write_json(path, {**written, **listed})
    shapes = {key: _shape(layer) for key, layer in bone_layers(model, name).items()}
    write_content(folder, config, [SAFETENSORS_WEIGHTS_NAME], base, layers=shapes)


def _shape(layer: BoneLinear) -> list[int]:
    """[out, in, whether the base keeps its weight transposed]."""
    return [layer.out_features, layer.in_features, int(storage_of(layer.get_base_layer()).transposed)]


# -- loading --------------------------------------------------------------------------------------------------------


def read_bone(model_id: Any, sidecar: Sidecar | None, **hub: Any) -> SavedBone | None:
    """The Bone adapter in a folder or a Hub repository; None if it is another kind of adapter.

    Args:
        sidecar: of that folder, if it has one; without it only folders of peft type `BONE` are read, not `MISS`.
        hub: `subfolder`, `revision`, `cache_dir`, `token` as in `from_pretrained`.

    Raises:
        AdapterFileError: damaged, changed since it was saved, a pickle, of impossible shapes, or not finite.
    """
    if sidecar is not None:
        if sidecar.method != BoneConfig.METHOD:
            return None
        tensors = sidecar.load_tensors(SAFETENSORS_WEIGHTS_NAME)
        config = _sidecar_config(sidecar)
        _check_plain_config(sidecar, config)
        folder = sidecar.folder
    else:
        path = _config_file(model_id, hub)
        settings = None if path is None else _json(path)
        if path is None or settings is None or settings.get("peft_type") != "BONE":
            return None
        folder = path.parent
        tensors = _load(folder, model_id, hub)
        config = _legacy_config(path, settings, _blocks(tensors))
    _check_tensors(folder, config, tensors)
    return SavedBone(folder, config, tensors, sidecar)


def _sidecar_config(sidecar: Sidecar) -> BoneConfig:
    try:
        return BoneConfig(**sidecar.config)
    except (LlmregError, TypeError) as error:
        raise AdapterFileError(
            f"{sidecar.folder / SIDECAR_NAME} describes a bone adapter that this version cannot mount ({error}); "
            "upgrade llmreg."
        ) from error


def _check_plain_config(sidecar: Sidecar, config: BoneConfig) -> None:
    """Refuse a folder whose two configs describe different functions: one of them was edited."""
    path = sidecar.folder / CONFIG_NAME
    settings = _json(path)
    if settings.get("peft_type") == "MISS":
        expected = {"r": config.r, "init_weights": _INIT[config.variant], "mini_r": config.mini_r}
    else:
        expected = {"peft_type": "BONE", "r": config.r, "variant": config.variant, "mini_r": config.mini_r}
    for name, value in expected.items():
        if name not in settings or settings[name] != value:
            raise AdapterFileError(
                f"{path} has {name}={settings.get(name)!r}, but {SIDECAR_NAME} describes {name}={value!r}: it was "
                "changed after it was saved; restore it, or copy the adapter again."
            )


def _config_file(model_id: Any, hub: dict[str, Any]) -> Path | None:
    path = Path(model_id) / (hub.get("subfolder") or "") / CONFIG_NAME
    if path.parent.is_dir():
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(model_id), CONFIG_NAME, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # PEFT says what is wrong


def _json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is missing or damaged ({error}); copy the adapter again.") from None
    return settings


def _load(folder: Path, model_id: Any, hub: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file() and not Path(model_id).is_dir():
        try:
            path = Path(hf_hub_download(str(model_id), SAFETENSORS_WEIGHTS_NAME, **hub))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            pass
    if not path.is_file():
        raise AdapterFileError(
            f"{model_id} has no {SAFETENSORS_WEIGHTS_NAME}; llmreg reads no pickle ({WEIGHTS_NAME}): convert it to "
            "safetensors with the PEFT version that saved it."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file ({error}); copy the adapter again.") from error


def _legacy_config(path: Path, settings: dict[str, Any], blocks: dict[str, Tensor]) -> BoneConfig:
    """The config of a `BONE` folder; its variant is what the tensors are."""
    dimensions = {block.dim() for block in blocks.values()}
    if not dimensions or not dimensions <= {2, 3} or len(dimensions) > 1:
        found = " and ".join(f"{number}-D" for number in sorted(dimensions)) or "no"
        raise AdapterFileError(
            f"{path.parent} has {found} Bone tensors; expected 2-D ones (row sharing) or 3-D ones (block-affine) for "
            "all layers: copy the adapter again."
        )
    known = {name: value for name, value in settings.items() if name in BoneConfig.__dataclass_fields__}
    known.pop("peft_type", None)
    if dimensions == {3}:
        known["variant"] = "bat"
    else:
        known["variant"] = "mini" if known.get("variant") == "mini" else "bone"
    try:
        return BoneConfig(**known)
    except (LlmregError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} describes no Bone adapter that can be loaded: {error}") from None


def _check_tensors(folder: Path, config: BoneConfig, tensors: dict[str, Tensor]) -> None:
    """Refuse shapes that the config rules out on any layer, and values that are not finite."""
    blocks = _blocks(tensors)
    if not blocks:
        raise AdapterFileError(f"{folder} holds no tensors of a Bone adapter; copy the adapter again.")
    for name, block in blocks.items():
        shape = tuple(block.shape)
        fits = len(shape) == 3 and shape[1:] == (config.r, config.r) and shape[0] > 0
        if config.variant != "bat":
            fits = len(shape) == 2 and shape[0] == config.r and shape[1] > 0
        if not fits:
            wanted = "(outputs / r, r, r)" if config.variant == "bat" else "(r, columns)"
            raise AdapterFileError(
                f"{folder} has a tensor of the impossible shape {shape} for layer {name!r}: variant {config.variant!r} "
                f"has {wanted} with r={config.r}; copy the adapter again."
            )
        if not block.is_floating_point() or not bool(torch.isfinite(block).all()):
            raise AdapterFileError(
                f"The tensor of layer {name!r} in {folder} holds NaN or infinite values, or is not of floats; use "
                "another checkpoint of the adapter."
            )


def check_same_bone(live: Any, name: str, model: nn.Module, saved: SavedBone) -> None:
    """Refuse to continue an adapter from a folder that holds another one.

    Raises:
        AdapterFileError: another method, variant, rank, or other layers.
    """
    if not isinstance(live, BoneConfig):
        raise AdapterFileError(
            f"{saved.folder} holds a bone adapter, the one to resume is of another method; load it under another name."
        )
    for field in ("variant", "r", "mini_r"):
        mine, theirs = getattr(live, field), getattr(saved.config, field)
        if mine != theirs:
            raise AdapterFileError(
                f"{saved.folder} holds an adapter with {field}={theirs!r}, the one to resume has {mine!r}; set "
                f"{field}={theirs!r}."
            )
    other = sorted(bone_layers(model, name).keys() ^ saved.blocks().keys())
    if other:
        raise AdapterFileError(
            f"{saved.folder} and the adapter to resume do not have the same layers: {other[0]!r} is in one of them "
            "only; set target_modules as in the saved adapter."
        )


# -- as plain LoRA --------------------------------------------------------------------------------------------------


def as_lora(folder: Path, sidecar: Sidecar | None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The saved `bone` or `mini` adapter in `folder` as the plain LoRA that computes the same function.

    `A` is the tiled identity `[I I ... I]` and `B = D^T`, of rank r with alpha = r; for `mini` with `mini_r < r` the
    tiled identity stands in `B`, which makes the rank `mini_r`.

    Raises:
        UnsupportedError: a `bat` adapter, whose update has full rank.
        AdapterFileError: without the sidecar, which knows the layers' shapes; or what `read_bone` refuses.
    """
    if sidecar is None:
        raise AdapterFileError(
            f"{folder} has no {SIDECAR_NAME}, from which the export takes the layers' shapes; load the adapter with "
            "llmreg and save it, then export that."
        )
    saved = read_bone(folder, sidecar)
    assert saved is not None
    config = saved.config
    if config.variant == "bat":
        raise UnsupportedError(
            f"{folder} holds a 'bat' adapter, whose update has full rank and so is no LoRA of any rank below the "
            "layer's; use it through PEFT, or merge it with merge_and_unload on the loaded model."
        )
    rank = min(config.r, config.mini_r) if config.variant == "mini" else config.r
    tensors = {key: value for key, value in saved.tensors.items() if not key.endswith(_ENDINGS)}
    for name, D in saved.blocks().items():
        out_features, in_features, _ = sidecar.layers[name]
        tensors |= _factors(name, D, rank, out_features, in_features)
    kept = {key: getattr(config, key) for key in _COMMON if key not in ("peft_type", "r")}
    transposed = any(shape[2] for shape in sidecar.layers.values())
    return LoraConfig(**kept, r=rank, lora_alpha=rank, fan_in_fan_out=transposed), tensors


def _factors(name: str, D: Tensor, rank: int, out_features: int, in_features: int) -> dict[str, Tensor]:
    """`A (rank, in)`, `B (out, rank)` of one layer."""
    along_in, along_out = _tiled(torch.eye(D.shape[0], dtype=D.dtype), in_features), D
    if rank < D.shape[0]:
        along_in, along_out = _tiled(D.t(), in_features), torch.eye(rank, dtype=D.dtype)
    up = _tiled(along_out, out_features).t().contiguous()
    return {f"{name}.lora_A.weight": along_in.contiguous(), f"{name}.lora_B.weight": up}


def _tiled(block: Tensor, columns: int) -> Tensor:
    return block.repeat(1, -(-columns // block.shape[1]))[:, :columns]
