"""llmreg: SVD-initialised and regularised fine-tuning for PEFT and TRL.

Importing registers the methods with PEFT; nothing else happens, and nothing else is needed:

    import llmreg, peft
    model = peft.get_peft_model(base, llmreg.PissaConfig(r=16, target_modules="all-linear"))
"""

from typing import TYPE_CHECKING, Any

from ._after_peft import after_peft as _after_peft

if TYPE_CHECKING:
    from .adapters import AdditiveConfig, PissaConfig

__version__ = "0.1.0"
__all__ = ["AdditiveConfig", "PissaConfig", "__version__", "export_lora", "linalg"]


def _register() -> None:
    from .hub.peft_io import install

    install()


_after_peft(_register)


def __getattr__(name: str) -> Any:
    """What costs time to import is imported when it is asked for."""
    if name in ("AdditiveConfig", "PissaConfig"):
        from . import adapters

        return getattr(adapters, name)
    if name == "export_lora":
        from .hub.export import export_lora

        return export_lora
    if name == "linalg":
        from . import linalg

        return linalg
    raise AttributeError(f"module 'llmreg' has no attribute {name!r}")
