"""What vLLM serves: the ranks it can be told to hold, and the adapter settings that it refuses or would misread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["VLLM_RANKS", "served_rank", "why_not_served"]

#: What vLLM takes as `--max-lora-rank`; an adapter needs one that is at least its rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def served_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` of vLLM that holds `rank`, or None.

    >>> served_rank(24), served_rank(1000)
    (32, None)
    """
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def why_not_served(config: Mapping[str, Any], rank: int) -> str | None:
    """Why vLLM does not serve a saved adapter, as half a sentence that begins "it", or None.

    Args:
        config: content of its `adapter_config.json`. rank: the largest rank in it.
    """
    if served_rank(rank) is None:
        return f"it holds ranks up to {VLLM_RANKS[-1]}, and this adapter has rank {rank}"
    for name in ("modules_to_save", "use_dora", "lora_bias"):
        if config.get(name):
            return f"it does not load adapters with {name}"
    if config.get("bias", "none") != "none":
        return "it does not load adapters with biases"
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r, alpha = config.get("r", 1), config.get("lora_alpha", 1)
    root = math.sqrt if config.get("use_rslora") else float
    for layer in {**ranks, **alphas}:
        if not math.isclose(alphas.get(layer, alpha) / root(ranks.get(layer, r)), alpha / root(r)):
            name = "rank_pattern" if layer in ranks else "alpha_pattern"
            return f"it scales every layer by one lora_alpha / r and would misread {name}"
    return None
