"""Layer inputs on their way: hooks that sum each distinct input once and let go of it.

q, k and v get one tensor, as do gate and up. They are recognised by the identity of that tensor while a forward runs:
its storage, held weakly so that the address cannot be used anew, its view of it and its version. Nothing is hashed
and nothing is kept alive. Which layers share is decided when each is first reached, and every later batch must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from llmreg.calibration.statistics import InputStatistics, Need
from llmreg.calibration.tokens import BatchTokens
from llmreg.errors import UnsupportedError, WeightError

__all__ = ["Collector"]


class Collector:
    """Gathers the inputs of `layers` while their model runs, inside `attached()` and, for each batch, `batch(tokens)`.

    Attributes:
        leader_of: each reached layer's leader, the layer in whose name their common input is summed.
        statistics: leader -> sums, in the order in which the leaders were first reached.
        unaligned: layers whose inputs did not have the batch's tokens. `masks_missed`: those of them that
            saw a batch in which some tokens do not count.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        need: Need,
        sketch_of: Callable[[int], int | None],
        *,
        seed: int = 0,
        share_inputs: bool = True,
        record_only: bool = False,
    ) -> None:
        """`sketch_of(dim)` is the size of the sketch of an input of that width, None for the exact form.

        With `record_only` nothing is summed: the collector only learns who shares with whom.
        """
        self.layers, self.need, self.seed = dict(layers), need, seed
        self.leader_of: dict[str, str] = {}
        self.statistics: dict[str, InputStatistics] = {}
        self.unaligned: set[str] = set()
        self.masks_missed: set[str] = set()
        self._sketch_of, self._share, self._record_only = sketch_of, share_inputs, record_only
        self._tokens = BatchTokens(None, None)
        self._seen: dict[tuple, tuple[str, Any]] = {}
        self._uses: Counter[str] = Counter()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on the layers, and off again afterwards whatever happens."""
        handles = []
        try:
            for name, module in self.layers.items():
                hook = self._hook(name)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    @contextmanager
    def batch(self, tokens: BatchTokens) -> Iterator[None]:
        """One forward over a batch with these tokens.

        Raises:
            WeightError: an input was not finite; names the first such layer.
            UnsupportedError: layers that shared an input before did not in this batch.
        """
        self._tokens = tokens
        self._seen.clear()
        self._uses.clear()
        try:
            yield
        finally:
            self._seen.clear()
        for name, leader in self.leader_of.items():
            if self._uses[name] != self._uses[leader]:
                raise self._no_longer_shared(name, leader)
        self._check_finite()

    def of_layer(self) -> dict[str, InputStatistics]:
        """Layer -> sums of its input, of layers with a counted token; layers that share an input share the object."""
        found = {name: self.statistics[leader] for name, leader in self.leader_of.items()}
        return {name: statistics for name, statistics in found.items() if statistics.count}

    def most_tokens(self) -> int:
        """Tokens of the layer that counted most."""
        return max((statistics.count for statistics in self.statistics.values()), default=0)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if inputs and inputs[0].is_floating_point() and inputs[0].dim() > 0:
                self._reached(name, inputs[0])

        return hook

    def _reached(self, name: str, X: Tensor) -> None:
        if X.numel() == 0:
            return
        self._uses[name] += 1
        first = self._first_user(name, X)
        leader = self.leader_of.setdefault(name, first)
        if leader == name:
            if not self._record_only:
                self._sum(name, X)
        elif leader != first:
            raise self._no_longer_shared(name, leader)
        if not self._tokens.aligned(tuple(X.shape[:-1])):
            self.unaligned.add(name)
            if self._tokens.masked and not self._tokens.one_a_row(tuple(X.shape[:-1])):
                self.masks_missed.add(name)

    def _first_user(self, name: str, X: Tensor) -> str:
        """The layer that led this very tensor first in this forward: another one's name, or this one's."""
        if not self._share or X.is_inference():  # such tensors have no version, so changes in place go unseen
            return name
        storage = StorageWeakRef(X.untyped_storage())
        key = (storage.cdata, X.storage_offset(), tuple(X.shape), X.stride(), X.dtype, X._version)
        known = self._seen.get(key)
        if known is None:
            self._seen[key] = (name, storage)
            return name
        return known[0]

    def _sum(self, name: str, X: Tensor) -> None:
        dim = X.shape[-1]
        statistics = self.statistics.get(name)
        if statistics is None:
            size = self._sketch_of(dim)
            statistics = InputStatistics(dim, self.need, sketch=size, seed=self.seed, device=X.device)
            self.statistics[name] = statistics
        rows = self._tokens.rows_of(tuple(X.shape[:-1]), statistics.moment.flat.device)
        statistics.add(X.reshape(-1, dim), rows)

    def _check_finite(self) -> None:
        """Squares pass NaN and Inf on, so one number a layer tells; read together, once a batch and device."""
        by_device: dict[torch.device, list[str]] = {}
        for name, statistics in self.statistics.items():
            by_device.setdefault(statistics.squares.device, []).append(name)
        for names in by_device.values():
            finite = torch.stack([self.statistics[name].squares for name in names]).isfinite().tolist()
            if not all(finite):
                name = names[finite.index(False)]
                raise WeightError(
                    f"layer {name!r}: its input holds NaN or infinite values (or overflows float32 when squared) on "
                    "the calibration data; check the data, or load the model in bfloat16 or float32"
                )

    def _no_longer_shared(self, name: str, leader: str) -> UnsupportedError:
        return UnsupportedError(
            f"layers {leader!r} and {name!r} shared their input in an earlier batch but not in this one; "
            "calibrate with share_inputs=False, which gathers every layer on its own"
        )
