"""Speed and error of `llmreg.linalg.truncated_svd` against `torch.svd_lowrank` and a full SVD, in one process.

    python evals/bench_svd.py                       matrix, layers, curve; writes evals/results/bench_svd.json
    python evals/bench_svd.py --sections matrix     any of: matrix, layers, curve, gpu
    python evals/bench_svd.py --gpu                 the gpu section alone

matrix   2048 x 2048, singular values k^-0.6, rank 64
layers   1024 x 1024, 2816 x 1024 and 1024 x 2816, singular values k^-0.6, rank 16 (what PiSSA asks of a model)
curve    2048 x 2048 Gaussian, rank 64: seconds and residual of growing sketches (no gap, nothing to be exact about)
gpu      all 224 linear layers of the Llama-2-7B shapes at rank 128, beside the roofline floor

Medians of interleaved repeats; the ratio in one run is the result. "excess" is the Frobenius residual over the
optimal one, minus 1. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, power_law_matrix, print_table
from torch import Tensor

from llmreg.files import write_json
from llmreg.linalg import plan_sketch, truncated_svd

RESULT = Path(__file__).parent / "results" / "bench_svd.json"
REPEATS = 7
SEED = 0
EXPONENT = 0.6
LAYER_SHAPES = [(1024, 1024), (2816, 1024), (1024, 2816)]
LLAMA_7B = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}

Triplets = tuple[Tensor, Tensor, Tensor]


# -- measuring --------------------------------------------------------------------------------------------------


def lowrank(W: Tensor, rank: int, niter: int = 16) -> Triplets:
    """The peer: PEFT's `pissa_niter_16` makes this call."""
    U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
    return U, S, V.mT


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times, in turn, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def excess(W: Tensor, triplets: Triplets, optimal: float) -> float:
    """`||W - U S V^T||_F / optimal - 1`, in float64."""
    U, S, Vh = (part.double() for part in triplets)
    return torch.linalg.matrix_norm(W.double() - (U * S) @ Vh).item() / optimal - 1


def optimal_residual(W: Tensor, rank: int) -> float:
    """The tail of the spectrum, from the Gram matrix of the shorter side in float64."""
    W = W.double()
    squares = torch.linalg.eigvalsh(W.mT @ W if W.shape[0] > W.shape[1] else W @ W.mT)
    return squares[:-rank].clamp_min(0).sum().sqrt().item()


def compare(W: Tensor, rank: int, functions: dict[str, Callable[[], Triplets]], repeats: int) -> dict[str, Any]:
    """Median seconds and excess residual of each function on one matrix."""
    optimal = optimal_residual(W, rank)
    seconds = interleaved(functions, repeats)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
            "excess": excess(W, functions[name](), optimal),
        }
        for name in functions
    }


def _row(name: str, entry: dict[str, Any], *against: dict[str, Any]) -> list[str]:
    ratios = [f"{other['seconds'] / entry['seconds']:.1f}x" for other in against]
    return [name, f"{entry['seconds'] * 1e3:.1f}", *ratios, f"{entry['excess']:.2e}"]


# -- sections ---------------------------------------------------------------------------------------------------


def matrix_section(repeats: int = REPEATS) -> dict[str, Any]:
    """A 2048 x 2048 power law at rank 64: the target is 5x the peer, 30x a full SVD, excess at most 5e-4."""
    torch.manual_seed(SEED)
    W = power_law_matrix(2048, 2048, exponent=EXPONENT, generator=torch.Generator().manual_seed(SEED))
    rank = 64
    entries = compare(
        W, rank, {"llmreg": partial(truncated_svd, W, rank), "svd_lowrank": partial(lowrank, W, rank)}, repeats
    )
    # A full SVD takes seconds: as many repeats, but not between the others, whose caches it would empty.
    entries |= compare(W, rank, {"full svd": partial(truncated_svd, W, rank, method="exact")}, min(repeats, 5))
    ours, peer, full = entries["llmreg"], entries["svd_lowrank"], entries["full svd"]
    print_table(
        "2048 x 2048, k^-0.6, rank 64",
        ["", "ms", "vs lowrank", "vs full", "excess"],
        [_row(name, entry, peer, full) for name, entry in entries.items()],
    )
    return {
        "entries": entries,
        "times_faster_than_svd_lowrank": peer["seconds"] / ours["seconds"],
        "times_faster_than_full_svd": full["seconds"] / ours["seconds"],
        "excess": ours["excess"],
        "plan": plan_sketch(rank)._asdict(),
        "seed": SEED,
    }


