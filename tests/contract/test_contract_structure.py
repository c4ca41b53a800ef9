"""Which layers are wrapped, what PEFT says about them, ties, copies, and models without data."""

from __future__ import annotations

import copy
import io
import pickle

import peft
import pytest
import tiny_models
import torch
from contract_cases import adapter_layers, adapter_tensors, cells, tensor_bytes, trained
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from tiny_models import logits
from torch import nn

SELECTIONS = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "a full name": {"target_modules": ["model.layers.0.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "the architecture's own": {"target_modules": None},
    "without names": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["q_proj"]},
    "without a regex": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0.*"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_the_layers_wrapped_are_those_of_plain_lora(llama_cell, selection):
    expected = peft.get_peft_model(llama_cell.base(), peft.LoraConfig(task_type="CAUSAL_LM", **selection))
    if selection["target_modules"] is None and llama_cell.case.family != "lora":
        expected_names = set()  # PEFT keeps such a list for each of its methods; any that is a layer's name will do
    else:
        expected_names = set(adapter_layers(expected))
    model = llama_cell.wrap(**selection)
    assert expected_names <= set(adapter_layers(model))
    assert adapter_layers(model)
    assert not expected_names or set(adapter_layers(model)) == expected_names
    batch = llama_cell.batch()
    assert torch.equal(logits(model, batch), logits(llama_cell.base(), batch))
    assert not torch.equal(logits(llama_cell.move(model), batch), logits(llama_cell.base(), batch))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"target_modules": ["nothing_like_it"]}, "not found|No modules were targeted"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "excluded"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "not found|No modules|layers_to_transform"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
    ],
    ids=["unknown", "all excluded", "no such layer", "string with layers"],
)
def test_a_selection_of_nothing_is_refused(llama_cell, selection, message):
    with pytest.raises(ValueError, match=message):
        llama_cell.wrap(**selection)


def test_a_layer_that_is_no_linear_map_is_refused_and_the_model_stays_as_it_was(llama_cell):
    base = llama_cell.base()
    before = tiny_models.structure(base)
    with pytest.raises((ValueError, TypeError)):
        llama_cell.wrap(base, target_modules=["q_proj", "input_layernorm"])
    assert tiny_models.structure(base) == before
    assert not adapter_layers(base)


def test_transposed_layers_are_wrapped_or_refused_whole(case):
    base = tiny_models.conv1d_mlp()
    before = tiny_models.structure(base)
    with case.promised("conv1d"):
        peft.get_peft_model(base, case.config(target_modules=["first", "second"]))
    assert (tiny_models.structure(base) == before) == ("conv1d" in case.refuses)


def test_the_status_follows_the_life_of_an_adapter(cell):
    model = cell.wrap()
    layers = adapter_layers(model)
    status = model.get_layer_status()
    assert {entry.name for entry in status} == {name.removeprefix("base_model.") for name in layers} | (
        {"model.classifier"} if cell.model.task_type == "SEQ_CLS" else set()
    )
    for entry in status:
        assert (entry.enabled, entry.active_adapters, entry.merged_adapters) == (True, ["default"], [])
        assert entry.requires_grad == {"default": True}
        assert entry.available_adapters == ["default"]
        assert entry.devices == {"default": ["cpu"]}
    whole = model.get_model_status()
    assert whole.trainable_params == sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert (whole.adapter_model_type, whole.num_adapter_layers) == (type(model.base_model).__name__, len(status))
    assert whole.peft_types == {"default": cell.config().peft_type.value}
    model.add_adapter("other", cell.config(r=cell.case.other_r))
    whole = model.get_model_status()
    assert whole.available_adapters == ["default", "other"]
    assert whole.requires_grad == {"default": True, "other": False}
    model.merge_adapter()
    assert {tuple(entry.merged_adapters) for entry in model.get_layer_status() if entry.name != "model.classifier"} == {
        ("default",)
    }
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    assert model.get_model_status().enabled is True
    assert model.get_model_status().merged_adapters == []


def test_the_tuner_is_one_as_peft_knows_them(float_cell):
    base = float_cell.base()
    model = float_cell.wrap(base)
    tuner = model.base_model
    assert isinstance(tuner, BaseTuner)
    assert tuner.model is base
    assert model.get_base_model() is base
    config = model.peft_config["default"]
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    assert tuner.prefix == prefix
    for name in adapter_tensors(model):
        assert prefix in name, name
    for layer in adapter_layers(model).values():
        assert isinstance(layer, tuner.tuner_layer_cls if isinstance(tuner.tuner_layer_cls, type) else BaseTunerLayer)
        assert set(layer.adapter_layer_names) <= set(dir(layer))
        assert layer.weight is layer.get_base_layer().weight
    text = repr(model)
    assert all(type(layer).__name__ in text for layer in adapter_layers(model).values())


