"""The order of prompts in TRL's GRPO, from any epoch on.

TRL's sampler draws one permutation an epoch from its own generator, which begins at the seed again when a run is
resumed: epochs after the first would see the prompts in the order of the first. This one draws the same permutations
and can go to an epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.utils import RepeatSampler

__all__ = ["with_epochs"]


class _EpochSampler(RepeatSampler):
    """TRL's sampler, to which Trainer says what epoch begins."""

    def set_epoch(self, epoch: int) -> None:
        """Make the next permutation that of `epoch`, from 0."""
        if not self.shuffle or self.seed is None:
            return
        self.generator.manual_seed(self.seed)
        for _ in range(epoch):
            torch.randperm(self.num_samples, generator=self.generator)


def with_epochs(sampler: Any) -> Any:
    """The same sampler with `set_epoch`; anything but TRL's own is returned as it is."""
    if type(sampler) is RepeatSampler:
        sampler.__class__ = _EpochSampler
    return sampler
