"""One training step without its numbers: which bytes are live when, found by running the real code on fake tensors.

Fake tensors have a shape, a dtype and a device but no storage, so the model's own forward (and the attention kernel
that its device would choose), TRL's fused head, the backward pass and an initialiser's decomposition run as they are
and cost milliseconds. A dispatch mode sees every tensor that is made and every storage that is let go; the sum of
what is alive at the worst moment is the memory that these tensors need. Workspaces inside a kernel are not seen.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

__all__ = ["StepMemory", "simulate_start", "simulate_step"]

#: What TRL's trainers ask of the fused head.
_OUTPUTS = {
    "sft": ("log_probs", "entropy", "is_top1"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "grpo": ("log_probs", "entropy"),
}


class StepMemory(NamedTuple):
    """Bytes of a micro-batch beyond the parameters: `saved` for backward after the forward pass, and the `peak`."""

    saved: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off when they die; of fake tensors unless `real`."""

    def __init__(self, existing: Iterable[Tensor] = (), *, real: bool = False) -> None:
        super().__init__()
        self._real = real
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._sizes.update((storage._cdata, 0) for storage in self._existing)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not self._real:
            return _answer(args[0])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _Values(TorchFunctionMode):
    """`tolist` of a fake tensor, which reads memory that is not there: the right number of `_answer`s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _filled(tuple(args[0].shape), _answer(args[0]))
        return func(*args, **(kwargs or {}))


def _answer(tensor: Tensor) -> Any:
    """What a question about values is told: checks pass, and no comparison says that the work is done.

    So an iteration that ends by a tolerance runs to its last round, which is the bound that is wanted.
    """
    return True if tensor.dtype == torch.bool else math.nan if tensor.is_floating_point() else 1


def _filled(shape: tuple[int, ...], value: Any) -> Any:
    return [_filled(shape[1:], value) for _ in range(shape[0])] if shape else value


# -- the model ------------------------------------------------------------------------------------------------------


def simulate_step(
    model: Any,
    training: Any,
    *,
    task: str,
    rows: int,
    length: int,
    quantized: frozenset[str],
    device: str,
) -> StepMemory:
    """Run forward, reference pass, loss and backward of one micro-batch on fake tensors.

    Args:
        model: a `PeftModel` on the meta device; used up.
        training: TRL's or transformers' config.
        task: "sft", "dpo", "grpo" or "classification".
        rows: of the batch as the model gets it. length: tokens of a row.
        quantized: names, in the base model, of the linear layers that are kept quantised.
        device: "cpu" or "cuda".
    """
    base = model.get_base_model()
    if task in _OUTPUTS:
        trl_utils.add_fused_lm_head(base, outputs=_OUTPUTS[task])
    if getattr(training, "activation_checkpointing", False) or getattr(training, "gradient_checkpointing", False):
        options = getattr(training, "activation_checkpointing_kwargs", None) or {}
        base.gradient_checkpointing_enable({"use_reentrant": False, **options})
        model.enable_input_require_grads()
    model.train()
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    with FakeTensorMode(), _triton_as_torch(device, base.config.get_text_config().vocab_size):
        materialize(model, device)
        _dequantize_on_use(base, quantized)
        with LiveBytes([*model.parameters(), *model.buffers()]) as memory:
            batch = _batch(training, rows, length, device)
            with torch.autocast(device, half, enabled=half is not None):
                loss = _loss(model, batch, task, training)
            saved = memory.live
            loss.backward()
    return StepMemory(saved, memory.peak)


def _batch(training: Any, rows: int, length: int, device: str) -> dict[str, Tensor]:
    """A padded batch; or, without padding, all rows in one with their positions."""
    packed = getattr(training, "padding_free", False) or getattr(training, "packing", False)
    shape = (1, rows * length) if packed else (rows, length)
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    extra = torch.zeros_like(ids) if packed else torch.ones_like(ids)
    return {"input_ids": ids, "position_ids" if packed else "attention_mask": extra}


def _loss(model: Any, batch: dict[str, Tensor], task: str, training: Any) -> Tensor:
    """As TRL 1.16 computes it, up to arithmetic on a few numbers a row."""
    if task == "classification":
        return model(**batch).logits.float().sum()
    inputs: dict[str, Any] = {**batch, "labels": batch["input_ids"].clone(), "use_cache": False, "fused_lm_head": True}
    log_probs = model(**inputs).log_probs
    if task == "dpo" and not training.precompute_ref_log_probs:
        with torch.no_grad(), model.disable_adapter():
            reference = model(**inputs).log_probs
        log_probs = log_probs - reference
    return log_probs.sum()


def materialize(model: nn.Module, device: str) -> None:
    """Give every meta parameter and buffer a fake storage on `device`; ties stay ties."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[id(old)]  # type: ignore[assignment]


class _DequantizedLinear(torch.autograd.Function):
    """bitsandbytes' linear: the weight exists in the input's dtype only during a product, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, torch.empty_like(weight, dtype=x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ torch.empty_like(ctx.weight, dtype=grad.dtype), None, None


def _dequantized(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: _DequantizedLinear.apply(x, layer.weight, layer.bias)


def _dequantize_on_use(base: nn.Module, quantized: frozenset[str]) -> None:
    for name, module in base.named_modules():
        if name.removesuffix(".base_layer") in quantized and isinstance(module, nn.Linear):
            module.forward = _dequantized(module)  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def _triton_as_torch(device: str, vocabulary: int) -> Iterator[None]:
    """TRL's vocabulary tiles for fake tensors.

    On a GPU, Triton works in the tile's own memory and cannot run on fake tensors: nothing stands for it. On a CPU,
    the columns of the tile beyond the vocabulary are never written, so the system never backs them with memory.
    """
    changes: list[tuple[Any, str, Any]] = []
    if device == "cuda":
        changes += [(owner, "_use_triton", lambda _: False) for owner in (chunked_logprob, trl_utils)]
        changes += [(chunked_logprob, name, lambda *_, **__: None) for name in ("_forward_tile", "_backward_tile")]
    else:
        tile = min(trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, vocabulary)
        changes.append((trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", tile))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


# -- the start ------------------------------------------------------------------------------------------------------


def simulate_start(model: nn.Module, adapter_name: str, config: Any, *, copied: bool, device: str) -> int:
    """Peak bytes of starting an additive adapter's factors, one group of equal layers at a time, some side by side.

    Args:
        model: holds the injected layers, on the meta device.
        config: an `AdditiveConfig`. copied: reading a weight makes a float32 copy of it (another dtype or device).
        device: where the decomposition runs.
    """
    from ..adapters.layer import layers_of
    from ..adapters.side_by_side import at_once
    from ..adapters.start import _batches, _groups  # the same as the real start's, whatever its budgets are

    peaks: dict[tuple[int, ...], int] = {}
    for group in _groups(layers_of(model, adapter_name).items(), adapter_name, config):
        (name, layer), batches = group[0], _batches(group)
        shape, count = (layer.out_features, layer.in_features), len(batches[0])
        key = (*shape, layer.r[adapter_name], len(group))
        if key in peaks:
            continue
        rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
        with FakeTensorMode(), _Values(), torch.no_grad():
            weights = [torch.empty(shape, device=device) for _ in range(count)]
            with LiveBytes(weights) as memory:
                factors = config.start(weights[0] if count == 1 else torch.stack(weights), rank, scaling, name)
                workspace = memory.peak
                del factors, weights
        copies = 4 * layer.out_features * layer.in_features * len(group) if copied else 0
        peaks[key] = copies + workspace * at_once(len(batches))
    return max(peaks.values(), default=0)
