"""Law 2: loaded with llmreg, a saved adapter is the method again to the last bit; without its sidecar, plain LoRA."""

from __future__ import annotations

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

LINEAR = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def trained(method, base, tmp_path, tokens):
    """(model, folder) of a trained adapter that was saved."""
    config = method(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = peft.get_peft_model(saved.load_base(base), config)
    tiny_models.train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def _same(loaded, model, tokens, name="default"):
    assert saved.factor_bytes(loaded, name) == saved.factor_bytes(model)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapter_is_the_method_again_bit_for_bit(trained, base, tokens, low_cpu_mem_usage, is_trainable):
    model, folder = trained
    loaded = PeftModel.from_pretrained(
        saved.load_base(base), folder, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    _same(loaded, model, tokens)
    assert type(loaded) is type(model)
    mine, theirs = loaded.peft_config["default"], model.peft_config["default"]
    assert type(mine) is type(theirs)
    assert mine.inference_mode is not is_trainable
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    if is_trainable:
        assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not any("lora_A0" in name or "lora_B0" in name for name in trainable)
    else:
        assert trainable == set()


def test_training_continues_as_if_never_interrupted(trained, base, tokens):
    model, folder = trained
    loaded = PeftModel.from_pretrained(saved.load_base(base), folder, is_trainable=True)
    assert tiny_models.train(loaded, tokens) == tiny_models.train(model, tokens)
    _same(loaded, model, tokens)


def test_saving_what_was_loaded_gives_the_same_tensors(trained, base, tmp_path):
    _, folder = trained
    PeftModel.from_pretrained(saved.load_base(base), folder).save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "llmreg_factors.safetensors", "llmreg.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("storage", ["nf4", "int8", "bfloat16"])
def test_half_precision_and_quantised_bases_come_back_bit_for_bit(method, base, tmp_path, tokens, storage):
    model = peft.get_peft_model(
        saved.load_base(base, storage), method(r=4, target_modules=LINEAR), autocast_adapter_dtype=storage != "bfloat16"
    )
    saved.drift(model, size=0.05)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        saved.load_base(base, storage), tmp_path / "adapter", autocast_adapter_dtype=storage != "bfloat16"
    )
    _same(loaded, model, tokens)


def test_modules_to_save_and_patterns_come_back_bit_for_bit(method, base, tmp_path, tokens):
    config = method(
        r=4,
        target_modules=LINEAR,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 1.5},
        modules_to_save=["lm_head"],
    )
    model = peft.get_peft_model(saved.load_base(base), config)
    tiny_models.train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    _same(PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter"), model, tokens)


def test_conv1d_comes_back_bit_for_bit(method, tmp_path, tokens):
    base = saved.checkpoint(tmp_path / "base", tiny_models.gpt2())
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    tiny_models.train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    _same(PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter"), model, tokens)


def test_without_sidecar_it_is_an_inference_lora_of_the_same_function(method, trained, base, tokens):
    model, folder = trained
    (folder / "llmreg.json").unlink()
    loaded = PeftModel.from_pretrained(saved.load_base(base), folder)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert loaded.peft_config["default"].r == 4 * method.SAVED_RANK
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(model, tokens)) <= 1e-6


def test_explicit_lora_config_mounts_the_folder_as_plain_lora(trained, base, tokens):
    model, folder = trained
    loaded = PeftModel.from_pretrained(saved.load_base(base), folder, config=LoraConfig.from_pretrained(folder))
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(model, tokens)) <= 1e-6


def test_loading_into_a_live_adapter_is_bit_exact(trained, method, base, tokens):
    """What Trainer's resume and load_best_model_at_end do."""
    model, folder = trained
    config = method(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", seed=1)
    live = peft.get_peft_model(saved.load_base(base), config)
    tiny_models.train(live, tokens.flip(0), steps=1)
    parameters = {name: id(parameter) for name, parameter in live.named_parameters()}
    live.load_adapter(folder, "default", is_trainable=True)
    _same(live, model, tokens)
    assert {name: id(parameter) for name, parameter in live.named_parameters()} == parameters, "optimizers hold these"


def test_loading_into_a_live_half_precision_adapter_keeps_its_dtype(method, base, tmp_path, tokens):
    """TRL trains on a quantised base in bf16; PEFT would hand back fp32 parameters on resume."""
    config = method(r=4, target_modules=LINEAR)
    live = peft.get_peft_model(saved.load_base(base, "nf4"), config)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    saved.drift(live, size=0.05)
    before = saved.factor_bytes(live)
    live.save_pretrained(tmp_path / "adapter")
    saved.drift(live, size=0.2, seed=1)
    live.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert {p.dtype for p in live.parameters() if p.requires_grad} == {torch.bfloat16}
    assert saved.factor_bytes(live) == before


def test_peft_state_dict_functions_keep_the_function(trained, method, base, tokens):
    model, _ = trained
    state = get_peft_model_state_dict(model)
    assert all(".lora_A0" not in key and ".lora_B0" not in key for key in state)
    other = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))
    result = set_peft_model_state_dict(other, state)
    assert result.unexpected_keys == []
    assert saved.relative(saved.outputs(other, tokens), saved.outputs(model, tokens)) <= 1e-6


