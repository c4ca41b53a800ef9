"""Adapters beside a quantised residual on disk: their base goes with them, and no other is taken."""

from __future__ import annotations

import json
import shutil

import adapter_files as saved
import peft
import pytest
import residual_models as residuals
import tiny_models
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmreg import PissaConfig, export_lora, merge
from llmreg.adapters import residual_errors
from llmreg.errors import AdapterFileError, BaseMismatchError, RecipeError, UnsupportedError
from llmreg.hub.card import write_card
from llmreg.hub.push import push
from llmreg.weights import identity_hash, read_weight

QUANTIZATIONS = pytest.mark.parametrize("quantization", residuals.QUANTIZATIONS)
METHODS = pytest.mark.parametrize("method", residuals.METHODS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


def trained(base, method="pissa", quantization="nf4 double", **settings):
    return tiny_models.perturb(residuals.wrap(residuals.load(base, quantization), method, **settings), size=0.02)


@pytest.fixture
def folder(base, tmp_path):
    trained(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def residual_of(folder, auto=AutoModelForCausalLM):
    return auto.from_pretrained(folder / "residual").eval()


# -- saved and loaded ---------------------------------------------------------------------------------------------


@QUANTIZATIONS
@METHODS
def test_it_comes_back_bit_for_bit(base, tmp_path, tokens, method, quantization):
    model = trained(base, method, quantization)
    expected, before = saved.outputs(model, tokens), residuals.bases(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(saved.outputs(model, tokens), expected)
    loaded = PeftModel.from_pretrained(residual_of(tmp_path / "adapter"), tmp_path / "adapter")
    assert residuals.bases(loaded) == before
    assert saved.factor_bytes(loaded) == saved.factor_bytes(model)
    assert torch.equal(saved.outputs(loaded, tokens), expected)
    assert residual_errors(loaded) == residual_errors(model)


def test_the_residual_loads_without_llmreg_and_is_what_the_layers_held(base, folder, tokens, run_python):
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "assert not any(name.startswith('llmreg') for name in sys.modules)\n"
        "with torch.no_grad(): print(model(torch.tensor(eval(sys.argv[2]))).logits.double().sum().item())\n"
    )
    printed = run_python(code, str(folder / "residual"), str(tokens.tolist()))
    here = saved.outputs(residual_of(folder), tokens).double().sum().item()
    assert float(printed) == pytest.approx(here, rel=1e-9)


def test_the_folder_holds_factors_as_trained_under_a_type_of_its_own(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["residual"]) == ("LLMREG_QUANTIZED_RESIDUAL", 6, "quantized")
    shapes = {tuple(value.shape) for value in load_file(folder / "adapter_model.safetensors").values()}
    assert all(6 in shape for shape in shapes)
    written = saved.files(folder)
    assert {"residual/config.json", "residual/model.safetensors", "llmreg.json", "README.md"} <= set(written)
    assert not any(name.startswith(".") for name in written)
    assert str(base) not in (folder / "residual" / "config.json").read_text()


def test_the_sidecar_names_the_original_base_and_the_residual_has_an_identity_of_its_own(base, folder):
    sidecar = json.loads((folder / "llmreg.json").read_text())
    assert sidecar["base"]["digest"] == identity_hash(base).digest
    assert sidecar["residual"]["checkpoint"] == identity_hash(folder / "residual").digest
    assert sidecar["residual"]["checkpoint"] != sidecar["base"]["digest"]
    again = PeftModel.from_pretrained(residual_of(folder), folder)
    again.save_pretrained(folder.parent / "again")
    second = json.loads((folder.parent / "again" / "llmreg.json").read_text())
    assert second["base"] == sidecar["base"]
    assert second["residual"]["layers"] == sidecar["residual"]["layers"]
    loaded = PeftModel.from_pretrained(residual_of(folder.parent / "again"), folder.parent / "again")
    assert saved.factor_bytes(loaded) == saved.factor_bytes(again)


def test_plain_peft_refuses_it(folder, tokens):
    with pytest.raises(RuntimeError, match="LLMREG_QUANTIZED_RESIDUAL"):
        saved.PlainPeft.ask(folder / "residual", folder, tokens)


@QUANTIZATIONS
def test_the_original_base_is_refused_and_left_as_it_was(base, tmp_path, quantization):
    trained(base, quantization=quantization).save_pretrained(tmp_path / "adapter")
    for model in (residuals.load(base, quantization), saved.load_base(base)):
        before = tiny_models.structure(model)
        with pytest.raises(BaseMismatchError, match="residual/ in the same folder"):
            PeftModel.from_pretrained(model, tmp_path / "adapter")
        assert tiny_models.structure(model) == before


def test_the_auto_class_which_takes_the_original_base_is_refused(base, folder):
    with pytest.raises(BaseMismatchError, match="residual/"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_another_adapter_s_residual_is_refused(base, folder, tmp_path):
    trained(base, r=3).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="residual/"):
        PeftModel.from_pretrained(residual_of(tmp_path / "other"), folder)


def test_without_its_sidecar_it_is_refused(folder):
    (folder / "llmreg.json").unlink()
    model = residual_of(folder)
    before = tiny_models.structure(model)
    with pytest.raises(AdapterFileError, match=r"llmreg\.json.*missing"):
        PeftModel.from_pretrained(model, folder)
    assert tiny_models.structure(model) == before


def test_a_loaded_one_refuses_what_a_live_one_refuses_and_unloads_to_what_was_loaded(base, folder, tokens):
    before = tiny_models.state_bytes(residual_of(folder))
    loaded = PeftModel.from_pretrained(residual_of(folder), folder)
    with pytest.raises(UnsupportedError, match="neither the base nor a reference"), loaded.disable_adapter():
        pass
    with pytest.raises(UnsupportedError, match="--approximate"):
        loaded.merge_and_unload()
    with pytest.raises(UnsupportedError, match="cannot share"):
        loaded.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="original checkpoint"):
        unloaded = loaded.unload()
    assert tiny_models.state_bytes(unloaded) == before


@pytest.mark.parametrize("settings", [{"residual": "quantized"}, {}])
def test_no_other_start_is_made_of_a_residual(folder, settings):
    with pytest.raises(UnsupportedError, match="lacks what that adapter carries"):
        peft.get_peft_model(residual_of(folder), PissaConfig(r=2, target_modules=["q_proj"], **settings))


def test_two_states_of_one_run_share_their_residual(base, tmp_path, tokens):
    model = trained(base)
    model.save_pretrained(tmp_path / "first")
    first = saved.outputs(model, tokens)
    tiny_models.perturb(model, seed=8)
    model.save_pretrained(tmp_path / "checkpoint-2")
    loaded = PeftModel.from_pretrained(residual_of(tmp_path / "first"), tmp_path / "first")
    loaded.load_adapter(tmp_path / "checkpoint-2", "second")
    assert torch.equal(saved.outputs(loaded, tokens), first)
    loaded.set_adapter("second")
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))


