"""Merging and unmerging: within PEFT's own tolerances everywhere, to the last bit where `exact_unmerge` asks for it."""

from __future__ import annotations

import warnings

import peft
import pytest
import tiny_models
import torch

from llmreg.errors import WeightError

#: PEFT's own tolerances for merging: absolute, for float logits; a quantised base is re-quantised, so only correlated.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}


@pytest.fixture(autouse=True)
def _no_rounding_notes():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module|Unmerge lora module")
        yield


def wrap(method, storage, *, builder=tiny_models.llama, targets="all-linear", **settings):
    return peft.get_peft_model(builder(storage), method(r=4, target_modules=targets, **settings))


def check_close(actual, expected, storage, base=None):
    if storage in TOLERANCE:
        torch.testing.assert_close(actual, expected, atol=TOLERANCE[storage], rtol=TOLERANCE[storage])
        return
    pair = torch.stack([actual.flatten().float(), expected.flatten().float()])
    assert torch.corrcoef(pair)[0, 1] > (0.9 if storage == "nf4" else 0.99)


@pytest.mark.parametrize("safe", [False, True])
def test_merged_unmerged_and_unloaded_models_agree_within_peft_s_tolerance(method, storage, safe, tokens):
    model = wrap(method, storage)
    base = tiny_models.logits(model, tokens)
    # An orthonormal factor's entries are about 0.1: noise of 0.05 would be an update that 4 bits cannot hold.
    tiny_models.perturb(model, size=0.02 if method.METHOD == "sorsa" else 0.05)
    adapted = tiny_models.logits(model, tokens)
    assert not torch.allclose(adapted, base, atol=1e-3)
    model.merge_adapter(safe_merge=safe)
    check_close(tiny_models.logits(model, tokens), adapted, storage)
    model.unmerge_adapter()
    check_close(tiny_models.logits(model, tokens), adapted, storage)
    merged = model.merge_and_unload(safe_merge=safe)
    check_close(tiny_models.logits(merged, tokens), adapted, storage)
    assert not [name for name, _ in merged.named_modules() if "lora" in name]


def test_conv1d_merges_in_its_own_layout(method, tokens):
    model = wrap(method, "float32", builder=tiny_models.gpt2, targets=["c_attn", "c_fc", "c_proj"])
    adapted = tiny_models.logits(tiny_models.perturb(model), tokens)
    torch.testing.assert_close(tiny_models.logits(model.merge_and_unload(), tokens), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_exact_unmerge_restores_every_bit(method, storage, safe, tokens):
    model = wrap(method, storage, exact_unmerge=True)
    before = tiny_models.logits(model, tokens)
    base_bytes = tiny_models.state_bytes(model.get_base_model())
    tiny_models.perturb(model)
    adapted = tiny_models.logits(model, tokens)
    for _ in range(2):
        model.merge_adapter(safe_merge=safe)
        tiny_models.logits(model, tokens)
        model.unmerge_adapter()
        assert torch.equal(tiny_models.logits(model, tokens), adapted)
        with model.disable_adapter():
            assert torch.equal(tiny_models.logits(model, tokens), before)
    after = tiny_models.state_bytes(model.get_base_model())
    assert all(after[key] == base_bytes[key] for key in base_bytes if "base_layer" in key)


def test_disabling_a_merged_adapter_unmerges_it(method, storage, tokens):
    model = wrap(method, storage, exact_unmerge=True)
    before = tiny_models.logits(model, tokens)
    tiny_models.perturb(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, tokens), before)


@pytest.mark.parametrize("neighbour", ["same method", "plain lora"])
@pytest.mark.parametrize("exact", [False, True])
def test_several_adapters_merge_to_the_sum_of_their_differences(method, neighbour, exact):
    x = tiny_models.inputs()
    base = tiny_models.mlp()
    weight = base.first.weight.clone()
    model = peft.get_peft_model(base, method(r=3, target_modules=["first"], exact_unmerge=exact))
    config = method(r=2, target_modules=["first"]) if neighbour == "same method" else None
    model.add_adapter("other", config or peft.LoraConfig(r=2, target_modules=["first"]))
    for name in ("default", "other"):
        tiny_models.perturb(model, name, size=0.2)
    layer = model.base_model.model.first
    expected = weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(layer.base_layer.weight, expected, atol=1e-6, rtol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight, atol=0 if exact else 1e-6, rtol=0)
    outputs = {}
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        outputs[len(names), names[0]] = layer(x)
    both = outputs[1, "default"] + outputs[1, "other"] - torch.nn.functional.linear(x, weight, base.first.bias)
    torch.testing.assert_close(outputs[2, "default"], both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_merging_one_after_the_other_unmerges_exactly_if_either_asked_for_it(method, order):
    base = tiny_models.mlp()
    weight = base.first.weight.clone()
    model = peft.get_peft_model(base, method(r=3, target_modules=["first"], exact_unmerge=True))
    model.add_adapter("other", method(r=2, target_modules=["first"]))
    for name in order:
        tiny_models.perturb(model, name)
        model.merge_adapter([name])
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.first.base_layer.weight, weight)


def test_a_merge_that_would_write_nan_is_refused_and_changes_nothing(method):
    base = tiny_models.mlp()
    before = tiny_models.state_bytes(base)
    model = peft.get_peft_model(base, method(r=3, target_modules=["first"], exact_unmerge=True))
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert not model.base_model.model.first.merged
    assert model.base_model.model.first._kept_weight is None
    assert tiny_models.state_bytes(model.unload()) == before


def test_a_fresh_adapter_merges_to_the_base_bit_for_bit(method):
    for storage in ("float32", "bfloat16", "float16"):
        base = tiny_models.mlp(storage)
        before = tiny_models.state_bytes(base)
        merged = peft.get_peft_model(base, method(r=3, target_modules=["first", "second"])).merge_and_unload()
        assert tiny_models.state_bytes(merged) == before


def test_in_bfloat16_merging_rounds_only_once(method):
    base = tiny_models.mlp("bfloat16")
    weight = base.first.weight.clone()
    model = tiny_models.perturb(peft.get_peft_model(base, method(r=3, target_modules=["first"])), size=0.01)
    layer = model.base_model.model.first
    expected = (weight.float() + layer.get_delta_weight("default")).bfloat16()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, expected)


def test_exact_unmerge_keeps_the_parameter_itself_so_that_ties_survive(method):
    base = tiny_models.mlp()
    weight = base.first.weight
    model = tiny_models.perturb(peft.get_peft_model(base, method(r=3, target_modules=["first"], exact_unmerge=True)))
    model.merge_adapter()
    model.unmerge_adapter()
    assert model.base_model.model.first.base_layer.weight is weight


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_is_not_finite_is_not_merged_and_the_base_stays(method, safe):
    model = wrap(method, "float32")
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).view(-1)[0] = float("nan")
    before = tiny_models.state_bytes(model)
    with pytest.raises(WeightError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=safe)
    assert tiny_models.state_bytes(model) == before
