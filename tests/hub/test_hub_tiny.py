"""SVFit's tiny form: the values alone on disk, vectors recomputed from the very base and verified before loading."""

from __future__ import annotations

import json

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
import trl_runs
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file

from llmreg import SvfitConfig, export_lora, merge
from llmreg.adapters import tiny
from llmreg.errors import AdapterFileError, BaseMismatchError, RecipeError, UnsupportedError
from llmreg.recipes import evaluate, make_recipe, plan, preview, run

LINEAR = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def base(tmp_path):
    return saved.checkpoint(tmp_path / "base")


def trained(base, storage="float32", **settings):
    config = SvfitConfig(**{"r": 6, "target_modules": LINEAR, "storage": "tiny", "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(saved.load_base(base, storage), config)
    return tiny_models.perturb(model, size=0.3)


@pytest.fixture
def folder(base, tmp_path):
    trained(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_file_holds_the_values_alone(base, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(key.endswith(".lora_S.weight") for key in tensors)
    assert {tuple(value.shape) for value in tensors.values()} == {(6,)}
    plain = folder.parent / "plain"
    whole = trained(base)
    whole.peft_config["default"].storage = "lora"
    whole.save_pretrained(plain)
    sizes = [(f / "adapter_model.safetensors").stat().st_size for f in (folder, plain)]
    assert sizes[0] < sizes[1] / 4


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "nf4", "int8"])
def test_it_comes_back_bit_for_bit(base, tmp_path, tokens, storage):
    model = trained(base, storage)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(saved.load_base(base, storage), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert saved.factor_bytes(loaded) == saved.factor_bytes(model)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))


def test_it_comes_back_with_ranks_that_energy_chose(base, tmp_path, tokens):
    model = trained(base, r=None, energy=0.5, allow_large=True)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter")
    assert loaded.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    assert saved.factor_bytes(loaded) == saved.factor_bytes(model)


def test_it_mounts_beside_another_and_by_the_auto_class(base, folder, tokens):
    expected = saved.outputs(PeftModel.from_pretrained(saved.load_base(base), folder), tokens)
    beside = peft.get_peft_model(saved.load_base(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    beside.load_adapter(folder, "tiny")
    beside.set_adapter("tiny")
    assert torch.equal(saved.outputs(beside, tokens), expected)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    auto = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(saved.outputs(auto, tokens), expected)


def test_plain_peft_refuses_it(base, folder, tokens):
    with pytest.raises(RuntimeError, match="LLMREG_SVFIT_TINY"):
        saved.PlainPeft.ask(base, folder, tokens)


def test_another_base_is_refused_and_left_as_it_was(base, folder, tmp_path):
    other = saved.checkpoint(tmp_path / "other", seed=1)
    model = saved.load_base(other)
    before = tiny_models.structure(model)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(model, folder)
    assert tiny_models.structure(model) == before


@pytest.mark.parametrize("storage", ["bfloat16", "nf4"])
def test_the_same_base_in_another_storage_is_refused(base, folder, storage):
    with pytest.raises(BaseMismatchError, match="very base"):
        PeftModel.from_pretrained(saved.load_base(base, storage), folder)


@pytest.mark.parametrize(("kind", "what"), [("probe", "vectors"), ("lora_S0.weight", "values")])
def test_vectors_that_come_out_otherwise_are_refused_and_the_base_is_left_as_it_was(
    base, folder, monkeypatch, kind, what
):
    original = tiny.vector_checks

    def otherwise(model, adapter_name):
        checks = original(model, adapter_name)
        key = next(key for key in checks if key.endswith(kind))
        checks[key] = checks[key].flip(0)
        return checks

    monkeypatch.setattr(tiny, "vector_checks", otherwise)
    model = saved.load_base(base)
    before = tiny_models.structure(model)
    with pytest.raises(AdapterFileError, match=f"{what} of layer"):
        PeftModel.from_pretrained(model, folder)
    assert tiny_models.structure(model) == before


def test_a_damaged_file_is_refused(base, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: value * 2 for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="not the file that was saved"):
        PeftModel.from_pretrained(saved.load_base(base), folder)


def test_trainer_resumes_from_its_checkpoints_as_if_never_interrupted(tmp_path):
    model = str(trl_runs.checkpoint(tmp_path / "base"))
    config = {"r": 4, "target_modules": trl_runs.TARGETS, "storage": "tiny"}
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    whole = trl_runs.sft(model, tmp_path / "whole", SvfitConfig(**config), max_steps=4, **settings)
    whole.train()
    again = trl_runs.sft(model, tmp_path / "again", SvfitConfig(**config), max_steps=4, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert saved.factor_bytes(again.model) == saved.factor_bytes(whole.model)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_it_exports_as_the_plain_lora_that_computes_the_same(base, tmp_path, tokens, storage):
    model = trained(base, storage, lora_alpha=12)
    model.save_pretrained(tmp_path / "adapter")
    model.peft_config["default"].storage = "lora"
    model.save_pretrained(tmp_path / "whole")
    report = export_lora(tmp_path / "adapter", tmp_path / "export")
    assert (report.rank, report.relative_error) == (6, 0)
    whole, export = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "export"))
    assert whole.keys() == export.keys()
    loaded = PeftModel.from_pretrained(saved.load_base(base, storage), tmp_path / "export")
    expected = saved.outputs(model, tokens)
    # Decomposed alone instead of in a batch: the last bits of the vectors differ.
    torch.testing.assert_close(saved.outputs(loaded, tokens), expected, atol=2e-5, rtol=1e-5)
    small = export_lora(tmp_path / "adapter", tmp_path / "small", rank=3)
    assert small.rank == 3
    assert small.relative_error > 0


def test_it_exports_with_modules_that_are_saved_whole(base, tmp_path):
    trained(base, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "export")
    assert any("lm_head" in key for key in load_file(tmp_path / "export" / "adapter_model.safetensors"))


def test_the_export_refuses_another_checkpoint_at_the_same_place(base, folder, tmp_path):
    weights = load_file(base / "model.safetensors")
    save_file({key: value * 1.01 for key, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError, match="was trained on"):
        export_lora(folder, tmp_path / "export")


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_values_that_were_trained_on_a_quantised_base_are_not_exported(base, tmp_path, storage):
    trained(base, storage).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match=rf"stored as {storage}; .* \(float32\)"):
        export_lora(tmp_path / "adapter", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_values_without_their_sidecar_are_not_exported(folder, tmp_path):
    (folder / "llmreg.json").unlink()
    with pytest.raises(AdapterFileError, match="cannot be read without"):
        export_lora(folder, tmp_path / "export")


def test_merging_on_disk_says_to_export_first(folder, tmp_path):
    with pytest.raises(UnsupportedError, match="llmreg export"):
        merge(folder, tmp_path / "merged")


def test_a_recipe_leaves_a_whole_run_behind(tmp_path):
    adapter = {"method": "svfit", "r": 4, "target_modules": ["q_proj"], "storage": "tiny"}
    values = {
        "model": {"name": "pocket"},
        "task": "sft",
        "data": {"train": "pocket/word-problems", "split": "validation"},
        "adapter": adapter,
        "training": {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True},
        "output": {"dir": str(tmp_path / "run"), "rank": 4},
    }
    recipe = make_recipe(values)
    assert preview(recipe).form == "plain LoRA"  # what output.rank exports
    report = run(recipe)
    assert (report.form, report.rank) == ("SVFit values", 4)
    values = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert report.vectors == {"dtype": "float32", "error": 0.0}
    layer, spectrum = next(iter(report.singular_values.items()))
    S = values[f"base_model.model.{layer}.lora_S.weight"]
    assert spectrum == pytest.approx(S.abs().sort(descending=True).values.tolist())
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert all(text in card for text in ("Plain PEFT refuses it", "resumes exactly"))
    assert "With vLLM" not in card
    assert "With vLLM" in (tmp_path / "run" / "lora" / "README.md").read_text()
    measured = evaluate(tmp_path / "run", ["evaluation.tasks=[pocket/arithmetic]"])
    assert measured.scores[0]["adapter"] is not None


def test_serving_a_tiny_adapter_is_refused_before_training(tmp_path):
    values = {
        "model": {"name": "pocket"},
        "task": "sft",
        "data": {"train": "pocket/word-problems"},
        "adapter": {"method": "svfit", "r": 4, "storage": "tiny", "target_modules": "all-linear"},
        "output": {"dir": str(tmp_path / "run"), "serve": "vllm"},
    }
    with pytest.raises(RecipeError, match=r"saved here as SVFit values; write output\.rank"):
        plan(make_recipe(values))


@pytest.mark.parametrize("from_files", [True, False])
def test_it_loads_after_it_was_merged_unmerged_and_saved(base, tmp_path, tokens, from_files):
    model = trained(base) if from_files else trained_in_memory()
    expected = saved.outputs(model, tokens)
    model.merge_adapter()
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    fresh = saved.load_base(base) if from_files else tiny_models.llama()
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(saved.outputs(loaded, tokens), expected, atol=1e-6, rtol=1e-6)


def trained_in_memory():
    config = SvfitConfig(r=6, target_modules=LINEAR, storage="tiny", task_type="CAUSAL_LM")
    return tiny_models.perturb(peft.get_peft_model(tiny_models.llama(), config), size=0.3)


def test_it_exports_from_a_base_that_has_moved(base, folder, tmp_path):
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="base="):
        export_lora(folder, tmp_path / "export")
    assert export_lora(folder, tmp_path / "export", base=moved).rank == 6
