"""A tiny checkpoint with a tokenizer, data, and TRL's trainers set up to run on a CPU in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_files as saved
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

TARGETS = ["q_proj", "v_proj", "down_proj"]
_LETTERS = " abcdefghijklmnopqrstuvwxyz.?"
_COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


def checkpoint(folder: Path) -> Path:
    """A Llama of two layers and its character tokenizer, saved."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *_LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    set_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


_TEXTS = [
    "the cat sat.",
    "a dog ran far.",
    "who is here?",
    "it rains today.",
    "we like tea.",
    "she reads.",
    "go home.",
    "no.",
]
TEXT = Dataset.from_dict({"text": _TEXTS})
PREFERENCE = Dataset.from_dict(
    {"prompt": [t[:4] for t in _TEXTS], "chosen": [t[4:] + "." for t in _TEXTS], "rejected": ["zz" for _ in _TEXTS]}
)
PROMPTS = Dataset.from_dict({"prompt": [t[:5] for t in _TEXTS]})


def sft(
    model: Any, folder: Path, peft_config: Any = None, trainers: Any = trl, own: Any = None, **arguments: Any
) -> trl.SFTTrainer:
    """`trainers`: trl, or llmreg.trainers with arguments of its `own`."""
    args = trl.SFTConfig(str(folder), **{**_COMMON, "max_length": 32, **arguments})
    return trainers.SFTTrainer(
        model, args=args, train_dataset=TEXT, eval_dataset=TEXT, peft_config=peft_config, **(own or {})
    )


def dpo(
    model: Any, folder: Path, peft_config: Any = None, trainers: Any = trl, own: Any = None, **arguments: Any
) -> trl.DPOTrainer:
    args = trl.DPOConfig(str(folder), **{**_COMMON, "max_length": 32, **arguments})
    return trainers.DPOTrainer(model, args=args, train_dataset=PREFERENCE, peft_config=peft_config, **(own or {}))


def grpo(
    model: Any, folder: Path, peft_config: Any = None, trainers: Any = trl, own: Any = None, **arguments: Any
) -> trl.GRPOTrainer:
    settings = {"num_generations": 2, "max_completion_length": 4, "beta": 0.04, **arguments}
    args = trl.GRPOConfig(str(folder), **{**_COMMON, **settings})

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    return trainers.GRPOTrainer(
        model, args=args, reward_funcs=length, train_dataset=PROMPTS, peft_config=peft_config, **(own or {})
    )


BUILDERS = {"sft": sft, "dpo": dpo, "grpo": grpo}


def load(folder: Path, storage: str) -> Any:
    """The base of a run: a path for a float one (TRL loads it), a quantised model else."""
    return saved.load_base(folder, storage)
