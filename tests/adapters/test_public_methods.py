"""Every public name of PEFT's LoRA model, layer and `PeftModel` is known here, and the refused ones raise."""

from __future__ import annotations

import copy

import peft
import pytest
import tiny_models
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from llmreg.errors import UnsupportedError

PEFT_MODEL = (
    "active_adapters active_peft_config add_adapter base_model_torch_dtype create_or_update_model_card delete_adapter "
    "disable_adapter from_pretrained generate get_base_model get_layer_status get_model_status "
    "get_nb_trainable_parameters has_active_enabled_adapter load_adapter modules_to_save peft_config "
    "prepare_model_for_gradient_checkpointing print_trainable_parameters push_to_hub save_pretrained set_adapter "
    "set_requires_grad supports_lora_conversion"
).split()
PROMPT_LEARNING = ["get_prompt", "get_prompt_embedding_to_save"]

LORA_MODEL = (
    "active_adapters delete_adapter disable_adapter_layers enable_adapter_layers get_model_config inject_adapter "
    "merge_adapter merge_and_unload prefix set_adapter set_requires_grad supports_lora_conversion "
    "target_module_mapping tuner_layer_cls unload unmerge_adapter uses_shared_state"
).split()
REFUSED_OF_MODEL = {
    "add_weighted_adapter": lambda model: model.base_model.add_weighted_adapter(["default"], [1.0], "sum"),
    "subtract_mutated_init": lambda model: model.base_model.subtract_mutated_init({}, "default"),
}

LORA_LAYER = (
    "active_adapter active_adapters adapter_layer_names bias delete_adapter disable_adapters enable_adapters "
    "frozen_peft_weight_names get_base_layer get_base_weight get_delta_weight lora_variants merge merged "
    "merged_adapters other_param_names quantization_backend resolve_lora_variant scale_layer set_adapter "
    "set_base_weight set_requires_grad set_scale supports_lora_conversion unmerge unscale_layer update_layer weight"
).split()
REFUSED_OF_LAYER = {
    "corda_init": lambda layer: layer.corda_init("default", "corda"),
    "loftq_init": lambda layer: layer.loftq_init("default", peft.LoraConfig()),
    "lora_ga_init": lambda layer: layer.lora_ga_init("default", None),
    "mica_init": lambda layer: layer.mica_init("default"),
    "olora_init": lambda layer: layer.olora_init("default"),
    "orthogonal_init": lambda layer: layer.orthogonal_init("default"),
    "pissa_init": lambda layer: layer.pissa_init("default", "pissa"),
    "reset_lora_parameters": lambda layer: layer.reset_lora_parameters("default", True),
}


@pytest.fixture
def model(method):
    return tiny_models.perturb(peft.get_peft_model(tiny_models.mlp(), method(r=3, target_modules=["first", "second"])))


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")} - set(dir(nn.Module))


@pytest.mark.parametrize(
    ("cls", "known"),
    [
        (peft.PeftModel, [*PEFT_MODEL, *PROMPT_LEARNING]),
        (LoraModel, [*LORA_MODEL, *REFUSED_OF_MODEL]),
        (LoraLayer, [*(set(LORA_LAYER) - {"get_delta_weight"}), *REFUSED_OF_LAYER]),
        (Linear, [*LORA_LAYER, *REFUSED_OF_LAYER]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_public_name_of_peft_is_classified(cls, known):
    assert public(cls) == set(known), f"PEFT changed {cls.__name__}: decide about the new names"


@pytest.mark.parametrize("name", sorted(REFUSED_OF_MODEL))
def test_a_refused_method_of_the_model_raises_and_changes_nothing(model, name):
    before = tiny_models.structure(model), tiny_models.state_bytes(model)
    with pytest.raises(UnsupportedError, match=name):
        REFUSED_OF_MODEL[name](model)
    assert (tiny_models.structure(model), tiny_models.state_bytes(model)) == before


@pytest.mark.parametrize("name", sorted(REFUSED_OF_LAYER))
def test_a_refused_method_of_a_layer_raises_and_changes_nothing(model, name):
    before = tiny_models.structure(model), tiny_models.state_bytes(model)
    with pytest.raises(UnsupportedError, match=f"{name} would restart the additive adapter 'default'"):
        REFUSED_OF_LAYER[name](model.base_model.model.first)
    assert (tiny_models.structure(model), tiny_models.state_bytes(model)) == before


def test_a_plain_lora_on_the_same_layer_keeps_the_methods_that_are_refused(model):
    model.add_adapter("lora", peft.LoraConfig(r=2, target_modules=["first"]))
    layer = model.base_model.model.first
    before = layer.lora_A["lora"].weight.clone()
    layer.reset_lora_parameters("lora", "gaussian")
    assert not torch.equal(layer.lora_A["lora"].weight, before)
    model.base_model.add_weighted_adapter(["lora"], [2.0], "sum", combination_type="linear")


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"kasa_config": peft.tuners.lora.config.KasaConfig()},
    ],
    ids=str,
)
@pytest.mark.parametrize("lora_first", [True, False])
def test_a_plain_lora_that_changes_the_base_is_refused_as_a_neighbour(method, settings, lora_first):
    ours = method(r=2, target_modules=["first"])
    lora = peft.LoraConfig(r=2, target_modules=["first"], **settings)
    first, second = (lora, ours) if lora_first else (ours, lora)
    model = peft.get_peft_model(tiny_models.mlp(), first)
    before = tiny_models.structure(model), tiny_models.state_bytes(model)
    with pytest.raises(ValueError, match=r"changes the base weights|KaSA cannot be combined"):
        model.add_adapter("second", second)
    assert (tiny_models.structure(model), tiny_models.state_bytes(model)) == before