@METHODS
def test_it_resumes_into_a_live_adapter_exactly(base, tmp_path, tokens, method):
    model = trained(base, method)
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1" / "residual").exists()
    live = residuals.wrap(residuals.load(base), method)
    assert saved.factor_bytes(live) != saved.factor_bytes(model)
    live.load_adapter(tmp_path / "checkpoint-1", "default", is_trainable=True)
    assert saved.factor_bytes(live) == saved.factor_bytes(model)
    assert torch.equal(saved.outputs(live, tokens), saved.outputs(model, tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual_iterations": 1}, "is not the one"),
        ({"residual": "difference"}, "residual='quantized'"),
        ({"r": 3}, "r=6"),
    ],
)
def test_it_does_not_resume_into_another(base, tmp_path, settings, message):
    trained(base).save_pretrained(tmp_path / "checkpoint-1")
    live = residuals.wrap(residuals.load(base), **settings)
    before = saved.factor_bytes(live)
    with pytest.raises(AdapterFileError, match=message):
        live.load_adapter(tmp_path / "checkpoint-1", "default", is_trainable=True)
    assert saved.factor_bytes(live) == before


def test_a_checkpoint_alone_says_that_its_residual_is_elsewhere(base, tmp_path):
    trained(base).save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(BaseMismatchError, match="that its run saved in the end"):
        PeftModel.from_pretrained(residuals.load(base), tmp_path / "checkpoint-1")


def test_training_resumes_from_the_residual_folder(base, folder, tokens):
    loaded = PeftModel.from_pretrained(residual_of(folder), folder, is_trainable=True)
    before = residuals.bases(loaded)
    losses = tiny_models.train(loaded, tokens)
    assert losses[-1] < losses[0]
    assert residuals.bases(loaded) == before


def test_modules_that_are_saved_whole_come_back_and_the_residual_has_the_base_s(base, tmp_path, tokens):
    model = trained(base, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "residual" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], load_file(base / "model.safetensors")["lm_head.weight"])
    loaded = PeftModel.from_pretrained(residual_of(tmp_path / "adapter"), tmp_path / "adapter")
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))


def test_an_interrupted_save_leaves_the_model_and_the_old_folder(base, folder, tokens, monkeypatch):
    model = trained(base)
    expected, before = (
        saved.outputs(model, tokens),
        {name: (folder / name).read_bytes() for name in saved.files(folder)},
    )
    monkeypatch.setattr("llmreg.hub.residual_io.write_json", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in saved.files(folder)} == before
    assert torch.equal(saved.outputs(model, tokens), expected)


