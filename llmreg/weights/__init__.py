"""The only door to a base weight, however it is stored."""

from llmreg.weights.finite import check_finite
from llmreg.weights.hashing import bytes_hash, module_bytes_hash
from llmreg.weights.identity import Identity, identity_hash
from llmreg.weights.original import OriginalWeights, original_checkpoint
from llmreg.weights.quantized import dequantize, requantize, stored_tensors
from llmreg.weights.read import read_weight
from llmreg.weights.sharded import gathered, gathering_forwards, is_sharded
from llmreg.weights.source import SafetensorsSource
from llmreg.weights.storage import Storage, is_supported, storage_of

__all__ = [
    "Identity",
    "OriginalWeights",
    "SafetensorsSource",
    "Storage",
    "bytes_hash",
    "check_finite",
    "dequantize",
    "gathered",
    "gathering_forwards",
    "identity_hash",
    "is_sharded",
    "is_supported",
    "module_bytes_hash",
    "original_checkpoint",
    "read_weight",
    "requantize",
    "storage_of",
    "stored_tensors",
]