def test_scaling_a_layer_scales_the_difference_and_unscaling_restores_it(model):
    x = tiny_models.inputs()
    layer = model.base_model.model.first
    base = layer.base_layer(x)
    change = (layer(x) - base).detach()
    for scale, act in ((2.0, lambda: layer.set_scale("default", 2.0)), (6.0, lambda: layer.scale_layer(3.0))):
        act()
        torch.testing.assert_close(layer(x) - base, scale * change, atol=1e-5, rtol=1e-5)
    layer.unscale_layer(3.0)
    torch.testing.assert_close(layer(x) - base, 2 * change, atol=1e-5, rtol=1e-5)
    layer.unscale_layer()
    torch.testing.assert_close(layer(x) - base, change, atol=0, rtol=0)


def test_rescaling_to_zero_gives_the_base_bit_for_bit(model):
    x = tiny_models.inputs()
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(model(x), tiny_models.mlp()(x))
    assert not torch.equal(model(x), tiny_models.mlp()(x))


def test_status_is_regular_through_the_life_of_an_adapter(method):
    model = peft.get_peft_model(tiny_models.mlp(), method(r=3, target_modules=["first", "second"]))
    status = model.get_model_status()
    assert status.requires_grad == {"default": True}
    assert status.peft_types == {"default": "LLMREG_ADDITIVE"}
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (2, True, ["default"])
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.add_adapter("lora", peft.LoraConfig(r=2, target_modules=["first"]))
    assert model.get_model_status().requires_grad == {"default": True, "lora": False}
    assert model.get_layer_status()[0].available_adapters == ["default", "lora"]
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    assert model.get_model_status().requires_grad == {"default": True, "lora": False}


def test_converting_to_lora_with_twice_the_rank_keeps_the_function(model):
    x = tiny_models.inputs()
    expected = tiny_models.logits(model, x)
    config, tensors = peft.convert_to_lora(copy.deepcopy(model), rank=6)
    converted = peft.get_peft_model(tiny_models.mlp(), config)
    peft.set_peft_model_state_dict(converted, tensors)
    torch.testing.assert_close(tiny_models.logits(converted, x), expected, atol=1e-5, rtol=1e-5)


def test_injecting_without_a_peft_model_works(method):
    x = tiny_models.inputs()
    model = peft.inject_adapter_in_model(method(r=3, target_modules=["first"]), tiny_models.mlp())
    assert torch.equal(model(x), tiny_models.mlp()(x))
    tiny_models.train(model, x)
    assert not torch.equal(model(x), tiny_models.mlp()(x))
    stored = peft.get_peft_model_state_dict(model)
    assert {tensor.shape[0] for key, tensor in stored.items() if "lora_A" in key} == {3 * method.SAVED_RANK}


def test_generate_uses_the_adapter_and_disabling_it_the_base(method, tokens):
    base = tiny_models.llama()
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = base.generate(tokens, **settings)
    model = peft.get_peft_model(base, method(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert type(model) is peft.PeftModelForCausalLM
    assert torch.equal(model.generate(input_ids=tokens, **settings), expected)
    tiny_models.perturb(model, size=0.5)
    assert not torch.equal(model.generate(input_ids=tokens, **settings), expected)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=tokens, **settings), expected)
