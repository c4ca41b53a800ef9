"""What regularisers cost over a step of stock TRL: time and memory.

    python evals/bench_regularizers.py                                 all sections; gpu is skipped without a GPU
    python evals/bench_regularizers.py --sections sft grpo --tiny      the same code in seconds

sft           BA-LoRA's terms, half of the tokens scored (prompt and completion) and all: each over TRL's step with one
              forward pass of a teacher, which is the least that a term with a teacher adds
orthonormal   SORSA's step with its regulariser, decoupled and as a term of the loss, over the step without
grpo          Lp-Reg, over TRL's update on the same completions; nothing is generated
memory        peak resident memory of the first step over the loaded model, in processes of their own, one each; the
              allocator moves a figure by up to a tile of logits (a tenth, at 128,000) from one process to the next
gpu           sft and grpo with the head and layers of Llama-3-8B, bfloat16; --tiny runs this section on a CPU

Llama of hidden 1024, intermediate 2816, 8 layers, vocabulary 32,000, random weights, LoRA r 16 on all linears, float32;
2 x 256 tokens (sft), 4 x 4 completions of 64 tokens after 16 of a prompt (grpo). A step is forward and backward through
the trainer's own `training_step` with the callback's events; in `orthonormal` AdamW's step too. "dense" is what one
writes without llmreg (see regularizer_steps).

"floor" is the ratio of the multiplications that cannot be left out: passes through the linear layers, and products of
n scored tokens, d and the vocabulary V for the head. TRL's head takes three: logits, logits again, gradient; on a CPU
of every token, on a GPU of scored ones.

One thread, whose processor time is measured (on a GPU wall time between synchronisations). Rounds in rotating order
in one process; a ratio is the median over rounds of the round's own. Writes evals/results/bench_regularizers.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from bench_init import resident
from common import machine, print_table
from regularizer_steps import GRPO_ROWS, SFT_ROWS, SORSA_ROWS, Shape, Step, base_model
from torch import nn

from llmreg.files import write_json

RESULT = Path(__file__).parent / "results" / "bench_regularizers.json"
SECTIONS = ("sft", "orthonormal", "grpo", "memory", "gpu")
TEACHER = "TRL, teacher forward"
VOCABULARIES = (32000, 128000)
MIB = 2**20

CPU = Shape()
TINY = Shape(
    hidden=64,
    intermediate=96,
    layers=2,
    vocabulary=500,
    heads=2,
    key_value_heads=2,
    rows=2,
    columns=24,
    prompts=2,
    completions=2,
    prompt=8,
    completion=8,
)
CUDA = Shape(
    hidden=4096,
    intermediate=14336,
    layers=32,
    vocabulary=128256,
    heads=32,
    key_value_heads=8,
    device="cuda",
    dtype=torch.bfloat16,
)
#: Of `memory`: two layers, as many tokens in an SFT batch as in a generation batch.
LARGE = CPU._replace(layers=2, columns=512, prompts=1, completions=2, completion=496)

#: Passes through the linear layers; products of the head with all tokens (of a GPU: scored ones); with scored ones.
SFT_PRODUCTS = {
    "TRL": (2, 3, 0),
    TEACHER: (3, 4, 0),
    "consistency": (3, 3, 3),
    "diversity": (2, 3, 1),
    "singular_values": (2, 3, 0),
    "all three": (3, 3, 4),
    "all three, dense": (5, 6, 0),
}
GRPO_PRODUCTS = {
    "TRL": (2, 3, 0),
    "threshold of the previous batch": (2, 3, 0),
    "exact threshold, old log-probs": (2, 3, 0),
    "exact threshold, no old log-probs": (3, 4, 0),
    "exact divergence": (2, 3, 0),
    "dense": (3, 3, 1),
}


# -- measuring --------------------------------------------------------------------------------------------------


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measured(steps: dict[str, Step], repeats: int, device: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each step, `repeats` times, in rotating order, after one that does not count; on a GPU MiB at most."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    order = list(steps)
    for turn in range(-1, repeats):
        for name in order:
            gc.collect()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = _now(device)
            steps[name]()
            took = _now(device) - started
            if turn >= 0:
                seconds[name].append(took)
            if device == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / MIB
        order = order[1:] + order[:1]
    return seconds, peaks


def ratios(seconds: dict[str, list[float]], peer: str) -> dict[str, float]:
    """Medians over rounds of each step's time over that of `peer` in the same round."""
    pairs = {name: zip(values, seconds[peer], strict=True) for name, values in seconds.items()}
    return {name: statistics.median(mine / other for mine, other in both) for name, both in pairs.items()}


