"""Speed and memory of Bone against PEFT's MiSS and LoRA of equal rank, in the same process.

    python evals/bench_bone.py                      all sections, writes evals/results/bench_bone.json
    python evals/bench_bone.py --sections layer     one of: layer, model

layer    forward and backward of one linear layer, at 128 and 512 tokens and ranks 16, 32, 64
model    forward and backward of a Llama-shaped model (hidden 1024, 8 layers), and the most memory it has live

Medians of interleaved repeats; the ratio in one run is the result. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from common import machine, print_table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmreg import BoneConfig
from llmreg.files import write_json
from llmreg.recipes.memory_step import _LiveBytes

RESULT = Path(__file__).parent / "results" / "bench_bone.json"
SECTIONS = ("layer", "model")
REPEATS = 9
TOKENS = (128, 512)
SHAPES = ((1024, 1024), (2816, 1024), (1024, 2816))  # out, in


class One(nn.Module):
    """One linear layer, for PEFT to wrap."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def configs(rank: int, targets: Any) -> dict[str, Any]:
    """The methods that are compared, by name."""
    return {
        "lora": peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets),
        "bone": BoneConfig(r=rank, target_modules=targets),
        "miss": peft.MissConfig(r=rank, target_modules=targets),
        "bone mini": BoneConfig(r=rank, variant="mini", mini_r=16, target_modules=targets),
        "miss mini": peft.MissConfig(r=rank, init_weights="mini", mini_r=16, target_modules=targets),
        "bone bat": BoneConfig(r=rank, variant="bat", target_modules=targets),
        "miss bat": peft.MissConfig(r=rank, init_weights="bat", target_modules=targets),
    }


def adapted(base: nn.Module, config: Any) -> Any:
    """A copy of `base` with the adapter, moved away from zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    return model.train()


def medians(steps: dict[str, Callable[[], None]], repeats: int = REPEATS) -> dict[str, float]:
    """Milliseconds of each step; interleaved, so that a busy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def ratios(times: dict[str, float]) -> dict[str, float]:
    """MiSS over Bone by variant, and Bone's bat over LoRA."""
    pairs = {name: times[f"miss{name}"] / times[f"bone{name}"] for name in ("", " mini", " bat")}
    named = {f"miss/bone{name}": ratio for name, ratio in pairs.items()}
    return {**named, "bone bat/lora": times["bone bat"] / times["lora"], "bone/lora": times["bone"] / times["lora"]}


def layer_step(model: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
    model(x).backward(grad)


def model_step(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


def bench_layer() -> list[dict[str, Any]]:
    """One layer, forward and backward."""
    rows = []
    for out_features, in_features in SHAPES:
        for rank in (16, 32, 64):
            base = One(out_features, in_features)
            models = {name: adapted(base, config) for name, config in configs(rank, ["linear"]).items()}
            for tokens in TOKENS:
                x = torch.randn(1, tokens, in_features, requires_grad=True)
                grad = torch.randn(1, tokens, out_features)
                steps = {name: partial(layer_step, model, x, grad) for name, model in models.items()}
                times = medians(steps)
                shape = f"{out_features} x {in_features}"
                rows.append({"shape": shape, "rank": rank, "tokens": tokens, "ms": times, "ratios": ratios(times)})
    return rows


def bench_model(layers: int, rank: int) -> list[dict[str, Any]]:
    """A whole model: time, and the most bytes live at once beyond its parameters."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=512,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    weights = sum(p.numel() * p.element_size() for name, p in base.named_parameters() if "_proj" in name)
    rows = []
    for tokens in TOKENS:
        ids = torch.randint(1, 512, (1, tokens))
        models = {name: adapted(base, setting) for name, setting in configs(rank, "all-linear").items()}
        steps = {name: partial(model_step, model, ids) for name, model in models.items()}
        times = medians(steps, 5)
        peaks = {}
        for name, model in models.items():
            model.zero_grad()
            with _LiveBytes(model.parameters()) as live:
                steps[name]()
            peaks[name] = live.peak
        extra = {name: peaks[name] - peaks["lora"] for name in ("bone bat", "miss bat")}
        rows.append(
            {
                "tokens": tokens,
                "rank": rank,
                "layers": layers,
                "ms": times,
                "ratios": ratios(times),
                "adapted_weights_bytes": weights,
                "peak_bytes": peaks,
                "extra_over_lora_of_weights": {name: value / weights for name, value in extra.items()},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {"machine": machine(), "threads": given.threads}
    if "layer" in given.sections:
        result["layer"] = bench_layer()
    if "model" in given.sections:
        result["model"] = bench_model(given.layers, 16)
    for section in given.sections:
        names = list(result[section][0]["ratios"])
        table = [
            [
                row.get("shape", f"{row.get('layers')} layers"),
                str(row["rank"]),
                str(row["tokens"]),
                *(f"{value:.0f}" for value in row["ms"].values()),
                *(f"{row['ratios'][name]:.2f}" for name in names),
            ]
            for row in result[section]
        ]
        print_table(
            section, ["shape", "r", "tokens", *(f"{name} ms" for name in result[section][0]["ms"]), *names], table
        )
    for row in result.get("model", ()):
        print(row["tokens"], row["extra_over_lora_of_weights"])
    write_json(given.output, result)


if __name__ == "__main__":
    main()
