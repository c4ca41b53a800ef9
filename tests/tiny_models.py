"""Tiny random models for the tests, and what the tests ask of them. Every builder is deterministic in `seed`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

VOCABULARY = 96
STORAGES = ("float32", "bfloat16", "float16", "nf4", "int8")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def llama(storage: str = "float32", *, layers: int = 2, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """Hidden 64, MLP 96, grouped-query attention; `storage` as in `STORAGES`, or "float64"."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        pad_token_id=0,
    )
    return stored(LlamaForCausalLM(config), storage, skip=("lm_head",)).eval()


def gpt2(storage: str = "float32", *, seed: int = 0) -> GPT2LMHeadModel:
    """Two layers of transformers' Conv1D (weights kept transposed), tied embeddings, no dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=48,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=32,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.1,
    )
    return GPT2LMHeadModel(config).to(FLOATS[storage]).eval()


def bert_classifier(storage: str = "float32", *, labels: int = 3, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return stored(BertForSequenceClassification(config), storage, skip=("classifier",)).eval()


class MLP(nn.Module):
    """Two linear layers and a head around a tanh: the smallest thing PEFT can wrap. Input `(..., 20)`."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.first = layer(20, 32)
        self.second = layer(32, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mlp(storage: str = "float32", *, seed: int = 0) -> MLP:
    """`MLP` of nn.Linear."""
    torch.manual_seed(seed)
    return stored(MLP(nn.Linear), storage, skip=("head",)).eval()


def conv1d_mlp(storage: str = "float32", *, seed: int = 0) -> MLP:
    """`MLP` of transformers' Conv1D, with weights large enough to matter (Conv1D draws them tiny)."""
    torch.manual_seed(seed)
    model = MLP(lambda inputs, outputs: Conv1D(outputs, inputs))
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight.normal_(std=0.2)
    return model.to(FLOATS[storage]).eval()


def inputs(rows: int = 6, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """`(rows, 20)` standard normal input of an `MLP`."""
    return torch.randn(rows, 20, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(model: nn.Module, storage: str, *, skip: Iterable[str] = ()) -> Any:
    """`model` in another storage: a float dtype, or its linears (but `skip`) quantised by bitsandbytes in place."""
    if storage in FLOATS:
        return model.to(FLOATS[storage])
    skip = set(skip)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.split(".")[-1] not in skip:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized_linear(module, storage))
    setattr(model, "is_loaded_in_4bit" if storage == "nf4" else "is_loaded_in_8bit", True)
    return model


def quantized_linear(layer: nn.Linear, storage: str) -> nn.Module:
    """A bitsandbytes layer ("nf4" with double quantisation, or "int8") of the same weight and bias."""
    import bitsandbytes as bnb

    bias = layer.bias is not None
    if storage == "nf4":
        new: Any = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=bias,
            compute_dtype=torch.float32,
            compress_statistics=True,
            quant_type="nf4",
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        )
    else:
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    if bias:
        new.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return new.to("cpu")


def logits(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    """The model's logits, without gradients, in evaluation mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(tokens, **kwargs)
    model.train(was_training)
    return out.logits if hasattr(out, "logits") else out


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every entry of a bare model's state dict as bytes (for quantised layers: codes, scales, tables)."""
    return {key: _bytes(value) for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def structure(model: nn.Module) -> dict[str, tuple]:
    """What a failed call must not change: modules' classes, parameters' identity, dtype and requires_grad."""
    modules = {f"module {name}": (type(module),) for name, module in model.named_modules()}
    parameters = {
        f"parameter {name}": (id(parameter), parameter.dtype, parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    return modules | parameters


def perturb(model: nn.Module, adapter: str = "default", *, size: float = 0.05, seed: int = 3) -> nn.Module:
    """Move what trains of `adapter` (a plain LoRA or ours) away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if adapter not in getattr(module, "lora_A", ()):
                continue
            form = module.form(adapter) if hasattr(module, "form") else None
            for container in form.trained if form else ("lora_A", "lora_B"):
                weight = getattr(module, container)[adapter].weight
                weight.add_((size * torch.randn(weight.shape, generator=generator)).to(weight.dtype))
    return model


def train(model: nn.Module, batch: Tensor, *, steps: int = 3, lr: float = 0.05) -> list[float]:
    """Plain SGD on a fixed target (language models: next token; else squared error); the losses."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        if batch.is_floating_point():
            out = model(batch)
            loss = F.mse_loss(out.double(), torch.ones_like(out, dtype=torch.float64))
        else:
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def twin(model: nn.Module) -> Any:
    """An independent copy, to compare with."""
    return copy.deepcopy(model)
