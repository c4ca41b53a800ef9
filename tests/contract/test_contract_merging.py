"""Merging, unmerging and unloading: PEFT's tolerances everywhere, exactness where nothing is rounded."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from contract_cases import adapter_layers, adapter_tensors, assert_merged_alike, cells, tensor_bytes, trained
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import logits
from torch import nn


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("safe", [False, True])
def test_merged_unmerged_and_unloaded_models_agree_with_the_adapter(cell, safe):
    batch = cell.batch()
    model = cell.moved()
    expected = logits(model, batch)
    tensors = tensor_bytes(adapter_tensors(model))
    model.merge_adapter(safe_merge=safe)
    assert all(layer.merged for layer in adapter_layers(model).values())
    merged = logits(model, batch)
    assert merged.dtype == expected.dtype
    assert_merged_alike(merged, expected, cell.storage)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in adapter_layers(model).values())
    assert_merged_alike(logits(model, batch), expected, cell.storage)
    assert tensor_bytes(adapter_tensors(model)) == tensors, "merging changed the adapter itself"
    unloaded = model.merge_and_unload(safe_merge=safe)
    assert_merged_alike(logits(unloaded, batch), expected, cell.storage)
    assert kinds(unloaded) == kinds(cell.base())
    assert not hasattr(unloaded, "peft_config")


def test_a_merged_layer_keeps_its_dtype_and_the_type_of_its_parameter(cell):
    model = cell.moved()
    before = {name: (type(value), value.dtype, value.shape) for name, value in model.named_parameters()}
    model.merge_adapter()
    assert {name: (type(value), value.dtype, value.shape) for name, value in model.named_parameters()} == before
    model.unmerge_adapter()
    assert {name: (type(value), value.dtype, value.shape) for name, value in model.named_parameters()} == before


@pytest.mark.parametrize("cell", cells(storages=("float32", "bfloat16", "float16")), ids=str)
def test_a_fresh_adapter_merges_to_the_base_bit_for_bit(cell):
    expected = tiny_models.state_bytes(cell.base())
    assert tiny_models.state_bytes(cell.wrap().merge_and_unload()) == expected


@pytest.mark.parametrize("cell", cells(storages=("float32", "nf4")), ids=str)
def test_unloading_gives_the_base_back_and_deep_inside_too(cell):
    base = cell.base()
    before, classes = tiny_models.state_bytes(base), kinds(base)
    model = cell.moved(base, modules_to_save=[cell.model.head])
    cell.train(model, steps=1)
    unloaded = model.unload()
    assert unloaded is base
    assert tiny_models.state_bytes(unloaded) == before
    assert kinds(unloaded) == classes
    assert torch.equal(logits(unloaded, cell.batch()), logits(cell.base(), cell.batch()))


def test_what_was_unloaded_can_be_wrapped_again(float_cell):
    batch = float_cell.batch()
    base = float_cell.base()
    expected = logits(base, batch)
    moved = logits(float_cell.moved(base), batch)
    for module in base.modules():
        assert not hasattr(module, "peft_config") or module is base
    unloaded = float_cell.moved(float_cell.base()).unload()
    again = float_cell.wrap(unloaded)
    assert torch.equal(logits(again, batch), expected)
    assert torch.equal(logits(float_cell.move(again), batch), moved)


def test_merging_twice_or_unmerging_twice_changes_nothing_more(float_cell):
    model = float_cell.moved()
    model.merge_adapter()
    merged = tiny_models.state_bytes(model)
    with pytest.warns(UserWarning, match="already merged|All adapters are already merged"):
        model.merge_adapter()
    assert tiny_models.state_bytes(model) == merged
    model.unmerge_adapter()
    unmerged = tiny_models.state_bytes(model)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert tiny_models.state_bytes(model) == unmerged


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite_and_changes_nothing(mlp_cell, bad):
    model = mlp_cell.moved()
    first = next(iter(trained(model).values()))
    with torch.no_grad():
        first.view(-1)[0] = bad
    before = tensor_bytes(model.state_dict())
    with pytest.raises(ValueError, match=r"NaNs|finite|[Ii]nf"):
        model.merge_adapter(safe_merge=True)
    assert tensor_bytes(model.state_dict()) == before
    assert not any(layer.merged_adapters for layer in adapter_layers(model).values())
    assert tiny_models.state_bytes(model.unload()) == tiny_models.state_bytes(mlp_cell.base())


def test_disabling_a_merged_adapter_is_the_base_within_rounding(float_cell):
    batch = float_cell.batch()
    base = logits(float_cell.base(), batch)
    model = float_cell.moved()
    moved = logits(model, batch)
    model.merge_adapter()
    with model.disable_adapter():
        assert_merged_alike(logits(model, batch), base, "float32")
    assert_merged_alike(logits(model, batch), moved, "float32")


def test_switching_adapters_while_merged_unmerges_first(mlp_cell):
    batch = mlp_cell.batch()
    model = mlp_cell.moved()
    mlp_cell.second(model)
    first = logits(model, batch)
    model.set_adapter("other")
    second = logits(model, batch)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("default")
    assert_merged_alike(logits(model, batch), first, "float32")
    assert (first - second).abs().max() > 1e-3


def test_the_adapter_named_is_the_one_that_is_merged(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    float_cell.second(model)
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = logits(model, batch)
    model.merge_adapter(["other"])
    assert {name for layer in adapter_layers(model).values() for name in layer.merged_adapters} == {"other"}
    assert_merged_alike(logits(model, batch), expected["other"], "float32")
    model.unmerge_adapter()
    assert_merged_alike(logits(model, batch), expected["default"], "float32")
    unloaded = model.merge_and_unload(adapter_names=["other"])
    head = "modules_to_save" in "".join(name for name, _ in model.named_parameters())
    assert head or not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert_merged_alike(logits(unloaded, batch), expected["other"], "float32")


def test_several_adapters_merge_to_what_they_compute_when_active_together(mlp_cell):
    batch = mlp_cell.batch()
    model = mlp_cell.moved()
    mlp_cell.second(model)
    with mlp_cell.case.promised("several active"):
        model.base_model.set_adapter(["default", "other"])
        together = logits(model, batch)
        assert together.isfinite().all()
        model.merge_adapter()
        assert_merged_alike(logits(model, batch), together, "float32")
        model.unmerge_adapter()
        assert_merged_alike(logits(model, batch), together, "float32")
        assert_merged_alike(logits(model.merge_and_unload(), batch), together, "float32")


def test_training_goes_on_after_merging_and_unmerging(mlp_cell):
    model = mlp_cell.moved()
    model.merge_adapter()
    model.unmerge_adapter()
    meant = set(trained(model))
    losses = mlp_cell.train(model)
    assert losses[-1] < losses[0]
    assert {name for name, value in model.named_parameters() if value.requires_grad} == meant


def test_merging_asks_for_no_gradient_and_leaves_no_graph(mlp_cell):
    model = mlp_cell.moved()
    model.merge_adapter()
    for layer in adapter_layers(model).values():
        weight = layer.get_base_layer().weight
        assert isinstance(weight, nn.Parameter)
        assert weight.is_leaf
        assert weight.grad_fn is None
        assert not weight.requires_grad