@pytest.mark.parametrize("other", [LoraConfig, PissaConfig])
def test_another_adapter_saved_there_later_takes_the_residual_away(base, folder, other):
    model = peft.get_peft_model(residuals.load(base), other(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    assert not (folder / "residual").exists()
    PeftModel.from_pretrained(residuals.load(base), folder)


def test_a_folder_of_that_name_which_is_somebody_s_own_stays(base, tmp_path):
    (tmp_path / "adapter" / "residual").mkdir(parents=True)
    (tmp_path / "adapter" / "residual" / "notes.txt").write_text("mine")
    model = peft.get_peft_model(residuals.load(base), PissaConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "residual" / "notes.txt").read_text() == "mine"


def test_the_pocket_model_s_adapter_comes_back(tmp_path):
    from llmreg.pocket import path

    ids = torch.randint(3, 900, (2, 12), generator=torch.Generator().manual_seed(0))
    model = trained(path(), target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(residual_of(tmp_path / "adapter"), tmp_path / "adapter")
    assert torch.equal(saved.outputs(loaded, ids), saved.outputs(model, ids))


# -- exported, merged, published ----------------------------------------------------------------------------------


@METHODS
def test_its_export_is_off_by_the_error_that_it_reports(base, tmp_path, tokens, method):
    model = trained(base, method, lora_alpha=3, target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "export", approximate=True)
    assert (report.rank, report.relative_error) == (12, 0.0)
    plain = PeftModel.from_pretrained(saved.load_base(base), tmp_path / "export")
    layers, errors, updates, weights = saved.additive_layers(model), 0.0, 0.0, 0.0
    for name, layer in layers.items():
        exported = plain.get_submodule(name)
        W = read_weight(exported.get_base_layer()).double()
        update = exported.get_delta_weight("default").detach().double()
        R = read_weight(layer.get_base_layer()).double()
        error = (W + update - R - saved.delta(layer)).norm()
        of_update, of_weight = report.approximation.layers[name.removeprefix("base_model.model.")]
        assert of_update == pytest.approx(float(error / update.norm()), rel=1e-3)
        assert of_weight == pytest.approx(float(error / W.norm()), rel=1e-3)
        errors, updates, weights = errors + error**2, updates + update.norm() ** 2, weights + W.norm() ** 2
    assert report.approximation.of_update == pytest.approx(float((errors / updates) ** 0.5), rel=1e-3)
    assert report.approximation.of_weight == pytest.approx(float((errors / weights) ** 0.5), rel=1e-3)
    out, _ = saved.PlainPeft.ask(base, tmp_path / "export", tokens)
    torch.testing.assert_close(out, saved.outputs(plain, tokens), atol=1e-5, rtol=1e-5)
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"{report.approximation.of_update:.1%} of the update's norm" in card


def test_an_untrained_one_exports_as_zero(base, tmp_path):
    residuals.wrap(residuals.load(base)).save_pretrained(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "export", approximate=True)
    assert report.approximation.of_update is None
    assert "the update is zero" in report.approximation.in_words()


def test_an_export_may_be_recompressed_too(folder, tmp_path):
    report = export_lora(folder, tmp_path / "export", rank=3, dtype="float16", approximate=True)
    assert (report.rank, report.dtype) == (3, "float16")
    assert report.relative_error > 0
    assert report.approximation.of_weight > 0


def test_export_and_merge_without_consent_say_what_to_write(folder, tmp_path):
    for call in (export_lora, merge):
        with pytest.raises(UnsupportedError, match="llmreg export ADAPTER DIR --approximate"):
            call(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exact_export_needs_no_consent(base, tmp_path):
    model = peft.get_peft_model(saved.load_base(base), PissaConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RecipeError, match="leave approximate out"):
        export_lora(tmp_path / "adapter", tmp_path / "out", approximate=True)


def test_the_export_merges_into_the_original_base(base, folder, tmp_path):
    export_lora(folder, tmp_path / "export", approximate=True)
    assert merge(tmp_path / "export", tmp_path / "merged", base=base, check=False).merged == 6


def test_the_command_line_exports_it_and_tells_the_error(folder, tmp_path, capsys):
    from llmreg.cli import _run

    assert _run(["export", str(folder), str(tmp_path / "no")]) == 2
    assert "--approximate" in capsys.readouterr().err
    assert _run(["export", str(folder), str(tmp_path / "out"), "--approximate"]) == 0
    assert "of the update's norm" in capsys.readouterr().out
    assert _run(["export", str(folder), str(tmp_path / "json"), "--approximate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["approximation"]["of_weight"] > 0


def test_the_card_says_what_it_is_and_its_code_loads_it(base, folder, tokens, monkeypatch):
    text = write_card(folder)
    assert all(part in text for part in ("Plain PEFT refuses it", "`residual/`", "--approximate", "resumes exactly"))
    assert "With vLLM" not in text
    code = text.split("```python\n")[-1].split("```")[0]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(folder))
    names: dict = {}
    exec(code, names)
    expected = saved.outputs(PeftModel.from_pretrained(residual_of(folder), folder), tokens)
    assert torch.equal(saved.outputs(names["model"], tokens), expected)


def test_it_is_pushed_with_its_residual_or_not_at_all(base, folder, tmp_path):
    write_card(folder)
    files = push(folder, "somebody/adapter", dry_run=True).files
    assert {"residual/config.json", "residual/model.safetensors", "llmreg.json"} <= set(files)
    shutil.rmtree(folder / "residual")
    with pytest.raises(AdapterFileError, match="nothing without it"):
        push(folder, "somebody/adapter", dry_run=True)
    trained(base, r=3).save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "residual", folder / "residual")
    with pytest.raises(AdapterFileError, match="not the one that was saved"):
        push(folder, "somebody/adapter", dry_run=True)
