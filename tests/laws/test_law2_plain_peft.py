"""Law 2: what is saved loads in plain PEFT, in a process that has never imported llmreg, and computes the same."""

from __future__ import annotations

import json

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from peft import LoraConfig
from safetensors.torch import load_file

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _check(model, base, folder, tokens, limit=1e-6, **kwargs):
    """Save, load by plain PEFT, compare; nothing unexpected may be said."""
    model.save_pretrained(folder)
    plain, warnings = saved.PlainPeft.ask(base, folder, tokens, **kwargs)
    assert warnings == []
    error = saved.relative(plain, saved.outputs(model, tokens))
    assert error <= limit, f"relative error of the logits {error:.2e}"
    return error


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_real_llama_loads_in_plain_peft_with_equal_logits(method, tmp_path, size):
    base, tokens = saved.stories()
    model = peft.get_peft_model(saved.load_base(base), method(r=8, target_modules=LINEAR, task_type="CAUSAL_LM"))
    before = saved.outputs(model, tokens)
    saved.drift(model, size=size)
    assert saved.relative(saved.outputs(model, tokens), before) > size / 10
    _check(model, base, tmp_path / "adapter", tokens)


def test_real_encoder_loads_in_plain_peft_with_equal_outputs(method, tmp_path):
    base, tokens = saved.minilm()
    model = peft.get_peft_model(
        saved.load_base(base, encoder=True), method(r=16, target_modules=["query", "value", "dense"])
    )
    saved.drift(model, size=0.01)
    _check(model, base, tmp_path / "adapter", tokens, encoder=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_bases_load_in_plain_peft(method, base, tmp_path, tokens, storage):
    model = peft.get_peft_model(saved.load_base(base, storage), method(r=4, target_modules=LINEAR))
    saved.drift(model, size=0.05)
    _check(model, base, tmp_path / "adapter", tokens, storage=storage)


def test_rslora_with_rank_and_alpha_patterns_loads_in_plain_peft(method, base, tmp_path, tokens):
    config = method(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=LINEAR,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7},
        alpha_pattern={"q_proj": 3, "layers.0.self_attn.v_proj": 1.5, "layers.1.mlp.up_proj": 5},
    )
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
    _check(model, base, tmp_path / "adapter", tokens)


def test_conv1d_loads_in_plain_peft(method, tmp_path, tokens):
    base = saved.checkpoint(tmp_path / "base", tiny_models.gpt2())
    config = method(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
    _check(model, base, tmp_path / "adapter", tokens)


def test_modules_to_save_load_in_plain_peft(method, base, tmp_path, tokens):
    config = method(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    _check(model, base, tmp_path / "adapter", tokens)


def test_layer_selection_and_regex_targets_load_in_plain_peft(method, base, tmp_path, tokens):
    for number, config in enumerate(
        (
            method(r=2, target_modules=r".*\.self_attn\.[qv]_proj"),
            method(r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
            method(r=2, target_modules="all-linear", exclude_modules=["down_proj"]),
        )
    ):
        model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
        _check(model, base, tmp_path / str(number), tokens)


def test_low_cpu_mem_usage_loads_in_plain_peft(method, base, tmp_path, tokens):
    model = saved.drift(peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=LINEAR)), size=0.05)
    _check(model, base, tmp_path / "adapter", tokens, low_cpu_mem_usage=True)


def test_each_adapter_of_several_loads_from_its_folder_in_plain_peft(method, base, tmp_path, tokens):
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=LINEAR))
    model.add_adapter("second", method(r=2, target_modules=["q_proj"]))
    model.add_adapter("plain", LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    saved.drift(model, size=0.05)
    saved.drift(model, "second", size=0.05, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    for name, folder in (("default", "."), ("second", "second"), ("plain", "plain")):
        model.set_adapter(name)
        plain, warnings = saved.PlainPeft.ask(base, tmp_path / "adapter" / folder, tokens)
        assert warnings == []
        assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6


def test_saved_adapter_loads_beside_another_in_plain_peft(method, base, tmp_path, tokens):
    for name, seed in (("first", 0), ("second", 1)):
        model = saved.drift(peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=LINEAR)), seed=seed)
        model.save_pretrained(tmp_path / name)
    plain, warnings = saved.PlainPeft.ask(base, [tmp_path / "first", tmp_path / "second"], tokens)
    assert warnings == []
    assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6


@pytest.mark.parametrize("model_name", ["stories", "tiny"])
def test_bfloat16_files_hold_a_one_percent_update_to_one_percent(method, base, tmp_path, tokens, model_name):
    folder = saved.stories()[0] if model_name == "stories" else base
    model = peft.get_peft_model(
        saved.load_base(folder, "bfloat16"), method(r=8, target_modules=LINEAR), autocast_adapter_dtype=False
    )
    saved.drift(model, size=0.01)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, layer in saved.additive_layers(model).items():
        update = saved.delta(layer)
        assert 0.005 < float(update.norm() / saved.weight_norm(layer)) < 0.02
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert down.dtype == torch.bfloat16
        assert up.dtype == layer.factors("default")[layer.form("default").trained[-1]].dtype
        stored = layer.scaling["default"] * (up.double() @ down.double())
        assert saved.relative(stored, update) <= 0.01, name


def test_bfloat16_base_gives_the_same_logits_in_plain_peft(method, base, tmp_path, tokens):
    """Plain PEFT computes `W x + s B A x` with the products rounded to bf16, so only bf16's own accuracy is left."""
    model = peft.get_peft_model(saved.load_base(base, "bfloat16"), method(r=4, target_modules=LINEAR))
    saved.drift(model, size=0.05)
    _check(model, base, tmp_path / "adapter", tokens, limit=1e-2, storage="bfloat16")


def test_files_are_safetensors_and_json_and_describe_a_plain_lora_of_twice_the_rank(method, base, tmp_path):
    config = method(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM")
    peft.get_peft_model(saved.load_base(base), config).save_pretrained(tmp_path / "adapter")
    assert saved.files(tmp_path) == [
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/llmreg.json",
        "adapter/llmreg_factors.safetensors",
    ]
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written["init_lora_weights"] is True
    assert (written["r"], written["lora_alpha"]) == (4 * method.SAVED_RANK, 8 * method.SAVED_RANK)
    assert written["task_type"] == "CAUSAL_LM"
    assert set(written) == set(LoraConfig().to_dict()), "no key that plain PEFT does not know"
    ranks = {tuple(value.shape) for value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()}
    assert all(4 * method.SAVED_RANK in shape for shape in ranks)


def test_untrained_adapter_adds_exactly_nothing_in_plain_peft(method, base, tmp_path, tokens):
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=LINEAR))
    model.save_pretrained(tmp_path / "adapter")
    plain, _ = saved.PlainPeft.ask(base, tmp_path / "adapter", tokens)
    assert torch.equal(plain, saved.outputs(saved.load_base(base), tokens))
