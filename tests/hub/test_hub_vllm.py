"""What vLLM would refuse or misread is named beforehand, each problem with what to do."""

from __future__ import annotations

import json

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import llmreg
from llmreg.errors import AdapterFileError
from llmreg.hub.vllm import check_vllm, vllm_lora_rank

LINEAR = ["q_proj", "v_proj"]


def _lora(folder, **settings):
    settings = {"r": 4, "target_modules": LINEAR, "init_lora_weights": False, **settings}
    peft.get_peft_model(tiny_models.llama(), LoraConfig(**settings)).save_pretrained(folder)
    return folder


def _only(problems, *words):
    assert len(problems) == 1, problems
    assert all(word in problems[0] for word in words), problems
    assert problems[0].endswith(".")


@pytest.mark.parametrize(("rank", "option"), [(1, 1), (4, 8), (8, 8), (33, 64), (65, 128), (300, 320), (512, 512)])
def test_plain_lora_is_served_with_the_smallest_rank_that_holds_it(tmp_path, rank, option):
    adapter = _lora(tmp_path / "lora", r=rank, use_rslora=rank == 8)
    assert check_vllm(adapter) == []
    assert vllm_lora_rank(adapter) == option


def test_what_llmreg_saves_is_served(method, tmp_path):
    base = saved.checkpoint(tmp_path / "base")
    model = peft.get_peft_model(saved.load_base(base), method(r=5, target_modules=LINEAR))
    saved.drift(model).save_pretrained(tmp_path / "adapter")
    assert check_vllm(tmp_path / "adapter") == []
    assert vllm_lora_rank(tmp_path / "adapter") == {5: 8, 10: 16}[5 * method.SAVED_RANK]


def test_a_rank_above_512_is_refused(tmp_path):
    adapter = _lora(tmp_path / "lora", r=513)
    _only(check_vllm(adapter), "up to 512", "513", "--rank 512")
    assert vllm_lora_rank(adapter) is None


def test_patterns_that_change_a_scale_are_misread_until_a_rank_folds_them_in(tmp_path):
    adapter = _lora(tmp_path / "lora", rank_pattern={"v_proj": 9}, alpha_pattern={"layers.0.self_attn.q_proj": 5})
    _only(check_vllm(adapter), "scales every layer by 2", "llmreg export --rank")
    assert vllm_lora_rank(adapter) == 16
    llmreg.export_lora(adapter, tmp_path / "exported", rank=9)
    assert json.loads((tmp_path / "exported" / "adapter_config.json").read_text())["rank_pattern"]
    assert check_vllm(tmp_path / "exported") == []


def test_patterns_that_keep_the_scale_are_served(tmp_path):
    adapter = _lora(tmp_path / "lora", r=4, lora_alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4})
    assert check_vllm(adapter) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "llmreg merge"]),
        ({"use_dora": True}, ["use_dora", "llmreg merge"]),
        ({"lora_bias": True}, ["lora_bias", "llmreg merge"]),
        ({"target_modules": ["lm_head"]}, ["lm_head", "head"]),
        ({"target_modules": ["embed_tokens"]}, ["embed_tokens", "embedding"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights='pissa'", "convert"]),
    ],
    ids=str,
)
def test_other_forms_are_named_with_the_way_out(tmp_path, settings, words):
    problems = check_vllm(_lora(tmp_path / "lora", **settings))
    assert any(all(word in problem for word in words) for problem in problems), problems
    assert all(problem.endswith(".") for problem in problems)


def test_trained_biases_are_named(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query"], bias="lora_only")
    peft.get_peft_model(tiny_models.bert_classifier(), config).save_pretrained(tmp_path / "lora")
    problems = check_vllm(tmp_path / "lora")
    assert "bias='none'" in problems[0]
    assert "no lora_A or lora_B" in problems[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_dtype_that_vllm_does_not_take_is_named(tmp_path, dtype):
    path = _lora(tmp_path / "lora") / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    _only(check_vllm(tmp_path / "lora"), "F64" if dtype == torch.float64 else "I8", "--dtype")


def test_pickles_and_other_peft_types_are_named(tmp_path):
    adapter = _lora(tmp_path / "lora")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    _only(check_vllm(adapter), "safetensors")
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(tiny_models.llama(), config).save_pretrained(tmp_path / "ia3")
    _only(check_vllm(tmp_path / "ia3"), "IA3")


@pytest.mark.parametrize("content", [None, "", "[]", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "r": "x"}'])
def test_a_damaged_config_is_an_error(tmp_path, content):
    path = _lora(tmp_path / "lora") / "adapter_config.json"
    path.unlink() if content is None else path.write_text(content)
    for check in (check_vllm, vllm_lora_rank):
        with pytest.raises(AdapterFileError, match=r"adapter_config\.json is (missing|damaged)|is damaged"):
            check(tmp_path / "lora")


def test_a_damaged_weights_file_is_an_error(tmp_path):
    path = _lora(tmp_path / "lora") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
        check_vllm(tmp_path / "lora")
