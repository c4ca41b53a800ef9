"""Adapters beside a quantised residual (QPiSSA) on disk: their base goes with them.

adapter_model.safetensors     A, B (and S) as trained, under a peft type that plain PEFT refuses
llmreg.json                   besides the usual: the residual layers' bytes, and how far they are from the original
residual/                     the base with its quantised residuals, a bitsandbytes checkpoint that transformers loads

A `checkpoint-*` of a trainer has no `residual/`: a run makes the same one again when it resumes, and its bytes are
compared. As a plain LoRA for the *original* base the adapter is only approximately what was trained,

    W + s (B A - B0 A0)  -  (R + s B A)  =  W - (R + s B0 A0),

off by exactly the error that was left at the start.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters.config import AdditiveConfig
from ..adapters.difference import concatenate
from ..adapters.layer import AdditiveLayer
from ..adapters.residual import LayerError, residual_errors
from ..errors import AdapterFileError, BaseMismatchError, UnsupportedError, WeightError
from ..files import write_json, write_text
from ..weights import identity_hash
from ..weights.hashing import unwrapped
from .base_records import base_record
from .card_facts import read_config
from .lora_files import PREFIX, lora_scaling
from .sidecar import SIDECAR_NAME, BaseRecord, Sidecar

__all__ = [
    "RESIDUAL_NAME",
    "Approximation",
    "check_residual",
    "clear_residual",
    "is_residual",
    "mount_residual",
    "residual_as_lora",
    "residual_content",
    "residual_files",
    "residual_record",
    "write_residual",
    "writes_residual",
]

RESIDUAL_NAME = "residual"
_MARK = "llmreg_residual"
_NO_MODEL = "the base of the adapter in the folder above, which carries what it lacks: no model on its own"
_ADAPTERS = ("base_layer", "original_module", "token_adapter")  # LoRA, modules_to_save, trainable tokens


def is_residual(config: Any) -> bool:
    """Whether an adapter of this config lies beside a quantised residual."""
    return isinstance(config, AdditiveConfig) and config.quantizes_residual()


# -- saving -------------------------------------------------------------------------------------------------------


def writes_residual(model: PeftModel, names: list[str], target: Path) -> bool:
    """Whether saving these adapters to `target` saves their base too; not into a trainer's checkpoints."""
    return any(map(is_residual, map(model.peft_config.get, names))) and not target.name.startswith("checkpoint-")


def write_residual(model: PeftModel, folder: Path) -> None:
    """Save the base as it is under its adapters to `folder`, by transformers itself.

    Raises:
        UnsupportedError: it is no model of transformers that is saved quantised.
    """
    base: Any = unwrapped(model)
    if getattr(base, "hf_quantizer", None) is None:
        raise UnsupportedError(
            "The base of this adapter was not quantised by transformers, which its residual/ is saved by; load it with "
            "from_pretrained(..., quantization_config=...)."
        )
    with _bare(base):
        try:
            base.save_pretrained(folder)
        except NotImplementedError:  # transformers cannot undo how it read a 4-bit checkpoint: under its own names then
            base.save_pretrained(folder, save_original_format=False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**config, _MARK: _NO_MODEL})
    write_text(folder / "README.md", f"# Quantised residual\n\nThis is {_NO_MODEL}.\n")


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The base's own modules in the place of those that adapters wrapped around them."""
    wrapped: list[tuple[nn.Module, str, nn.Module]] = []
    prefixes: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if _base_of(module) is not module and not name.startswith(prefixes or ("\0",)):
            parent, _, child = name.rpartition(".")
            wrapped.append((model.get_submodule(parent), child, module))
            prefixes = (*prefixes, f"{name}.")
    try:
        for holder, child, module in wrapped:
            setattr(holder, child, _base_of(module))
        yield
    finally:
        for holder, child, module in wrapped:
            setattr(holder, child, module)


def _base_of(module: nn.Module) -> nn.Module:
    for wrapper in _ADAPTERS:
        inner = module._modules.get(wrapper)
        if inner is not None:
            return _base_of(inner)
    return module


