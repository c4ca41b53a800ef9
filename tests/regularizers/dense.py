"""What the regularisers compute in tiles or from a Gram matrix, written out with all logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmreg.regularizers.base import Head


def logits(hidden: Tensor, head: Head) -> Tensor:
    """(n, vocabulary), in float64."""
    Z = F.linear(hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double()) * head.scale
    if head.softcap is not None:
        Z = head.softcap * torch.tanh(Z / head.softcap)
    return Z / head.temperature


def entropy(Z: Tensor) -> Tensor:
    log_p = Z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def teacher_kl(hidden, head, teacher_hidden, teacher_head, *, temperature) -> Tensor:
    log_q = (logits(hidden, head) / temperature).log_softmax(-1)
    log_p = (logits(teacher_hidden, teacher_head) / temperature).log_softmax(-1).detach()
    return (log_p.exp() * (log_p - log_q)).sum(-1)