def test_attributes_of_the_base_are_reached_through_the_wrapping(float_cell):
    base = float_cell.base()
    marker = base.marker = object()
    model = float_cell.wrap(base)
    assert model.marker is marker
    assert model.config is base.config
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute
    for name, layer in adapter_layers(model).items():
        inner = layer.get_base_layer()
        width = "nx" if "Conv1D" in type(inner).__name__ else "in_features"
        assert getattr(layer, "in_features", None) == getattr(inner, width), name


# -- ties ----------------------------------------------------------------------------------------------------------


def build_tied(cell):
    return tiny_models.llama(tied=True) if cell.model.name == "llama" else tiny_models.gpt2()


@pytest.mark.parametrize("cell", cells("llama", "gpt2", storages=("float32",)), ids=str)
def test_tied_embeddings_stay_tied_and_untouched(cell):
    def tied(model):
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    base = build_tied(cell)
    assert tied(base)
    before = tiny_models.state_bytes(base)
    model = cell.wrap(base)
    assert tied(model.base_model.model)
    losses = cell.train(model)
    assert losses[-1] < losses[0]
    assert tied(model.base_model.model)
    expected = logits(model, cell.batch())
    twin = copy.deepcopy(model)
    assert tied(twin.base_model.model)
    merged = twin.merge_and_unload()
    assert tied(merged)
    torch.testing.assert_close(logits(merged, cell.batch()), expected, atol=1e-4, rtol=1e-4)
    unloaded = model.unload()
    assert tied(unloaded)
    assert tiny_models.state_bytes(unloaded) == before


def test_two_names_of_one_layer_are_wrapped_once_or_refused(mlp_cell):
    """A module that stands at two places: PEFT wraps what it finds; both places must then compute the same."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"model_type": "custom"}
            self.first = nn.Linear(24, 24)
            self.second = nn.Linear(24, 24)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    base = Shared()
    x = torch.randn(4, 24)
    expected = logits(base, x)
    model = mlp_cell.wrap(base)
    assert torch.equal(logits(model, x), expected)
    moved = logits(mlp_cell.move(model), x)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), expected)
    assert torch.equal(logits(model, x), moved)
    assert model.base_model.model.first.get_base_layer().weight is model.base_model.model.second.get_base_layer().weight
    unloaded = model.unload()
    assert unloaded.first.weight is unloaded.second.weight
    assert torch.equal(logits(unloaded, x), expected)


# -- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", cells(storages=("float32", "nf4", "int8")), ids=str)
def test_a_deep_copy_is_whole_and_independent(cell):
    batch = cell.batch()
    model = cell.moved()
    if cell.model.name == "mlp":
        cell.second(model)
    before, tensors = logits(model, batch), tensor_bytes(adapter_tensors(model))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), before)
    assert tensor_bytes(adapter_tensors(twin)) == tensors
    assert set(trained(twin)) == set(trained(model))
    mine = {value.data_ptr() for value in adapter_tensors(model).values()}
    assert not mine & {value.data_ptr() for value in adapter_tensors(twin).values()}
    cell.train(twin, steps=1)
    assert not torch.equal(logits(twin, batch), before)
    assert torch.equal(logits(model, batch), before)
    assert twin.peft_config["default"] is not model.peft_config["default"]
    assert twin.peft_config["default"].peft_type is model.peft_config["default"].peft_type
    twin.merge_adapter()
    assert torch.equal(logits(model, batch), before)


def test_a_model_pickles_and_torch_saves(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    expected = logits(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for restored in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(restored, batch), expected)
        assert set(trained(restored)) == set(trained(model))
        restored.merge_adapter()
        torch.testing.assert_close(logits(restored, batch), expected, atol=1e-4, rtol=1e-4)


# -- without data --------------------------------------------------------------------------------------------------


def test_low_cpu_mem_usage_makes_an_adapter_without_data_that_takes_a_state(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    empty = peft.get_peft_model(float_cell.base(), float_cell.config(), low_cpu_mem_usage=True)
    assert all(value.is_meta for value in trained(empty).values())
    base = {id(value) for name, value in empty.named_parameters() if "base_layer" in name}
    result = peft.set_peft_model_state_dict(empty, peft.get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    assert not any(value.is_meta for value in empty.parameters())
    assert {id(value) for name, value in empty.named_parameters() if "base_layer" in name} == base
    torch.testing.assert_close(logits(empty, batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_a_frozen_adapter_parameter_is_no_buffer_of_the_base(float_cell):
    """What the base's own state dict holds is the base's: same keys, same shapes, in the same order."""
    base = float_cell.base()
    keys = list(base.state_dict())
    model = float_cell.wrap(base, task_type=None)
    adapter = set(adapter_tensors(model))
    inside = [name for name in model.state_dict() if name not in adapter]
    assert [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in inside] == keys
