"""Merging on disk: what PEFT computes in memory, whatever the base calls its tensors."""

from __future__ import annotations

import json
import shutil

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from merge_cases import LINEAR, PATTERNS, file_bytes, lora, peft_merged, sharded_checkpoint, tensor_bytes
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, CLIPTextConfig, CLIPTextModel

from llmreg import pocket
from llmreg.hub import streaming
from llmreg.hub.merge import merge


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return sharded_checkpoint(tmp_path_factory.mktemp("sharded"))


# -- the values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, PATTERNS], ids=["plain", "patterns-and-rslora"])
def test_merged_logits_are_those_of_pefts_merge(base, tmp_path, tokens, settings):
    adapter = lora(base, tmp_path / "lora", **settings)
    report = merge(adapter, tmp_path / "merged")
    expected = saved.outputs(peft_merged(base, adapter), tokens)
    assert saved.relative(saved.outputs(saved.load_base(tmp_path / "merged"), tokens), expected) <= 1e-6
    assert saved.relative(saved.outputs(saved.load_base(base), tokens), expected) > 0.05
    assert report.merged == 8
    assert report.parity["merged"]["relative"] <= 1e-6


def test_methods_merge_to_what_they_compute_unmerged(method, base, tmp_path, tokens):
    config = method(r=4, target_modules=LINEAR, rank_pattern={"v_proj": 2})
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.1)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    expected = saved.outputs(model, tokens)
    assert saved.relative(saved.outputs(saved.load_base(tmp_path / "merged"), tokens), expected) <= 1e-6
    assert report.parity["exported"]["compared"] == "the adapter read as plain LoRA"
    assert report.parity["exported"]["relative"] <= 1e-6
    assert report.parity["merged"]["relative"] <= 1e-6


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
def test_every_merged_value_is_the_exact_one_rounded_once(tmp_path, stored):
    base = saved.checkpoint(tmp_path / "base", tiny_models.llama(stored))
    adapter = lora(base, tmp_path / "lora", **PATTERNS)
    merge(adapter, tmp_path / "merged", check=False)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    layers = PeftModel.from_pretrained(tiny_models.llama("float64"), adapter).double()
    epsilon = torch.finfo(torch.float64 if stored == "float64" else torch.float32).eps
    for name in (name for name in before if name.split(".")[-2] in LINEAR):
        layer = layers.base_model.model.get_submodule(name.removesuffix(".weight"))
        exact = before[name].double() + layer.get_delta_weight("default")
        assert after[name].dtype == before[name].dtype
        error = (after[name].double() - exact).abs()
        ulp = torch.finfo(after[name].dtype).eps
        assert torch.all(error <= exact.abs() * ulp / 2 + 20 * epsilon * exact.abs().max()), name
        if stored == "bfloat16":  # far from a tie in fp32: the same number
            assert (after[name] == exact.bfloat16()).float().mean() > 0.999


def test_a_bf16_merge_differs_from_the_adapter_by_bf16_rounding(sharded, tmp_path, tokens):
    adapter = lora(sharded, tmp_path / "lora")
    report = merge(adapter, tmp_path / "merged")
    merged = saved.outputs(saved.load_base(tmp_path / "merged"), tokens)
    assert saved.relative(merged, saved.outputs(peft_merged(sharded, adapter), tokens)) <= 1e-2
    assert 1e-5 < report.parity["merged"]["relative"] <= 1e-2


