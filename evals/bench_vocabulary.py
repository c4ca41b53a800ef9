"""Time and memory of `llmreg.regularizers.vocabulary`, forward and backward, beside whole logits and TRL's kernels.

    python evals/bench_vocabulary.py                       a vocabulary of 32,000
    python evals/bench_vocabulary.py --vocabularies 32000 128000

1,024 tokens of width 1,024, float32, a frozen head. "products" is the time over that of one bare product `h W^T`: made
and thrown away block by block, as the fastest that anything can be. Of the forward and backward pass two products are
the least for a statistic of one model, three for a divergence of two. "dense" makes all logits and leaves the rest to
autograd. "largest" is the largest tensor that was made, in MB.

Medians of interleaved repeats; the ratio in one run is the result. Run on a quiet machine.
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
from common import machine, print_table
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from llmreg.files import write_json
from llmreg.regularizers.base import Head
from llmreg.regularizers.vocabulary import teacher_kl, token_statistics

RESULT = Path(__file__).parent / "results" / "bench_vocabulary.json"
TOKENS, WIDTH = 1024, 1024
KAPPA, TOP_K = 0.02, 20
SEED = 0


class LargestTensor(TorchDispatchMode):
    """Watches the bytes of the largest storage that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return result


def dense_statistic(name: str, hidden: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """One output by its formula, from whole logits."""
    z = hidden @ W.mT
    if name == "top_k_entropy":
        log_q = torch.log_softmax(z.topk(TOP_K, dim=1).values, 1)
        return -(log_q.exp() * log_q).sum(1)
    log_p = torch.log_softmax(z, 1)
    if name == "log_probs":
        return log_p.gather(1, labels[:, None]).squeeze(1)
    if name == "max_log_prob":
        return log_p.amax(1)
    if name == "entropy":
        return -(log_p.exp() * log_p).sum(1)
    kept = log_p > log_p.amax(1, keepdim=True) + torch.tensor(KAPPA).log()
    return log_p.masked_fill(~kept, -torch.inf).logsumexp(1)


def dense_kl(hidden: Tensor, W: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(hidden @ W.mT, 1), torch.log_softmax(teacher @ W.mT, 1)
    return kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


def trl_log_probs(hidden: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, W, None, labels, 1.0, 8192, None, 1.0, ())[0]


def trl_kl(hidden: Tensor, W: Tensor, teacher: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, W, None, teacher, W, None, 0.0)[0]


def bare_product(hidden: Tensor, W: Tensor, rows: int = 256) -> None:
    block = torch.empty(rows, len(W))
    with torch.no_grad():
        for part in hidden.split(rows):
            torch.mm(part, W.mT, out=block[: len(part)])


def forward_backward(function: Callable[[], Tensor], hidden: Tensor) -> None:
    hidden.grad = None
    function().sum().backward()


def contestants(vocabulary: int) -> dict[str, Callable[[], None]]:
    """Forward and backward passes to be measured, by name; "bare product" is the unit."""
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    teacher = hidden.detach() + 0.1 * torch.randn(TOKENS, WIDTH, generator=generator)
    W = torch.randn(vocabulary, WIDTH, generator=generator) * (4 / WIDTH**0.5)
    labels = torch.randint(vocabulary, (TOKENS,), generator=generator)
    head = Head(W)

    def ours(*names: str) -> Tensor:
        found = token_statistics(hidden, head, labels, outputs=names, kappa=KAPPA, top_k=TOP_K)
        return torch.stack([one for one in found if one is not None]).sum(0)

    names = ("log_probs", "max_log_prob", "entropy", "kept_log_mass", "top_k_entropy")
    functions: dict[str, Callable[[], Tensor]] = {name: partial(ours, name) for name in names}
    functions["three outputs"] = partial(ours, "log_probs", "entropy", "kept_log_mass")
    functions |= {f"{name}, dense": partial(dense_statistic, name, hidden, W, labels) for name in names}
    functions["log_probs, TRL"] = partial(trl_log_probs, hidden, W, labels)
    functions["teacher_kl"] = lambda: teacher_kl(hidden, head, teacher, head)
    functions["teacher_kl, dense"] = partial(dense_kl, hidden, W, teacher)
    functions["teacher_kl, TRL"] = partial(trl_kl, hidden, W, teacher)
    passes = {name: partial(forward_backward, function, hidden) for name, function in functions.items()}
    return {"bare product": partial(bare_product, hidden, W), **passes}


def largest_bytes(function: Callable[[], None]) -> int:
    with LargestTensor() as watch:
        function()
    return watch.bytes


def section(vocabulary: int, repeats: int) -> dict[str, Any]:
    """Median seconds, products and the largest tensor of every contestant."""
    functions = contestants(vocabulary)
    entries: dict[str, dict[str, Any]] = {
        name: {"largest_bytes": largest_bytes(function), "all_seconds": []} for name, function in functions.items()
    }
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            entries[name]["all_seconds"].append(time.perf_counter() - started)
    for entry in entries.values():
        entry["seconds"] = statistics.median(entry["all_seconds"])
        entry["products"] = entry["seconds"] / entries["bare product"]["seconds"]
    rows = [
        [name, f"{entry['seconds']:.2f}", f"{entry['products']:.2f}", f"{entry['largest_bytes'] / 1e6:.0f}"]
        for name, entry in entries.items()
    ]
    print_table(
        f"{TOKENS} tokens x {WIDTH}, vocabulary {vocabulary}: forward and backward",
        ["", "s", "products", "largest"],
        rows,
    )
    return {"entries": entries, "repeats": repeats, "seed": SEED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for vocabulary in arguments.vocabularies:
        load = os.getloadavg()[0]
        result = section(vocabulary, arguments.repeats)
        results[str(vocabulary)] = {**machine(), "threads": arguments.threads, "load": load, "result": result}
        write_json(arguments.output, results)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
