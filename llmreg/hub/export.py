"""Exporting a saved adapter as plain LoRA of a chosen rank and dtype.

The update of a layer is `s up down` with `up (out, R)`, `down (R, in)`. Its SVD needs no `out x in` product:

    up = Q_u R_u,  down^T = Q_d R_d,  s R_u R_d^T = U diag(S) V^T   (R x R)
    B' = Q_u U_k sqrt(S_k),  A' = sqrt(S_k) V_k^T Q_d^T,  error^2 = sum_{i>k} S_i^2 / sum_i S_i^2
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import AdapterFileError, RecipeError
from ..files import commit_folder, staged_folder, write_text
from .card import model_card
from .card_facts import license_of_base
from .sidecar import read_sidecar

__all__ = ["ExportReport", "export_lora", "recompress"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PREFIX = "base_model.model."
#: Values of `init_lora_weights` that leave the base weights alone; the others change them at every load.
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        rank: largest rank in the exported adapter. dtype: its tensors' dtype.
        relative_error: Frobenius norm of what recompression dropped over the update's norm, all layers together.
        layer_errors: the same for each layer.
    """

    rank: int
    dtype: str
    relative_error: float
    layer_errors: dict[str, float]


def recompress(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best rank-`rank` approximation of `up @ down`.

    Args:
        up: `(out, R)`. down: `(R, in)`. rank: of the result, or less where `out`, `in` or `R` is smaller.

    Returns:
        `B (out, rank)`, `A (rank, in)` (fp64), and the Frobenius norms of the dropped part and of the whole.
    """
    Q_up, R_up = torch.linalg.qr(up.double())
    Q_down, R_down = torch.linalg.qr(down.double().t())
    U, S, Vh = torch.linalg.svd(R_up @ R_down.t(), full_matrices=False)
    root = S[:rank].sqrt()
    B = (Q_up @ U[:, :rank]) * root
    A = root.unsqueeze(1) * (Vh[:rank] @ Q_down.t())
    return B, A, float(S[rank:].norm()), float(S.norm())


def export_lora(
    src: str | Path, dst: str | Path, rank: int | None = None, dtype: str | torch.dtype | None = None
) -> ExportReport:
    """Write the adapter in `src` to `dst` as plain LoRA, without a sidecar.

    Args:
        src: a saved adapter (plain LoRA, or what llmreg saves). dst: a folder that is empty or does not exist.
        rank: recompress every layer to at most this rank; by default the saved form is kept as it is (rank 2r, exact).
        dtype: "float32", "bfloat16" or "float16"; by default as saved.

    Returns:
        `ExportReport`; its error also stands in the exported `README.md`.

    Raises:
        RecipeError: a rank or dtype that makes no sense, or a `dst` that is not empty.
        AdapterFileError: `src` is not a whole plain-LoRA adapter in safetensors.
    """
    src, dst = Path(src), Path(dst)
    target_dtype = _dtype(dtype)
    if rank is not None and rank < 1:
        raise RecipeError(f"rank must be a positive integer, got {rank}.")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise RecipeError(f"{dst} is not an empty folder; choose another output or empty it.")
    config, tensors = _read(src)
    _check_finite(tensors, f"the adapter in {src}")
    errors: dict[str, tuple[float, float]] = {}
    if rank is not None:
        _check_recompressible(config, tensors)
        config, tensors, errors = _recompress_all(config, tensors, rank)
    if target_dtype is not None:
        tensors = {key: value.to(target_dtype) for key, value in tensors.items()}
        _check_finite(tensors, f"the adapter in {target_dtype}")
    report = _report(config, tensors, errors)
    with staged_folder(dst) as staging:
        save_file(tensors, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(staging))
        write_text(staging / "README.md", _card(src, config, report))
        commit_folder(staging, dst, marker=CONFIG_NAME)
    return report


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise RecipeError(f"dtype {dtype!r} is not known; write one of {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _read(src: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of a plain LoRA adapter."""
    if not (src / CONFIG_NAME).is_file():
        raise AdapterFileError(f"{src} holds no adapter: {CONFIG_NAME} is missing; give the folder of a saved adapter.")
    weights = src / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        pickle = f" ({WEIGHTS_NAME} is a pickle, which llmreg does not read)" if (src / WEIGHTS_NAME).exists() else ""
        raise AdapterFileError(f"{weights} is missing{pickle}; save the adapter as safetensors.")
    try:
        settings = json.loads((src / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_file(weights)
        kind = settings.pop("peft_type")
        config = LoraConfig(**settings) if kind == "LORA" else None
    except (ValueError, TypeError, AttributeError, KeyError, SafetensorError, OSError) as error:
        raise AdapterFileError(f"{src} is damaged ({error}); copy the adapter again.") from error
    if config is None:
        raise AdapterFileError(f"{src} holds a {kind} adapter; only plain LoRA can be exported.")
    if config.init_lora_weights not in _HARMLESS_STARTS:
        raise AdapterFileError(
            f"{src} has init_lora_weights={config.init_lora_weights!r}: PEFT changes the base weights when loading it, "
            "so its factors alone are no plain LoRA; convert it with PEFT "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...)) first."
        )
    config.init_lora_weights, config.eva_config = True, None
    return config, tensors


def _check_finite(tensors: dict[str, Tensor], what: str) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise AdapterFileError(f"{key!r} of {what} holds NaN or infinite values; export another checkpoint of it.")


def _check_recompressible(config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Refuse what is not a pair of matrices per layer: its update is more than `s up down`."""
    for key, value in tensors.items():
        if "lora_" in key and (not key.endswith((".lora_A.weight", ".lora_B.weight")) or value.dim() != 2):
            raise AdapterFileError(f"{key!r} is not a factor of a linear layer: leave rank out to export it as it is.")
        if ".lora_A." in key and key.replace(".lora_A.", ".lora_B.") not in tensors:
            raise AdapterFileError(f"{key!r} has no lora_B beside it: the adapter is damaged; copy it again.")
    if config.target_parameters:
        raise AdapterFileError(
            "target_parameters cannot be recompressed; leave rank out to export the adapter as it is."
        )


def _recompress_all(
    config: LoraConfig, tensors: dict[str, Tensor], rank: int
) -> tuple[LoraConfig, dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Every layer to at most `rank`, with the scaling folded in (`alpha = r` everywhere)."""
    out = {key: value for key, value in tensors.items() if ".lora_A." not in key and ".lora_B." not in key}
    errors, ranks = {}, {}
    for key in (key for key in tensors if ".lora_A." in key):
        partner = key.replace(".lora_A.", ".lora_B.")
        down, up = tensors[key], tensors[partner]
        layer = key.split(".lora_A.")[0].removeprefix(_PREFIX)
        B, A, dropped, whole = recompress(up * _scaling(config, layer, down.shape[0]), down, rank)
        out[key], out[partner] = A.to(down.dtype).contiguous(), B.to(up.dtype).contiguous()
        errors[layer] = (dropped, whole)
        ranks[layer] = A.shape[0]
    largest = max(ranks.values(), default=rank)
    config.r, config.lora_alpha, config.use_rslora = largest, largest, False
    config.rank_pattern = {layer: kept for layer, kept in ranks.items() if kept != largest}
    config.alpha_pattern = dict(config.rank_pattern)
    return config, out, errors


def _scaling(config: LoraConfig, layer: str, rank: int) -> float:
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), layer), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _report(config: LoraConfig, tensors: dict[str, Tensor], errors: dict[str, tuple[float, float]]) -> ExportReport:
    dropped = math.sqrt(sum(error**2 for error, _ in errors.values()))
    whole = math.sqrt(sum(norm**2 for _, norm in errors.values()))
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    return ExportReport(
        rank=max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r,
        dtype="+".join(dtypes),
        relative_error=dropped / whole if whole else 0.0,
        layer_errors={layer: error / norm if norm else 0.0 for layer, (error, norm) in errors.items()},
    )


def _card(src: Path, config: LoraConfig, report: ExportReport) -> str:
    """The exported adapter's card; the method and the hashes come from the sidecar of what was exported."""
    try:
        sidecar = read_sidecar(src)
    except AdapterFileError:  # only the card needs it: the export stands without
        sidecar = None
    settings = {**config.to_dict(), "peft_type": "LORA"}
    return model_card(
        settings,
        sidecar=sidecar,
        report={"export": {"rank": report.rank, "dtype": report.dtype}},
        license=license_of_base(settings, sidecar, online=False),
        relative_error=report.relative_error,
        exported=True,
    )
