"""Saving and loading: what comes back is the adapter, in safetensors and JSON, here and where llmreg is unknown."""

from __future__ import annotations

import copy
import json
import pickle

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from contract_cases import adapter_tensors, tensor_bytes, trained
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from tiny_models import logits

import llmreg
from llmreg.errors import LlmregError


def load(cell, folder, **settings):
    return peft.PeftModel.from_pretrained(cell.base(), folder, **settings)


def test_a_saved_adapter_comes_back_bit_for_bit(cell, tmp_path):
    batch = cell.batch()
    model = cell.moved()
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model, batch), expected), "saving changed the adapter"
    restored = load(cell, tmp_path)
    assert type(restored) is type(model)
    assert type(restored.peft_config["default"]) is type(model.peft_config["default"])
    assert torch.equal(logits(restored, batch), expected)
    assert tensor_bytes(adapter_tensors(restored)) == tensor_bytes(adapter_tensors(model))
    assert not any(value.requires_grad for value in restored.parameters())
    with restored.disable_adapter():
        assert torch.equal(logits(restored, batch), logits(cell.base(), batch))


def test_a_saved_adapter_is_safetensors_and_json(float_cell, tmp_path):
    model = float_cell.moved(modules_to_save=[float_cell.model.head])
    model.save_pretrained(tmp_path)
    names = saved.files(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(names)
    assert {name.rpartition(".")[2] for name in names} <= {"safetensors", "json", "md"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors
    assert not [key for key in tensors if "default" in key], "names of adapters are no part of a file"
    assert [key for key in tensors if key.endswith(f"{float_cell.model.head}.weight")]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"]


def test_pickle_is_refused(mlp_cell, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        mlp_cell.moved().save_pretrained(tmp_path, safe_serialization=False)
    assert not saved.files(tmp_path)


def test_training_goes_on_after_loading_as_if_never_interrupted(float_cell, tmp_path):
    model = float_cell.wrap()
    float_cell.train(model, steps=2)
    model.save_pretrained(tmp_path)
    restored = load(float_cell, tmp_path, is_trainable=True)
    assert set(trained(restored)) == set(trained(model))
    assert float_cell.train(restored, steps=3) == float_cell.train(model, steps=3)
    assert tensor_bytes(adapter_tensors(restored)) == tensor_bytes(adapter_tensors(model))


def test_modules_to_save_come_back(float_cell, tmp_path):
    batch = float_cell.batch()
    model = float_cell.moved(modules_to_save=[float_cell.model.head])
    float_cell.train(model, steps=2)
    model.save_pretrained(tmp_path)
    restored = load(float_cell, tmp_path)
    assert torch.equal(logits(restored, batch), logits(model, batch))
    with restored.disable_adapter():
        assert torch.equal(logits(restored, batch), logits(float_cell.base(), batch))


def test_loading_with_low_cpu_mem_usage_gives_the_same_bits_and_leaves_nothing_on_meta(float_cell, tmp_path):
    model = float_cell.moved()
    model.save_pretrained(tmp_path)
    restored = load(float_cell, tmp_path, low_cpu_mem_usage=True)
    assert not any(value.is_meta for value in restored.state_dict().values() if isinstance(value, torch.Tensor))
    assert torch.equal(logits(restored, float_cell.batch()), logits(model, float_cell.batch()))
    assert tensor_bytes(adapter_tensors(restored)) == tensor_bytes(adapter_tensors(model))


def test_an_adapter_loads_beside_the_one_that_is_there(float_cell, tmp_path):
    batch = float_cell.batch()
    model = float_cell.moved()
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    host = float_cell.moved(r=float_cell.case.other_r)
    own = logits(host, batch)
    host.load_adapter(tmp_path, "loaded")
    assert host.active_adapters == ["default"]
    assert torch.equal(logits(host, batch), own)
    host.set_adapter("loaded")
    assert torch.equal(logits(host, batch), expected)
    host.delete_adapter("default")
    assert torch.equal(logits(host, batch), expected)


def test_each_of_several_adapters_is_saved_in_its_folder_and_only_the_selected_ones(mlp_cell, tmp_path):
    batch = mlp_cell.batch()
    model = mlp_cell.moved()
    mlp_cell.second(model)
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = logits(model, batch)
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    for folder, name in (("all", "default"), ("all/other", "other"), ("one/other", "other")):
        assert torch.equal(logits(load(mlp_cell, tmp_path / folder), batch), expected[name])
    restored = load(mlp_cell, tmp_path / "all", adapter_name="first")
    assert torch.equal(logits(restored, batch), expected["default"])


def test_saving_what_was_loaded_writes_the_same_tensors(mlp_cell, tmp_path):
    mlp_cell.moved().save_pretrained(tmp_path / "one")
    load(mlp_cell, tmp_path / "one").save_pretrained(tmp_path / "two")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert tensor_bytes(first) == tensor_bytes(second)


def test_the_state_dict_functions_of_peft_carry_the_function(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    state = peft.get_peft_model_state_dict(model)
    assert not [key for key in state if "base_layer" in key]
    fresh = float_cell.wrap()
    result = peft.set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(fresh, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
    shapes = {key: value.shape for key, value in peft.get_peft_model_state_dict(fresh).items()}
    assert shapes == {key: value.shape for key, value in state.items()}


def test_the_model_s_own_state_dict_comes_back(float_cell):
    model = float_cell.moved()
    fresh = float_cell.wrap()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, float_cell.batch()), logits(model, float_cell.batch()))


def test_a_merged_model_is_saved_as_a_plain_one(llama_cell, tmp_path):
    batch = llama_cell.batch()
    model = llama_cell.moved()
    expected = logits(model, batch)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert "adapter_config.json" not in saved.files(tmp_path)
    torch.testing.assert_close(logits(saved.load_base(tmp_path), batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_config_survives_copies_files_and_dicts(case, duplicate, tmp_path):
    config = case.config(target_modules=["b", "a"], modules_to_save=["head"], exclude_modules=["c"])
    again = duplicate(config)
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()
    assert again.peft_type is config.peft_type
    config.save_pretrained(tmp_path)
    for cls in (type(config), peft.PeftConfig):
        restored = cls.from_pretrained(tmp_path)
        assert type(restored) is type(config)
        assert restored.to_dict() == config.to_dict()
    json.dumps(config.to_dict(), default=sorted)
    assert repr(config).startswith(type(config).__name__)


def test_without_llmreg_the_adapter_computes_the_same_or_is_refused(llama_cell, tmp_path):
    base = saved.checkpoint(tmp_path / "base")
    batch = llama_cell.batch()
    model = llama_cell.moved(saved.load_base(base))
    model.save_pretrained(tmp_path / "adapter")
    if "plain peft" in llama_cell.case.refuses:
        with pytest.raises(RuntimeError):
            saved.PlainPeft.ask(base, tmp_path / "adapter", batch)
        return
    plain, warnings = saved.PlainPeft.ask(base, tmp_path / "adapter", batch)
    assert not warnings
    change = logits(model, batch) - logits(tiny_models.llama(), batch)
    assert (plain - logits(model, batch)).norm() <= 1e-4 * change.norm()
    assert saved.relative(plain, logits(model, batch)) <= 1e-6


def test_exports_of_one_rank_are_hotswapped(float_cell, tmp_path):
    batch = float_cell.batch()
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        # Without a task type: PEFT's hotswap knows no modules that are saved whole.
        model = float_cell.move(float_cell.wrap(task_type=None), seed=seed)
        outputs[name] = logits(model, batch)
        model.save_pretrained(tmp_path / name)
        if "export" in float_cell.case.refuses:
            with pytest.raises(LlmregError):
                llmreg.export_lora(tmp_path / name, tmp_path / f"{name}-lora")
            return
        llmreg.export_lora(tmp_path / name, tmp_path / f"{name}-lora", rank=2 * float_cell.case.r)
    model = load(float_cell, tmp_path / "one-lora")
    assert type(model.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(logits(model, batch), outputs["one"], atol=1e-4, rtol=1e-4)
    for name in ("two", "one", "two"):
        hotswap_adapter(model, str(tmp_path / f"{name}-lora"), adapter_name="default")
        torch.testing.assert_close(logits(model, batch), outputs[name], atol=1e-4, rtol=1e-4)
    assert (outputs["one"] - outputs["two"]).abs().max() > 1e-3
