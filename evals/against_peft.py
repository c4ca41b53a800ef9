"""What users of PEFT's own PiSSA meet, and what they meet here: the same questions asked of both, on the pocket model.

    python evals/against_peft.py        prints the table of the README, writes evals/results/against_peft.json

PEFT's fast start (`pissa_niter_16`, the form that recipes recommend) and llmreg's `PissaConfig`, r 16, all linear
layers, same data, learning rate 0 where a reference is compared. Reloads happen in a process of their own with
another seed, llmreg's without llmreg.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from common import machine, print_table
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmreg
from llmreg import pocket
from llmreg.files import write_json

RESULT = Path(__file__).parent / "results" / "against_peft.json"
SHAPE = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "peft": lambda: peft.LoraConfig(**SHAPE, init_lora_weights="pissa_niter_16"),
    "llmreg": lambda: llmreg.PissaConfig(**SHAPE),
}
_RELOAD = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
torch.manual_seed(1234)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
assert "llmreg" not in sys.modules
expected = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    logits = model(expected["tokens"]).logits
print(float((logits - expected["trained"]).norm() / (expected["trained"] - expected["base"]).norm()))
"""


def model(**kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(pocket.path(), dtype=torch.float32, **kwargs)


def tokens() -> torch.Tensor:
    texts = [row["text"] for row in pocket.load_split("pocket/corpus", split="test")[:8]]
    return pocket.load_tokenizer()(texts, return_tensors="pt", padding=True).input_ids


@torch.no_grad()
def logits(wrapped: Any, ids: torch.Tensor) -> torch.Tensor:
    return wrapped.eval()(ids).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def train(wrapped: Any, ids: torch.Tensor, steps: int = 10) -> None:
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    wrapped.train()
    for _ in range(steps):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def disabled_is_base(config: Callable[[], Any]) -> float:
    """Relative change of the logits with the adapter disabled."""
    ids, base = tokens(), model()
    expected = logits(base, ids)
    wrapped = peft.get_peft_model(base, config())
    with wrapped.disable_adapter():
        return relative(logits(wrapped, ids), expected)


def reload_error(config: Callable[[], Any]) -> float:
    """Error of the logits after reload in a new process, relative to what training changed."""
    ids, base = tokens(), model()
    before = logits(base, ids)
    wrapped = peft.get_peft_model(base, config())
    train(wrapped, ids)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(f"{folder}/adapter")
        torch.save({"tokens": ids, "base": before, "trained": logits(wrapped, ids)}, f"{folder}/expected.pt")
        command = [sys.executable, "-c", _RELOAD, str(pocket.path()), f"{folder}/adapter", f"{folder}/expected.pt"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _trainer_arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "report_to": "none",
        "learning_rate": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def dpo_first_loss(config: Callable[[], Any]) -> float:
    """DPO's first loss at learning rate 0; ln 2 = 0.6931 if the reference is the policy's own start."""
    from trl import DPOConfig, DPOTrainer

    rows = pocket.load_split("pocket/word-problems", split="train")[:8]
    data = Dataset.from_list(
        [
            {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
            for a, b in zip(rows, rows[1:] + rows[:1], strict=True)
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(**_trainer_arguments(folder))
        trainer = DPOTrainer(
            model(), args=arguments, train_dataset=data, processing_class=pocket.load_tokenizer(), peft_config=config()
        )
        trainer.train()
        return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def grpo_first_kl(config: Callable[[], Any]) -> float:
    """GRPO's KL to the reference at step 0; 0 if the reference is the policy's own start."""
    from trl import GRPOConfig, GRPOTrainer

    data = Dataset.from_list(
        [{"prompt": row["prompt"]} for row in pocket.load_split("pocket/word-problems", split="train")[:8]]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(**_trainer_arguments(folder), beta=0.04, num_generations=4, max_completion_length=8)
        trainer = GRPOTrainer(
            model(),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=arguments,
            train_dataset=data,
            processing_class=pocket.load_tokenizer(),
            peft_config=config(),
        )
        trainer.train()
        return next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry)


def unload_is_base(config: Callable[[], Any]) -> float:
    """Relative change of the logits after `unload()`."""
    ids, base = tokens(), model()
    expected = logits(base, ids)
    return relative(logits(peft.get_peft_model(base, config()).unload(), ids), expected)


def nf4_start(config: Callable[[], Any]) -> float:
    """Relative change of an NF4 model's logits by wrapping it."""
    ids = tokens()
    base = model(
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    )
    expected = logits(base, ids)
    return relative(logits(peft.get_peft_model(base, config()), ids), expected)


def bf16_start(config: Callable[[], Any]) -> float:
    """Relative change of a bf16 model's logits by wrapping it."""
    ids, base = tokens(), model().to(torch.bfloat16)
    expected = logits(base, ids).float()
    return relative(logits(peft.get_peft_model(base, config()), ids).float(), expected)


QUESTIONS: dict[str, tuple[Callable, float]] = {
    "`disable_adapter()`: relative change of the base's logits": (disabled_is_base, 0.0),
    "`unload()`: relative change of the base's logits": (unload_is_base, 0.0),
    "saved, reloaded by plain PEFT with another seed: error over what training changed": (reload_error, 0.0),
    "TRL DPO, first loss at learning rate 0 (ln 2 = 0.6931)": (dpo_first_loss, math.log(2)),
    "TRL GRPO, KL to the reference at step 0": (grpo_first_kl, 0.0),
    "bf16 base: relative change of the logits by wrapping": (bf16_start, 0.0),
    "NF4 base: relative change of the logits by wrapping": (nf4_start, 0.0),
}


def answer(question: Callable, config: Callable[[], Any]) -> float | str:
    """The figure, or the name of the error that came instead."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            return question(config)
    except Exception as error:
        return type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    output = parser.parse_args().output
    rows = []
    for text, (question, ideal) in QUESTIONS.items():
        answers = {name: answer(question, config) for name, config in CONFIGS.items()}
        rows.append({"question": text, "ideal": ideal, **answers})
    write_json(output, {**machine(), "rank": SHAPE["r"], "rows": rows})

    def shown(value: float | str) -> str:
        return value if isinstance(value, str) else f"{value:.4g}"

    print_table(
        "plain PEFT and llmreg",
        ["question", "PEFT pissa_niter_16", "llmreg"],
        [[r["question"], shown(r["peft"]), shown(r["llmreg"])] for r in rows],
    )
    print("\n".join(f"| {r['question']} | {shown(r['peft'])} | {shown(r['llmreg'])} |" for r in rows))


if __name__ == "__main__":
    main()
