"""Merging Bone adapters and taking them out again: the same function, whole parameters, the base back."""

from __future__ import annotations

import bone_models
import peft
import pytest
import tiny_models
import torch
from bone_models import each_variant

from llmreg import BoneConfig
from llmreg.adapters.bone_merge import merged, unmerged
from llmreg.adapters.bone_model import bone_layers
from llmreg.errors import WeightError
from llmreg.weights import read_weight

#: Largest error of merged logits, relative to the effect of the update; NF4 rounds more than the update of 5 % moves.
MERGED = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.15, "nf4": 2.0, "int8": 0.3}


def adapted(storage, variant, tokens, **settings):
    base = tiny_models.llama(storage)
    before = tiny_models.logits(base, tokens)
    autocast = settings.pop("autocast_adapter_dtype", True)
    model = peft.get_peft_model(base, bone_models.config(variant, **settings), autocast_adapter_dtype=autocast)
    return bone_models.drift(model), before


@pytest.mark.parametrize("safe", [False, True])
@each_variant
def test_merged_is_adapted_and_unmerged_is_the_base(storage, variant, tokens, safe):
    model, before = adapted(storage, variant, tokens)
    out = tiny_models.logits(model, tokens)
    blocks = bone_models.block_bytes(model)
    effect = (out.double() - before.double()).norm()
    weights = {name: read_weight(layer.base_layer) for name, layer in bone_layers(model, "default").items()}
    weights = {name: W.clone() for name, W in weights.items()}
    model.base_model.merge_adapter(safe_merge=safe)
    error = (tiny_models.logits(model, tokens).double() - out.double()).norm() / effect
    assert error < MERGED[storage]
    assert bone_models.block_bytes(model) == blocks, "merging writes to no parameter"
    model.unmerge_adapter()
    assert bone_models.block_bytes(model) == blocks
    assert torch.isfinite(tiny_models.logits(model, tokens)).all()
    for name, layer in bone_layers(model, "default").items():
        W = read_weight(layer.base_layer)
        limit = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2, "nf4": 0.3, "int8": 0.02}[storage]
        assert float((W - weights[name]).norm() / W.norm()) < limit, name


@each_variant
def test_a_kept_copy_makes_unmerging_bit_exact(storage, variant, tokens):
    model, before = adapted(storage, variant, tokens, exact_unmerge=True)
    state = tiny_models.state_bytes(model.get_base_model())
    out = tiny_models.logits(model, tokens)
    for _ in range(2):
        model.merge_adapter()
        tiny_models.logits(model, tokens)
        model.unmerge_adapter()
        assert tiny_models.state_bytes(model.get_base_model()) == state
        assert torch.equal(tiny_models.logits(model, tokens), out)
    model.merge_adapter()
    with model.disable_adapter():  # which unmerges
        assert torch.equal(tiny_models.logits(model, tokens), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_variant
def test_half_precision_parameters_keep_shape_and_value(dtype, variant, tokens):
    """PEFT's MiSS writes the tiled block of `mini` back into the parameter here."""
    model, _ = adapted(dtype, variant, tokens, autocast_adapter_dtype=False)
    blocks = bone_models.block_bytes(model)
    assert {block[0] for block in blocks.values()} == {tiny_models.FLOATS[dtype]}
    out = tiny_models.logits(model, tokens)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
        assert bone_models.block_bytes(model) == blocks
    assert float((tiny_models.logits(model, tokens) - out).norm() / out.norm()) < 0.05


@each_variant
def test_merge_and_unload_gives_a_plain_model_of_the_same_function(variant, tokens):
    for builder, targets in ((tiny_models.llama, bone_models.LINEAR), (tiny_models.gpt2, ["c_attn", "c_fc"])):
        model = peft.get_peft_model(builder(), bone_models.config(variant, target_modules=targets))
        out = tiny_models.logits(bone_models.drift(model), tokens)
        plain = model.merge_and_unload(safe_merge=True)
        assert not [name for name, module in plain.named_modules() if hasattr(module, "bone_block")]
        torch.testing.assert_close(tiny_models.logits(plain, tokens), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_several_merged_adapters_of_different_blocks_come_out_again(together, exact):
    base = tiny_models.mlp("float64")
    x = tiny_models.inputs(dtype=torch.float64)
    W = base.first.weight.detach().clone()
    names = ["one", "two", "three", "four"]
    settings = [{"variant": "bat", "r": 4}, {"variant": "bat", "r": 2}, {"r": 3}, {"variant": "mini", "mini_r": 8}]
    model = None
    for name, given in zip(names, settings, strict=True):
        config = BoneConfig(**{"r": 5, "target_modules": ["first"], "exact_unmerge": exact, **given})
        model = model or peft.get_peft_model(base, config, adapter_name=name)
        if name not in model.peft_config:
            model.add_adapter(name, config)
        bone_models.drift(model, name, size=0.2, seed=len(name))
    model.base_model.set_adapter(names)
    layer = model.base_model.model.first
    out = layer(x)
    if together:
        layer.merge()
    else:
        for name in names:
            with pytest.warns(UserWarning, match="additionally merging") if name != "one" else _nothing():
                layer.merge(adapter_names=[name])
    assert layer.merged_adapters == names
    torch.testing.assert_close(layer(x), out, rtol=1e-6, atol=1e-6)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight.detach(), W, rtol=0, atol=0 if exact else 1e-6)
    assert layer.merged_adapters == []


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *exception):
        return None


