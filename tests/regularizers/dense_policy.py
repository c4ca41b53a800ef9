"""Policies small enough for their whole distribution: dense float64 references for what is tiled in the package."""

from __future__ import annotations

import torch

from llmreg.regularizers.base import Context, Head
from llmreg.regularizers.low_probability import PROXY, THRESHOLD

KNOWN = (0.6, 0.3, 0.09, 0.01)


def dense_log_probs(hidden, head):
    """(n, vocabulary), float64, from all logits."""
    logits = head.scale * (hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double()))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / head.temperature, dim=-1)


def policy(probabilities=KNOWN, count=1):
    """Leaf logits (count, vocabulary), and the head whose inputs they are."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().repeat(count, 1).requires_grad_()
    return logits, Head(torch.eye(len(probabilities), dtype=torch.float64))


def context(logits, head, labels, advantages, threshold=0.05, proxy=None):
    """What a trainer would offer of tokens `labels` of these logits; `threshold` is a probability."""
    labels = torch.as_tensor(labels)
    log_probs = dense_log_probs(logits, head).gather(1, labels[:, None]).squeeze(1)
    extra = {THRESHOLD: torch.full_like(log_probs, threshold).detach().log()}
    if proxy is not None:
        extra[PROXY] = torch.as_tensor(proxy, dtype=torch.float64)
    return Context(
        labels=labels,
        hidden=logits,
        head=head,
        log_probs=log_probs,
        advantages=torch.as_tensor(advantages, dtype=torch.float64),
        extra=extra,
    )
