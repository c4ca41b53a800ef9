"""Whether vLLM will load an adapter folder as a LoRA, found out without vLLM.

vLLM reads r, alpha, bias, modules_to_save, use_dora and use_rslora of the config, and of the weights file tensors
called `<layer>.lora_A.weight` and `<layer>.lora_B.weight`; it refuses other names, and scales every layer by the one
alpha / r (alpha / sqrt(r)) of the config, whatever the patterns say. So the patterns that a rank-reducing export
writes (alpha = r in every layer) are read right, and others are not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from ..errors import AdapterFileError, WeightError
from .serving import EMBEDDINGS, MERGE, REFUSED, VLLM_RANKS, served_rank
from .streaming import SafetensorsFile

__all__ = ["check_vllm", "vllm_lora_rank"]

_DTYPES = ("F32", "F16", "BF16")


def check_vllm(folder: str | Path) -> list[str]:
    """What keeps vLLM from loading the adapter in `folder`, or makes it misread it; empty where it serves.

    Each problem is a sentence that ends in what to do.

    Raises:
        AdapterFileError: there is no adapter, or its files are damaged.
    """
    config = _config(Path(folder))
    if config.get("peft_type") != "LORA":
        return [f"vLLM serves LoRA, and this is a {config.get('peft_type')!r} adapter; export it as LoRA if it can be."]
    problems = [f"vLLM refuses {name}: {advice}." for name, advice in REFUSED.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append(f"vLLM refuses bias={config['bias']!r}: train with bias='none', or {MERGE}.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal", "mica"):
        problems.append(
            f"vLLM would put the factors on the unchanged base, and init_lora_weights={start!r} belongs to a changed "
            "one: convert the adapter with PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...))."
        )
    file = _weights(Path(folder))
    if file is None:
        return [*problems, f"There is no {SAFETENSORS_WEIGHTS_NAME}: save the adapter as safetensors."]
    return [*problems, *_rank_problems(config, file), *_tensor_problems(file)]


def vllm_lora_rank(folder: str | Path) -> int | None:
    """The `--max-lora-rank` to start vLLM with for the adapter in `folder`; None where none is large enough.

    Raises:
        AdapterFileError: there is no adapter, or its files are damaged.
    """
    file = _weights(Path(folder))
    return served_rank(_largest_rank(_config(Path(folder)), file))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterFileError(f"{folder} holds no adapter: {CONFIG_NAME} is missing; give the folder of one.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("peft_type") == "LORA" and not (config["r"] >= 1 and config["lora_alpha"] + 0.0 >= 0):
            raise ValueError("r and lora_alpha must be positive")
        for name in ("rank_pattern", "alpha_pattern"):
            dict(config.get(name) or {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged ({error!r}); copy the adapter again.") from error
    return config


def _weights(folder: Path) -> SafetensorsFile | None:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        return SafetensorsFile(path) if path.is_file() else None
    except WeightError as error:
        raise AdapterFileError(str(error)) from error


def _ranks(file: SafetensorsFile) -> dict[str, int]:
    """Rank of every adapted layer, as its tensors have it."""
    names = {key: key.removeprefix("base_model.model.") for key in file.entries if key.endswith(".lora_A.weight")}
    return {name.removesuffix(".lora_A.weight"): file.entries[key].shape[0] for key, name in names.items()}


def _largest_rank(config: dict[str, Any], file: SafetensorsFile | None) -> int:
    return max(config.get("r", 1), *(_ranks(file).values() if file else ()), 1)


def _rank_problems(config: dict[str, Any], file: SafetensorsFile) -> list[str]:
    problems, rank = [], _largest_rank(config, file)
    if served_rank(rank) is None:
        problems.append(
            f"vLLM holds ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: export it with "
            f"--rank {VLLM_RANKS[-1]} or less."
        )
    root = math.sqrt if config.get("use_rslora") else float
    read = config["lora_alpha"] / root(config["r"])
    alphas = config.get("alpha_pattern") or {}
    for layer, own in _ranks(file).items():
        alpha = alphas.get(get_pattern_key(list(alphas), layer), config["lora_alpha"])
        if not math.isclose(alpha / root(own), read):
            problems.append(
                f"vLLM scales every layer by {read:.4g}, and {layer} is meant to be scaled by {alpha / root(own):.4g} "
                "(rank_pattern, alpha_pattern): export the adapter with a rank (llmreg export --rank), which folds "
                "the scaling in."
            )
            break
    return problems


def _tensor_problems(file: SafetensorsFile) -> list[str]:
    """One problem for each kind of tensor that vLLM does not take."""
    problems: dict[str, str] = {}
    for key, entry in file.entries.items():
        layer = key.partition(".lora_")[0].rpartition(".")[2]
        if "lora_embedding_" in key or (".lora_" in key and layer in EMBEDDINGS):
            problems.setdefault(
                "embedding",
                f"vLLM does not adapt {layer}, an embedding or head: train without this target, or {MERGE}.",
            )
        elif not key.endswith((".lora_A.weight", ".lora_B.weight")):
            problems.setdefault("name", f"vLLM refuses the tensor {key!r}, which is no lora_A or lora_B: {MERGE}.")
        elif len(entry.shape) != 2:
            problems.setdefault("shape", f"vLLM adapts linear layers only, and {key!r} is {entry.shape}: {MERGE}.")
        if entry.code not in _DTYPES:
            problems.setdefault(
                "dtype",
                f"vLLM takes float32, bfloat16 and float16, and {key!r} is {entry.code}: export with a --dtype.",
            )
    return list(problems.values())
