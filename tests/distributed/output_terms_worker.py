"""Started by the launcher or alone: steps with output terms, case by case, gradients over what the processes hold.

    output_terms_worker.py plain|zero3|fsdp2 BASE OUT ROWS_PER_MICRO_BATCH CASE ...

Rows differ in length, and processes in how many tokens they hold: only one mean of all tokens gives the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import llmreg
from llmreg.regularizers import (
    ConsistencyRegularizer,
    DiversityRegularizer,
    LowProbabilityRegularizer,
    SingularValueRegularizer,
    TargetedEntropyRegularizer,
)
from llmreg.trainers import GRPOTrainer, SFTTrainer

LENGTHS = (3, 9, 5, 7, 4, 12, 6, 8)
ROWS = [[5 + (3 * i + 7 * j) % 20 for j in range(length)] for i, length in enumerate(LENGTHS)]
WORDS = ["the cat", "a dog", "who is", "it rains", "we like", "she reads", "go home", "no"]
TARGETS = ["q_proj", "down_proj"]
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,  # nothing of this small model stays whole longer than it is used
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    "zero_allow_untested_optimizer": True,
}


@dataclass
class Squared:
    weight: float = 0.5
    schedule: str = "constant"
    reduction: str = "tokens"
    needs: frozenset = frozenset({"log_probs"})
    name = "squared"

    def loss(self, context: Any) -> torch.Tensor:
        return context.log_probs.square().mean()


def policy(**options: Any) -> list[Any]:
    return [
        LowProbabilityRegularizer(weight=20.0, percentile=0.7, kappa=0.05, **options),
        TargetedEntropyRegularizer(weight=0.3),
    ]


ALWAYS: dict[str, Any] = {"schedule": "constant"}
BALORA = [
    ConsistencyRegularizer(0.5, **ALWAYS),
    DiversityRegularizer(0.2, **ALWAYS),
    SingularValueRegularizer(0.2, k=2, **ALWAYS),
]
#: By name: the kind of trainer, and its terms (None: what the adapter's config asks for).
CASES: dict[str, tuple[str, list[Any] | None]] = {
    "squared": ("sft", [Squared()]),
    "teacher": ("sft", BALORA),
    "adaptive": ("sft", [ConsistencyRegularizer(0.5, adaptive=True), TargetedEntropyRegularizer(weight=0.3)]),
    "balora": ("sft", None),
    "current": ("grpo", policy()),
    "exact": ("grpo", policy(divergence="exact")),
    "old": ("grpo", policy(policy="old")),
    "unscored": ("grpo", BALORA),
    "sft": ("sft", []),
    "grpo": ("grpo", []),
}


def arguments(case: str, out: Path, mode: str, rows: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(out / "run"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": len(ROWS) // (rows * int(os.environ.get("WORLD_SIZE", "1"))),
        "max_steps": 2,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    if CASES[case][0] == "grpo":
        settings |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.0}
        settings |= {"mask_truncated_completions": case == "unscored"}
    if mode == "zero3":
        settings["deepspeed"] = ZERO3
    if mode == "fsdp2":
        settings |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    return settings


def trainer_of(case: str, base: str, out: Path, mode: str, rows: int) -> Any:
    kind, regularizers = CASES[case]
    settings = arguments(case, out, mode, rows)
    args = trl.GRPOConfig(**settings) if kind == "grpo" else trl.SFTConfig(**settings)  # before the model, for ZeRO-3
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian")
    if case == "balora":
        config = llmreg.BaLoraConfig(r=4, target_modules=TARGETS, weights=20.0, task_type="CAUSAL_LM")
    common = {"args": args, "peft_config": config, "regularizers": regularizers}
    model = LlamaForCausalLM.from_pretrained(base)
    if kind == "grpo":
        data = Dataset.from_dict({"prompt": WORDS})
        return GRPOTrainer(model, reward, train_dataset=data, rollout_func=rollout, **common)
    return SFTTrainer(model, train_dataset=Dataset.from_dict({"input_ids": ROWS}), **common)


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on their prompt and place in its group alone, not on a process's random state.

    Those of prompts of odd length do not end: micro-batches of them are what a case of masked ones does not score.
    """
    ids = trainer.processing_class(text=prompts)["input_ids"]
    completions = []
    for number, prompt in enumerate(prompts):
        tokens = [3 + (len(prompt) * 7 + 5 * (number % 2) + 3 * j) % 25 for j in range(3 + number % 2)]
        completions.append(tokens if len(prompt) % 2 else [*tokens, trainer.processing_class.eos_token_id])
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


@contextmanager
def accelerate_shards_on_cpus() -> Iterator[None]:
    """accelerate takes FSDP for processes with accelerators alone, and on CPUs silently becomes DDP."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    stock = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    with mock.patch.object(AcceleratorState, "__init__", with_fsdp):
        yield


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What trains, whole; a collective where it is sharded."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    context: Any = nullcontext()
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed

        context = deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=None)
    with context:
        whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in parameters.items()}
        return {name.replace("module.", ""): one.detach().clone() for name, one in whole.items()}


def check_sharded(trainer: Any, mode: str) -> None:
    head = trainer.model.get_output_embeddings().weight
    if mode == "zero3":
        assert head.ds_numel > head.numel() == 0, "the head was not partitioned"
    if mode == "fsdp2":
        assert type(head).__name__ == "DTensor", "the head was not sharded"


def run(case: str, base: str, out: Path, mode: str, rows: int) -> None:
    trainer = trainer_of(case, base, out, mode, rows)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    trainer.train()
    if mode != "plain":
        check_sharded(trainer, mode)
    tensors = trained(trainer.model)
    if trainer.is_world_process_zero():
        save_file(tensors, out / f"{case}.safetensors")
        logs = [
            {key: value for key, value in log.items() if "regularizer" in key and "seconds" not in key}
            for log in trainer.state.log_history
            if "loss" in log
        ]
        (out / f"{case}.json").write_text(json.dumps(logs))


def main() -> None:
    mode, base, out, rows = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    sharding = accelerate_shards_on_cpus() if mode == "fsdp2" else nullcontext()
    # GRPO mixes rows of a generation batch, and a term that is a statistic of a micro-batch needs the same in each.
    with sharding, mock.patch("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch):
        for case in sys.argv[5:]:
            run(case, base, out, mode, rows)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
