"""Started by the launcher or alone: one SFT step with an output term, gradients summed over what the processes hold.

    output_terms_worker.py BASE OUT ROWS_PER_PROCESS

Rows differ in length, and processes in how many tokens they hold: only one mean of all tokens gives the same.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llmreg.trainers import SFTTrainer

LENGTHS = (3, 9, 5, 7, 4, 12, 6, 8)
ROWS = [[5 + (3 * i + 7 * j) % 20 for j in range(length)] for i, length in enumerate(LENGTHS)]


@dataclass
class Squared:
    weight: float = 0.5
    schedule: str = "constant"
    reduction: str = "tokens"
    needs: frozenset = frozenset({"log_probs"})
    name = "squared"

    def loss(self, context: Any) -> torch.Tensor:
        return context.log_probs.square().mean()


def main() -> None:
    base, out, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    args = trl.SFTConfig(
        str(out / "run"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(ROWS) // (rows * int(os.environ.get("WORLD_SIZE", "1"))),
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        seed=3,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")
    trainer = SFTTrainer(
        LlamaForCausalLM.from_pretrained(base),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ROWS}),
        processing_class=tokenizer,
        peft_config=config,
        regularizers=[Squared()],
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    trainer.train()
    if trainer.is_world_process_zero():
        trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(trained, out / "trained.safetensors")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
