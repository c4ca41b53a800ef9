"""Exporting: exact as it is, recompressed with the error it reports, and never silently wrong."""

from __future__ import annotations

import json

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

import llmreg
from llmreg.errors import AdapterFileError, RecipeError
from llmreg.hub.export import recompress

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def trained(method, base, tmp_path):
    config = method(
        r=4,
        target_modules=LINEAR,
        use_rslora=True,
        rank_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 6},
        alpha_pattern={"q_proj": 3, "layers.0.self_attn.v_proj": 7},
    )
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
    model.save_pretrained(tmp_path / "adapter")
    return model


def _load(base, folder):
    return PeftModel.from_pretrained(saved.load_base(base), folder)


def _update_error(model, folder):
    """Frobenius norm of (exported - trained update) over the trained update's, all layers together, in fp64."""
    exported = PeftModel.from_pretrained(tiny_models.llama("float64"), folder)
    dropped = whole = 0.0
    for name, layer in saved.additive_layers(model).items():
        update = saved.delta(layer)
        other = exported.get_submodule(name)
        A, B = other.lora_A["default"].weight.double(), other.lora_B["default"].weight.double()
        dropped += float((other.scaling["default"] * (B @ A) - update).norm() ** 2)
        whole += float(update.norm() ** 2)
    return (dropped / whole) ** 0.5


def test_export_without_rank_is_the_saved_form_to_the_bit(method, trained, base, tmp_path, tokens):
    report = llmreg.export_lora(tmp_path / "adapter", tmp_path / "out")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors.keys() == exported.keys()
    assert all(torch.equal(tensors[key], exported[key]) for key in tensors)
    assert (report.rank, report.relative_error) == (6 * method.SAVED_RANK, 0.0)
    assert saved.files(tmp_path / "out") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    loaded = _load(base, tmp_path / "out")
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(trained, tokens)) <= 1e-6


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_reported_error_is_the_measured_one(trained, tmp_path, rank):
    report = llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=rank)
    assert 0.01 < report.relative_error < 1
    assert report.relative_error == pytest.approx(_update_error(trained, tmp_path / "out"), rel=1e-3)
    assert report.rank == rank
    assert f"{report.relative_error:.3e}" in (tmp_path / "out" / "README.md").read_text()
    assert set(report.layer_errors) == {
        name.removeprefix("base_model.model.") for name in saved.additive_layers(trained)
    }


@pytest.mark.parametrize("rank", [12, 100])
def test_rank_twice_the_trained_one_or_more_loses_nothing(trained, base, tmp_path, tokens, rank):
    report = llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=rank)
    assert report.relative_error <= 1e-6
    assert _update_error(trained, tmp_path / "out") <= 1e-6
    loaded = _load(base, tmp_path / "out")
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(trained, tokens)) <= 1e-6


def test_layers_smaller_than_twice_the_rank_recompress(method, base, tmp_path, tokens):
    """k_proj has 32 outputs and the saved form rank 40."""
    config = method(r=20, target_modules=["q_proj", "k_proj"])
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
    model.save_pretrained(tmp_path / "adapter")
    report = llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=40)
    assert report.relative_error <= 1e-6
    loaded = _load(base, tmp_path / "out")
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(model, tokens)) <= 1e-6


@pytest.mark.parametrize("rank", [None, 3])
def test_dtype_is_the_one_asked_for(trained, base, tmp_path, tokens, rank):
    for dtype in ("bfloat16", "float16", "float32"):
        report = llmreg.export_lora(tmp_path / "adapter", tmp_path / dtype, rank=rank, dtype=dtype)
        tensors = load_file(tmp_path / dtype / "adapter_model.safetensors")
        assert {value.dtype for value in tensors.values()} == {getattr(torch, dtype)}
        assert report.dtype == dtype
    exact = saved.outputs(_load(base, tmp_path / "float32"), tokens)
    assert saved.relative(saved.outputs(_load(base, tmp_path / "bfloat16"), tokens), exact) < 1e-2


def test_plain_lora_recompresses_too(base, tmp_path, tokens):
    torch.manual_seed(0)
    config = LoraConfig(r=6, lora_alpha=3, target_modules=LINEAR, init_lora_weights=False, alpha_pattern={"q_proj": 5})
    model = peft.get_peft_model(saved.load_base(base), config)
    model.save_pretrained(tmp_path / "lora")
    report = llmreg.export_lora(tmp_path / "lora", tmp_path / "out", rank=6)
    assert report.relative_error <= 1e-6
    loaded = _load(base, tmp_path / "out")
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(model, tokens)) <= 1e-6


def test_exported_adapter_loads_in_plain_peft(trained, base, tmp_path, tokens):
    llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=12)
    plain, warnings = saved.PlainPeft.ask(base, tmp_path / "out", tokens)
    assert warnings == []
    assert saved.relative(plain, saved.outputs(trained, tokens)) <= 1e-6


