"""One rank of Trainer runs with SORSA's regulariser, of each kind: python ddp_worker.py MODEL_DIR OUT_DIR BATCH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import llmreg


def train(kind: str, model_dir: str, out: Path, batch: int) -> None:
    config = llmreg.SorsaConfig(
        r=4, target_modules=["q_proj", "down_proj"], weights=0.05, decoupled=kind == "decoupled"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    with torch.no_grad():  # away from the start, where the term's direction is rounding
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (32, 12), generator=generator)]
    args = TrainingArguments(
        str(out / "run"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        max_grad_norm=0.5,
        ddp_find_unused_parameters=False,
        seed=0,
    )
    Trainer(model, args, train_dataset=rows, callbacks=[llmreg.RegularizerCallback()]).train()
    if int(os.environ.get("RANK", 0)) == 0:
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, out / f"{kind}.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    for kind in ("decoupled", "loss"):
        train(kind, sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    if dist.is_initialized():  # a process that ends with an open group may abort on the group's threads
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
