"""PEFT configs, layers and the tuner of the additive methods; importing registers them with PEFT."""

import peft as _peft  # noqa: F401, first: llmreg registers itself when PEFT has been imported

from .config import AdditiveConfig
from .layer import AdditiveLayer
from .model import AdditiveModel
from .registry import ADDITIVE, SVFIT_TINY, register
from .svd_configs import PissaConfig, SorsaConfig, SvfitConfig

for _kind in (ADDITIVE, SVFIT_TINY):
    register(_kind, AdditiveConfig, AdditiveModel)

__all__ = ["ADDITIVE", "AdditiveConfig", "AdditiveLayer", "AdditiveModel", "PissaConfig", "SorsaConfig", "SvfitConfig"]
