"""What memory a training would need, before anything is loaded: bytes by purpose.

Nothing is downloaded, written or allocated: the model is an `outline`, and a training step runs on fake tensors
(`memory_step`). An estimate is for one device: the process's memory on a CPU, the
GPU's memory on a GPU.
"""

from __future__ import annotations

import copy
import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .outline import Task, frozen_factors, with_adapter

__all__ = ["MemoryEstimate", "estimate", "libraries_memory"]

Quantization = Literal["nf4", "int8"]

#: A CUDA context with cuBLAS' workspace, which no allocator reports; 0.4 to 0.6 GB on the GPUs of the last years.
_CUDA_CONTEXT = 500 << 20
#: Float32 copies of a row's scores while a token is drawn: the scores, those at the temperature, the probabilities.
_SCORES = 3
#: Numbers that share one scale in bitsandbytes' 4-bit storage, and scales that share one in its double quantisation.
_NF4_BLOCK, _NF4_NESTED_BLOCK = 64, 256
#: bitsandbytes keeps the state of smaller parameters in 32 bits; its 8-bit state has a float32 scale a block.
_BNB_SMALL, _BNB_BLOCK = 4096, 256
#: Moments that an optimizer keeps for each parameter, in the parameter's dtype ...
_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1, "stable_adamw": 2}
#: ... and in bitsandbytes' or apex' float32, or 8 bits.
_FLOAT_MOMENTS = {"adamw_apex_fused": 2, "paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
_BYTE_MOMENTS = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose; None where it could not be found out, with the reason among the notes.

    Attributes:
        libraries: the process before the model is loaded, or a GPU's context.
        weights: the base as stored. mapped: the checkpoint behind quantised weights, on a CPU.
        adapter: its factors, frozen ones and `modules_to_save` included.
        gradients, optimizer: of what is trained.
        activations: what one micro-batch keeps for its backward pass.
        temporaries: what else is live at the worst moment of the micro-batch.
        allocator: freed memory that a CPU's malloc cannot give back during a step.
        start: workspace of the decomposition, before training.
        generation: of grpo, keys and values of a whole batch of completions and the scores of their last tokens.
        notes: what is not known or not counted.
    """

    libraries: int
    weights: int
    mapped: int
    adapter: int
    gradients: int
    optimizer: int | None
    activations: int | None
    temporaries: int | None
    allocator: int | None
    start: int | None
    generation: int | None = 0
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The largest of a training step's sum, generation's and the start's; parts that are None count nothing."""
        step = (self.gradients, self.optimizer, self.activations, self.temporaries, self.allocator)
        resident = self.libraries + self.weights + self.mapped + self.adapter
        generating = (self.optimizer or 0) + (self.generation or 0)
        return resident + max(sum(part or 0 for part in step), generating, self.start or 0)


def estimate(
    model: nn.Module,
    adapter_config: Any,
    training_config: Any,
    *,
    task: Task,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    double_quantization: bool = False,
    gpu: bool = False,
    tokens: int | None = None,
    libraries: int | None = None,
    start: int | None = None,
) -> MemoryEstimate:
    """What training this adapter would need.

    Args:
        model: from `outline`; left as it is.
        training_config: TRL's `SFTConfig`, `DPOConfig`, `GRPOConfig`, or `TrainingArguments` for classification.
        dtype: of the weights that are not quantised. double_quantization: of NF4's scales.
        gpu: estimate the GPU's memory, else the process's.
        tokens: length of a row where it is known, of grpo with its completion; default `max_length`.
        libraries: from `libraries_memory`, where it was taken earlier; default: taken now.
        start: workspace of the start, where it is known; default: found out, for methods that need no data.
    """
    notes: list[str] = []
    if libraries is None:
        libraries = _CUDA_CONTEXT if gpu else libraries_memory(task)
    quantized = _quantized_layers(model) if quantization else frozenset()
    adapted = _typed(model, adapter_config, dtype, task, quantization)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    frozen = list(frozen_factors(adapted))
    if start is None:
        start = _start(adapted, dtype, quantization, gpu, notes)
    weights = _weights(adapted, quantized, quantization, double_quantization) - sum(map(_bytes, frozen))
    step = _step(adapted, training_config, task, tokens, quantized, gpu, notes)
    saved = None if step is None else step.saved
    if gpu:
        notes.append("A GPU's caching allocator reserves more than is live, most where lengths vary.")
    return MemoryEstimate(
        libraries=libraries,
        weights=weights,
        mapped=0 if gpu else _mapped(model, quantized, dtype),
        adapter=sum(map(_bytes, trained + frozen)),
        gradients=sum(map(_bytes, trained)),
        optimizer=_optimizer(training_config, trained, notes),
        activations=saved,
        temporaries=None if step is None else step.peak - step.saved,
        allocator=None if saved is None else 0 if gpu else _held_by_malloc(saved),
        start=start,
        generation=_generation(model, training_config, tokens, dtype, notes) if task == "grpo" else 0,
        notes=tuple(notes),
    )


def libraries_memory(task: Task = "sft") -> int:
    """Resident bytes of this process once everything that a training imports is in memory; call before any model."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    if task == "grpo":
        from trl import GRPOTrainer  # noqa: F401

    # torch and MKL load much at the first product, the first backward pass and the first optimizer step only.
    weight = nn.Parameter(torch.zeros(64, 64))
    (torch.ones(64, 64) @ weight).sum().backward()
    torch.optim.AdamW([weight]).step()
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def _held_by_malloc(saved: int) -> int:
    """Freed memory that stays with the process during a step, between its two bounds.

    glibc serves tensors below 32 MiB from its heap, and asks for a little more than their size to align them: what
    backward frees cannot hold a tensor of that same size again until its neighbours are free too. The least is
    nothing, the most is that backward reuses nothing of what forward saved; this is the middle.
    """
    return saved // 2


def _bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _typed(model: nn.Module, adapter_config: Any, dtype: torch.dtype, task: str, quantization: str | None) -> Any:
    """The adapted outline in the dtypes that training would see."""
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    adapted = with_adapter(plain, adapter_config)
    if quantization and task != "classification":  # TRL trains in bfloat16 on a quantised base; A0, B0 follow
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        for parameter in [*trained, *frozen_factors(adapted)]:
            parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def _quantized_layers(model: Any) -> frozenset[str]:
    """The linear layers that transformers gives to bitsandbytes: all but the head and tied ones."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    )


def _weights(adapted: Any, quantized: frozenset[str], quantization: str | None, double: bool) -> int:
    """Bytes of everything that is not trained."""
    packed = {
        id(module.weight)
        for name, module in adapted.get_base_model().named_modules()
        if name.removesuffix(".base_layer") in quantized and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    total = 0
    for parameter in adapted.parameters():
        if id(parameter) in packed:
            total += _packed_bytes(parameter, quantization, double)
        elif not parameter.requires_grad:
            total += _bytes(parameter)
    return total


def _mapped(model: Any, quantized: frozenset[str], dtype: torch.dtype) -> int:
    """Bytes of the quantised layers in the checkpoint, where they stay in memory beside their packed form.

    On a CPU the weights that are not quantised are views of the mapped file if they need no conversion, and keep all
    of it mapped; quantising has read the rest. The system can take these pages back when memory runs short.
    """
    if getattr(model.config, "dtype", None) != dtype:
        return 0
    return sum(model.get_submodule(name).weight.numel() for name in quantized) * dtype.itemsize


def _packed_bytes(weight: torch.Tensor, quantization: str | None, double: bool) -> int:
    if quantization == "int8":
        return weight.numel() + 4 * weight.shape[0]  # a float32 scale a row
    blocks = math.ceil(weight.numel() / _NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / _NF4_NESTED_BLOCK) if double else 4 * blocks
    return math.ceil(weight.numel() / 2) + scales


def _optimizer(training: Any, trained: list[nn.Parameter], notes: list[str]) -> int | None:
    name = str(getattr(training.optim, "value", training.optim))
    if name in _MOMENTS:
        return sum(_MOMENTS[name] * _bytes(parameter) for parameter in trained)
    if name in _FLOAT_MOMENTS:
        return sum(4 * _FLOAT_MOMENTS[name] * parameter.numel() for parameter in trained)
    if name in _BYTE_MOMENTS:
        sizes = (p.numel() * (4 if p.numel() < _BNB_SMALL else 1 + 4 / _BNB_BLOCK) for p in trained)
        return math.ceil(_BYTE_MOMENTS[name] * sum(sizes))
    if name == "adafactor":  # a row and a column of second moments for a matrix
        return sum(4 * (sum(p.shape[-2:]) if p.ndim > 1 else p.numel()) for p in trained)
    notes.append(f"The state of the optimizer {name} is not known and not counted.")
    return None


def _start(adapted: Any, dtype: torch.dtype, quantization: str | None, gpu: bool, notes: list[str]) -> int | None:
    from ..adapters.config import AdditiveConfig
    from .memory_step import simulate_start

    config = adapted.peft_config["default"]
    if not isinstance(config, AdditiveConfig):
        return 0
    try:
        copied = bool(quantization) or dtype != torch.float32
        return simulate_start(adapted, "default", config, copied=copied, device=_device(gpu))
    except Exception as error:  # a decomposition that asks for values the simulation does not have
        notes.append(f"The workspace of the start is not known: {_first_sentence(error)}")
        return None


def _generation(model: Any, training: Any, tokens: int | None, dtype: torch.dtype, notes: list[str]) -> int | None:
    """Keys and values of the completions that are generated at a time, and the scores from which a token is drawn."""
    if training.use_vllm:
        notes.append("vLLM's memory is not counted.")
        return None
    if tokens is None:
        notes.append("Generation is not known: the length of the prompts is not.")
        return None
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rows = training.per_device_train_batch_size * training.steps_per_generation
    notes.append("Of generation the cache and the scores are counted, not the pass over the prompts.")
    cache = 2 * config.num_hidden_layers * width * tokens * dtype.itemsize
    scores = config.vocab_size * (dtype.itemsize + 4 * _SCORES)
    return rows * (cache + scores)


def _step(
    adapted: Any, training: Any, task: str, tokens: int | None, quantized: frozenset[str], gpu: bool, notes: list[str]
) -> Any:
    """A `StepMemory`, or None with a note."""
    from .memory_step import simulate_step

    length = tokens or getattr(training, "max_length", None)
    if length is None:
        notes.append("Activations are not known: neither training.max_length nor the data's length is given.")
        return None
    if gpu and _device(gpu) == "cpu":
        notes.append("This torch has no CUDA: activations are those of the CPU's kernels.")
    rows = training.per_device_train_batch_size * (2 if task == "dpo" else 1)  # chosen and rejected in one batch
    config = adapted.get_base_model().config
    if task == "classification" and config.pad_token_id is None:
        config.pad_token_id = 0
    try:
        return simulate_step(
            adapted, training, task=task, rows=rows, length=length, quantized=quantized, device=_device(gpu)
        )
    except Exception as error:  # whatever an architecture does that fake tensors cannot follow
        notes.append(f"Activations are not known: {_first_sentence(error)}")
        return None


def _device(gpu: bool) -> str:
    return "cuda" if gpu and torch.cuda.is_available() else "cpu"


def _first_sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
