"""Batches of random tokens for the tiny language models, and dense references for what calibration sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY
from torch import Tensor, nn

from llmreg.calibration import Need, Statistics

ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
MLP = [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")]
LINEARS = ATTENTION + MLP
NEEDS = [Need(mean=True), Need(sample_scale="signed_max"), Need(sample_scale="abs_max", mean=True)]


def documents(lengths: Iterable[int] = (9, 5, 12, 7), seed: int = 0) -> list[Tensor]:
    """Token ids of documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def single(texts: list[Tensor]) -> list[dict[str, Tensor]]:
    """One batch a document, unpadded."""
    return [{"input_ids": text.unsqueeze(0)} for text in texts]


def padded(texts: list[Tensor], side: str) -> dict[str, Tensor]:
    """All documents in one batch, padded with id 0 on the left or on the right."""
    width = max(len(text) for text in texts)
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        span = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, span], mask[row, span] = text, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def packed(texts: list[Tensor]) -> dict[str, Tensor]:
    """All documents in one row without a mask, position ids restarting."""
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return {"input_ids": torch.cat(texts).unsqueeze(0), "position_ids": positions.unsqueeze(0)}


def inputs_of(model: nn.Module, name: str, batches: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The inputs (rows, columns, in) that layer `name` gets for each batch."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    hook.remove()
    return seen


def dense_moment(parts: Iterable[Tensor]) -> Tensor:
    """`X^T X / count` in float64 of inputs with any leading dimensions."""
    X = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double()
    return X.mT @ X / X.shape[0]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def assert_close(a: Statistics, b: Statistics, tolerance: float = 1e-5) -> None:
    assert list(a) == list(b)
    for name in a:
        assert (a[name].count, a[name].samples) == (b[name].count, b[name].samples)
        assert relative(a[name].second_moment(), b[name].second_moment()) < tolerance
        assert a[name].trace == pytest.approx(b[name].trace, rel=tolerance)
        if a[name].need.mean:
            assert relative(a[name].mean(), b[name].mean()) < tolerance
