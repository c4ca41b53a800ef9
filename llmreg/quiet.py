"""Third-party noise that a user can do nothing about, each message by its name and module; nothing else is filtered."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

#: (category, start of the message, module that warns, why it is harmless)
_WARNINGS: tuple[tuple[type[Warning], str, str, str], ...] = (
    (
        UserWarning,
        r"MatMul8bitLt: inputs will be cast from",
        r"bitsandbytes\.autograd\._functions",
        "int8 bases with float32 activations, once a layer and call: the cast is what int8 means",
    ),
    (
        FutureWarning,
        r"`is_gradient_checkpointing` is deprecated",
        r"transformers\.modeling_utils",
        "peft and trl still read the old name",
    ),
    (
        DeprecationWarning,
        r"`torch\.jit\.script(_method)?` is deprecated",
        r"torch\.jit.*",
        "bitsandbytes' own code, not the user's",
    ),
)
#: (logger, part of the message, why it is harmless)
_LOG_MESSAGES = (
    (
        "transformers.modeling_utils",
        "LOAD REPORT",
        "what a checkpoint lacks is checked in base_model.py: an error, or a new head",
    ),
    (
        "bitsandbytes.autograd._functions",
        "MatMul8bitLt: inputs will be cast",
        "as above; it is logged in some versions",
    ),
    ("DeepSpeed", "Setting accelerator to CPU", "deepspeed is installed and trl imports it; the run does not use it"),
    (
        "trl.trainer.sft_trainer",
        "The tokenizer has new PAD/BOS/EOS tokens",
        "the model's config is aligned with its tokenizer on purpose",
    ),
    (
        "transformers.trainer",
        "The tokenizer has new PAD/BOS/EOS tokens",
        "the model's config is aligned with its tokenizer on purpose",
    ),
)


class _Without(logging.Filter):
    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def filter(self, record: logging.LogRecord) -> bool:
        return self.part not in str(record.msg)


@contextmanager
def quiet() -> Iterator[None]:
    """Filter the messages above, keep progress bars to terminals, and send no telemetry; all restored afterwards."""
    import datasets
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    filters = [(logging.getLogger(name), _Without(part)) for name, part, _ in _LOG_MESSAGES]
    telemetry, bars = constants.HF_HUB_DISABLE_TELEMETRY, datasets.are_progress_bars_disabled()
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    constants.HF_HUB_DISABLE_TELEMETRY = True
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    for logger, one in filters:
        logger.addFilter(one)
    try:
        with warnings.catch_warnings():
            for category, message, module, _ in _WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category, module=module)
            yield
    finally:
        for logger, one in filters:
            logger.removeFilter(one)
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry
        if not bars:
            datasets.enable_progress_bars()
        if transformers_bars:
            transformers_logging.enable_progress_bar()
