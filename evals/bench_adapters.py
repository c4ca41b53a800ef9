"""Speed and memory of training an adapter against the peer in the same process: SORSA, SVFit and PiSSA, and Bone.

    python evals/bench_adapters.py                      all sections, writes evals/results/bench_adapters.json
    python evals/bench_adapters.py --sections step      any of: step, wide, bone, init, gpu

step     forward, backward and AdamW against plain LoRA of equal rank: 1 x 512 and 4 x 128 tokens, ranks 16 and 64;
         "products": multiplications of the difference form (five thin products a layer) over LoRA's (three)
wide     the same at hidden 2048 and rank 64: the thin products weigh less, as in the models that people train
bone     Bone's variants against PEFT's MiSS: 1 x 128 and 1 x 512 tokens; bat also against its floor, which is LoRA's
         step and a third product with each weight's shape
init     starting all linear layers of a model: SORSA, SVFit, PiSSA, and PEFT's pissa_niter_16
gpu      the three with larger shapes in bf16 on a CUDA device

A round takes one step of every method, in rotating order; a ratio is the median over rounds of the round's own ratio,
so that what slows a whole round cancels out. "LoRA again" is a second copy of the peer: its ratio is the noise. The
memory of a step is what it has live at most beyond the model and the optimizer's states, and what the forward pass
keeps for backward. Run on a quiet machine; the load is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bench_init
import peft
import torch
from common import machine, print_table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import llmreg
from llmreg.files import write_json
from llmreg.recipes.memory_step import _LiveBytes

RESULT = Path(__file__).parent / "results" / "bench_adapters.json"
SECTIONS = ("step", "wide", "bone", "init", "gpu")
VOCABULARY = 2048
LEARNING_RATE = 1e-5
MIB = 2**20

#: Seconds of the phases of one run; medians and ratios of them.
Phases = dict[str, float]


class Setting(NamedTuple):
    """A Llama-shaped model, where it runs, and what it is given; `batches` are (sequences, tokens in each)."""

    hidden: int
    intermediate: int
    layers: int
    device: str
    dtype: torch.dtype
    batches: tuple[tuple[int, int], ...]
    bone_batches: tuple[tuple[int, int], ...]
    init_layers: int
    ranks: tuple[int, ...] = (16, 64)

    def model(self) -> nn.Module:
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(self.device, self.dtype)

    def tokens(self, batch: tuple[int, int]) -> Tensor:
        return torch.randint(0, VOCABULARY, batch, generator=torch.Generator().manual_seed(0)).to(self.device)


CPU = Setting(512, 1408, 4, "cpu", torch.float32, ((1, 512), (4, 128)), ((1, 128), (1, 512)), init_layers=4)
WIDE = Setting(2048, 5632, 2, "cpu", torch.float32, ((1, 512),), (), init_layers=0, ranks=(64,))
CUDA = Setting(2048, 5632, 8, "cuda", torch.bfloat16, ((8, 512), (4, 2048)), ((8, 128), (8, 512)), init_layers=16)


# -- what is compared -------------------------------------------------------------------------------------------------


def decomposed_configs(rank: int) -> dict[str, Any]:
    """Plain LoRA, and the methods that are held to its step."""
    lora = partial(peft.LoraConfig, r=rank, lora_alpha=rank, target_modules="all-linear")
    return {
        "LoRA": lora(),
        "LoRA again": lora(),
        "pissa": llmreg.PissaConfig(r=rank, target_modules="all-linear"),
        "sorsa (start)": llmreg.SorsaConfig(r=rank, target_modules="all-linear", weights=None),
        "sorsa": llmreg.SorsaConfig(r=rank, target_modules="all-linear"),  # with the decoupled orthonormal step
        "svfit": llmreg.SvfitConfig(r=rank, target_modules="all-linear"),
    }


def bone_configs(rank: int) -> dict[str, Any]:
    """Bone's variants beside PEFT's MiSS of the same form, and plain LoRA."""
    bone = partial(llmreg.BoneConfig, r=rank, target_modules="all-linear")
    miss = partial(peft.MissConfig, r=rank, target_modules="all-linear")
    return {
        "LoRA": peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"),
        "bone": bone(variant="bone"),
        "MiSS": miss(init_weights=True),
        "bone mini": bone(variant="mini", mini_r=16),
        "MiSS mini": miss(init_weights="mini", mini_r=16),
        "bone bat": bone(variant="bat"),
        "MiSS bat": miss(init_weights="bat"),
    }


def start_configs(rank: int) -> dict[str, Any]:
    """The methods that decompose every weight."""
    return {
        "pissa": llmreg.PissaConfig(r=rank, target_modules="all-linear"),
        "sorsa": llmreg.SorsaConfig(r=rank, target_modules="all-linear"),
        "svfit": llmreg.SvfitConfig(r=rank, target_modules="all-linear"),
        "PEFT pissa_niter_16": peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights="pissa_niter_16"
        ),
    }


class Training:
    """A copy of `base` with an adapter, and its optimizer; called with tokens, it takes one step."""

    def __init__(self, base: nn.Module, config: Any) -> None:
        torch.manual_seed(0)
        self.model = peft.get_peft_model(copy.deepcopy(base), config).train()
        self.device = next(base.parameters()).device.type
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self.arguments = SimpleNamespace(learning_rate=LEARNING_RATE, fp16=False, deepspeed=None)
        self.callback: llmreg.RegularizerCallback | None = None
        if isinstance(config, llmreg.SorsaConfig) and config.needs_regularizer():
            self.callback = llmreg.RegularizerCallback()
            self.callback.on_train_begin(self.arguments, None, None, model=self.model)

    def __call__(self, tokens: Tensor) -> Phases:
        marks = [_now(self.device)]
        loss = self.forward(tokens)
        marks.append(_now(self.device))
        loss.backward()
        del loss
        marks.append(_now(self.device))
        self.update()
        marks.append(_now(self.device))
        forward, backward, update = (after - before for before, after in itertools.pairwise(marks))
        return {"forward": forward, "backward": backward, "update": update, "step": marks[-1] - marks[0]}

    def forward(self, tokens: Tensor) -> Tensor:
        half = torch.autocast(self.device, torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()
        with half:
            return self.model(input_ids=tokens, labels=tokens).loss

    def update(self) -> None:
        if self.callback is not None:
            self.callback.on_pre_optimizer_step(self.arguments, None, None)
        self.optimizer.step()
        if self.callback is not None:
            self.callback.on_optimizer_step(self.arguments, None, None, optimizer=self.optimizer)
        self.optimizer.zero_grad()

    def existing(self) -> list[Tensor]:
        """What is there before a step: parameters, buffers, optimizer states."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *filter(torch.is_tensor, states)]


