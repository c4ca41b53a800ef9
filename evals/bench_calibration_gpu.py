"""Calibration and CorDA at the Llama-2-7B shapes on one GPU: the section `gpu` of `bench_calibration`.

Random bfloat16 weights made on the device, so nothing is loaded. The wanted setting is 256 x 2048 tokens; what
calibration costs over the bare forward passes does not depend on how many batches there are, so `--samples` sequences
are run, in batches of one and of eight: one sequence leaves the GPU waiting for Python between the small sums. The
decomposition is timed on one layer of each shape and multiplied by how many there are.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import print_table
from data_driven import CORDA_NEED, Batches, calibration_functions, linear_layers, moment_of, random_batches
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmreg.calibration import InputStatistics, Statistics, calibrate
from llmreg.initializers import corda, damp, eva_components

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
TINY = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 512}
COLUMNS, TINY_COLUMNS = 2048, 64
RANK, SKETCH, REPEATS = 128, 256, 3
ROWS = (1, 8)
WANTED = {"exact": 3.0, "sketch": 1.3}


def section(samples: int, *, tiny: bool = False) -> dict[str, Any]:
    """Bare passes, calibration in both forms, decomposition; skipped where there is no GPU, unless tiny."""
    if not torch.cuda.is_available() and not tiny:
        print("gpu: no CUDA device here, section skipped")
        return {"skipped": "no CUDA device"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, columns = (TINY, TINY_COLUMNS) if tiny else (LLAMA_7B, COLUMNS)
    rank, sketch = (8, 16) if tiny else (RANK, SKETCH)
    model = _model(shape, device)
    samples = 16 if tiny else samples
    sizes = {rows: random_batches(shape["vocab_size"], samples // rows, rows, columns, device=device) for rows in ROWS}
    batches = sizes[1]
    result: dict[str, Any] = {
        "shape": shape,
        "tokens": samples * columns,
        "rank": rank,
        "sketch": sketch,
        "model_gib": _allocated(device) / 2**30,
    }
    for rows, of_size in sizes.items():
        result[f"passes, {rows} x {columns}"] = _passes(model, of_size, sketch, device)
        _print_passes(result[f"passes, {rows} x {columns}"])
    for name, size in (("exact", None), ("sketch", sketch)):
        found = calibrate(model, batches[: max(1, len(batches) // 4)], linear_layers(model), CORDA_NEED, sketch=size)
        result[f"corda {name}"] = _decomposition(model, found, rank, device)
        del found
        _print_decomposition(f"CorDA, {name}", result[f"corda {name}"])
    return result


def _model(shape: dict[str, int], device: str) -> nn.Module:
    """Random bfloat16 weights, made where they stay."""
    config = LlamaConfig(
        **shape,
        num_attention_heads=shape["hidden_size"] // (128 if shape is LLAMA_7B else 32),
        num_key_value_heads=shape["hidden_size"] // (128 if shape is LLAMA_7B else 32),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


# -- calibration over bare passes -------------------------------------------------------------------------------


def _passes(model: nn.Module, batches: Batches, sketch: int, device: str) -> dict[str, Any]:
    """Seconds and peak memory over the model of the forward passes alone and with the sums of CorDA and of EVA."""
    functions = calibration_functions(model, batches, sketch)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    memory: dict[str, float] = {}
    for function in calibration_functions(model, batches[:2], sketch).values():
        _measured(function, device)  # libraries and kernels load
    for _ in range(REPEATS):
        for name, function in functions.items():
            took, memory[name] = _measured(function, device)
            seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": medians,
        "all_seconds": seconds,
        "ratio": {name: value / medians["bare"] for name, value in medians.items() if name != "bare"},
        "extra_gib": memory,
        "tokens_per_second": {
            name: len(batches) * batches[0]["input_ids"].numel() / value for name, value in medians.items()
        },
        "seconds_of_256": {
            name: value * 256 / sum(len(batch["input_ids"]) for batch in batches) for name, value in medians.items()
        },
        "wanted": WANTED,
    }


def _measured(function: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds of a call, the device's queue empty before and after, and GiB that it needed at its peak."""
    gc.collect()
    before = _allocated(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _synchronize(device)
    started = time.perf_counter()
    kept = function()
    _synchronize(device)
    took = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else before
    del kept
    return took, (peak - before) / 2**30


# -- decomposition ----------------------------------------------------------------------------------------------


def _decomposition(model: nn.Module, found: Statistics, rank: int, device: str) -> dict[str, Any]:
    """Seconds of `damp`, CorDA's factors and EVA's components, once for each shape, and for the whole model."""
    layers = linear_layers(model)
    of_shape: dict[str, dict[str, Any]] = {}
    inputs: dict[int, dict[str, float]] = {}
    for names, part in found.groups():
        weights = {f"{W.shape[0]}x{W.shape[1]}": W for W in (layers[name].weight for name in names)}
        new = {shape: W for shape, W in weights.items() if shape not in of_shape}
        if not new:
            continue
        moment = _damped(part)
        if part.dim not in inputs:
            inputs[part.dim] = {
                "damp": _median(partial(_damped, part), device),
                "eva": _median(partial(_components, part, rank), device),
            }
        for shape, W in new.items():
            of_shape[shape] = {"corda": _median(partial(corda, W, rank, 1.0, moment), device)}
    counts = [f"{layer.out_features}x{layer.in_features}" for layer in layers.values()]
    for shape, entry in of_shape.items():
        entry["count"] = counts.count(shape)
    damping, components = (sum(inputs[part.dim][step] for _, part in found.groups()) for step in ("damp", "eva"))
    decomposed = sum(entry["corda"] * entry["count"] for entry in of_shape.values())
    return {
        "shapes": of_shape,
        "inputs": {str(dim): steps for dim, steps in inputs.items()},
        "corda_total": damping + decomposed,
        "eva_total": components,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }


def _damped(part: InputStatistics) -> Any:
    return damp(moment_of(part), overwrite=True)


def _components(part: InputStatistics, rank: int) -> Any:
    return eva_components(moment_of(part), rank, centered=False)


def _median(function: Callable[[], Any], device: str) -> float:
    return statistics.median([_measured(function, device)[0] for _ in range(REPEATS + 1)][1:])


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


# -- tables -----------------------------------------------------------------------------------------------------


def _print_passes(result: dict[str, Any]) -> None:
    print_table(
        "calibration over bare forward passes",
        ["", "seconds", "over bare", "extra GiB", "tokens/s"],
        [
            [
                name,
                f"{value:.3f}",
                f"{value / result['seconds']['bare']:.3f}",
                f"{result['extra_gib'][name]:.2f}",
                f"{result['tokens_per_second'][name]:,.0f}",
            ]
            for name, value in result["seconds"].items()
        ],
    )


def _print_decomposition(title: str, result: dict[str, Any]) -> None:
    rows = [[shape, str(entry["count"]), f"{entry['corda']:.4f}"] for shape, entry in result["shapes"].items()]
    rows += [[f"damp {dim}", "", f"{entry['damp']:.4f}"] for dim, entry in result["inputs"].items()]
    rows += [[f"EVA {dim}", "", f"{entry['eva']:.4f}"] for dim, entry in result["inputs"].items()]
    rows += [["CorDA, all", "", f"{result['corda_total']:.2f}"], ["EVA, all", "", f"{result['eva_total']:.2f}"]]
    print_table(title, ["", "count", "seconds"], rows)
