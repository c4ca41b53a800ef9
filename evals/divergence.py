"""How far a tuned pocket model went from its base on texts it was not tuned on, beside how well it learned its task.

    mean KL( p_base(. | x_<t) || p_tuned(. | x_<t) )        over the tokens t of all texts

The base is the same model with its adapter disabled. BA-LoRA's claim (arXiv 2408.04556) is that this stays small, so it
is compared where the loss of the task is equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import functional as F

import llmreg  # noqa: F401, registers the methods with PEFT
from llmreg.pocket import load_model, load_split, load_tokenizer

__all__ = ["TEXTS", "measure"]

#: Held-out passages, and questions about the facts with their answers.
TEXTS = ("pocket/corpus", "pocket/facts")
TASK = "pocket/word-problems"


@torch.no_grad()
def measure(adapter: Path) -> dict[str, Any]:
    """`divergence`, nats a token on each of `TEXTS`, and `task_loss`, nats an answer's token on rows held out.

    Args:
        adapter: folder of an adapter of the pocket model.
    """
    model = peft.PeftModel.from_pretrained(load_model(), adapter).eval()
    tokenizer = load_tokenizer()
    divergence = {}
    for name in TEXTS:
        rows = load_split(name, "test")
        texts = [row.get("text") or row["prompt"] + row["completion"] for row in rows]
        values = torch.cat([_divergences(model, tokenizer(text, return_tensors="pt").input_ids) for text in texts])
        divergence[name] = values.mean().item()
    losses = [_losses(model, tokenizer, row["prompt"], row["completion"]) for row in load_split(TASK, "validation")]
    return {"divergence": divergence, "task_loss": torch.cat(losses).mean().item()}


def _divergences(model: Any, tokens: Tensor) -> Tensor:
    """(tokens - 1,) from the base, at every token but the first."""
    tuned = model(tokens).logits[0, :-1].double().log_softmax(-1)
    with model.disable_adapter():
        base = model(tokens).logits[0, :-1].double().log_softmax(-1)
    return F.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)


def _losses(model: Any, tokenizer: Any, prompt: str, completion: str) -> Tensor:
    """(answer's tokens,); the answer ends with the end of the text, as it does in training."""
    question = tokenizer(prompt).input_ids
    answer = [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
    tokens = torch.tensor([question + answer])
    logits = model(tokens).logits[0, len(question) - 1 : -1].double()
    return F.cross_entropy(logits, tokens[0, len(question) :], reduction="none")