def multiplications(shape: Shape, products: tuple[int, int, int], tokens: int, scored: int) -> int:
    """Of one step, without attention and the adapters' thin products."""
    passes, of_all, of_scored = products
    width = shape.key_value_heads * shape.hidden // shape.heads
    layer = shape.hidden * (2 * shape.hidden + 2 * width + 3 * shape.intermediate)
    head = shape.hidden * shape.vocabulary * (of_all * (scored if shape.device == "cuda" else tokens))
    return passes * shape.layers * layer * tokens + head + shape.hidden * shape.vocabulary * of_scored * scored


def compared(
    shape: Shape,
    rows: dict[str, Any],
    base: nn.Module,
    repeats: int,
    floor: dict[str, float] | None = None,
    peers: tuple[str, ...] = ("TRL",),
) -> dict[str, Any]:
    """What is kept of a section's rows: medians, ratios to each peer, the floor of the ratio to the last."""
    steps = {name: row(shape, base) for name, row in rows.items()}
    seconds, peaks = measured(steps, repeats, shape.device)
    for step in steps.values():
        step.end()
    result = {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "over": {peer: ratios(seconds, peer) for peer in peers},
        "floor": floor or {},
        "peak_mib": peaks,
    }
    return result


def floors(
    shape: Shape, products: dict[str, tuple[int, int, int]], peer: str, tokens: int, scored: int
) -> dict[str, float]:
    counts = {name: multiplications(shape, row, tokens, scored) for name, row in products.items()}
    return {name: count / counts[peer] for name, count in counts.items()}


def print_result(title: str, result: dict[str, Any]) -> None:
    peers = list(result["over"])
    extra = [name for name in ("floor", "peak_mib") if result[name]]
    rows = [
        [
            name,
            f"{seconds:.3f}",
            *(f"{result['over'][peer][name]:.3f}" for peer in peers),
            *(f"{result[key].get(name, float('nan')):.{3 if key == 'floor' else 0}f}" for key in extra),
        ]
        for name, seconds in result["seconds"].items()
    ]
    heads = {"floor": f"floor of the ratio to {peers[-1]!r}", "peak_mib": "peak MiB"}
    print_table(title, ["", "s", *(f"over {peer!r}" for peer in peers), *(heads[key] for key in extra)], rows)


# -- sections ---------------------------------------------------------------------------------------------------


