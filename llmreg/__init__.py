"""llmreg: SVD-initialised and regularised fine-tuning for PEFT and TRL.

Importing registers the methods with PEFT; nothing else happens, and nothing else is needed:

    import llmreg, peft
    model = peft.get_peft_model(base, llmreg.PissaConfig(r=16, target_modules="all-linear"))
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._after_peft import after_peft as _after_peft

if TYPE_CHECKING:
    from .adapters import (
        AdditiveConfig,
        BaLoraConfig,
        BoneConfig,
        CordaConfig,
        EoraConfig,
        EvaConfig,
        PissaConfig,
        SorsaConfig,
        SvfitConfig,
    )
    from .hub.export import export_lora
    from .hub.merge import merge
    from .hub.push import push
    from .trainers import RegularizerCallback, initialize

__version__ = "0.1.0"
__all__ = [
    "AdditiveConfig",
    "BaLoraConfig",
    "BoneConfig",
    "CordaConfig",
    "EoraConfig",
    "EvaConfig",
    "PissaConfig",
    "RegularizerCallback",
    "SorsaConfig",
    "SvfitConfig",
    "__version__",
    "export_lora",
    "initialize",
    "linalg",
    "merge",
    "push",
]

#: Where each name lives; imported when it is asked for.
_LATER = {
    "AdditiveConfig": "adapters",
    "BaLoraConfig": "adapters",
    "BoneConfig": "adapters",
    "CordaConfig": "adapters",
    "EoraConfig": "adapters",
    "EvaConfig": "adapters",
    "PissaConfig": "adapters",
    "RegularizerCallback": "trainers",
    "SorsaConfig": "adapters",
    "SvfitConfig": "adapters",
    "export_lora": "hub.export",
    "initialize": "trainers",
    "merge": "hub.merge",
    "push": "hub.push",
}


def _register() -> None:
    from .hub.peft_io import install

    install()


_after_peft(_register)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    if name == "linalg":
        return importlib.import_module(f"{__name__}.linalg")
    raise AttributeError(f"module 'llmreg' has no attribute {name!r}")