def layers_section(repeats: int = REPEATS) -> dict[str, Any]:
    """The three shapes of a Llama block of hidden 1024 at rank 16: the target is 5x the peer, at no larger residual."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    rank = 16
    shapes: dict[str, dict[str, Any]] = {}
    rows = []
    for m, n in LAYER_SHAPES:
        W = power_law_matrix(m, n, exponent=EXPONENT, generator=generator)
        functions = {
            "llmreg": partial(truncated_svd, W, rank),
            "svd_lowrank": partial(lowrank, W, rank),
        }
        entries = compare(W, rank, functions, repeats)
        shapes[f"{m}x{n}"] = entries
        rows += [_row(f"{m} x {n} {name}", entry, entries["svd_lowrank"]) for name, entry in entries.items()]
    total = {name: sum(entries[name]["seconds"] for entries in shapes.values()) for name in ("llmreg", "svd_lowrank")}
    worst = {name: max(entries[name]["excess"] for entries in shapes.values()) for name in total}
    rows += [
        _row(
            f"together {name}",
            {"seconds": total[name], "excess": worst[name]},
            {"seconds": total["svd_lowrank"]},
        )
        for name in total
    ]
    print_table("Llama-shaped layers, k^-0.6, rank 16", ["", "ms", "vs lowrank", "excess"], rows)
    ratio = total["svd_lowrank"] / total["llmreg"]
    return {"shapes": shapes, "times_faster": ratio, "largest_excess": worst, "seed": SEED}


def curve_section(repeats: int = 3) -> dict[str, Any]:
    """A Gaussian matrix: how the residual falls with the time spent."""
    torch.manual_seed(SEED)
    W = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(SEED))
    rank = 64
    functions: dict[str, Callable[[], Triplets]] = {
        f"svd_lowrank niter {niter}": partial(lowrank, W, rank, niter) for niter in (2, 4, 8, 16)
    }
    functions["llmreg default"] = partial(truncated_svd, W, rank)
    for method in ("krylov", "subspace"):
        for iterations in (1, 2, 4, 8):
            name = f"{method} power_iterations {iterations}"
            functions[name] = partial(truncated_svd, W, rank, method=method, power_iterations=iterations)
    entries = compare(W, rank, functions, repeats)
    print_table(
        "2048 x 2048 Gaussian, rank 64", ["", "ms", "excess"], [_row(name, entry) for name, entry in entries.items()]
    )
    return {"entries": entries, "seed": SEED}


# -- a whole model on a GPU -------------------------------------------------------------------------------------


def gpu_section(repeats: int = 5) -> dict[str, Any]:
    """224 layers of the Llama-2-7B shapes at rank 128; the paper reports 22.7 s (niter 16) and 435 s (full)."""
    if not torch.cuda.is_available():
        print("gpu: no CUDA device here, section skipped")
        return {"skipped": "no CUDA device"}
    return model_on_device("cuda", LLAMA_7B, rank=128, chunk_bytes=4 << 30, repeats=repeats)


def model_on_device(
    device: str, shapes: dict[tuple[int, int], int], *, rank: int, chunk_bytes: int, repeats: int
) -> dict[str, Any]:
    """Seconds to decompose `shapes` (shape: count) in batches of equal shape of at most `chunk_bytes` of weights."""
    throughput, bandwidth = _roofline(device)
    result: dict[str, Any] = {"matmul_tflops": throughput / 1e12, "bandwidth_gb": bandwidth / 1e9, "seed": SEED}
    rows = []
    for method in ("subspace", "krylov"):
        plan = plan_sketch(rank, method=method)
        seconds, floor = 0.0, 0.0
        for (m, n), count in shapes.items():
            in_chunk = min(count, max(1, chunk_bytes // (4 * m * n)))
            W = _weights(in_chunk, m, n, device)
            one_chunk = partial(truncated_svd, W, rank, method=method)
            seconds += _median_seconds(one_chunk, device, repeats) * count / in_chunk
            flops = 2 * m * n * plan.width * plan.passes * count
            floor += max(flops / throughput, 4 * m * n * plan.passes * count / bandwidth)
            del W
        result[method] = {"seconds": seconds, "plan": plan._asdict()}
        rows.append([method, f"{seconds:.3f}", "", ""])
        if plan.tolerance is None:  # else the number of passes, and so the floor, depends on the spectrum
            result[method]["roofline_seconds"] = floor
            rows[-1][2:] = [f"{floor:.3f}", f"{seconds / floor:.1f}x"]
    peer = 0.0
    for (m, n), count in shapes.items():
        W = _weights(1, m, n, device)[0]
        peer += count * _median_seconds(partial(lowrank, W, rank), device, repeats)
    result["svd_lowrank"] = {"seconds": peer}
    rows.append(["svd_lowrank niter 16, one by one", f"{peer:.3f}", "", ""])
    total = sum(shapes.values())
    print_table(f"{total} layers at rank {rank} on {device}", ["", "s", "roofline s", "of the floor"], rows)
    return result


def _weights(count: int, m: int, n: int, device: str) -> Tensor:
    """`(count, m, n)` with about a power-law spectrum: Gaussian factors around k^-0.6, one matrix at a time."""
    generator = torch.Generator(device).manual_seed(SEED)
    k = min(m, n)
    spectrum = torch.arange(1, k + 1, device=device) ** -EXPONENT
    W = torch.empty(count, m, n, device=device)
    for matrix in W:
        left = torch.randn(m, k, generator=generator, device=device) * (spectrum / (m * n) ** 0.5)
        torch.matmul(left, torch.randn(k, n, generator=generator, device=device), out=matrix)
    return W


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _median_seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of a call, the device's queue empty before and after, the first call left out."""
    seconds = []
    for turn in range(repeats + 1):
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        if turn:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _roofline(device: str, size: int = 8192) -> tuple[float, float]:
    """Measured fp32 matmul throughput (FLOP/s, current TF32 setting) and memory bandwidth (byte/s, read + write)."""
    size = size if device == "cuda" else 1024
    A = torch.randn(size, size, device=device)
    throughput = 2 * size**3 / _median_seconds(lambda: A @ A, device, 5)
    source = torch.empty(size * size, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device, 5)
    return throughput, bandwidth


def main() -> None:
    sections = {"matrix": matrix_section, "layers": layers_section, "curve": curve_section, "gpu": gpu_section}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(sections), default=["matrix", "layers", "curve"])
    parser.add_argument("--gpu", action="store_true", help="the gpu section alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name in ["gpu"] if arguments.gpu else arguments.sections:
        result = sections[name]()
        if "skipped" in result:
            continue
        results[name] = {**machine(), "threads": arguments.threads, "load": os.getloadavg()[0], "result": result}
        write_json(arguments.output, results)
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