def test_block_sizes_without_a_common_multiple_in_small_groups():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 24, generator=generator, dtype=torch.float64)
    blocks = [0.1 * torch.randn(12 // r, r, r, generator=generator, dtype=torch.float64) for r in (2, 3, 4, 6, 12)] + [
        0.1 * torch.randn(5, 12, generator=generator, dtype=torch.float64)
    ]
    torch.testing.assert_close(unmerged(merged(W, blocks), blocks), W)


def test_a_merge_that_lost_the_base_says_so():
    base = tiny_models.mlp()
    model = peft.get_peft_model(base, BoneConfig(r=4, variant="bat", target_modules=["first"]))
    layer = model.base_model.model.first
    with torch.no_grad():
        layer.block("default")[2] = -torch.eye(4)
    layer.merge()
    merged_weight = layer.base_layer.weight.detach().clone()
    with pytest.raises(WeightError, match=r"'first' cannot be unmerged: I \+ B is singular.*exact_unmerge=True"):
        layer.unmerge()
    assert layer.merged
    assert torch.equal(layer.base_layer.weight, merged_weight)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_variant
def test_blocks_that_are_not_finite_are_refused_and_nothing_is_merged(variant, value, safe):
    base = tiny_models.mlp()
    config = bone_models.config(variant, r=4, target_modules=["first"])
    model = peft.get_peft_model(base, config)
    layer, W = model.base_model.model.first, base.first.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.block("default").view(-1)[1] = value
    with pytest.raises(WeightError, match="'default' holds NaN or infinite values on layer 'first'"):
        layer.merge(safe_merge=safe)
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, W)


@each_variant
def test_values_that_the_base_s_dtype_cannot_hold_are_refused(variant):
    model = peft.get_peft_model(tiny_models.mlp("float16"), bone_models.config(variant, r=4, target_modules=["first"]))
    layer = model.base_model.model.first
    W = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.block("default").fill_(1e6)
    with pytest.raises(WeightError, match=r"'first' cannot be merged: .* do not fit torch.float16"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, W)
    assert not layer.merged


def test_the_parameter_of_a_merged_layer_stays_the_same_object():
    base = tiny_models.mlp()
    parameter = base.first.weight
    model = bone_models.drift(peft.get_peft_model(base, BoneConfig(r=4, target_modules=["first"])))
    model.merge_adapter()
    model.unmerge_adapter()
    assert model.unload().first.weight is parameter