def test_modules_to_save_survive_an_export(method, base, tmp_path, tokens):
    config = method(r=4, target_modules=LINEAR, modules_to_save=["lm_head"])
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=8)
    loaded = _load(base, tmp_path / "out")
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(model, tokens)) <= 1e-6


def test_conv1d_recompresses(method, tmp_path, tokens):
    base = saved.checkpoint(tmp_path / "base", tiny_models.gpt2())
    config = method(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05)
    model.save_pretrained(tmp_path / "adapter")
    llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=8)
    loaded = _load(base, tmp_path / "out")
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(model, tokens)) <= 1e-6


def test_two_exports_of_one_rank_hotswap(method, base, tmp_path, tokens):
    for name, seed in (("one", 0), ("two", 1)):
        config = method(r=4, target_modules=LINEAR, rank_pattern={"v_proj": 3})
        model = saved.drift(peft.get_peft_model(saved.load_base(base), config), size=0.05, seed=seed)
        model.save_pretrained(tmp_path / name)
        llmreg.export_lora(tmp_path / name, tmp_path / f"export-{name}", rank=4)
    swapped = _load(base, tmp_path / "export-one")
    hotswap_adapter(swapped, str(tmp_path / "export-two"), adapter_name="default")
    expected = saved.outputs(_load(base, tmp_path / "export-two"), tokens)
    assert torch.equal(saved.outputs(swapped, tokens), expected)


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 30),
    width=st.integers(1, 30),
    whole=st.integers(1, 12),
    rank=st.integers(1, 12),
    zero=st.booleans(),
)
def test_recompression_is_the_best_approximation(out, width, whole, rank, zero):
    generator = torch.Generator().manual_seed(out * 1000 + width * 10 + whole)
    up = torch.randn(out, whole, generator=generator) * (not zero)
    down = torch.randn(whole, width, generator=generator)
    rank = min(rank, whole)
    B, A, dropped, norm = recompress(up, down, rank)
    kept = min(rank, out, width)
    assert (B.shape, A.shape) == ((out, kept), (kept, width))
    S = torch.linalg.svdvals(up.double() @ down.double())
    assert dropped == pytest.approx(float(S[rank:].norm()), abs=1e-9)
    assert norm == pytest.approx(float(S.norm()), abs=1e-9)
    assert float((B @ A - up.double() @ down.double()).norm()) == pytest.approx(dropped, abs=1e-9)


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_factor_is_refused_with_the_layer_named(trained, tmp_path, rank, value):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "layers.1.mlp.up_proj.lora_B" in key)
    tensors[key][1, 1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"layers\.1\.mlp\.up_proj.*NaN or infinite"):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_a_dtype_too_small_for_the_factors_is_refused(trained, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value * 1e6 for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match="float16 holds NaN or infinite"):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", dtype="float16")


def test_a_folder_that_is_not_empty_is_left_alone(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not an empty folder"):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(RecipeError, match="not an empty folder"):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "adapter")
    assert saved.files(tmp_path / "out") == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rank": 0}, "positive"), ({"rank": -3}, "positive"), ({"dtype": "int8"}, "float32, bfloat16, float16")],
)
def test_arguments_without_sense_are_refused(trained, tmp_path, arguments, message):
    with pytest.raises(RecipeError, match=message):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", **arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "not a factor of a linear layer"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "not a factor of a linear layer"),
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "not a factor of a linear layer"),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "changes the base weights"),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora"), "changes the base weights"),
    ],
)
def test_what_recompression_would_get_wrong_is_refused(tmp_path, config, message):
    peft.get_peft_model(tiny_models.llama(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match=message):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def test_another_peft_type_is_refused(tmp_path):
    peft.get_peft_model(
        tiny_models.llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="IA3"):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"peft_type": "LORA", "no_such_field": 1}', "null"])
def test_a_damaged_config_is_refused(trained, tmp_path, content):
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterFileError, match="damaged"):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out")


def test_a_missing_half_of_a_layer_is_refused(trained, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if ".lora_B." in key)]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match="no lora_B"):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out", rank=2)


def test_pickles_and_missing_files_are_refused(tmp_path):
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json is missing"):
        llmreg.export_lora(tmp_path / "nowhere", tmp_path / "out")
    folder = tmp_path / "pickled"
    config = LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(tiny_models.llama(), config).save_pretrained(folder, safe_serialization=False)
    assert (folder / "adapter_model.bin").is_file()
    with pytest.raises(AdapterFileError, match="pickle, which llmreg does not read"):
        llmreg.export_lora(folder, tmp_path / "out")


def test_the_card_never_names_a_local_path(trained, tmp_path):
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("/")
    llmreg.export_lora(tmp_path / "adapter", tmp_path / "out")
    assert config["base_model_name_or_path"] not in (tmp_path / "out" / "README.md").read_text()
