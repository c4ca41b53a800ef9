"""Models whose base is a quantised residual, for the tests: made of a checkpoint on disk, as users make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_files as saved
import made_up
import peft
import torch
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from llmreg import CordaConfig, PissaConfig, SorsaConfig
from llmreg.adapters.data_start import start_from_statistics, waiting_layers
from llmreg.weights import module_bytes_hash

TARGETS = ["q_proj", "v_proj", "down_proj"]
#: Every way in which bitsandbytes keeps a base, by name.
QUANTIZATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
METHODS = {"pissa": PissaConfig, "sorsa": SorsaConfig, "corda": CordaConfig}


def load(folder: Path, quantization: str = "nf4 double", *, encoder: bool = False, dtype: Any = torch.float32) -> Any:
    """The model of a checkpoint, quantised by transformers as it loads."""
    settings = dict(QUANTIZATIONS[quantization])
    if "load_in_4bit" in settings:
        settings["bnb_4bit_compute_dtype"] = torch.float32
    auto = AutoModel if encoder else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings)).eval()


def config(method: str = "pissa", **settings: Any) -> Any:
    """A config with `residual="quantized"`; of SORSA the start alone, which any loop may train."""
    given = {"r": 6, "target_modules": TARGETS, "residual": "quantized", "task_type": "CAUSAL_LM", **settings}
    if method == "sorsa":
        given.setdefault("weights", None)
    return METHODS[method](**given)


def wrap(model: Any, method: str = "pissa", **settings: Any) -> Any:
    """`model` with such an adapter; CorDA is given made-up statistics."""
    wrapped = peft.get_peft_model(model, config(method, **settings))
    start(wrapped)
    return wrapped


def start(wrapped: Any) -> None:
    """Give an adapter that waits for data some."""
    tuner = wrapped.base_model
    layers = waiting_layers(tuner.model, "default")
    if layers:
        widths = {name: layer.in_features for name, layer in layers.items()}
        need = tuner.peft_config["default"].need()
        start_from_statistics(tuner, "default", [made_up.statistics_for(widths, need)])


def bases(wrapped: Any) -> dict[str, str]:
    """The hash of each adapted layer's base weight."""
    return {name: module_bytes_hash(layer.get_base_layer()) for name, layer in saved.additive_layers(wrapped).items()}
