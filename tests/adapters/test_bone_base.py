"""Law 1 for Bone: the base is never changed, adapters of all variants share it, and each is what it is alone."""

from __future__ import annotations

import copy
import pickle

import bone_models
import peft
import pytest
import tiny_models
import torch
from bone_models import each_variant
from torch import nn

from llmreg import BoneConfig
from llmreg.adapters.bone_model import bone_layers
from llmreg.errors import UnsupportedError
from llmreg.weights import bytes_hash

BUILDERS = {
    "llama": (tiny_models.llama, bone_models.LINEAR, tiny_models.STORAGES),
    "gpt2-conv1d": (tiny_models.gpt2, ["c_attn", "c_fc", "c_proj"], ("float32", "bfloat16")),
    "bert": (tiny_models.bert_classifier, ["query", "dense"], ("float32", "nf4")),
}
CASES = [
    pytest.param((builder, targets, storage), id=f"{name}-{storage}")
    for name, (builder, targets, storages) in BUILDERS.items()
    for storage in storages
]


@pytest.fixture(params=CASES)
def case(request, tokens):
    builder, targets, storage = request.param
    base = builder(storage)
    tiny_models.logits(base, tokens)  # bitsandbytes moves int8 scales at the first forward
    return base, targets, tokens


def train(model, tokens, steps=2, lr=1e-3):
    labels = torch.tensor([0, 1, 2]) if hasattr(model.get_base_model(), "classifier") else tokens
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


@each_variant
def test_wrapping_training_disabling_and_unloading_leave_every_byte_as_it_was(case, variant):
    base, targets, tokens = case
    before, bytes_before = tiny_models.logits(base, tokens), tiny_models.state_bytes(base)
    model = peft.get_peft_model(base, bone_models.config(variant, target_modules=targets))
    hash_before = bytes_hash(model, list(bone_layers(model, "default")))
    assert torch.equal(tiny_models.logits(model, tokens), before), "step 0 is the base"
    train(model, tokens)
    trained = tiny_models.logits(model, tokens)
    assert not torch.equal(trained, before)
    assert bytes_hash(model, list(bone_layers(model, "default"))) == hash_before
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, tokens), before)
    assert torch.equal(tiny_models.logits(model, tokens), trained)
    unloaded = model.unload()
    assert torch.equal(tiny_models.logits(unloaded, tokens), before)
    assert tiny_models.state_bytes(unloaded) == bytes_before
    assert type(unloaded) is type(base)


@each_variant
def test_every_layer_gets_a_gradient_at_step_0(case, variant):
    base, targets, tokens = case
    model = peft.get_peft_model(base, bone_models.config(variant, target_modules=targets)).train()
    labels = torch.tensor([0, 1, 2]) if hasattr(base, "classifier") else tokens
    model(input_ids=tokens, labels=labels).loss.backward()
    layers = bone_layers(model, "default")
    assert layers
    for name, layer in layers.items():
        assert float(layer.block("default").grad.abs().sum()) > 0, name


def test_all_variants_live_on_one_layer_and_none_influences_another(case):
    base, targets, tokens = case
    before, bytes_before = tiny_models.logits(base, tokens), tiny_models.state_bytes(base)
    ranks = {"bone": 5, "mini": 8, "bat": 4}
    model, alone = None, {}
    for name, r in ranks.items():
        config = bone_models.config(name, target_modules=targets, r=r, bone_dropout=0.1)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        assert torch.equal(tiny_models.logits(model, tokens), before)
        bone_models.drift(model, name)
        alone[name] = tiny_models.logits(model, tokens)
    for name in ranks:
        model.set_adapter(name)
        assert torch.equal(tiny_models.logits(model, tokens), alone[name])
        trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable
        assert all(f"bone_block.{name}." in key for key in trainable)
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("bat")
    assert model.active_adapters == ["bone"]
    assert torch.equal(tiny_models.logits(model, tokens), alone["bone"])
    assert tiny_models.state_bytes(model.unload()) == bytes_before


def test_several_active_adapters_add_up_in_any_order():
    base = tiny_models.mlp()
    x, W = tiny_models.inputs(), base.first.weight.detach().clone()
    settings = {"one": {"variant": "bat", "r": 4}, "two": {"variant": "bat", "r": 2}, "three": {"r": 3}}
    model = None
    for name, given in settings.items():
        config = BoneConfig(target_modules=["first"], **given)
        model = model or peft.get_peft_model(base, config, adapter_name=name)
        if name not in model.peft_config:
            model.add_adapter(name, config)
        bone_models.drift(model, name, size=0.3, seed=len(name))
    layer = model.base_model.model.first
    outputs = []
    for order in (["one", "two", "three"], ["three", "two", "one"]):
        model.base_model.set_adapter(order)
        outputs.append(layer(x))
    delta = sum(layer.get_delta_weight(name) for name in settings)
    expected = nn.functional.linear(x, W + delta, layer.base_layer.bias)
    for out in outputs:
        torch.testing.assert_close(out, expected)


