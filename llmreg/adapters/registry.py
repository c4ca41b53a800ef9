"""llmreg's place in PEFT's registry: its `PeftType` members, their config class and tuner.

PEFT has no public way to add a peft type from outside; the enum members are made here and nowhere else.
They pickle by a function of this module, so that a worker process that unpickles a model imports llmreg first.
"""

from __future__ import annotations

from typing import Any

import peft
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from ..errors import LlmregError

__all__ = ["ADDITIVE", "BONE", "QUANTIZED_RESIDUAL", "SVFIT_TINY", "check_peft_version", "peft_type", "register"]

_SUPPORTED = (Version("0.21"), Version("0.22"))


def check_peft_version(version: str = peft.__version__) -> None:
    """Raise `LlmregError` with what to install when PEFT is outside the range whose private hooks are known."""
    low, high = _SUPPORTED
    if not low <= Version(Version(version).base_version) < high:
        raise LlmregError(
            f"llmreg works with peft >= {low}, < {high}, but peft {version} is installed; "
            f'run: pip install "peft>={low},<{high}"'
        )


def peft_type(name: str) -> PeftType:
    """The `PeftType` member called `name`, added to PEFT's enum if it is not there yet (idempotent)."""
    if name in PeftType._value2member_map_:
        return PeftType(name)
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    # Looked up on the instance by pickle and copy; unpickling imports this module and so registers the member.
    member.__reduce_ex__ = lambda protocol: (peft_type, (name,))
    member.__deepcopy__ = lambda memo: member
    type.__setattr__(PeftType, name, member)  # Python >= 3.12 finds members as class attributes
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python >= 3.13 answers `"NAME" in PeftType` from this list
        PeftType._hashable_values_.append(name)
    return member


check_peft_version()
BONE = peft_type("BONE")  # PEFT had it up to 0.18, and dropped it with everything that was saved under it
#: What SVFit's tiny form is saved as, so that plain PEFT refuses it; a live adapter is `ADDITIVE`.
SVFIT_TINY = peft_type("LLMREG_SVFIT_TINY")
#: What an adapter beside a quantised residual is saved as: plain PEFT would add it to the wrong base.
QUANTIZED_RESIDUAL = peft_type("LLMREG_QUANTIZED_RESIDUAL")
ADDITIVE = peft_type("LLMREG_ADDITIVE")


def register(kind: PeftType, config_cls: type, tuner_cls: type, prefix: str) -> None:
    """Tell PEFT which config and tuner belong to `kind`; those of a newer import of llmreg replace the older."""
    if kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[kind], PEFT_TYPE_TO_TUNER_MAPPING[kind] = config_cls, tuner_cls
    else:
        register_peft_method(name=kind.value.lower(), config_cls=config_cls, model_cls=tuner_cls, prefix=prefix)
