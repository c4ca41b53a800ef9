"""Several adapters on one model: switching, deleting, mixed batches, and who may share a start."""

from __future__ import annotations

import copy

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch

from llmreg.adapters import data_start, start

TARGETS = ["q_proj", "down_proj"]


def switch(model, name):
    model.set_adapter(name)
    return model


@pytest.fixture
def model(method):
    """`a` and `b` of the method, `lora` a plain LoRA, all moved away from their start."""
    model = peft.get_peft_model(tiny_models.llama(), method(r=4, target_modules=TARGETS), adapter_name="a")
    model.add_adapter("b", method(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("lora", peft.LoraConfig(r=3, target_modules=TARGETS))
    for seed, name in enumerate(("a", "b", "lora")):
        tiny_models.perturb(model, name, seed=seed)
    return model


@pytest.fixture
def alone(model, tokens):
    """Each adapter's logits when it is the active one, and the base's."""
    outputs = {name: tiny_models.logits(switch(model, name), tokens) for name in ("b", "lora", "a")}
    return outputs | {"__base__": tiny_models.logits(tiny_models.llama(), tokens)}


def trainable(model):
    return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_adapter_changes_the_output_in_its_own_way(alone):
    outputs = list(alone.values())
    for first in range(4):
        for second in range(first):
            assert (outputs[first] - outputs[second]).abs().max() > 1e-3


def test_switching_switches_what_is_trained_and_never_the_frozen_start(model):
    for name in ("b", "a", "lora", "b"):
        assert trainable(switch(model, name)) == {name}
        assert not any(
            parameter.requires_grad for key, parameter in model.named_parameters() if "A0" in key or "B0" in key
        )


def test_disabling_is_the_base_for_every_adapter(model, alone, tokens):
    for name in ("a", "b", "lora"):
        model.set_adapter(name)
        with model.disable_adapter():
            assert torch.equal(tiny_models.logits(model, tokens), alone["__base__"])
        assert torch.equal(tiny_models.logits(model, tokens), alone[name])


def test_a_mixed_batch_gives_each_row_its_own_adapter(model, alone, tokens):
    names = ["a", "__base__", "lora", "b", "a", "lora"]
    batch = tokens.repeat(2, 1)
    rows = tiny_models.logits(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(rows[row], alone[name][row % 3], atol=1e-5, rtol=1e-5)
    base = tiny_models.logits(model, tokens, adapter_names=["__base__"] * 3)
    torch.testing.assert_close(base, alone["__base__"], atol=0, rtol=0)


def test_a_mixed_batch_works_on_every_storage(method, storage, tokens):
    model = peft.get_peft_model(tiny_models.llama(storage), method(r=4, target_modules=TARGETS), adapter_name="a")
    model.add_adapter("b", method(r=2, target_modules=TARGETS))
    base = tiny_models.logits(model, tokens, adapter_names=["__base__"] * 3)
    assert torch.equal(tiny_models.logits(model, tokens, adapter_names=["a", "b", "__base__"]), base)
    tiny_models.perturb(model, "a")
    mixed = tiny_models.logits(model, tokens, adapter_names=["a", "b", "__base__"])
    assert not torch.allclose(mixed[0], base[0], atol=1e-3)
    # int8 and half precision multiply in blocks that depend on the batch, but here the batch is the same.
    assert torch.equal(mixed[1:], base[1:])


def test_an_unknown_name_in_a_mixed_batch_is_refused(model, tokens):
    with pytest.raises(ValueError, match="nobody"):
        tiny_models.logits(model, tokens, adapter_names=["a", "nobody", "a"])


@pytest.mark.filterwarnings("ignore:Adapter a was active")
def test_deleting_the_active_adapter_activates_another_and_keeps_the_rest(model, alone, tokens):
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert set(model.peft_config) == {"b", "lora"}
    assert torch.equal(tiny_models.logits(model, tokens), alone["b"])
    assert not [name for name, _ in model.named_parameters() if ".a." in name]
    model.add_adapter("a", copy.deepcopy(model.peft_config["b"]))
    assert torch.equal(tiny_models.logits(switch(model, "a"), tokens), alone["__base__"])


@pytest.mark.filterwarnings("ignore:Adapter .* was active")
def test_deleting_them_all_leaves_the_base(model, alone, tokens):
    for name in ("lora", "a", "b"):
        model.delete_adapter(name)
    bare = model.base_model.model  # PeftModel itself, as in PEFT, needs an adapter to run
    assert torch.equal(tiny_models.logits(bare, tokens), alone["__base__"])
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]


def test_two_additive_adapters_active_together_add_up(model):
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    changes = {}
    for names in (["a"], ["b"], ["lora"], ["a", "b", "lora"]):
        model.base_model.set_adapter(names)
        changes[len(names), names[0]] = layer(x) - layer.base_layer(x)
    total = changes[1, "a"] + changes[1, "b"] + changes[1, "lora"]
    torch.testing.assert_close(changes[3, "a"], total, atol=1e-5, rtol=1e-5)


def test_a_reference_copy_takes_the_start_of_its_sibling_without_a_second_decomposition(method, monkeypatch):
    config = method(r=4, target_modules=TARGETS)
    model = peft.get_peft_model(tiny_models.llama(), config)
    tiny_models.perturb(model)
    monkeypatch.setattr(start, "_start_group", None)  # calling it would raise
    monkeypatch.setattr(data_start, "_set_starts", None)
    model.add_adapter("ref", config)
    for layer in saved.additive_layers(model, "ref").values():
        for container in layer.form("ref").frozen:
            frozen = getattr(layer, container)
            assert torch.equal(frozen["ref"].weight, frozen["default"].weight)
        assert not layer.get_delta_weight("ref").any()
        assert layer.get_delta_weight("default").any()


@pytest.mark.parametrize("settings", [{"seed": 1}, {"lora_alpha": 2}, {"r": 3}, {"use_rslora": True}], ids=str)
def test_a_sibling_of_other_settings_lends_nothing(method, settings, monkeypatch):
    called = []
    module, name = (data_start, "_set_starts") if method.NEEDS_DATA else (start, "_start_group")
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (called.append(1), original(*args)))
    model = peft.get_peft_model(tiny_models.mlp(), method(r=4, target_modules=["first"]))
    model.add_adapter("other", method(**{"r": 4, "target_modules": ["first"], **settings}))
    assert len(called) == 2


def test_modules_to_save_belong_to_their_adapter(method):
    x = tiny_models.inputs()
    model = peft.get_peft_model(tiny_models.mlp(), method(r=3, target_modules=["first"], modules_to_save=["head"]))
    model.add_adapter("other", method(r=2, target_modules=["first"], modules_to_save=["head"]))
    tiny_models.train(model, x)
    first = tiny_models.logits(model, x)
    assert torch.equal(tiny_models.logits(switch(model, "other"), x), tiny_models.mlp()(x))
    tiny_models.train(model, x)
    assert torch.equal(tiny_models.logits(switch(model, "default"), x), first)
