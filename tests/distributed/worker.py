"""One rank of the distributed tests: wraps a small Llama, trains it, saves it, method by method; run under torchrun.

torchrun --nproc_per_node 2 worker.py zero3|fsdp2|single MODEL_DIR OUT_DIR
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import llmreg
from llmreg.adapters.bone_layer import BoneLinear
from llmreg.adapters.layer import AdditiveLayer

STEPS = 3
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "pissa": (llmreg.PissaConfig, {}),
    "balora": (llmreg.BaLoraConfig, {"weights": None}),  # its terms: output_terms_worker.py
    "sorsa": (llmreg.SorsaConfig, {"weights": None}),
    "svfit": (llmreg.SvfitConfig, {}),
    "corda": (llmreg.CordaConfig, {}),
    "eva": (llmreg.EvaConfig, {}),
    "bone": (llmreg.BoneConfig, {}),
    "bat": (llmreg.BoneConfig, {"variant": "bat"}),
}
ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "zero_allow_untested_optimizer": True,
}


def batches() -> list[torch.Tensor]:
    """Token batches `(2, 12)`, the same on every rank, so that averaging over ranks changes nothing."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (2, 12), generator=generator) for _ in range(STEPS)]


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def wrapped(model_dir: str, method: str, **options: Any) -> peft.PeftModel:
    config, settings = METHODS[method]
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config(**settings), **options)
    if getattr(config, "NEEDS_DATA", False):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        llmreg.initialize(model, calibration_batches()[rank::world])
    return model


def calibration_batches() -> list[dict[str, torch.Tensor]]:
    """Four padded batches, which the ranks share out."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return [{"input_ids": torch.randint(3, 60, (2, 12), generator=generator), "attention_mask": mask} for _ in range(4)]


def single(model_dir: str, method: str) -> tuple[list[float], peft.PeftModel, dict | None]:
    model = wrapped(model_dir, method)
    step, losses = optimizer(model), []
    for tokens in batches():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    return losses, model, None


def fsdp2(model_dir: str, method: str) -> tuple[list[float], peft.PeftModel, dict]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    model = wrapped(model_dir, method)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    step, losses = optimizer(model), []
    for tokens in batches():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    return losses, model, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def zero3(model_dir: str, method: str) -> tuple[list[float], peft.PeftModel, dict]:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(ZERO3)  # from_pretrained partitions the base while this is alive
    model = wrapped(model_dir, method, autocast_adapter_dtype=False)
    layer: Any = next(module for module in model.modules() if isinstance(module, AdditiveLayer | BoneLinear))
    assert layer.get_base_layer().weight.numel() == 0, "the base was not partitioned"
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=ZERO3)
    losses = []
    for tokens in batches():
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    del keep
    return losses, model, engine._zero3_consolidated_16bit_state_dict()


def main() -> None:
    mode, model_dir, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # ranks must not depend on equal random states
    if mode != "single":
        dist.init_process_group("gloo")
    for method in METHODS:
        losses, model, state = {"single": single, "fsdp2": fsdp2, "zero3": zero3}[mode](model_dir, method)
        if mode == "single" or dist.get_rank() == 0:
            model.save_pretrained(out / method, state_dict=state)
            (out / method / "losses.json").write_text(json.dumps(losses))
    if mode != "single":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
