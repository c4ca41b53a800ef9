"""What cannot be merged, or is not whole, is refused by name before anything is written."""

from __future__ import annotations

import json
import shutil
import struct

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from merge_cases import LINEAR, edit, lora, refuse, sharded_checkpoint
from safetensors.torch import load_file

from llmreg.errors import AdapterFileError, BaseMismatchError, RecipeError, UnsupportedError, WeightError
from llmreg.hub.merge import merge


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return sharded_checkpoint(tmp_path_factory.mktemp("sharded"))


# -- refused -------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_by_its_identity(method, base, tmp_path):
    model = saved.drift(peft.get_peft_model(saved.load_base(base), method(r=2, target_modules=LINEAR)))
    model.save_pretrained(tmp_path / "adapter")
    other = saved.checkpoint(tmp_path / "other", tiny_models.llama(seed=1))
    refuse(BaseMismatchError, "was trained on", tmp_path / "adapter", tmp_path, base=other)


def test_a_base_that_was_never_a_file_is_known_by_its_layers(method, tmp_path):
    live = tiny_models.llama()
    model = saved.drift(peft.get_peft_model(live, method(r=2, target_modules=LINEAR)))
    model.save_pretrained(tmp_path / "adapter")
    same = saved.checkpoint(tmp_path / "same", tiny_models.llama())
    other = saved.checkpoint(tmp_path / "other", tiny_models.llama(seed=1))
    assert merge(tmp_path / "adapter", tmp_path / "merged", base=same, check=False).note is None
    refuse(BaseMismatchError, "was trained on", tmp_path / "adapter", tmp_path / "no", base=other)


def test_targets_that_the_base_lacks_are_refused(base, tmp_path):
    adapter = lora(base, tmp_path / "lora")
    small = saved.checkpoint(tmp_path / "small", tiny_models.llama(layers=1))
    refuse(BaseMismatchError, r"layers\.1.*does not have", adapter, tmp_path, base=small)
    gpt2 = saved.checkpoint(tmp_path / "gpt2", tiny_models.gpt2())
    refuse(BaseMismatchError, "does not have", adapter, tmp_path, base=gpt2)


