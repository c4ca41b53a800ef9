"""What vLLM serves: the ranks it can be told to hold, and the adapter settings that it refuses or would misread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["EMBEDDINGS", "MERGE", "REFUSED", "VLLM_RANKS", "served_rank", "targets_embedding", "why_not_served"]

#: What vLLM takes as `--max-lora-rank`; an adapter needs one that is at least its rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

MERGE = "serve the merged checkpoint instead (llmreg merge)"
#: Fields of an adapter's config that it must not have -> why, and what to do.
REFUSED = {
    "modules_to_save": f"it takes no whole modules; train without modules_to_save, or {MERGE}",
    "use_dora": f"it does not know DoRA; train without use_dora, or {MERGE}",
    "lora_bias": f"it takes no biases on lora_B; train without lora_bias, or {MERGE}",
    "target_parameters": f"it takes no factors of bare parameters; target linear modules, or {MERGE}",
    "trainable_token_indices": f"it takes no trained tokens; train without them, or {MERGE}",
    "use_bdlora": f"it would read block-diagonal factors as whole ones; train without use_bdlora, or {MERGE}",
}
#: Names of layers that it does not adapt: embeddings and heads.
EMBEDDINGS = "embed_tokens wte word_embeddings lm_head embed_out output".split()


def targets_embedding(targets: Any) -> str | None:
    """The embedding or head that `target_modules` names, or None."""
    if isinstance(targets, str):
        targets = [targets]
    return next((name for name in targets or () if name.rpartition(".")[2] in EMBEDDINGS), None)


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
    for name in REFUSED:
        if config.get(name):
            return f"it does not load adapters with {name}"
    embedding = targets_embedding(config.get("target_modules"))
    if embedding:
        return f"it does not adapt {embedding}, an embedding or head"
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
