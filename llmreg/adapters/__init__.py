"""PEFT configs, layers and tuners of the additive methods and of Bone; importing registers them with PEFT."""

import peft as _peft  # noqa: F401, first: llmreg registers itself when PEFT has been imported

from .balora_config import BaLoraConfig
from .bone_config import BoneConfig
from .bone_layer import BoneLinear
from .bone_model import BoneModel
from .config import AdditiveConfig
from .data_configs import CordaConfig, EvaConfig
from .eora_config import EoraConfig
from .layer import AdditiveLayer
from .model import AdditiveModel
from .peft_namesakes import explain_namesakes
from .registry import ADDITIVE, BONE, QUANTIZED_RESIDUAL, SVFIT_TINY, register
from .residual import LayerError, residual_errors, residual_table
from .svd_configs import PissaConfig, SorsaConfig, SvfitConfig

for _kind in (ADDITIVE, SVFIT_TINY, QUANTIZED_RESIDUAL):
    register(_kind, AdditiveConfig, AdditiveModel, "lora_")
register(BONE, BoneConfig, BoneModel, "bone_")
explain_namesakes()

__all__ = [
    "ADDITIVE",
    "BONE",
    "AdditiveConfig",
    "AdditiveLayer",
    "AdditiveModel",
    "BaLoraConfig",
    "BoneConfig",
    "BoneLinear",
    "BoneModel",
    "CordaConfig",
    "EoraConfig",
    "EvaConfig",
    "LayerError",
    "PissaConfig",
    "SorsaConfig",
    "SvfitConfig",
    "residual_errors",
    "residual_table",
]
