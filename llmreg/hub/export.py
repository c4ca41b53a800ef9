"""Exporting a saved adapter as plain LoRA of a chosen rank and dtype.

The update of a layer is `s up down` with `up (out, R)`, `down (R, in)`. Its SVD needs no `out x in` product:

    up = Q_u R_u,  down^T = Q_d R_d,  s R_u R_d^T = U diag(S) V^T   (R x R)
    B' = Q_u U_k sqrt(S_k),  A' = sqrt(S_k) V_k^T Q_d^T,  error^2 = sum_{i>k} S_i^2 / sum_i S_i^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.registry import QUANTIZED_RESIDUAL
from ..errors import AdapterFileError, RecipeError
from ..files import commit_folder, staged_folder, write_text
from .card import model_card
from .card_facts import license_of_base, read_config
from .lora_files import PREFIX, check_new_folder, float_dtype, lora_scaling, read_lora
from .residual_io import Approximation, residual_as_lora
from .sidecar import read_sidecar
from .vllm import check_vllm, vllm_lora_rank

__all__ = ["ExportReport", "export_lora", "recompress"]


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        rank: largest rank in the exported adapter. dtype: its tensors' dtype.
        relative_error: Frobenius norm of what recompression dropped over the update's norm, all layers together.
        layer_errors: the same for each layer.
        vllm_rank: the `--max-lora-rank` that serves it, if that was checked.
        approximation: of an adapter beside a quantised residual: how far the export on the original base is from it.
    """

    rank: int
    dtype: str
    relative_error: float
    layer_errors: dict[str, float]
    vllm_rank: int | None = None
    approximation: Approximation | None = None


def recompress(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best rank-`rank` approximation of `up @ down`.

    Args:
        up: `(out, R)`. down: `(R, in)`. rank: of the result, or less where `out`, `in` or `R` is smaller.

    Returns:
        `B (out, rank)`, `A (rank, in)` (fp64), and the Frobenius norms of the dropped part and of the whole.

    Example:
        >>> up, down = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.eye(2)
        >>> B, A, dropped, whole = recompress(up, down, rank=1)
        >>> tuple(B.shape), tuple(A.shape), round(dropped, 6), round(whole, 6)
        ((2, 1), (1, 2), 3.0, 5.0)
    """
    Q_up, R_up = torch.linalg.qr(up.double())
    Q_down, R_down = torch.linalg.qr(down.double().t())
    U, S, Vh = torch.linalg.svd(R_up @ R_down.t(), full_matrices=False)
    root = S[:rank].sqrt()
    B = (Q_up @ U[:, :rank]) * root
    A = root.unsqueeze(1) * (Vh[:rank] @ Q_down.t())
    return B, A, float(S[rank:].norm()), float(S.norm())


def export_lora(
    src: str | Path,
    dst: str | Path,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    check: str | None = None,
    base: str | Path | None = None,
    approximate: bool = False,
) -> ExportReport:
    """Write the adapter in `src` to `dst` as plain LoRA, without a sidecar.

    Args:
        src: a saved adapter (plain LoRA, or what llmreg saves). dst: a folder that is empty or does not exist.
        rank: recompress every layer to at most this rank; by default the saved form is kept as it is (rank 2r, exact).
        dtype: "float32", "bfloat16" or "float16"; by default as saved.
        base: the checkpoint of SVFit's tiny form, whose vectors are computed from it: `pocket`, a folder or a Hub id;
            by default the one that the adapter names. Other adapters need none.
        check: "vllm" writes nothing unless vLLM can serve the result.
        approximate: consent to a plain LoRA of an adapter beside a quantised residual (`residual="quantized"`), whose
            original base differs from what was trained on by an error that the report tells; of no other adapter.

    Returns:
        `ExportReport`; its errors also stand in the exported `README.md`.

    Raises:
        RecipeError: a rank or dtype that makes no sense, a `dst` that is not empty, or a failed check.
        AdapterFileError: `src` is not a whole plain-LoRA adapter in safetensors.
        UnsupportedError: an adapter beside a quantised residual, without `approximate`.
    """
    src, dst = Path(src), Path(dst)
    target_dtype = float_dtype(dtype)
    if rank is not None and rank < 1:
        raise RecipeError(f"rank must be a positive integer, got {rank}.")
    if check not in (None, "vllm"):
        raise RecipeError(f"check {check!r} is not known; write vllm, or leave it out.")
    check_new_folder(dst)
    approximation = None
    if approximate:
        config, tensors, approximation = _approximate(src)
    else:
        config, tensors = read_lora(src, base)
    _check_finite(tensors, f"the adapter in {src}")
    errors: dict[str, tuple[float, float]] = {}
    if rank is not None:
        _check_recompressible(config, tensors)
        config, tensors, errors = _recompress_all(config, tensors, rank)
    if target_dtype is not None:
        tensors = {key: value.to(target_dtype) for key, value in tensors.items()}
        _check_finite(tensors, f"the adapter in {target_dtype}")
    report = replace(_report(config, tensors, errors), approximation=approximation)
    with staged_folder(dst) as staging:
        save_file(tensors, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(staging))
        if check:
            report = replace(report, vllm_rank=_served(staging, src))
        write_text(staging / "README.md", _card(src, config, report))
        commit_folder(staging, dst, marker=CONFIG_NAME)
    return report


def _approximate(src: Path) -> tuple[LoraConfig, dict[str, Tensor], Approximation]:
    kind = read_config(src)["peft_type"]
    if kind != QUANTIZED_RESIDUAL.value:
        raise RecipeError(
            f"{src} holds a {kind} adapter, whose export is exact; leave approximate out, which is for adapters beside "
            "a quantised residual."
        )
    return residual_as_lora(src, read_sidecar(src))


def _served(folder: Path, src: Path) -> int:
    """The `--max-lora-rank` for the adapter in `folder`.

    Raises:
        RecipeError: with everything that keeps vLLM from loading it.
    """
    problems = check_vllm(folder)
    rank = vllm_lora_rank(folder)
    if problems or rank is None:
        raise RecipeError(f"vLLM cannot serve the export of {src}: {' '.join(problems)}")
    return rank


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
        layer = key.split(".lora_A.")[0].removeprefix(PREFIX)
        B, A, dropped, whole = recompress(up * lora_scaling(config, layer, down.shape[0]), down, rank)
        out[key], out[partner] = A.to(down.dtype).contiguous(), B.to(up.dtype).contiguous()
        errors[layer] = (dropped, whole)
        ranks[layer] = A.shape[0]
    largest = max(ranks.values(), default=rank)
    config.r, config.lora_alpha, config.use_rslora = largest, largest, False
    # Anchored: PEFT takes a bare name for every layer whose name ends like it.
    config.rank_pattern = {f"^{layer}": kept for layer, kept in ranks.items() if kept != largest}
    config.alpha_pattern = dict(config.rank_pattern)
    return config, out, errors


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
        approximation=report.approximation.in_words() if report.approximation else None,
        exported=True,
    )
