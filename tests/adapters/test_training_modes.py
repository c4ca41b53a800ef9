"""Training as people do it: checkpointed, under autocast, cast by TRL, copied, from meta tensors."""

from __future__ import annotations

import copy
import hashlib
import pickle

import peft
import pytest
import tiny_models
import torch

from llmreg import SvfitConfig
from llmreg.adapters.layer import AdditiveLayer


def wrap(method, storage="float32", *, adapter="default", **settings):
    config = method(**{"r": 4, "target_modules": "all-linear", **settings})
    return peft.get_peft_model(tiny_models.llama(storage), config, adapter_name=adapter)


def gradients(model, tokens):
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def frozen(model):
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdditiveLayer):
            for adapter in filter(layer.form, layer.lora_A):
                for container in layer.form(adapter).frozen:
                    found[f"{name}.{container}.{adapter}.weight"] = getattr(layer, container)[adapter].weight
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant, tokens):
    model = tiny_models.perturb(wrap(method)).train()
    expected = gradients(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients(model, tokens)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4"])
def test_under_autocast_step_zero_is_the_base_and_gradients_agree(method, base, tokens):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = tiny_models.logits(tiny_models.llama(base), tokens)
        model = wrap(method, base)
        assert torch.equal(tiny_models.logits(model, tokens), before)
    tiny_models.perturb(model).train()
    exact = gradients(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients(model, tokens)
    assert rounded.keys() == exact.keys()
    for name in exact:
        assert rounded[name].dtype == torch.float32
        assert torch.cosine_similarity(rounded[name].flatten(), exact[name].flatten(), dim=0) > 0.99


def test_casting_only_what_trains_to_bfloat16_keeps_step_zero_exactly_zero(method, storage, tokens):
    """What TRL does to a model with quantised layers."""
    before = tiny_models.logits(tiny_models.llama(storage), tokens)
    model = wrap(method, storage)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    layer = next(module for module in model.modules() if isinstance(module, AdditiveLayer))
    assert not layer.get_delta_weight("default").any()
    assert torch.equal(tiny_models.logits(model, tokens), before)
    if not layer.form("default").own_dtypes:
        assert {parameter.dtype for parameter in frozen(model).values()} == {torch.bfloat16}
    assert all(torch.isfinite(grad).all() for grad in gradients(model.train(), tokens).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_frozen_start_follows_when_the_whole_model_is_cast(method, dtype, tokens):
    model = wrap(method).to(dtype)
    assert torch.equal(tiny_models.logits(model, tokens), tiny_models.logits(tiny_models.llama().to(dtype), tokens))
    assert {parameter.dtype for parameter in frozen(model).values()} == {dtype}


def test_without_autocast_of_adapters_the_factors_have_the_base_s_dtype(method, tokens):
    base = tiny_models.llama("bfloat16")
    before = tiny_models.logits(base, tokens)
    config = method(r=4, target_modules="all-linear")
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    values = {p.dtype for name, p in model.named_parameters() if "lora_S" in name and method is SvfitConfig}
    assert values <= {torch.float32}, "a change of singular values is too small for bfloat16"
    others = {p.dtype for name, p in model.named_parameters() if "lora_" in name and "lora_S" not in name}
    assert others == {torch.bfloat16}
    assert torch.equal(tiny_models.logits(model, tokens), before)


def test_no_call_makes_the_frozen_start_trainable(method):
    model = wrap(method)
    model.add_adapter("other", method(r=2, target_modules=["q_proj"]))
    calls = [
        lambda: model.train(),
        lambda: model.set_adapter("other"),
        lambda: model.set_adapter("default"),
        lambda: model.base_model.set_adapter(["default", "other"]),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.set_requires_grad("other"),
        lambda: model.set_requires_grad(["default", "other"], requires_grad=False),
        lambda: model.set_requires_grad(["default", "other"]),
        lambda: model.delete_adapter("other"),
        lambda: model.enable_input_require_grads(),
    ]
    for call in calls:
        call()
        assert frozen(model)
        assert not any(parameter.requires_grad for parameter in frozen(model).values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert not {id(parameter) for parameter in frozen(model).values()} & {id(parameter) for parameter in trained}


def test_training_moves_the_factors_and_never_the_frozen_start(method, storage, tokens):
    model = wrap(method, storage)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "lora_" in name}
    losses = tiny_models.train(model, tokens, steps=5)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name]) == (name in frozen(model)), name


def test_a_deep_copy_is_independent(method, storage, tokens):
    model = tiny_models.perturb(wrap(method, storage))
    before = tiny_models.logits(model, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny_models.logits(twin, tokens), before)
    tiny_models.train(twin, tokens)
    assert not torch.equal(tiny_models.logits(twin, tokens), before)
    assert torch.equal(tiny_models.logits(model, tokens), before)
    assert type(twin.peft_config["default"]) is method
    assert twin.peft_config["default"].peft_type is model.peft_config["default"].peft_type


def test_a_model_pickles_with_its_adapters(method, tokens):
    model = tiny_models.perturb(wrap(method))
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(tiny_models.logits(restored, tokens), tiny_models.logits(model, tokens))
    tiny_models.train(restored, tokens)


def test_low_cpu_mem_usage_makes_meta_factors_and_decomposes_nothing(method, tokens, monkeypatch):
    model = wrap(method)
    tiny_models.perturb(model)
    state = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    monkeypatch.setattr(method, "start", None)
    empty = peft.get_peft_model(tiny_models.llama(), method(r=4, target_modules="all-linear"), low_cpu_mem_usage=True)
    assert all(parameter.is_meta for name, parameter in empty.named_parameters() if "lora_" in name)
    empty.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(tiny_models.logits(empty, tokens), tiny_models.logits(model, tokens))
    assert not any(parameter.requires_grad for parameter in frozen(empty).values())


def test_the_global_random_state_is_neither_used_nor_changed(method):
    base = tiny_models.llama()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    model = peft.get_peft_model(base, method(r=4, target_modules="all-linear"))
    model.add_adapter("other", method(r=3, target_modules=["q_proj"]))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_start_from_the_same_bits(method, run_python):
    code = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import made_up, peft, tiny_models, torch
from llmreg import AdditiveConfig
if AdditiveConfig._CLASSES[sys.argv[2]].NEEDS_DATA:
    made_up.give_data(AdditiveConfig._CLASSES[sys.argv[2]])
base = tiny_models.llama()
torch.manual_seed(1)
model = peft.get_peft_model(base, AdditiveConfig(method=sys.argv[2], r=4, target_modules="all-linear"))
digest = hashlib.sha256()
for name, parameter in model.named_parameters():
    if "lora_" in name:
        digest.update(parameter.detach().numpy().tobytes())
print(digest.hexdigest())
"""
    there = run_python(code, str(tiny_models.__file__).rpartition("/")[0], method.METHOD)
    torch.manual_seed(2)
    here = hashlib.sha256()
    for name, parameter in wrap(method).named_parameters():
        if "lora_" in name:
            here.update(parameter.detach().numpy().tobytes())
    assert here.hexdigest() == there