# -- measuring --------------------------------------------------------------------------------------------------------


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds(runs: dict[str, Callable[[], Phases]], repeats: int) -> dict[str, list[Phases]]:
    """What each run reports, `repeats` times, in rotating order, after two rounds that do not count."""
    samples: dict[str, list[Phases]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(repeats + 2):
        gc.collect()
        for name in order:
            phases = runs[name]()
            if turn > 1:
                samples[name].append(phases)
        order = order[1:] + order[:1]
    return samples


def medians(samples: list[Phases]) -> Phases:
    return {phase: statistics.median(sample[phase] for sample in samples) for phase in samples[0]}


def ratios(samples: list[Phases], peers: list[Phases]) -> Phases:
    """Median over rounds of each phase's time over the peer's in the same round."""
    pairs = list(zip(samples, peers, strict=True))
    return {phase: statistics.median(mine[phase] / peer[phase] for mine, peer in pairs) for phase in samples[0]}


class LiveBytes(_LiveBytes):
    """The bytes that operations on real tensors have live, now and at most."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            self._add(tensor.untyped_storage())
        return out


def memory(training: Training, tokens: Tensor) -> dict[str, float]:
    """MiB of a step beyond `training.existing()`: kept for backward after the forward pass, and the peak."""
    existing = [*training.existing(), tokens]
    saved = saved_bytes(training, tokens, existing)
    if training.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training(tokens)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes(existing) as live:
            training(tokens)
        peak = live.peak
    return {"saved_mib": saved / MIB, "peak_mib": peak / MIB}


def saved_bytes(training: Training, tokens: Tensor, existing: Iterable[Tensor]) -> int:
    """Bytes of the storages that the graph of a forward pass holds, without what was there before."""
    known = {tensor.untyped_storage().data_ptr() for tensor in existing}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.forward(tokens)
    del loss
    return sum(saved.values())


def bare_products(base: nn.Module, tokens: int) -> Callable[[], Phases]:
    """The full-size products of a step, one linear layer after another: `x W^T`, `g W` (LoRA needs these), `g^T x`."""
    layers = [m.weight.detach() for name, m in base.named_modules() if isinstance(m, nn.Linear) and "head" not in name]
    like = {"device": layers[0].device, "dtype": layers[0].dtype}
    rows = {size: torch.randn(tokens, size, **like) for weight in layers for size in weight.shape}

    def seconds(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        started = _now(like["device"].type)
        for W in layers:
            product(W, rows[W.shape[1]], rows[W.shape[0]])
        return _now(like["device"].type) - started

    def run() -> Phases:
        forward = seconds(lambda W, x, g: x @ W.t())
        backward = seconds(lambda W, x, g: g @ W)
        return {"two": forward + backward, "third": seconds(lambda W, x, g: g.t() @ x)}

    return run


# -- sections ---------------------------------------------------------------------------------------------------------


def section_step(setting: Setting, repeats: int) -> dict[str, Any]:
    """The decomposed methods against plain LoRA."""
    out: dict[str, Any] = {}
    base = setting.model()
    for rank in setting.ranks:
        trainings = {name: Training(base, config) for name, config in decomposed_configs(rank).items()}
        floor = products_over_lora(base, rank)
        for batch in setting.batches:
            tokens = setting.tokens(batch)
            samples = rounds({name: partial(training, tokens) for name, training in trainings.items()}, repeats)
            result = {
                name: {
                    "seconds": medians(samples[name]),
                    "ratio": ratios(samples[name], samples["LoRA"]),
                    "memory": memory(training, tokens),
                }
                for name, training in trainings.items()
            }
            key = f"r {rank}, {batch[0]} x {batch[1]}"
            out[key] = result
            print_steps(f"step, {key} tokens; x: over LoRA's (aim: <= 1.10; products {floor:.2f})", result)
            out[key]["products"] = floor
        trainings.clear()
    return out


def products_over_lora(base: nn.Module, rank: int) -> float:
    """Multiplications a token of the difference form over those of plain LoRA: all linear layers, and the head."""
    shapes = [m.weight.shape for m in base.modules() if isinstance(m, nn.Linear)]

    def cost(thin: int) -> int:
        adapted = sum(2 * rows * columns + thin * rank * (rows + columns) for rows, columns in shapes[:-1])
        return adapted + 2 * shapes[-1][0] * shapes[-1][1]

    return cost(5) / cost(3)


def print_steps(title: str, result: dict[str, Any]) -> None:
    phases = ("forward", "backward", "update", "step")
    print_table(
        title,
        ["", "step ms", *(f"{phase} x" for phase in phases), "peak MiB", "saved MiB"],
        [
            [
                name,
                f"{entry['seconds']['step'] * 1e3:.0f}",
                *(f"{entry['ratio'][phase]:.2f}" for phase in phases),
                f"{entry['memory']['peak_mib']:.1f}",
                f"{entry['memory']['saved_mib']:.1f}",
            ]
            for name, entry in result.items()
        ],
    )


def section_bone(setting: Setting, repeats: int) -> dict[str, Any]:
    """Bone against MiSS, and bat against what it cannot go below."""
    if not hasattr(llmreg, "BoneConfig"):
        print("bone: this llmreg has no BoneConfig, section skipped")
        return {"skipped": "no llmreg.BoneConfig"}
    out = {}
    base = setting.model()
    for rank in setting.ranks:
        trainings = {name: Training(base, config) for name, config in bone_configs(rank).items()}
        for batch in setting.bone_batches:
            tokens = setting.tokens(batch)
            runs: dict[str, Any] = {name: partial(training, tokens) for name, training in trainings.items()}
            samples = rounds({**runs, "products": bare_products(base, tokens.numel())}, repeats)
            used = {name: memory(training, tokens) for name, training in trainings.items()}
            key = f"r {rank}, {batch[0]} x {batch[1]}"
            out[key] = bone_result(samples, used)
            print_bone(key, out[key])
        trainings.clear()
    return out


def bone_result(samples: dict[str, list[Phases]], used: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Times over those of MiSS; of bat also over LoRA's and the floor's, and its extra memory over that of MiSS."""
    pairs = {"bone": "MiSS", "bone mini": "MiSS mini", "bone bat": "MiSS bat"}
    lora, bat = samples["LoRA"], samples["bone bat"]
    floor = [{"step": a["step"] + b["third"]} for a, b in zip(lora, samples["products"], strict=True)]
    extra = {name: used[name]["peak_mib"] - used["LoRA"]["peak_mib"] for name in ("bone bat", "MiSS bat")}
    steps = {name: [{"step": sample["step"]} for sample in samples[name]] for name in ("LoRA", "bone bat", "MiSS bat")}
    return {
        "seconds": {name: medians(values) for name, values in samples.items()},
        "memory": used,
        "over_miss": {mine: ratios(samples[mine], samples[peer]) for mine, peer in pairs.items()},
        "bat": {
            "over_lora": ratios(bat, lora)["step"],
            "over_floor": ratios(steps["bone bat"], floor)["step"],
            "floor_over_lora": ratios(floor, steps["LoRA"])["step"],
            "floor_over_miss_bat": ratios(floor, steps["MiSS bat"])["step"],
            "extra_mib": extra,
            "extra_over_miss_bat": extra["bone bat"] / extra["MiSS bat"],
        },
    }


def print_bone(key: str, result: dict[str, Any]) -> None:
    over, bat = result["over_miss"], result["bat"]
    print_table(
        f"step, {key} tokens; x: over MiSS's (aim: <= 1, bat 1 / 1.3 = 0.77)",
        ["", "step ms", "forward x", "backward x", "step x", "peak MiB", "saved MiB"],
        [
            [
                name,
                f"{result['seconds'][name]['step'] * 1e3:.0f}",
                *(f"{over[name][phase]:.2f}" if name in over else "" for phase in ("forward", "backward", "step")),
                f"{used['peak_mib']:.1f}",
                f"{used['saved_mib']:.1f}",
            ]
            for name, used in result["memory"].items()
        ],
    )
    print(
        f"bat takes {bat['over_lora']:.2f}x LoRA's step, {bat['over_floor']:.2f}x its floor (LoRA's step and a third "
        f"product with each weight's shape: {bat['floor_over_lora']:.2f}x LoRA's, {bat['floor_over_miss_bat']:.2f}x "
        f"MiSS bat's), and {bat['extra_over_miss_bat']:.0%} of MiSS bat's memory beyond LoRA's (aim: <= 15 %)\n"
    )


def section_init(setting: Setting, repeats: int, rank: int = 16) -> dict[str, Any]:
    """Wrapping a model whose weights have the spectrum k^-0.6 (hidden 1024), and with it starting every layer."""
    base = bench_init.llama(setting.init_layers).to(setting.device, setting.dtype)

    def start(config: Any) -> Phases:
        model = copy.deepcopy(base)
        started = _now(setting.device)
        peft.get_peft_model(model, config)
        return {"start": _now(setting.device) - started}

    configs = start_configs(rank)
    samples = rounds({name: partial(start, config) for name, config in configs.items()}, repeats)
    result = {
        name: {"seconds": medians(values)["start"], "ratio": ratios(values, samples["pissa"])["start"]}
        for name, values in samples.items()
    }
    print_table(
        f"start, hidden 1024, {setting.init_layers} layers, r {rank} (aim: sorsa, svfit as pissa)",
        ["", "seconds", "over pissa's"],
        [[name, f"{entry['seconds']:.3f}", f"{entry['ratio']:.2f}"] for name, entry in result.items()],
    )
    return result


GPU_PARTS = {"step": section_step, "bone": section_bone, "init": section_init}
CPU_SECTIONS = {name: partial(section, CPU) for name, section in GPU_PARTS.items()}
CPU_SECTIONS["wide"] = partial(section_step, WIDE)


def section_gpu(repeats: int) -> dict[str, Any]:
    """The other sections with larger shapes, in bf16."""
    if not torch.cuda.is_available():
        print("gpu: no CUDA device here, section skipped")
        return {"skipped": "no CUDA device"}
    out = {name: section(CUDA, repeats) for name, section in GPU_PARTS.items()}
    return {"setting": {**CUDA._asdict(), "dtype": "bfloat16"}, **out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    written = False
    for name in arguments.sections:
        load = os.getloadavg()[0]
        run = section_gpu if name == "gpu" else CPU_SECTIONS[name]
        result = run(arguments.repeats)
        if "skipped" in result:
            continue
        settings = {"threads": arguments.threads, "repeats": arguments.repeats, "load": [load, os.getloadavg()[0]]}
        results[name] = {**machine(), **settings, "result": result}
        write_json(arguments.output, results)
        written = True
    if written:
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
