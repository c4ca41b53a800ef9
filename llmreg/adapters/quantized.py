"""Additive layers over bitsandbytes' quantised linears; imported only where bitsandbytes already is."""

from __future__ import annotations

import bitsandbytes as bnb
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from .layer import AdditiveLayer

__all__ = ["QUANTIZED_LAYERS", "AdditiveLinear4bit", "AdditiveLinear8bit"]


class AdditiveLinear4bit(AdditiveLayer, Linear4bit):
    """Over `bitsandbytes.nn.Linear4bit` (NF4, FP4)."""


class AdditiveLinear8bit(AdditiveLayer, Linear8bitLt):
    """Over `bitsandbytes.nn.Linear8bitLt`."""


#: bitsandbytes layer -> the layer that wraps it.
QUANTIZED_LAYERS: dict[type, type[AdditiveLayer]] = {
    bnb.nn.Linear4bit: AdditiveLinear4bit,
    bnb.nn.Linear8bitLt: AdditiveLinear8bit,
}
