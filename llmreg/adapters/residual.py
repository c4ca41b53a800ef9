"""What is kept of a quantised residual (QPiSSA) on the layers that hold one, and what it rules out.

Such a layer's base weight is `R = q(W - s B0 A0)`: alone it is neither the base nor a reference for DPO or GRPO, and
merged into it the adapter would be quantised once more, which loses what fitting the two to each other gained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "LayerError",
    "WayBack",
    "check_together",
    "has_residual",
    "refuse_residual_alone",
    "refuse_residual_merge",
    "residual_errors",
    "residual_table",
]


@dataclass(frozen=True)
class LayerError:
    """How well a layer's quantised residual and the adapter's start make up its weight; Frobenius norms.

    Attributes:
        qlora: `||W - q(W)||`, of the quantised weight alone. kept: `||W - (R + s B0 A0)||`, of what is trained on.
        weight: `||W||`. iteration: which iterate was kept; 0 is the quantised weight itself, beside which the adapter
            starts at nothing.
    """

    qlora: float
    kept: float
    weight: float
    iteration: int

    @property
    def reduction(self) -> float:
        """Share of QLoRA's error that is gone."""
        return 1 - self.kept / self.qlora if self.qlora > 0 else 0.0


@dataclass(frozen=True)
class WayBack:
    """How a base layer gets its own weight back.

    Attributes:
        source: the full-precision checkpoint. dtype: what its weight is rounded to before it is quantised.
        digest: of the quantised weight; None where its bytes could not be read.
        kept: the weight (and int8 state) itself, where quantising the checkpoint's does not give these bytes.
        packs: whether bitsandbytes may rearrange the layer for a CPU; None for layers that it never does this to.
    """

    source: Path
    dtype: torch.dtype
    digest: str | None
    kept: tuple[Any, Any] | None
    packs: bool | None


def residual_errors(model: nn.Module, adapter_name: str = "default") -> dict[str, LayerError]:
    """By layer, how well residual and adapter make up the full-precision weight at the start; empty without residual.

    Example:
        >>> residual_errors(nn.Linear(2, 2))
        {}
    """
    found = {}
    for name, module in model.named_modules():
        errors = getattr(module, "residual_error", {})
        if adapter_name in errors:
            found[name.removeprefix("base_model.model.")] = errors[adapter_name]
    return found


def residual_table(model: nn.Module, adapter_name: str = "default") -> Table:
    """`residual_errors` as a table to print with rich, relative to the weight's norm, with the whole model last."""
    from rich.table import Table

    table = Table("layer", "QLoRA", "kept", "reduction", "iteration", title="||W - base|| / ||W||")
    errors = residual_errors(model, adapter_name)
    for name, one in errors.items():
        table.add_row(name, *_cells(one), str(one.iteration))
    if errors:
        table.add_row("all", *_cells(_together(errors)), "")
    return table


def _cells(one: LayerError) -> tuple[str, str, str]:
    weight = one.weight or 1.0
    return f"{one.qlora / weight:.2%}", f"{one.kept / weight:.2%}", f"{one.reduction:.1%}"


def _together(errors: dict[str, LayerError]) -> LayerError:
    def norm(name: str) -> float:
        return sum(getattr(one, name) ** 2 for one in errors.values()) ** 0.5

    return LayerError(norm("qlora"), norm("kept"), norm("weight"), -1)


# -- what it rules out --------------------------------------------------------------------------------------------


def has_residual(model: nn.Module) -> bool:
    """Whether some layer's base weight is a quantised residual, so that the model needs its adapter."""
    return any(getattr(module, "residual_error", None) for module in model.modules())


def refuse_residual_alone() -> UnsupportedError:
    return UnsupportedError(
        "This adapter's base holds a quantised residual (residual='quantized'), and the residual alone is neither the "
        "base nor a reference: it lacks the principal components, which the adapter carries, so the adapter cannot be "
        "disabled. For DPO or GRPO give the trainer a prebuilt model (model=peft.get_peft_model(base, config), no "
        "peft_config=), whose reference is a copy of the adapter at its start; or use residual='difference'."
    )


def refuse_residual_merge() -> UnsupportedError:
    return UnsupportedError(
        "An adapter beside a quantised residual (residual='quantized') cannot be merged: quantising the sum again "
        "loses what fitting the two to each other gained. Save it, make a plain LoRA for the original base of it with "
        "llmreg export ADAPTER DIR --approximate, and merge that."
    )


#: What may differ between two adapters that share one residual.
_FREE = frozenset("inference_mode base_model_name_or_path revision task_type auto_mapping peft_version".split())


def check_together(configs: dict[str, Any]) -> None:
    """Refuse adapters that cannot share a base: beside a quantised residual only copies of its adapter are right.

    Raises:
        UnsupportedError: naming both.
    """
    owner = next((name for name, config in configs.items() if _quantizes(config)), None)
    if owner is None:
        return
    for name, config in configs.items():
        if not (_quantizes(config) and _settings(config) == _settings(configs[owner])):
            raise UnsupportedError(
                f"The adapters {owner!r} and {name!r} cannot share a model: with residual='quantized' {owner!r} "
                "changes the base weights, and only a copy of it with the same config (the reference of DPO and GRPO) "
                "belongs there; give each its own copy of the model, or use residual='difference'."
            )


def _quantizes(config: Any) -> bool:
    return bool(getattr(config, "quantizes_residual", lambda: False)())


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _FREE}
