"""The only door to a base weight, however it is stored."""

from llmreg.weights.finite import check_finite
from llmreg.weights.quantized import dequantize, requantize
from llmreg.weights.read import read_weight
from llmreg.weights.source import SafetensorsSource
from llmreg.weights.storage import Storage, is_supported, storage_of

__all__ = [
    "SafetensorsSource",
    "Storage",
    "check_finite",
    "dequantize",
    "is_supported",
    "read_weight",
    "requantize",
    "storage_of",
]
