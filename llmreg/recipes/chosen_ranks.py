"""Ranks that a method chooses from the weights (`energy`), found out before a model is loaded, one layer at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import median_low
from typing import Any

from torch import nn

from ..weights.source import SafetensorsSource, weight_files

__all__ = ["choose_ranks"]


def choose_ranks(
    name_or_path: str, revision: str | None, model: nn.Module, adapter: Any, layers: list[str]
) -> tuple[Any, list[str]]:
    """The adapter's config with the ranks that its start will choose, and what to say about them.

    Args:
        name_or_path: of the base; its weights are read only where they lie on this machine.
        model: the outline. layers: names of the adapted layers.

    Returns:
        `adapter` itself and no notes where it chooses nothing; else a copy, unchanged if the weights are not here.
    """
    if not getattr(adapter, "chooses_rank", lambda layer: False)(""):
        return adapter, []
    folder = _folder(name_or_path, revision)
    if folder is None or not any(file.suffix == ".safetensors" for file in weight_files(folder)):
        note = (
            "The ranks depend on the weights, which are not on this machine; each may reach its layer's smaller side."
        )
        return adapter, [note]
    chosen, source = copy.copy(adapter), SafetensorsSource(folder)
    chosen.allow_large = True
    ranks, large, kept, whole = [], 0, 0, 0
    for layer in layers:
        module: Any = model.get_submodule(layer)
        W = source.read_weight_of(layer)
        if not isinstance(module, nn.Linear):  # Conv1D keeps (in, out)
            W = W.t()
        if not adapter.chooses_rank(layer):
            continue
        slices = adapter.slices_of(layer)
        rank = slices * adapter.rank_for(W, slices)
        chosen.accept_rank(layer, tuple(W.shape), rank, rank**0.5 if adapter.use_rslora else rank)
        ranks.append(rank)
        kept, whole = kept + rank * sum(W.shape), whole + W.numel()
        large += rank * sum(W.shape) > 0.25 * W.numel()
    notes = [
        f"energy={adapter.energy} chooses ranks {min(ranks)} to {max(ranks)} (median {median_low(ranks)}); the frozen "
        f"vectors hold {kept:,} values, {kept / whole:.0%} of the adapted layers."
    ]
    if large and not adapter.allow_large:
        notes.append(
            f"{large} of {len(layers)} layers pass a quarter of their size, which training refuses without "
            "adapter.allow_large=true."
        )
    chosen.allow_large = adapter.allow_large
    return chosen, notes


def _folder(name_or_path: str, revision: str | None) -> Path | None:
    """Where the checkpoint lies: the folder itself, or a snapshot in the Hub's cache."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