def section_sft(shape: Shape, repeats: int) -> dict[str, Any]:
    """Half of the tokens scored, and all of them."""
    base, out = base_model(shape), {}
    for scored, unscored in (("half", shape.columns // 2), ("all", 0)):
        this = shape._replace(unscored=unscored)
        count = shape.rows * (shape.columns - max(unscored, 1))
        floor = floors(shape, SFT_PRODUCTS, TEACHER, shape.rows * shape.columns, count)
        out[scored] = compared(this, SFT_ROWS, base, repeats, floor, peers=("TRL", TEACHER))
        title = f"SFT, {shape.rows} x {shape.columns} tokens, {scored} scored (wanted: terms <= 1.10 of the teacher's)"
        print_result(title, out[scored])
    return out


def section_orthonormal(shape: Shape, repeats: int) -> dict[str, Any]:
    result = compared(shape, SORSA_ROWS, base_model(shape), repeats, peers=("SORSA",))
    print_result("SORSA, forward, backward and update (wanted: <= 1.02)", result)
    return result


def section_grpo(shape: Shape, repeats: int) -> dict[str, Any]:
    count = shape.prompts * shape.completions
    tokens, scored = count * (shape.prompt + shape.completion), count * shape.completion
    floor = floors(shape, GRPO_PRODUCTS, "TRL", tokens, scored)
    result = compared(shape, GRPO_ROWS, base_model(shape), repeats, floor)
    title = f"GRPO's update, {shape.prompts} x {shape.completions} completions of {shape.completion} tokens"
    print_result(f"{title} (wanted: thresholds without a pass of their own <= 1.10)", result)
    return result


#: Rows of `memory`, by the peer that they are held against.
MEMORY_ROWS = {
    "sft": [name for name in SFT_ROWS if name != TEACHER],
    "grpo": ["TRL", "threshold of the previous batch", "exact divergence", "dense"],
}
ROWS = {"sft": SFT_ROWS, "grpo": GRPO_ROWS}


def section_memory(shape: Shape, tiny: bool) -> dict[str, Any]:
    """Peaks over the loaded model, and over those of TRL."""
    out: dict[str, Any] = {}
    for vocabulary in (shape.vocabulary,) if tiny else VOCABULARIES:
        for kind, names in MEMORY_ROWS.items():
            found = {name: _peak_in_a_process(kind, name, vocabulary, tiny) for name in names}
            peer = found["TRL"]["extra_mib"]
            cells = {name: {**one, "over_trl": one["extra_mib"] / peer} for name, one in found.items()}
            out[f"{kind}, {vocabulary}"] = cells
            print_table(
                f"{kind}, vocabulary {vocabulary}: peak resident memory of the first step (wanted: <= 1.05)",
                ["", "model MiB", "extra MiB", "over TRL's"],
                [
                    [name, f"{one['model_mib']:.0f}", f"{one['extra_mib']:.0f}", f"{one['over_trl']:.3f}"]
                    for name, one in cells.items()
                ],
            )
    return out


def _peak_in_a_process(kind: str, name: str, vocabulary: int, tiny: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--peak", kind, name, str(vocabulary), *(["--tiny"] if tiny else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak(kind: str, name: str, shape: Shape) -> dict[str, float]:
    """MiB that the loaded model has, and that the first step takes over it at most."""
    row = ROWS[kind][name]
    row(TINY, base_model(TINY))()  # libraries load before the measurement
    step = row(shape, base_model(shape))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what making the model has freed is not the model's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    step()
    return {"model_mib": before / 1024, "extra_mib": (resident("VmHWM") - before) / 1024}


def section_gpu(tiny: bool, layers: int, repeats: int) -> dict[str, Any]:
    if not tiny and not torch.cuda.is_available():
        print("gpu: no CUDA device here, section skipped")
        return {"skipped": "no CUDA device"}
    shape = TINY if tiny else CUDA._replace(layers=layers)
    setting = {**shape._asdict(), "dtype": str(shape.dtype).removeprefix("torch.")}
    return {"shape": setting, "sft": section_sft(shape, repeats), "grpo": section_grpo(shape, repeats)}


def run_section(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    shape, repeats = TINY if arguments.tiny else CPU, arguments.repeats
    if name == "memory":
        return section_memory(shape, arguments.tiny)
    if name == "gpu":
        return section_gpu(arguments.tiny, arguments.layers, repeats)
    return {"sft": section_sft, "orthonormal": section_orthonormal, "grpo": section_grpo}[name](shape, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--layers", type=int, default=CUDA.layers, help="of the gpu section")
    parser.add_argument("--tiny", action="store_true", help="small shapes; nothing is written")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if arguments.peak:
        kind, name, vocabulary = arguments.peak
        shape = TINY if arguments.tiny else LARGE._replace(vocabulary=int(vocabulary))
        print(json.dumps(peak(kind, name, shape)))
        return
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name in arguments.sections:
        load = os.getloadavg()[0]
        result = run_section(name, arguments)
        if "skipped" in result or arguments.tiny:
            continue
        clock = "wall" if name == "gpu" else "processor"
        setting = {"threads": 1, "clock": clock, "repeats": arguments.repeats, "load": [load, os.getloadavg()[0]]}
        results[name] = {**machine(), **setting, "result": result}
        write_json(arguments.output, results)
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