def test_blocks_smaller_than_a_row_change_nothing(base, tmp_path, monkeypatch):
    adapter = lora(base, tmp_path / "lora")
    merge(adapter, tmp_path / "one", check=False)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 100)
    merge(adapter, tmp_path / "two", check=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-6, atol=1e-7) for name in one)


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"bias": "lora_only"}, {"bias": "all"}], ids=str)
def test_biases_of_an_adapter_are_merged(tmp_path, tokens, settings):
    base = saved.checkpoint(tmp_path / "base", tiny_models.bert_classifier())
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "lora")
    report = merge(tmp_path / "lora", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    # These logits are ten times smaller than what they are sums of, so float32 rounding weighs more: 2e-6 on AMD EPYC.
    assert saved.relative(saved.outputs(merged, tokens), saved.outputs(model, tokens)) <= 5e-6
    assert report.parity["merged"]["relative"] <= 5e-6


def test_modules_to_save_replace_the_bases(base, tmp_path, tokens):
    adapter = lora(base, tmp_path / "lora", modules_to_save=["lm_head", "norm"])
    report = merge(adapter, tmp_path / "merged")
    expected = saved.outputs(peft_merged(base, adapter), tokens)
    assert saved.relative(saved.outputs(saved.load_base(tmp_path / "merged"), tokens), expected) <= 1e-6
    assert (report.merged, report.replaced) == (8, 6)  # every norm


def test_a_hub_id_is_read_from_the_cache(base, tmp_path, monkeypatch):
    """Offline, and through the links that the cache is made of; they arrive as files."""
    repository, commit = tmp_path / "models--some-org--tiny", "c" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in saved.files(base):
        (snapshot / name).symlink_to(base / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    report = merge(lora(base, tmp_path / "lora"), tmp_path / "merged", base="some-org/tiny", check=False)
    assert report.base == "some-org/tiny"
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    assert "base_model: some-org/tiny" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapted_head_of_its_own_is_merged(base, tmp_path, tokens):
    adapter = lora(base, tmp_path / "lora", target_modules=["lm_head", "q_proj"])
    assert any("lm_head.base_layer.weight" in name for name in load_file(adapter / "adapter_model.safetensors"))
    merge(adapter, tmp_path / "merged", check=False)
    expected = saved.outputs(peft_merged(base, adapter), tokens)
    assert saved.relative(saved.outputs(saved.load_base(tmp_path / "merged"), tokens), expected) <= 1e-6


def test_conv1d_is_merged_as_it_is_stored(method, tmp_path, tokens):
    base = saved.checkpoint(tmp_path / "base", tiny_models.gpt2())
    config = method(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.1)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "merged")  # c_proj of attention is square: shapes do not tell
    expected = saved.outputs(model, tokens)
    assert saved.relative(saved.outputs(saved.load_base(tmp_path / "merged"), tokens), expected) <= 1e-6
    assert report.parity["merged"]["relative"] <= 1e-6


def test_the_pocket_model_is_found_by_its_identity(method, tmp_path, tokens):
    model = peft.get_peft_model(pocket.load_model(), method(r=2, target_modules=["q_proj"]))
    saved.drift(model).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/of/another/machine"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for number, base in enumerate((None, "pocket", pocket.path())):
        report = merge(tmp_path / "adapter", tmp_path / f"merged{number}", base=base, check=number == 0)
        assert report.base == "pocket"
    assert "float32" in report.note  # trained in it, stored in float16
    assert file_bytes(tmp_path / "merged0") == file_bytes(tmp_path / "merged1") == file_bytes(tmp_path / "merged2")
    merged = saved.load_base(tmp_path / "merged0")
    assert saved.relative(saved.outputs(merged, tokens), saved.outputs(model, tokens)) <= 1e-2


def test_a_real_llama_merges(method, tmp_path):
    base, tokens = saved.stories()
    model = saved.drift(peft.get_peft_model(saved.load_base(base), method(r=4, target_modules="all-linear")))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", check=False)
    merged = saved.load_base(tmp_path / "merged")
    assert saved.relative(saved.outputs(merged, tokens), saved.outputs(model, tokens)) <= 1e-5


# -- names ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_models_prefix_is_found(tmp_path, tokens):
    """As GPT-2 lies on the Hub: `h.0...`, while the model with its head says `transformer.h.0...`."""
    base = saved.checkpoint(tmp_path / "base", tiny_models.gpt2())
    tensors = load_file(base / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = lora(base, tmp_path / "lora", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    report = merge(adapter, tmp_path / "merged")
    assert report.parity["merged"]["relative"] <= 1e-6
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == tensors.keys()
    expected = saved.outputs(peft_merged(base, adapter), tokens)
    assert saved.relative(saved.outputs(saved.load_base(tmp_path / "merged"), tokens), expected) <= 1e-6


def test_names_that_transformers_changes_while_loading_are_found(tmp_path, tokens):
    """CLIP's text model has `encoder...` in memory and `text_model.encoder...` on disk."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPTextConfig(**size, vocab_size=tiny_models.VOCABULARY, max_position_embeddings=32, eos_token_id=2)
    CLIPTextModel(config).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors = {f"text_model.{name}": value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = CLIPTextModel.from_pretrained(tmp_path / "base").eval()
    on_disk = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert not set(on_disk) & set(model.state_dict())
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "lora")
    report = merge(tmp_path / "lora", tmp_path / "merged")
    assert report.parity["merged"]["relative"] <= 1e-6
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == on_disk
    merged = CLIPTextModel.from_pretrained(tmp_path / "merged")
    assert saved.relative(merged(tokens).last_hidden_state, model(tokens).last_hidden_state) <= 1e-6


def test_an_adapter_of_the_model_with_a_head_merges_into_the_headless_checkpoint(base, tmp_path, tokens):
    headless = tmp_path / "headless"
    saved.load_base(base).model.save_pretrained(headless)
    adapter = lora(base, tmp_path / "lora")
    report = merge(adapter, tmp_path / "merged", base=headless)
    assert "different classes" in report.parity_skipped
    expected = saved.outputs(peft_merged(base, adapter).model, tokens)
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert saved.relative(saved.outputs(merged, tokens), expected) <= 1e-6


def test_an_adapter_of_the_headless_model_merges_into_the_checkpoint_with_a_head(base, tmp_path, tokens):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False)
    model = peft.get_peft_model(AutoModel.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "lora")
    merge(tmp_path / "lora", tmp_path / "merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert saved.relative(saved.outputs(merged, tokens), saved.outputs(model, tokens)) <= 1e-6


def test_a_model_class_that_transformers_does_not_have_is_merged_by_name(base, tmp_path):
    adapter = lora(base, tmp_path / "lora")
    unknown = shutil.copytree(base, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"]}))
    report = merge(adapter, tmp_path / "merged", base=unknown)
    assert "does not know" in report.parity_skipped
    merge(adapter, tmp_path / "known", check=False)
    assert tensor_bytes(tmp_path / "merged") == tensor_bytes(tmp_path / "known")


# -- parity --------------------------------------------------------------------------------------------------------


def test_parity_compares_the_recompressed_lora_beside_the_adapter(method, base, tmp_path):
    import llmreg

    config = method(r=4, target_modules=LINEAR)
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.1)
    model.save_pretrained(tmp_path / "adapter")
    llmreg.export_lora(tmp_path / "adapter", tmp_path / "lora", rank=2)
    parity = merge(tmp_path / "adapter", tmp_path / "merged").parity
    assert parity["exported"]["compared"] == "lora/ beside the adapter"
    assert parity["exported"]["relative"] > 1e-3 > 1e-6 >= parity["merged"]["relative"]
    assert parity["exported"]["maximum"] > parity["merged"]["maximum"] > 0


def test_parity_is_skipped_where_the_model_does_not_fit(base, tmp_path, monkeypatch):
    from llmreg.hub import parity

    monkeypatch.setattr(parity, "_free_memory", lambda: 1000)
    report = merge(lora(base, tmp_path / "lora"), tmp_path / "merged")
    assert report.parity is None
    assert "more than half of the" in report.parity_skipped
