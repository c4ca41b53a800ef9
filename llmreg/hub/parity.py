"""Whether the forms of one adapter compute the same: unmerged, as plain LoRA, and merged into its base.

All are loaded in float32, one after the other, and asked for the logits of one fixed batch of random token ids. The
reference is the adapter on its base as llmreg loads it (the method's own form where a sidecar is there). Against it:

    exported   the recompressed `lora/` beside the adapter where there is one, else the adapter read as plain LoRA
    merged     the merged checkpoint; its error is the rounding to the stored dtype

`maximum` is the largest difference of a logit, `relative` the norm of the difference over the reference's norm.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor

from ..quiet import quiet
from .base_checkpoint import BaseCheckpoint

__all__ = ["parity"]

_ROWS, _LENGTH, _SEED = 2, 16, 0


def parity(
    adapter: Path, merged: Path, checkpoint: BaseCheckpoint, has_sidecar: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """The comparison, or None and the reason why there is none."""
    reason = _obstacle(checkpoint)
    if reason is not None:
        return None, reason
    exported = adapter.parent / "lora"
    recompressed = exported != adapter and (exported / CONFIG_NAME).is_file()
    try:
        with quiet():
            return _compared(adapter, merged, checkpoint, exported if recompressed else None, has_sidecar), None
    except Exception as error:  # the merged checkpoint is whole; a model that wants images must not undo it
        return None, f"the model could not be run on token ids ({type(error).__name__}: {error})"


def _compared(
    adapter: Path, merged: Path, checkpoint: BaseCheckpoint, recompressed: Path | None, has_sidecar: bool
) -> dict[str, Any]:
    reference = _outputs(checkpoint, checkpoint.folder, adapter, plain=False)
    result: dict[str, Any] = {"dtype": "float32", "tokens": [_ROWS, _LENGTH], "reference": "adapter on its base"}
    if recompressed is not None:
        again = _outputs(checkpoint, checkpoint.folder, recompressed, plain=True)
        result["exported"] = {"compared": "lora/ beside the adapter", **_errors(again, reference)}
    elif has_sidecar:
        again = _outputs(checkpoint, checkpoint.folder, adapter, plain=True)
        result["exported"] = {"compared": "the adapter read as plain LoRA", **_errors(again, reference)}
    else:
        result["exported"] = {"compared": "the same file", "maximum": 0.0, "relative": 0.0}
    result["merged"] = _errors(_outputs(checkpoint, merged, None, plain=True), reference)
    return result


def _obstacle(checkpoint: BaseCheckpoint) -> str | None:
    if checkpoint.skeleton is None:
        return "transformers does not know the model's class without running code from its repository"
    if checkpoint.shifted:
        return "checkpoint and adapter belong to different classes of the model (with and without its head)"
    needed = sum(4 * entry.elements for file in checkpoint.files for entry in file.entries.values())
    free = _free_memory()
    if needed > free // 2:
        return f"the model takes {needed / 2**30:.1f} GiB in float32, more than half of the {free / 2**30:.1f} GiB free"
    return None


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@torch.no_grad()
def _outputs(checkpoint: BaseCheckpoint, folder: Path, adapter: Path | None, *, plain: bool) -> Tensor:
    """Logits (of a model without a head: last hidden states) of the fixed batch, in float32."""
    cls = type(checkpoint.skeleton)
    model: Any = cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    if adapter is not None:
        config = LoraConfig.from_pretrained(str(adapter)) if plain else None
        model = PeftModel.from_pretrained(model, str(adapter), config=config)
    text = checkpoint.skeleton.config.get_text_config()
    generator = torch.Generator().manual_seed(_SEED)
    length = min(_LENGTH, getattr(text, "max_position_embeddings", None) or _LENGTH)
    tokens = torch.randint(text.vocab_size, (_ROWS, length), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(text, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    out = model.eval()(**inputs)
    values = out.logits if hasattr(out, "logits") else out.last_hidden_state
    del model
    gc.collect()
    return values.clone()


def _errors(values: Tensor, reference: Tensor) -> dict[str, float]:
    difference = values.double() - reference.double()
    norm = float(reference.double().norm())
    return {"maximum": float(difference.abs().max()), "relative": float(difference.norm()) / norm if norm else 0.0}
