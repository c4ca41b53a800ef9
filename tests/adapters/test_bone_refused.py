"""What Bone cannot do is one clear sentence that names layer and alternative, and leaves the model as it was."""

from __future__ import annotations

import pickle

import bone_models
import peft
import pytest
import tiny_models
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from torch import nn

from llmreg import BoneConfig, methods
from llmreg.adapters import BoneModel
from llmreg.adapters.registry import BONE, peft_type, register
from llmreg.errors import UnsupportedError


class Mixed(nn.Module):
    """A linear layer that could carry an adapter, and others that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.linear = nn.Linear(12, 8)
        self.embedding = nn.Embedding(10, 12)
        self.conv1 = nn.Conv1d(3, 4, 3)
        self.attention = nn.MultiheadAttention(12, 2)
        self.norm = nn.LayerNorm(12)


def everything(model):
    return tiny_models.structure(model), tiny_models.state_bytes(model), sorted(vars(model))


CASES = [
    pytest.param(
        {"variant": "bat", "r": 5},
        r"Layer 'first' cannot be cut into 5 x 5 blocks.*32 x 20; write one of r=1, 2, 4, use variant 'bone'",
        id="bat-rank",
    ),
    pytest.param({"r": 24}, r"Layer 'first' is too small for r=24.*r can be at most 20", id="rank"),
    pytest.param(
        {"variant": "mini", "r": 4, "mini_r": 5},
        r"mini_r=5 does not divide the 32 outputs of layer 'first'; write one of 1, 2, 4, 8, 16, 32, or exclude it",
        id="mini-columns",
    ),
]


@pytest.mark.parametrize(("settings", "said"), CASES)
def test_a_layer_that_does_not_divide_is_named_with_what_would_do(settings, said):
    base = tiny_models.mlp()
    before = everything(base)
    with pytest.raises(UnsupportedError, match=said):
        peft.get_peft_model(base, BoneConfig(target_modules=["second", "first"], **settings))
    assert everything(base) == before
    assert peft.get_peft_model(base, BoneConfig(r=4, target_modules=["first"]))(tiny_models.inputs()).shape == (6, 5)


@pytest.mark.parametrize(("settings", "said"), CASES)
def test_a_second_adapter_that_fails_leaves_the_first_as_it_was(settings, said):
    model = peft.get_peft_model(tiny_models.mlp(), BoneConfig(r=4, target_modules=["second"]))
    bone_models.drift(model)
    out, before = model(tiny_models.inputs()), (everything(model), set(model.peft_config), model.active_adapters)
    with pytest.raises(UnsupportedError, match=said):
        model.add_adapter("other", BoneConfig(target_modules=["second", "first"], **settings))
    assert (everything(model), set(model.peft_config), model.active_adapters) == before
    assert torch.equal(model(tiny_models.inputs()), out)


@pytest.mark.parametrize("layer", ["embedding", "conv1", "attention", "norm"])
def test_a_layer_of_another_kind_is_refused_by_name_and_class(layer):
    model = Mixed()
    before = everything(model)
    with pytest.raises(UnsupportedError, match=f"Layer '{layer}' cannot carry a bone adapter") as caught:
        peft.get_peft_model(model, BoneConfig(r=4, target_modules=["linear", layer]))
    assert type(getattr(model, layer)).__name__ in str(caught.value)
    assert everything(model) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"r": 4.0}, "r must be a positive integer, got 4.0"),
        ({"variant": "mini", "mini_r": -1}, "mini_r must be a positive integer"),
        ({"mini_r": 4}, "mini_r=4 belongs to variant='mini', and this is 'bone'"),
        ({"variant": "bats"}, "variant must be 'bone', 'bat' or 'mini', got 'bats'"),
        ({"bone_dropout": 1.0}, "bone_dropout must be a number from 0 to below 1"),
        ({"bone_dropout": "0.1"}, "bone_dropout must be a number"),
        ({"bias": "all"}, "does not support bias='all'"),
        ({"init_weights": "pissa"}, "init_weights='pissa' is no form of Bone"),
        ({"target_modules": ".*q", "layers_to_transform": [1]}, "layers_to_transform cannot be used"),
        ({"target_modules": ".*q", "layers_pattern": "layers"}, "layers_pattern cannot be used"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(settings, said):
    with pytest.raises(UnsupportedError, match=said):
        BoneConfig(**settings)


def test_configs_of_older_peft_name_the_variant_by_init_weights():
    assert BoneConfig(init_weights="bat").variant == "bat"
    assert BoneConfig(init_weights=True).variant == BoneConfig(init_weights=False).variant == "bone"
    assert "init_weights" not in BoneConfig(init_weights="bat").to_dict()


def test_a_plain_lora_beside_it_is_peft_s_own_refusal():
    model = peft.get_peft_model(tiny_models.mlp(), BoneConfig(r=4, target_modules=["first"]))
    before = everything(model)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", peft.LoraConfig(r=2, target_modules=["first"]))
    assert everything(model) == before


def test_the_peft_type_is_registered_once_and_pickles():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register(BONE, BoneConfig, BoneModel, "bone_")
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
    assert PEFT_TYPE_TO_CONFIG_MAPPING[BONE] is BoneConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[BONE] is BoneModel
    assert PeftType("BONE") is peft_type("BONE") is BONE
    assert pickle.loads(pickle.dumps(BONE)) is BONE


def test_the_catalogue_knows_it():
    row = methods.get_method("bone")
    assert row.config_class() is BoneConfig
    assert row.kind == "bone"
