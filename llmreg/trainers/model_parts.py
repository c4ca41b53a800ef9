"""The parts of a wrapped language model that terms on its output are about: backbone, head, and the base alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..errors import UnsupportedError
from ..regularizers.base import Head
from ..weights.storage import is_dtensor, is_linear8bit

__all__ = [
    "active_configs",
    "backbone_of",
    "check_next_tokens",
    "check_teacher",
    "evaluating",
    "graph_reaches",
    "has_head",
    "head_of",
    "without_adapters",
]


def _base(model: Any) -> Any:
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def active_configs(model: Any) -> dict[str, Any]:
    """The configs of the adapters that are switched on, by name; TRL keeps a frozen copy beside them as reference."""
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapters", ())
    names = active() if callable(active) else active  # a method where transformers put the adapter in itself
    return {name: configs[name] for name in names if name in configs}


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The module whose last hidden state goes into the head; None where there is no such thing."""
    base = _base(model)
    backbone = getattr(base, "base_model", None)
    return backbone if isinstance(backbone, nn.Module) and backbone is not base else None


def has_head(model: nn.Module) -> bool:
    """Whether it is a language model, not a classifier."""
    get = getattr(_base(model), "get_output_embeddings", None)
    return callable(get) and get() is not None


def head_of(model: nn.Module, temperature: float = 1.0) -> Head:
    """The head as TRL's trainers apply it: with the model's own logit scale and soft cap.

    Raises:
        UnsupportedError: there is none, or an adapter is on it.
    """
    base = _base(model)
    layer = getattr(base, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise UnsupportedError(f"{type(base).__name__} has no language-model head, which the regularisers need.")
    if hasattr(layer, "base_layer"):
        raise UnsupportedError(
            "An adapter is on the language-model head, which TRL's trainers do not train; leave it out of "
            "target_modules (all-linear leaves it out)."
        )
    config = base.config.get_text_config()
    return Head(
        layer.weight,
        getattr(layer, "bias", None),
        temperature=temperature,
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=_logit_scale(config),
    )


def _logit_scale(config: Any) -> float:
    """Families name the factor on their logits differently, and some divide by it; the names that TRL looks for."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:
        factor = float(config.logits_scaling)
        return factor if config.model_type == "hyperclovax" else 1 / factor
    return 1.0


def check_next_tokens(model: nn.Module, names: str) -> None:
    """Refuse terms on next tokens where a label is not about the token after its position.

    Raises:
        UnsupportedError: a classifier, a masked language model, or an encoder with a decoder.
    """
    base = _base(model)
    if not has_head(model):
        raise UnsupportedError(
            f"{type(base).__name__} has no language-model head, and the regularisers {names} are about next tokens; "
            "for a classifier's write task='nlu', or task_type='SEQ_CLS' in the adapter's config."
        )
    loss = LOSS_MAPPING.get(getattr(base, "loss_type", None), ForCausalLMLoss)
    if loss is not ForCausalLMLoss or getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(base).__name__} does not predict the token after each position, which the regularisers {names} are "
            "about; use a causal language model."
        )


def check_teacher(model: Any) -> None:
    """Refuse a teacher that would not be the base as it was: what is left when adapters are switched off.

    Raises:
        UnsupportedError: there is no adapter, its start changed the base, it is a prompt (which stays in the inputs),
            or parameters of the base are trained beside it.
    """
    if not hasattr(model, "disable_adapter"):
        raise UnsupportedError(
            "The teacher is the base without its adapter, and this model has no adapter: all of it is trained; wrap it "
            "with one (peft.get_peft_model), or leave the consistency regulariser out."
        )
    for name, config in active_configs(model).items():
        why = _why_no_base(config)
        if why:
            raise UnsupportedError(
                f"The consistency regulariser's teacher is the base without adapter {name!r}, and {why}; or leave the "
                "regulariser out."
            )
    kept = (getattr(model.base_model, "prefix", "") or "lora_", "modules_to_save", "trainable_tokens_")
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not any(k in name for k in kept)]
    if trained:
        raise UnsupportedError(
            f"The consistency regulariser's teacher is the base, and {len(trained)} parameters of the base are trained "
            f"({trained[0]}); freeze them (requires_grad_(False), bias='none'), or leave the regulariser out."
        )


def _why_no_base(config: Any) -> str:
    start = getattr(config, "init_lora_weights", True)
    if getattr(config, "is_prompt_learning", False):
        return "its prompt stays in the inputs; use an adapter on layers"
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return f"init_lora_weights={start!r} has changed the base; use one of llmreg's configs, such as PissaConfig"
    if getattr(config, "residual", None) == "quantized":
        return "residual='quantized' has changed the base; write residual='difference'"
    return ""


def graph_reaches(value: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the graph of `value` leads to one of these that is trained, or to a reentrant checkpoint before it.

    Sharded by FSDP2 they are not in the graph themselves: a forward pass runs on whole copies, Parameters too.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    wanted, copied = {id(parameter) for parameter in trained}, any(map(is_dtensor, trained))
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if id(variable) in wanted or (copied and isinstance(variable, nn.Parameter)):
            return True
        if node.name() == "CheckpointFunctionBackward":
            return True
        nodes += [following for following, _ in node.next_functions]
    return id(value) in wanted


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The base alone; flags that PEFT sets when it switches adapters on again come back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own mode afterwards.

    int8 layers keep theirs: on a CPU bitsandbytes quantises activations too where one evaluates, and a teacher of other
    kernels than its student's is another model.
    """
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        for part in training:
            if is_linear8bit(part):
                part.training = True
        yield
    finally:
        for part in training:
            part.training = True
