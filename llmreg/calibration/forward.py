"""Running somebody's model over a batch without leaving a trace: modes, random states and gradients as before."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["RandomState", "is_head", "run_batch", "undisturbed"]

#: Keys of packed batches that a model passes on to its attention through `**kwargs`.
_ATTENTION_KEYS = frozenset(
    ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids")
)


class RandomState:
    """The global random states of torch (all initialised devices), numpy and Python."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._numpy, self._python = np.random.get_state(), random.getstate()  # noqa: NPY002

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode and the random states come back whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    state = RandomState()
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        state.restore()


def run_batch(model: nn.Module, *, head_needed: bool = False) -> Callable[[Any], Any]:
    """A function that runs `model` on one batch as calibration wants it.

    A mapping is passed by name: without `labels`, so that no loss is computed; without keys that the forward does not
    know; with `use_cache=False` and, unless `head_needed`, `logits_to_keep=1` where it knows these. The latter spares
    the (tokens, vocabulary) logits and still runs the whole model, so that the hooks of accelerate and the wrappers of
    sharded training work as always, which calling the backbone would bypass. A tensor or tuple is passed by position.
    Tensors go to the device of the model, where that is known.
    """
    parameters = inspect.signature(_innermost(model).forward).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    extra: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    extra = {key: value for key, value in extra.items() if key in names and not (key[0] == "l" and head_needed)}
    device = _device(model)

    def known(key: str) -> bool:
        return key in names or (any_name and (key in _ATTENTION_KEYS or not names - {"args", "input"}))

    def run(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            chosen = {key: value for key, value in batch.items() if key != "labels" and known(key)}
            return model(**{**extra, **_moved(chosen, device)})
        inputs = batch if isinstance(batch, tuple | list) else (batch,)
        return model(*_moved(dict(enumerate(inputs)), device).values(), **extra)

    return run


def is_head(model: nn.Module, layer: nn.Module) -> bool:
    """Whether `layer` is the model's output head, or an adapter around it."""
    get = getattr(_innermost(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head is not None and any(module is head for module in layer.modules())


def _moved(values: dict[Any, Any], device: torch.device | None) -> dict[Any, Any]:
    return {k: v.to(device) if device is not None and isinstance(v, Tensor) else v for k, v in values.items()}


def _innermost(model: nn.Module) -> nn.Module:
    """The model under wrappers whose own forward says nothing: parallel ones, and adapters'."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _device(model: nn.Module) -> torch.device | None:
    """Where inputs belong. None: a device-mapped model moves them itself, or there is nothing to ask."""
    if hasattr(model, "_hf_hook"):
        return None
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), None)
