"""The packaged model: where it is and how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

__all__ = ["load_model", "load_tokenizer", "path"]


def path() -> Path:
    """Return the folder of the packaged model, which knows world 0.

    It is an ordinary Hugging Face model folder: configuration, half-precision safetensors, tokenizer,
    generation configuration and model card. Anything that takes a local path takes this one.
    """
    return Path(__file__).resolve().parent / "model"


def load_model(dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """Load the packaged model on the CPU, in evaluation mode.

    Args:
        dtype: type of the weights in memory; default float32.
    """
    import torch
    from transformers import LlamaForCausalLM

    with _no_progress_bar():
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(path(), dtype=dtype or torch.float32)
    return model


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the tokenizer of the packaged model: no token is added to a text; padding is on the left."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path())
    return tokenizer


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar over the few milliseconds this takes, also where nobody looks."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