@pytest.mark.parametrize("first", ["lora", "additive"])
def test_saved_adapter_and_plain_lora_live_side_by_side(trained, method, base, tmp_path, tokens, first):
    model, folder = trained
    torch.manual_seed(0)
    plain = peft.get_peft_model(saved.load_base(base), LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False))
    plain.save_pretrained(tmp_path / "plain")
    order = {"lora": [tmp_path / "plain", folder], "additive": [folder, tmp_path / "plain"]}[first]
    both = PeftModel.from_pretrained(saved.load_base(base), order[0], adapter_name="one")
    both.load_adapter(order[1], "two")
    names = dict(zip(("plain", "ours") if first == "lora" else ("ours", "plain"), ("one", "two"), strict=True))
    both.set_adapter(names["ours"])
    _same(both, model, tokens, names["ours"])
    both.set_adapter(names["plain"])
    assert torch.equal(saved.outputs(both, tokens), saved.outputs(plain, tokens))
    with both.disable_adapter():
        assert torch.equal(saved.outputs(both, tokens), saved.outputs(saved.load_base(base), tokens))


def test_one_folder_loads_under_two_names(trained, base, tokens):
    model, folder = trained
    twice = PeftModel.from_pretrained(saved.load_base(base), folder, adapter_name="one")
    twice.load_adapter(folder, "two", is_trainable=True)
    for name in ("one", "two"):
        twice.set_adapter(name)
        _same(twice, model, tokens, name)


def test_subfolders_of_several_adapters_come_back(method, base, tmp_path, tokens):
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=LINEAR))
    model.add_adapter("second", method(r=2, target_modules=["q_proj"]))
    for name in ("default", "second"):
        saved.drift(model, name, size=0.05)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    named = PeftModel.from_pretrained(saved.load_base(base), tmp_path, subfolder="second", adapter_name="second")
    for name in ("default", "second"):
        assert saved.factor_bytes(loaded, name) == saved.factor_bytes(model, name)
    assert saved.factor_bytes(named, "second") == saved.factor_bytes(model, "second")


def test_selected_adapters_alone_are_written(method, base, tmp_path):
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=LINEAR))
    model.add_adapter("second", method(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    written = {name.split("/")[0] for name in saved.files(tmp_path)}
    assert written == {"README.md", "second"}


def test_auto_model_finds_base_and_adapter(trained, tokens):
    model, folder = trained
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    _same(loaded, model, tokens)


def test_gathered_state_dict_saves_the_same_files(trained, tmp_path):
    """Trainer passes `state_dict=` where the model is sharded."""
    model, folder = trained
    model.save_pretrained(tmp_path / "gathered", state_dict=model.state_dict())
    for name in ("adapter_model.safetensors", "llmreg_factors.safetensors", "llmreg.json"):
        assert (tmp_path / "gathered" / name).read_bytes() == (folder / name).read_bytes(), name


def test_other_processes_of_a_distributed_run_write_nothing(trained, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert saved.files(tmp_path / "rank1") == []


def test_a_newer_save_replaces_an_older_one_whole(trained, base, tmp_path, tokens):
    model, folder = trained
    tiny_models.train(model, tokens, steps=1)
    model.save_pretrained(folder)
    _same(PeftModel.from_pretrained(saved.load_base(base), folder), model, tokens)
    assert not [name for name in saved.files(tmp_path) if "/." in name or name.startswith(".")], "nothing temporary"


def test_plain_lora_saved_over_an_older_adapter_loads_as_itself(trained, base, tokens):
    _, folder = trained
    torch.manual_seed(0)
    plain = peft.get_peft_model(saved.load_base(base), LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False))
    plain.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(saved.load_base(base), folder)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(plain, tokens))


def test_overlapping_patterns_mean_after_reloading_what_they_meant_before(method, base, tmp_path, tokens):
    """PEFT takes the first pattern that matches, and writes them sorted."""
    config = method(
        r=4,
        lora_alpha=4,
        target_modules=LINEAR,
        rank_pattern={"v_proj": 2, "layers.0.self_attn.v_proj": 3},
        alpha_pattern={"v_proj": 1, "layers.0.self_attn.v_proj": 9},
    )
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
    model.save_pretrained(tmp_path / "adapter")
    _same(PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter"), model, tokens)
    (tmp_path / "adapter" / "llmreg.json").unlink()
    plain = PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter")
    assert saved.relative(saved.outputs(plain, tokens), saved.outputs(model, tokens)) <= 1e-6
