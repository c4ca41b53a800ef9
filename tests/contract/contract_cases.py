"""The adapters under contract, the models and storages they are held to it on, and how to handle any of them.

A new method is one `Case` in `CASES`: its config class by name, and what is particular to it. A case whose class
`llmreg` does not export yet is left out. Nothing here knows the name of a factor: adapters are found as PEFT finds
them (`BaseTunerLayer`), and moved by noise on whatever they train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import peft
import pytest
import tiny_models
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

import llmreg

#: Everything a case may refuse; a refusal must be an error, and the tests then ask for the error.
FEATURES = frozenset({"conv1d", "float16", "nf4", "int8", "mixed batch", "several active", "plain peft", "export"})
LOUD = (ValueError, TypeError, NotImplementedError)


@dataclass(frozen=True)
class Case:
    """One adapter under contract.

    Attributes:
        name: in the tests' ids.
        config_class: its name in `llmreg`.
        settings: always given to it. `r` and `other_r` (a second adapter's) must divide every layer of the models
            below if the method asks for that: both divide 20, 24, 32, 48, 64, 96 and 384.
        family: adapters of one family share a model; others may refuse to. Plain LoRA is in "lora".
        noise: of what moves the trained parameters, large enough to change the logits by more than 1e-3.
        lr: of plain SGD; a few steps must lower the loss.
        refuses: of `FEATURES`.
        always_float32: what trains is float32 whatever the base is.
    """

    name: str
    config_class: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    r: int = 4
    other_r: int = 2
    family: str = "lora"
    noise: float = 0.05
    lr: float = 0.05
    refuses: frozenset[str] = frozenset()
    always_float32: bool = False

    def __post_init__(self) -> None:
        assert self.refuses <= FEATURES, self.refuses

    def __str__(self) -> str:
        return self.name

    def config(self, **settings: Any) -> Any:
        """A config; `settings` come on top of `r` and the case's own."""
        return getattr(llmreg, self.config_class)(**{"r": self.r, **self.settings, **settings})

    @contextmanager
    def promised(self, feature: str) -> Iterator[None]:
        """What is done in this context must work, or raise if the case refuses `feature`."""
        if feature not in self.refuses:
            yield
            return
        with pytest.raises(LOUD):
            yield


ALL_CASES = (
    Case("pissa", "PissaConfig"),
    Case("sorsa", "SorsaConfig", settings={"weights": None}),
    Case("balora", "BaLoraConfig", settings={"weights": None}),
    Case("svfit", "SvfitConfig", noise=0.5, lr=0.5, always_float32=True),
    Case("corda", "CordaConfig"),
    Case("eva", "EvaConfig"),
    Case("bone", "BoneConfig", settings={"variant": "bone"}, family="bone"),
    Case("bat", "BoneConfig", settings={"variant": "bat"}, family="bone", refuses=frozenset({"export"})),
    Case("mini", "BoneConfig", settings={"variant": "mini", "mini_r": 4}, family="bone"),
)
CASES = tuple(case for case in ALL_CASES if hasattr(llmreg, case.config_class))


@dataclass(frozen=True)
class Model:
    """A kind of model: how it is built, what is targeted, and `head`, a module to train whole beside the adapter."""

    name: str
    build: Callable[[str], Any]
    targets: tuple[str, ...]
    head: str
    storages: tuple[str, ...]
    task_type: str | None = None
    layer: str = "linear"
    vocabulary: int = 0

    def batch(self, storage: str = "float32", rows: int = 4) -> Tensor:
        """`(rows, 20)` floats for an MLP, `(rows, 7)` token ids for a language model."""
        if not self.vocabulary:
            return tiny_models.inputs(rows, dtype=tiny_models.FLOATS.get(storage, torch.float32))
        return torch.randint(1, self.vocabulary, (rows, 7), generator=torch.Generator().manual_seed(5))


def _bert(storage: str) -> nn.Module:
    """A classifier whose logits depend on its layers: as initialised, the embeddings' norm drowns them."""
    model = tiny_models.bert_classifier()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(4)
    return tiny_models.stored(model, storage, skip=("classifier",)).eval()


_ALL = ("float32", "bfloat16", "nf4", "int8")
_TOKENS = tiny_models.VOCABULARY
MODELS = {
    model.name: model
    for model in (
        Model("mlp", tiny_models.mlp, ("first", "second"), "head", (*_ALL, "float16")),
        Model("conv1d", tiny_models.conv1d_mlp, ("first", "second"), "head", ("float32", "bfloat16"), layer="conv1d"),
        Model(
            "llama",
            tiny_models.llama,
            ("q_proj", "v_proj", "down_proj"),
            "lm_head",
            _ALL,
            task_type="CAUSAL_LM",
            vocabulary=_TOKENS,
        ),
        Model(
            "gpt2",
            tiny_models.gpt2,
            ("c_attn", "c_fc"),
            "ln_f",
            ("float32", "bfloat16"),
            task_type="CAUSAL_LM",
            layer="conv1d",
            vocabulary=_TOKENS,
        ),
        Model(
            "bert",
            _bert,
            ("query", "value", "intermediate.dense"),
            "classifier",
            _ALL,
            task_type="SEQ_CLS",
            vocabulary=_TOKENS,
        ),
    )
}


@dataclass(frozen=True)
class Cell:
    """One adapter on one model in one storage: what a test of the contract is given."""

    case: Case
    model: Model
    storage: str

    def __str__(self) -> str:
        return f"{self.case}-{self.model.name}-{self.storage}"

    def base(self) -> Any:
        return self.model.build(self.storage)

    def batch(self, rows: int = 4) -> Tensor:
        return self.model.batch(self.storage, rows)

    def config(self, **settings: Any) -> Any:
        return self.case.config(
            **{"target_modules": list(self.model.targets), "task_type": self.model.task_type, **settings}
        )

    def wrap(self, base: Any = None, **settings: Any) -> Any:
        return peft.get_peft_model(self.base() if base is None else base, self.config(**settings))

    def moved(self, base: Any = None, **settings: Any) -> Any:
        """A wrapped model whose adapter is away from its start."""
        return self.move(self.wrap(base, **settings))

    def move(self, model: Any, adapter: str = "default", *, seed: int = 3) -> Any:
        """Add noise to what `adapter` trains."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trained(model, adapter).values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((self.case.noise * noise).to(parameter.dtype))
        return model

    def second(self, model: Any, name: str = "other", **settings: Any) -> Any:
        """Add a second adapter of another rank, moved by other noise; it is not active."""
        model.add_adapter(name, self.config(**{"r": self.case.other_r, **settings}))
        return self.move(model, name, seed=17)

    def loss(self, model: Any, batch: Tensor | None = None, *, autocast: bool = False) -> Tensor:
        """Cross-entropy with fixed targets, in fp32 (in fp64 for a model of doubles)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(self.batch() if batch is None else batch)
        out = getattr(out, "logits", out)
        out = out.reshape(-1, out.shape[-1])
        out = out if out.dtype == torch.float64 else out.float()
        return F.cross_entropy(out, torch.arange(len(out)) % min(3, out.shape[-1]))

    def train(self, model: Any, *, steps: int = 4, autocast: bool = False) -> list[float]:
        """Plain SGD on what requires gradients; the losses before each step and after the last."""
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=self.case.lr)
        losses = []
        model.train()
        for _ in range(steps):
            loss = self.loss(model, autocast=autocast)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            return [*losses, self.loss(model, autocast=autocast).item()]