@each_variant
def test_dropout_acts_on_the_adapter_alone_and_only_in_training(variant):
    base = tiny_models.mlp()
    x = tiny_models.inputs(64)
    config = bone_models.config(variant, r=4, bone_dropout=0.4, target_modules=["first"])
    model = bone_models.drift(peft.get_peft_model(base, config), size=0.3)
    layer = model.base_model.model.first
    model.eval()
    assert torch.equal(layer(x), layer(x))
    plain, added = layer.base_layer(x), layer(x) - layer.base_layer(x)
    model.train()
    torch.manual_seed(0)
    draws = torch.stack([layer(x) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    mean = (draws.mean(0) - plain).detach()
    assert float((mean - added).norm() / added.norm()) < 0.1, "what is dropped is made up for on average"
    with torch.no_grad():
        layer.block("default").zero_()
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=0)


def test_dropout_of_one_adapter_does_not_touch_another():
    base = tiny_models.mlp()
    model = peft.get_peft_model(base, BoneConfig(r=4, target_modules=["first"]))
    model.add_adapter("dropped", BoneConfig(r=4, bone_dropout=0.5, variant="bat", target_modules=["first"]))
    for name in ("default", "dropped"):
        bone_models.drift(model, name, size=0.3)
    model.train()
    layer, x = model.base_model.model.first, tiny_models.inputs()
    assert torch.equal(layer(x), layer(x))
    model.set_adapter("dropped")
    assert not torch.equal(layer(x), layer(x))


@each_variant
def test_a_batch_may_name_an_adapter_for_each_row(variant, tokens):
    base = tiny_models.llama()
    expected = {"__base__": tiny_models.logits(base, tokens)}
    model = peft.get_peft_model(base, bone_models.config(variant))
    model.add_adapter("other", bone_models.config("bone", r=5, target_modules=["q_proj"]))
    for name in ("default", "other"):
        model.set_adapter(name)
        bone_models.drift(model, name)
        expected[name] = tiny_models.logits(model, tokens)
    names = ["other", "__base__", "default"]
    out = tiny_models.logits(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(out[row], expected[name][row])
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    for names, said in ((["default", "ohter", "other"], "'ohter'"), (["default"], "each row")):
        with pytest.raises(UnsupportedError, match=said):
            tiny_models.logits(model, tokens, adapter_names=names)
    with pytest.raises(UnsupportedError, match="num_beams=1"):
        model.generate(tokens, adapter_names=["default"] * 3, num_beams=2, max_new_tokens=2)
    generated = model.generate(tokens, adapter_names=["default"] * 3, max_new_tokens=2, do_sample=False)
    assert generated.shape == (3, 9)


@each_variant
def test_gradient_checkpointing_gives_the_same_gradients(variant, tokens):
    def gradients(checkpointing):
        model = bone_models.drift(peft.get_peft_model(tiny_models.llama(), bone_models.config(variant)))
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        return [layer.block("default").grad for layer in bone_layers(model, "default").values()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)


@each_variant
def test_autocast_computes_in_half_precision_and_trains(variant, tokens):
    model = bone_models.drift(peft.get_peft_model(tiny_models.llama(), bone_models.config(variant)))
    full = tiny_models.logits(model, tokens)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens, labels=tokens)
    out.loss.backward()
    assert float((out.logits.float() - full).norm() / full.norm()) < 0.03
    for layer in bone_layers(model, "default").values():
        assert layer.block("default").grad.dtype == torch.float32


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@each_variant
def test_half_precision_keeps_a_small_update_to_one_percent(variant, autocast_adapter_dtype):
    base = tiny_models.mlp("bfloat16")
    config = bone_models.config(variant, r=4, target_modules=["first"])
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = bone_models.drift(model, size=0.01).base_model.model.first
    assert layer.block("default").dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    x = tiny_models.inputs(16, dtype=torch.bfloat16)
    exact = x.double() @ layer.get_delta_weight("default").double().t()
    zero = torch.zeros(16, 32, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    added = layer._add("default", zero, x)
    assert float((added.double() - exact).norm() / exact.norm()) < 0.01


@each_variant
def test_copies_and_pickles_compute_the_same(variant, tokens):
    model = bone_models.drift(peft.get_peft_model(tiny_models.llama(), bone_models.config(variant)))
    out = tiny_models.logits(model, tokens)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny_models.logits(other, tokens), out)


def test_a_base_layer_with_hooks_keeps_them():
    base = tiny_models.mlp()
    seen = []
    base.first.register_forward_hook(lambda module, args, out: seen.append(out))
    model = peft.get_peft_model(base, BoneConfig(r=4, variant="bat", target_modules=["first", "second"]))
    model(tiny_models.inputs())
    assert len(seen) == 1


def test_trl_s_reference_copy_finds_the_parameters_by_name():
    """TRL copies what it finds under ".default." to ".ref."; a reference that stays at zero would be the base."""
    model = bone_models.drift(peft.get_peft_model(tiny_models.mlp(), BoneConfig(r=4, target_modules=["first"])))
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
    x = tiny_models.inputs()
    out = model(x)
    model.set_adapter("ref")
    assert torch.equal(model(x), out)


def test_a_second_adapter_finds_all_linear_layers_too():
    model = peft.get_peft_model(tiny_models.llama(), BoneConfig(r=4, target_modules="all-linear"))
    model.add_adapter("b", BoneConfig(r=4, target_modules="all-linear", variant="bat"))
    assert bone_layers(model, "b").keys() == bone_layers(model, "default").keys()
