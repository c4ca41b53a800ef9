"""Speed, memory and quality of starting adapters from data: CorDA and EVA against PEFT, calibration, quantisation.

    python evals/bench_calibration.py                              all sections but gpu
    python evals/bench_calibration.py --sections corda eva         any of them
    python evals/bench_calibration.py --sections gpu [--tiny]      on a GPU; --tiny tries the same code on a small shape

corda         all 56 linears from data to factors, against `preprocess_corda`: seconds, memory, energy of the components
eva           the same against `get_eva_state_dict`, which gets `--peft-seconds`; the variance that is captured
passes        calibration over the same forward passes without it
quantization  errors of QLoRA, LoftQ and QPiSSA, layer by layer, in NF4 (see bench_quantization)
eora          output error on held-out text of no, a plain and EoRA's compensation (see bench_quantization)
gpu           Llama-2-7B shapes: calibration over bare passes, decomposition, peak memory (see bench_calibration_gpu)

Llama of hidden 1024, intermediate 2816, 8 layers, r 16, 16 x 256 random tokens, one row a batch, which is all that
PEFT's CorDA takes. One thread, whose processor time is measured: what else the machine does hardly lengthens it.
Medians of interleaved repeats in one process; the ratio in one run is the result. Peak memory is measured in processes
of their own. Writes evals/results/bench_calibration.json.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import data_driven
import torch
from bench_init import llama, resident
from common import machine, print_table
from data_driven import (
    CORDA_NEED,
    EVA_NEED,
    Batches,
    calibration_functions,
    linear_layers,
    moment_of,
    peft_corda,
    peft_eva,
    random_batches,
    start_corda,
    start_eva,
)
from torch import nn

from llmreg.calibration import Statistics, calibrate
from llmreg.files import write_json
from llmreg.initializers import Factors, damp

RESULT = Path(__file__).parent / "results" / "bench_calibration.json"
SECTIONS = ("corda", "eva", "passes", "quantization", "eora", "gpu")
VOCABULARY, SAMPLES, COLUMNS = 4096, 16, 256
RANK, SKETCH = 16, 128
REPEATS = 3
CLOCK = time.process_time


def model_and_batches() -> tuple[nn.Module, Batches]:
    return llama().eval(), random_batches(VOCABULARY, SAMPLES, 1, COLUMNS)


# -- measuring --------------------------------------------------------------------------------------------------


@contextmanager
def stopwatch(module: Any, name: str) -> Iterator[list[float]]:
    """The seconds of each call of a module's function meanwhile."""
    function, seconds = getattr(module, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = CLOCK()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(CLOCK() - started)

    setattr(module, name, timed)
    try:
        yield seconds
    finally:
        setattr(module, name, function)


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each function, `repeats` times, in turn, after one call of the first; and what each returned last."""
    next(iter(functions.values()))()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    returned: dict[str, Any] = {}
    for _ in range(repeats):
        for name, function in functions.items():
            returned.pop(name, None)
            gc.collect()
            started = CLOCK()
            returned[name] = function()
            seconds[name].append(CLOCK() - started)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    return seconds, returned


def extra_memory(method: str) -> float:
    """MiB by which the peak resident memory of a CorDA start exceeds the loaded model, in a process of its own."""
    command = [sys.executable, __file__, "--memory", method]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _memory_of(method: str) -> float:
    model, batches = model_and_batches()
    run = CORDA_METHODS[method]
    small = nn.Sequential(nn.Linear(64, 64))
    run(small, [{"input": torch.randn(1, 32, 64)}], 4)  # libraries load before the measurement
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what making the model has freed is not the model's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    run(model, batches, RANK)
    return (resident("VmHWM") - before) / 1024


CORDA_METHODS: dict[str, Callable[[nn.Module, Any, int], dict[str, Factors]]] = {
    "exact": start_corda,
    "sketch": partial(start_corda, sketch=SKETCH),
    "peft": peft_corda,
}


# -- CorDA ------------------------------------------------------------------------------------------------------


def section_corda(repeats: int) -> dict[str, Any]:
    """Data to factors; the decomposition alone; memory; how much of the best components' energy is held."""
    model, batches = model_and_batches()
    peft_corda(nn.Sequential(nn.Linear(8, 8)), [{"input": torch.randn(1, 32, 8)}], 4)
    from peft.tuners.lora import corda as peft_module

    parts = {"exact": (data_driven, "corda_factors"), "peft": (peft_module, "collect_eigens")}
    parts["sketch"] = parts["exact"]
    alone: dict[str, list[float]] = {name: [] for name in CORDA_METHODS}

    def run(name: str) -> dict[str, Factors]:
        with stopwatch(*parts[name]) as of_part:
            factors = CORDA_METHODS[name](model, batches, RANK)
        alone[name] += of_part
        return factors

    seconds, factors = interleaved({name: partial(run, name) for name in CORDA_METHODS}, repeats)
    del alone["exact"][0]  # the call before the first
    exact = calibrate(model, batches, linear_layers(model), CORDA_NEED)
    energy = {name: held_energy(model, exact, factors[name], factors["peft"]) for name in factors}
    result = {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "decomposition": {name: statistics.median(values) for name, values in alone.items()},
        "all_seconds": seconds,
        "all_decomposition": alone,
        "extra_mib": {name: extra_memory(name) for name in CORDA_METHODS},
        "energy": energy,
    }
    for key, label in (("seconds", "ratio"), ("decomposition", "decomposition_ratio"), ("extra_mib", "memory_ratio")):
        result[label] = {name: result[key]["peft"] / result[key][name] for name in ("exact", "sketch")}
    _print_corda(result)
    return result


def held_energy(
    model: nn.Module, exact: Statistics, factors: dict[str, Factors], reference: dict[str, Factors]
) -> dict[str, float]:
    """`||U^T W C_f||^2` for the factors' column spaces `U`, over that of the reference's: the least and the mean."""
    shares = []
    layers = linear_layers(model)
    for names, part in exact.groups():
        damped = damp(moment_of(part))
        for name in names:
            WC = layers[name].weight.detach() @ damped.matrix
            held, best = (
                torch.linalg.matrix_norm(torch.linalg.qr(found[name].B)[0].mT @ WC) ** 2
                for found in (factors, reference)
            )
            shares.append((held / best).item())
    return {"least": min(shares), "mean": statistics.fmean(shares)}


def _print_corda(result: dict[str, Any]) -> None:
    keys = ("seconds", "decomposition", "extra_mib")
    rows = [
        [name, *(f"{result[key][name]:.2f}" for key in keys), f"{result['energy'][name]['least']:.4f}"]
        for name in CORDA_METHODS
    ]
    print_table("CorDA, 56 linears", ["", "seconds", "decomposition", "extra MiB", "least energy over PEFT's"], rows)
    for label in ("ratio", "decomposition_ratio", "memory_ratio"):
        print(label, {name: f"{value:.1f}" for name, value in result[label].items()})


# -- EVA --------------------------------------------------------------------------------------------------------


class TimeIsUp(Exception):
    """PEFT's EVA has used the seconds that it was given."""


def section_eva(repeats: int, peft_seconds: float) -> dict[str, Any]:
    """Data to factors against PEFT's, which goes on until it has converged or its time is up."""
    model, batches = model_and_batches()
    methods: dict[str, Callable[[], dict[str, Factors]]] = {
        "exact": lambda: start_eva(model, batches, RANK),
        "sketch": lambda: start_eva(model, batches, RANK, sketch=SKETCH),
    }
    seconds, factors = interleaved(methods, repeats)
    layers = linear_layers(model)
    exact = calibrate(model, batches, layers, EVA_NEED)
    best = {names: _best_variances(part, 2 * RANK) for names, part in exact.groups()}
    result = {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "captured": {name: captured_variance(exact, factors[name], best) for name in methods},
        "peft": _peft_until(peft_seconds, batches),
    }
    result["ratio"] = {name: result["peft"]["seconds"] / value for name, value in result["seconds"].items()}
    rows = [[name, f"{result['seconds'][name]:.2f}", f"{result['captured'][name]['least']:.5f}"] for name in methods]
    done = "converged" if result["peft"]["converged"] else "not converged"
    rows.append([f"PEFT, {done}", f"{result['peft']['seconds']:.0f}", ""])
    print_table("EVA, 56 linears", ["", "seconds", "least captured variance over the best"], rows)
    return result


def _best_variances(part: Any, count: int) -> torch.Tensor:
    """`(count,)` sums of the leading eigenvalues of the covariance, float64."""
    covariance = part.second_moment(centred=True).double()
    return torch.linalg.eigvalsh(covariance).flip(0)[:count].cumsum(0)


def captured_variance(
    exact: Statistics, factors: dict[str, Factors], best: dict[tuple[str, ...], torch.Tensor]
) -> dict[str, float]:
    """`Tr(A C A^T)`, `C` the exact covariance, over the most that as many components can hold: least and mean."""
    shares = []
    for names, part in exact.groups():
        covariance = part.second_moment(centred=True).double()
        for A in (factors[name].A.double() for name in names if name in factors):
            shares.append((torch.trace(A @ covariance @ A.mT) / best[names][len(A) - 1]).item())
    return {"least": min(shares), "mean": statistics.fmean(shares)}


def _peft_until(seconds: float, batches: Batches) -> dict[str, Any]:
    """PEFT's EVA on a model of its own; its `forward_fn` looks at the clock before each batch."""
    from peft.tuners.lora.eva import SVDHook

    model = llama().eval()
    batch_ends: list[float] = []
    started = CLOCK()

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        if CLOCK() - started > seconds:
            raise TimeIsUp
        model(**batch)
        batch_ends.append(CLOCK() - started)

    converged = True
    try:
        with torch.no_grad():
            peft_eva(model, batches, RANK, forward)
    except TimeIsUp:
        converged = False
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return {
        "converged": converged,
        "seconds": CLOCK() - started,
        "batches": len(batch_ends),
        "inputs_left": sum(isinstance(hook, SVDHook) for hook in hooks),
        # one batch finds out who shares an input, then each of the data's batches once
        "first_pass_seconds": batch_ends[len(batches)] if len(batch_ends) > len(batches) else None,
    }


# -- calibration over bare forward passes -----------------------------------------------------------------------


def section_passes(repeats: int) -> dict[str, Any]:
    """The same forward passes without and with calibration, for what CorDA and what EVA ask."""
    model, batches = model_and_batches()
    functions = calibration_functions(model, batches, SKETCH)
    seconds, _ = interleaved(functions, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: value / medians["bare"] for name, value in medians.items() if name != "bare"}
    print_table(
        "calibration, 16 x 256 tokens",
        ["", "seconds", "over bare"],
        [[name, f"{value:.2f}", f"{value / medians['bare']:.3f}"] for name, value in medians.items()],
    )
    return {"seconds": medians, "all_seconds": seconds, "ratio": ratios, "sketch": SKETCH}


# -- the rest ---------------------------------------------------------------------------------------------------


def run_section(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    if name == "corda":
        return section_corda(arguments.repeats)
    if name == "eva":
        return section_eva(arguments.repeats, arguments.peft_seconds)
    if name == "passes":
        return section_passes(arguments.repeats)
    if name == "gpu":
        import bench_calibration_gpu

        return bench_calibration_gpu.section(arguments.samples, tiny=arguments.tiny)
    import bench_quantization

    return bench_quantization.SECTIONS[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[name for name in SECTIONS if name != "gpu"])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--peft-seconds", type=float, default=480, help="that PEFT's EVA is given")
    parser.add_argument("--samples", type=int, default=32, help="calibration batches of the gpu section")
    parser.add_argument("--tiny", action="store_true", help="a small shape in the gpu section, also on a CPU")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--memory", choices=CORDA_METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(_memory_of(arguments.memory))
        return
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name in arguments.sections:
        started = time.perf_counter()
        result = run_section(name, arguments)
        if "skipped" in result:
            continue
        took = time.perf_counter() - started
        setting = {
            "threads": 1,
            "clock": "wall" if name == "gpu" else "processor",
            "repeats": arguments.repeats,
            "took": took,
        }
        results[name] = {**machine(), **setting, "load": os.getloadavg()[0], "result": result}
        write_json(arguments.output, results)
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