def clear_residual(target: Path) -> None:
    """Remove the `residual/` of an older adapter; the folder holds no adapter any more before that."""
    folder = target / RESIDUAL_NAME
    try:
        ours = _MARK in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if ours:
        (target / CONFIG_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


def residual_record(model: PeftModel, layers: list[str]) -> BaseRecord:
    """The record of the base: identity of the *original*, bytes of the residual.

    Raises:
        UnsupportedError: the bytes cannot be read, so that no base could be compared with this one.
    """
    base = base_record(model, layers)
    original: BaseRecord | None = getattr(model.base_model, "_llmreg_residual_base", None)
    if base.stored_bytes is None:
        raise UnsupportedError("The residual's layers cannot be hashed here (sharded, or moved), so it is not saved.")
    return base if original is None else replace(original, stored_bytes=base.stored_bytes, storage=base.storage)


def residual_content(model: PeftModel, name: str, folder: Path | None) -> dict[str, Any]:
    """What the sidecar keeps of a residual; `folder` is its checkpoint, if it was saved."""
    errors = {layer: asdict(one) for layer, one in residual_errors(model, name).items()}
    return {"layers": errors, "checkpoint": None if folder is None else identity_hash(folder).digest}


# -- loading ------------------------------------------------------------------------------------------------------


def check_residual(sidecar: Sidecar, base: BaseRecord, *, live: bool) -> str | None:
    """Refuse a base whose layers are not the residual that the adapter completes; a note where it is not its own.

    Args:
        live: the base is that of a run which made the residual again.

    Raises:
        BaseMismatchError: with what to load instead.
    """
    mine = sidecar.base
    if mine.stored_bytes == base.stored_bytes and mine.stored_bytes is not None:
        known = (mine.digest, sidecar.residual.get("checkpoint"))
        return None if base.digest in known else "its layers are the adapter's residual; its files are not"
    if live:
        raise BaseMismatchError(
            f"The residual that was made here is not the one that the adapter in {sidecar.folder.name!r} completes: "
            "the base, the settings, the libraries or the machine differ. Resume where the run began, or from a folder "
            f"that holds its {RESIDUAL_NAME}/ (PeftModel.save_pretrained writes it, also before training)."
        )
    place = sidecar.folder / RESIDUAL_NAME
    advice = f"load its base from {RESIDUAL_NAME}/ in the same folder"
    if not place.is_dir():
        advice = f"load its base from the {RESIDUAL_NAME}/ that its run saved in the end (a checkpoint has none)"
    raise BaseMismatchError(
        f"The adapter in {sidecar.folder.name!r} completes a quantised residual ({mine.storage}), and the layers of "
        f"this base hold something else ({base.storage}); {advice}: "
        'AutoModelForCausalLM.from_pretrained(".../residual").'
    )


def mount_residual(model: Any, name: str, sidecar: Sidecar) -> None:
    """Let the layers of an adapter that was mounted know that their base is its residual."""
    modules = dict(unwrapped(model).named_modules())
    for layer, error in _layer_errors(sidecar).items():
        module = modules.get(layer)
        if isinstance(module, AdditiveLayer):
            module.residual_error[name] = error
            module.keep_unpacked()
    model.base_model._llmreg_residual_base = sidecar.base


def _layer_errors(sidecar: Sidecar) -> dict[str, LayerError]:
    try:
        return {layer: LayerError(**one) for layer, one in sidecar.residual["layers"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(
            f"{sidecar.folder / SIDECAR_NAME} does not tell the residual's errors ({error!r}); save the adapter again."
        ) from error


# -- as plain LoRA ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Approximation:
    """How far the plain LoRA on the original base is from adapter and residual; Frobenius norms.

    Attributes:
        of_update: the error `||W - (R + s B0 A0)||` over the norm of the update `||s (B A - B0 A0)||`, all layers
            together; None where nothing was trained. of_weight: over `||W||`.
        layers: both for each layer, by name.
    """

    of_update: float | None
    of_weight: float
    layers: dict[str, tuple[float | None, float]]

    def in_words(self) -> str:
        """One sentence, for the command line and the card."""
        update = "the update is zero" if self.of_update is None else f"{self.of_update:.1%} of the update's norm"
        return (
            "on the original full-precision base it computes what was trained but for the error that quantisation left "
            f"at the start: {update}, {self.of_weight:.2%} of the weights' (Frobenius, all layers)."
        )


def residual_as_lora(folder: Path, sidecar: Sidecar | None) -> tuple[LoraConfig, dict[str, Tensor], Approximation]:
    """The adapter in `folder` as plain LoRA of rank 2r for its original base, and what that gets wrong.

    Raises:
        AdapterFileError: no whole adapter with its sidecar.
    """
    if sidecar is None:
        raise AdapterFileError(f"{folder} has no {SIDECAR_NAME}, which the adapter cannot be read without; copy all.")
    config = copy.copy(sidecar.adapter_config())
    factors, errors = sidecar.load_factors(), _layer_errors(sidecar)
    tensors = {key: value for key, value in load_file(folder / SAFETENSORS_WEIGHTS_NAME).items() if "lora_" not in key}
    norms: dict[str, tuple[float, float, float]] = {}
    for key in sorted(key for key in factors if key.endswith(".lora_A.weight")):
        stem = key.removesuffix("lora_A.weight")
        A, B, A0, B0 = (factors[f"{stem}lora_{name}.weight"] for name in ("A", "B", "A0", "B0"))
        S, S0 = (factors.get(f"{stem}lora_{name}.weight") for name in ("S", "S0"))
        down, up = concatenate(A, B, A0, B0, S, S0)
        tensors |= {f"{stem}lora_A.weight": down.contiguous(), f"{stem}lora_B.weight": up.contiguous()}
        layer = stem.removeprefix(PREFIX).removesuffix(".")
        if layer not in errors:
            raise AdapterFileError(f"{folder / SIDECAR_NAME} knows nothing of layer {layer!r}; save the adapter again.")
        update = lora_scaling(config, layer, A.shape[0]) * _product_norm(up, down)
        norms[layer] = (errors[layer].kept, update, errors[layer].weight)
    config.residual = "difference"
    plain = config.to_lora_config()
    named = read_config(folder).get("base_model_name_or_path")
    plain.base_model_name_or_path = sidecar.base.name or named
    return plain, tensors, _approximation(norms)


def _product_norm(up: Tensor, down: Tensor) -> float:
    """`||up down||` from Gram matrices, without the product."""
    up, down = up.double(), down.double()
    return math.sqrt(max(0.0, float(((up.mT @ up) * (down @ down.mT)).sum())))


def _approximation(norms: dict[str, tuple[float, float, float]]) -> Approximation:
    def shares(error: float, update: float, weight: float) -> tuple[float | None, float]:
        return (error / update if update else None), (error / weight if weight else 0.0)

    totals = [math.sqrt(sum(value[place] ** 2 for value in norms.values())) for place in range(3)]
    of_update, of_weight = shares(*totals)
    return Approximation(of_update, of_weight, {layer: shares(*value) for layer, value in norms.items()})


# -- publishing ---------------------------------------------------------------------------------------------------


def residual_files(folder: Path, sidecar: Sidecar | None) -> list[Path]:
    """The files of the `residual/` beside an adapter, after it was found to be the adapter's own.

    Raises:
        AdapterFileError: it is missing, or another one.
    """
    place = folder / RESIDUAL_NAME
    expected = sidecar.residual.get("checkpoint") if sidecar else None
    try:
        same = expected is not None and identity_hash(place).digest == expected
    except WeightError:
        same = False
    if not same or not (place / "config.json").is_file():
        raise AdapterFileError(
            f"{place} is missing or not the one that was saved with this adapter, which is nothing without it; give "
            "the folder that PeftModel.save_pretrained wrote at the end (a checkpoint has no residual)."
        )
    wanted = [*place.glob("*.safetensors"), *place.glob("*.json"), place / "README.md"]
    return sorted(path for path in wanted if path.is_file() and not path.is_symlink())
