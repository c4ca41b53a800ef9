"""Config of Bone, which later became MiSS (Matrix Shard Sharing; arXiv 2409.15371): one method, three forms.

    bone   W'[o, j] = W[o, j] + D[j mod r, o]             D (r, out): rows of D are shared by all groups of r inputs
    mini   W'[o, j] = W[o, j] + D[j mod r, o mod m]       D (r, m): shared along the outputs too, m = mini_r
    bat    W'_ab = W_ab + W_ab B_a + B_a                  B (out/r, r, r); W_ab are the r x r blocks of W

All start at zero, where they are the base exactly. `bone` is LoRA with a frozen A = [I I ... I] and B = D^T; `bat`
(the first form, "block-affine") multiplies the weight itself, so its update has full rank.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar, Literal

from peft import PeftConfig

from ..errors import UnsupportedError
from .registry import BONE

__all__ = ["VARIANTS", "BoneConfig"]

Variant = Literal["bone", "bat", "mini"]
VARIANTS = ("bone", "bat", "mini")


@dataclass
class BoneConfig(PeftConfig):
    """Bone over an untouched base: `peft.get_peft_model(base, BoneConfig(r=64, target_modules="all-linear"))`.

    Args:
        r: rows of D, or the size of bat's blocks, which must divide both sides of every targeted weight.
        variant: "bone" (row sharing), "bat" (block-affine) or "mini"; see the module's docstring.
        mini_r: columns of D in `mini`; must divide the outputs of every targeted layer.
        bone_dropout: of the adapter's input, in every variant.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in PEFT.
        bias: "none"; the base's biases belong to the base.
        exact_unmerge: keep a copy of each merged layer's weight, so that unmerging is bit-exact (costs the memory of
            the merged layers); otherwise unmerging is within rounding, as in PEFT.
        init_weights: what configs of PEFT <= 0.18 say: True or False for `bone`, "bat" for `bat`. Not kept.

    Example:
        >>> BoneConfig(variant="bat", r=16, target_modules=["q_proj"]).method
        'bone'
    """

    r: int = field(default=64, metadata={"help": "rows of D, or the size of bat's blocks"})
    variant: Variant = field(default="bone", metadata={"help": "bone (row sharing), bat (block-affine) or mini"})
    mini_r: int = field(default=1, metadata={"help": "columns of D in the variant mini"})
    bone_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "layers that carry the adapter"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers that do not"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of the layers"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules that are trained whole"})
    bias: Literal["none"] = field(default="none", metadata={"help": "none: the base's biases belong to the base"})
    exact_unmerge: bool = field(default=False, metadata={"help": "keep merged layers' weights to unmerge bit-exactly"})
    init_weights: InitVar[bool | str | None] = None  # no field: to_dict and the stored config do not have it

    METHOD: ClassVar[str] = "bone"

    @property
    def method(self) -> str:
        """Name in `llmreg methods`."""
        return self.METHOD

    def __post_init__(self, init_weights: bool | str | None) -> None:
        super().__post_init__()
        self.peft_type = BONE
        if init_weights in VARIANTS:
            self.variant = init_weights  # type: ignore[assignment]
        elif init_weights not in (True, False, None):
            raise UnsupportedError(f"init_weights={init_weights!r} is no form of Bone; write variant: {_or(VARIANTS)}.")
        self._check_numbers()
        if self.bias != "none":
            raise UnsupportedError(
                f"BoneConfig does not support bias={self.bias!r}: training the base's biases changes the base model; "
                "leave bias='none', or list the module in modules_to_save to train a copy of it."
            )
        for name in ("target_modules", "exclude_modules"):
            value: Any = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise UnsupportedError(
                        f"{name} cannot be used where target_modules is a string; write the layers into a regular "
                        "expression, or give target_modules as a list of names."
                    )

    def _check_numbers(self) -> None:
        if self.variant not in VARIANTS:
            raise UnsupportedError(f"variant must be {_or(VARIANTS)}, got {self.variant!r}.")
        for name in ("r", "mini_r"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UnsupportedError(f"{name} must be a positive integer, got {value!r}.")
        if self.mini_r != 1 and self.variant != "mini":
            raise UnsupportedError(
                f"mini_r={self.mini_r} belongs to variant='mini', and this is {self.variant!r}; leave one of them out."
            )
        rate: Any = self.bone_dropout
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate < 1:
            raise UnsupportedError(f"bone_dropout must be a number from 0 to below 1, got {rate!r}.")


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