def cells(*models: str, storages: tuple[str, ...] = ()) -> list[Cell]:
    """Every case on the named models (default all) in the given storages (default all), less what a case refuses."""
    return [
        Cell(case, model, storage)
        for case in CASES
        for model in MODELS.values()
        for storage in model.storages
        if model.name in (models or MODELS)
        and storage in (storages or model.storages)
        and not case.refuses & {model.layer, storage}
    ]


# -- adapters of any kind ------------------------------------------------------------------------------------------


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The tuner layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Every parameter and buffer of `adapter` in the tuner layers, trained or frozen, by name."""
    return {
        f"{layer_name}.{name}": value
        for layer_name, layer in adapter_layers(model).items()
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]
        if adapter in name.split(".") and not name.startswith("base_layer.")
    }


def trained(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """What is trained in the tuner layers when `adapter` is the active one; flags and active adapters stay."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = {name: list(layer.active_adapters) for name, layer in adapter_layers(model).items()}
    for layer in adapter_layers(model).values():
        layer.set_adapter([adapter])
    found = {name: value for name, value in adapter_tensors(model, adapter).items() if value.requires_grad}
    for name, layer in adapter_layers(model).items():
        layer.set_adapter(active[name])
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    assert found, f"{adapter!r} trains nothing"
    return found  # type: ignore[return-value]


def tensor_bytes(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: tiny_models._bytes(value) for name, value in tensors.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients there are, by the parameter's name; they are cleared."""
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


#: PEFT's own tolerances for merging, absolute; a quantised base is quantised anew, so its outputs only correlate.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}


def assert_merged_alike(actual: Tensor, expected: Tensor, storage: str) -> None:
    if storage in TOLERANCE:
        torch.testing.assert_close(actual, expected, atol=TOLERANCE[storage], rtol=TOLERANCE[storage])
        return
    pair = torch.stack([actual.flatten().float(), expected.flatten().float()])
    assert torch.corrcoef(pair)[0, 1] > (0.9 if storage == "nf4" else 0.99)