def test_targets_of_another_shape_are_refused(base, tmp_path):
    adapter = lora(base, tmp_path / "lora", target_modules=["k_proj", "q_proj"])
    path = adapter / "adapter_model.safetensors"
    names = [name for name in load_file(path) if "k_proj" in name]
    edit(path, lambda t: t.update({n.replace("self_attn.k_proj", "mlp.up_proj"): t.pop(n) for n in names}))
    refuse(BaseMismatchError, r"shape \(32, 64\).*\(96, 64\)", adapter, tmp_path)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_a_target_tied_to_the_embedding_is_refused(tmp_path, settings):
    base = saved.checkpoint(tmp_path / "base", tiny_models.llama(tied=True))
    adapter = lora(base, tmp_path / "lora", **settings)
    refuse(UnsupportedError, "shares between the embedding and the head", adapter, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_other_forms_of_lora_are_refused_by_name(base, tmp_path, settings, message):
    adapter = lora(base, tmp_path / "lora", **settings)
    refuse(UnsupportedError, message, adapter, tmp_path)


def test_another_peft_type_is_refused_by_name(base, tmp_path):
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(saved.load_base(base), config).save_pretrained(tmp_path / "ia3")
    refuse(UnsupportedError, "IA3", tmp_path / "ia3", tmp_path)


def test_fields_of_a_newer_peft_are_refused_only_where_they_are_set(base, tmp_path):
    adapter = lora(base, tmp_path / "lora")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_future": True}))
    refuse(UnsupportedError, "use_future", adapter, tmp_path)
    path.write_text(json.dumps({**config, "use_future": None}))
    assert merge(adapter, tmp_path / "merged", check=False).merged == 8


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantised_base_is_refused_with_what_to_give_instead(base, tmp_path, storage):
    saved.load_base(base, storage).save_pretrained(tmp_path / "quantised")
    adapter = lora(base, tmp_path / "lora")
    refuse(UnsupportedError, r"quantised \(bitsandbytes\).*16-bit base", adapter, tmp_path, base=tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    refuse(UnsupportedError, "only floats", adapter, tmp_path, base=tmp_path / "quantised")


def test_a_base_that_cannot_be_had_is_named(base, tmp_path):
    adapter = lora(base, tmp_path / "lora")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, message in (("some-org/model", "some-org/model"), ("/gone", "/gone"), (None, "does not say")):
        path.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        refuse(RecipeError, message, adapter, tmp_path)
    refuse(RecipeError, "is a file", adapter, tmp_path, base=base / "config.json")


@pytest.mark.parametrize("dtype", ["int8", "float64", torch.int8])
def test_a_dtype_without_sense_is_refused(base, tmp_path, dtype):
    refuse(RecipeError, "float32, bfloat16, float16", lora(base, tmp_path / "lora"), tmp_path, dtype=dtype)


def test_values_that_the_dtype_cannot_hold_are_refused(base, tmp_path):
    adapter = lora(base, tmp_path / "lora")
    edit(adapter / "adapter_model.safetensors", lambda t: t.update({k: v * 1e4 for k, v in t.items()}))
    refuse(WeightError, r"q_proj|v_proj|up_proj|down_proj", adapter, tmp_path, dtype="float16")


# -- damaged -------------------------------------------------------------------------------------------------------


def test_an_adapter_changed_after_it_was_saved_is_refused(method, base, tmp_path):
    model = saved.drift(peft.get_peft_model(saved.load_base(base), method(r=2, target_modules=LINEAR)))
    model.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_model.safetensors", lambda t: t.update({k: 2 * v for k, v in t.items()}))
    refuse(AdapterFileError, "not the file that was saved", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_diverged_is_refused_by_layer(base, tmp_path, value):
    adapter = lora(base, tmp_path / "lora")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    edit(adapter / "adapter_model.safetensors", lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    refuse(AdapterFileError, r"layers\.1\.mlp\.up_proj.*NaN or infinite", adapter, tmp_path)


def test_half_a_layer_or_another_rank_is_refused(base, tmp_path):
    for half, message in (("lora_A", "no lora_A|only one"), ("lora_B", "only one")):
        adapter = lora(base, tmp_path / half)
        name = f"base_model.model.model.layers.0.mlp.up_proj.{half}.weight"
        edit(adapter / "adapter_model.safetensors", lambda tensors, name=name: tensors.pop(name))
        refuse(AdapterFileError, message, adapter, tmp_path)
    adapter = lora(base, tmp_path / "rank")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    refuse(AdapterFileError, "gives it rank 8", adapter, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"peft_type": "LORA", "r": "four"}', "{}", "[" * 100_000])
def test_a_damaged_adapter_config_is_refused(base, tmp_path, content):
    adapter = lora(base, tmp_path / "lora")
    (adapter / "adapter_config.json").write_text(content)
    refuse(AdapterFileError, "damaged|rank", adapter, tmp_path)


def test_missing_and_pickled_adapters_are_refused(base, tmp_path):
    refuse(AdapterFileError, r"adapter_config\.json is missing", tmp_path / "nowhere", tmp_path)
    adapter = lora(base, tmp_path / "lora")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refuse(AdapterFileError, "pickle", adapter, tmp_path)


@pytest.mark.parametrize("part", ["base", "adapter"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "header", "empty"])
def test_damaged_weight_files_are_refused(base, tmp_path, part, damage):
    adapter = lora(base, tmp_path / "lora")
    copy = shutil.copytree(base, tmp_path / "copy")
    path = adapter / "adapter_model.safetensors" if part == "adapter" else copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-100],
            "longer": content + b"\0" * 8,
            "header": struct.pack("<Q", 1 << 40) + content[8:],
            "empty": b"",
        }[damage]
    )
    refuse(AdapterFileError if part == "adapter" else WeightError, "whole safetensors", adapter, tmp_path, base=copy)


def test_damaged_checkpoints_are_refused(sharded, tmp_path):
    adapter = lora(sharded, tmp_path / "lora")

    def broken(name):
        return shutil.copytree(sharded, tmp_path / name)

    missing = broken("missing")
    next(missing.glob("*-00002-*.safetensors")).unlink()
    refuse(WeightError, "not there", adapter, tmp_path, base=missing)
    index = broken("index")
    content = json.loads((index / "model.safetensors.index.json").read_text())
    content["weight_map"]["model.layers.9.weight"] = next(iter(content["weight_map"].values()))
    (index / "model.safetensors.index.json").write_text(json.dumps(content))
    refuse(WeightError, r"model\.layers\.9\.weight", adapter, tmp_path, base=index)
    config = broken("config")
    (config / "config.json").unlink()
    refuse(WeightError, r"config\.json is missing", adapter, tmp_path, base=config)
    pickled = broken("pickled")
    for path in pickled.glob("*.safetensors*"):
        path.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    refuse(WeightError, "pickle", adapter, tmp_path, base=pickled)
