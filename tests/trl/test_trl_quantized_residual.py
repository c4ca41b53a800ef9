"""QPiSSA in TRL's trainers: SFT trains and resumes, a copy is the reference, and a disabled adapter never is."""

from __future__ import annotations

import math

import adapter_files as saved
import peft
import pytest
import residual_models as residuals
import torch
import trl_runs as runs
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmreg
from llmreg.adapters import residual_errors
from llmreg.errors import UnsupportedError

_RUN = {"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
QUANTIZATIONS = pytest.mark.parametrize("quantization", ["nf4 double", "int8"])
METHODS = pytest.mark.parametrize("method", ["pissa", "sorsa"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ids():
    return torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))


def config(method="pissa", **settings):
    return residuals.config(method, r=4, target_modules=runs.TARGETS, **settings)


def prebuilt(base, method="pissa", quantization="nf4 double"):
    return peft.get_peft_model(residuals.load(base, quantization), config(method))


@QUANTIZATIONS
@METHODS
def test_sft_trains_it_and_what_it_saves_comes_back(base, tmp_path, ids, method, quantization):
    trainer = runs.sft(residuals.load(base, quantization), tmp_path / "run", config(method), **_RUN)
    before, factors = residuals.bases(trainer.model), saved.factor_bytes(trainer.model)
    trainer.train()
    assert residuals.bases(trainer.model) == before
    assert saved.factor_bytes(trainer.model) != factors
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "run" / "checkpoint-2" / "residual").exists()
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "final" / "residual")
    loaded = PeftModel.from_pretrained(residual, tmp_path / "final", autocast_adapter_dtype=False)
    assert saved.factor_bytes(loaded) == saved.factor_bytes(trainer.model)
    assert torch.equal(saved.outputs(loaded, ids), saved.outputs(trainer.model, ids))


@METHODS
def test_trl_s_cast_to_bfloat16_leaves_what_the_residual_was_made_for(base, tmp_path, method):
    trainer = runs.sft(residuals.load(base), tmp_path, config(method))
    alone = peft.get_peft_model(residuals.load(base), config(method))
    assert residuals.bases(trainer.model) == residuals.bases(alone)
    cast = saved.additive_layers(trainer.model)
    for name, layer in saved.additive_layers(alone).items():
        for container, factor in layer.factors("default").items():
            other = cast[name].factors("default")[container]
            assert other.dtype == torch.bfloat16
            assert torch.equal(other.float(), factor.float())


@METHODS
@pytest.mark.parametrize("passed", ["config", "prebuilt"])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(base, tmp_path, method, passed):
    def trainer(folder):
        if passed == "prebuilt":
            return runs.sft(prebuilt(base, method), folder, **_RUN)
        return runs.sft(residuals.load(base), folder, config(method), **_RUN)

    whole = trainer(tmp_path / "run")
    whole.train()
    resumed = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert saved.factor_bytes(resumed.model) == saved.factor_bytes(whole.model)
    assert residuals.bases(resumed.model) == residuals.bases(whole.model)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_trainer_that_would_disable_the_adapter_for_its_reference_is_stopped(base, tmp_path, kind):
    trainer = runs.BUILDERS[kind](residuals.load(base), tmp_path, config())
    before = saved.factor_bytes(trainer.model)
    with pytest.raises(UnsupportedError, match=r"neither the base nor a reference.*prebuilt"):
        trainer.train()
    assert saved.factor_bytes(trainer.model) == before


@QUANTIZATIONS
@METHODS
def test_dpo_of_a_prebuilt_model_begins_at_ln_2(base, tmp_path, method, quantization):
    settings = {"learning_rate": 0.0, "max_steps": 2}
    trainer = runs.dpo(prebuilt(base, method, quantization), tmp_path, **settings)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    trainer.train()
    for entry in (log for log in trainer.state.log_history if "loss" in log):
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert entry["rewards/margins"] == 0


@METHODS
def test_grpo_of_a_prebuilt_model_begins_at_kl_0_and_trains(base, tmp_path, method):
    trainer = runs.grpo(prebuilt(base, method), tmp_path, learning_rate=1e-2, max_steps=2)
    before, bytes_before = saved.factor_bytes(trainer.model), residuals.bases(trainer.model)
    reference = saved.factor_bytes(trainer.model, "ref")
    trainer.train()
    assert next(log["kl"] for log in trainer.state.log_history if "kl" in log) == 0.0
    assert saved.factor_bytes(trainer.model) != before
    assert saved.factor_bytes(trainer.model, "ref") == reference
    assert residuals.bases(trainer.model) == bytes_before


def test_grpo_without_a_reference_takes_a_config(base, tmp_path):
    runs.grpo(residuals.load(base), tmp_path, config(), beta=0.0).train()


def test_both_adapters_of_dpo_are_saved_beside_one_residual(base, tmp_path, ids):
    trainer = runs.dpo(prebuilt(base), tmp_path / "run", learning_rate=1e-2, max_steps=2)
    trainer.train()
    out = tmp_path / "out"
    trainer.save_model(str(out))
    expected = saved.outputs(trainer.model, ids)
    residual = AutoModelForCausalLM.from_pretrained(out / "residual")
    loaded = PeftModel.from_pretrained(residual, out, autocast_adapter_dtype=False)
    loaded.load_adapter(out / "ref", "ref", autocast_adapter_dtype=False)
    assert torch.equal(saved.outputs(loaded, ids), expected)
    for name, layer in saved.additive_layers(loaded, "ref").items():
        kept = saved.additive_layers(trainer.model, "ref")[name].factors("ref")
        assert all(torch.equal(factor.float(), kept[key].float()) for key, factor in layer.factors("ref").items())
    assert not (out / "ref" / "residual").exists()


def test_a_loaded_adapter_trains_on_against_its_own_copy(base, tmp_path):
    prebuilt(base).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter" / "residual")  # TRL looks beside the model
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "residual"), tmp_path / "adapter", is_trainable=True
    )
    trainer = runs.dpo(model, tmp_path / "run", learning_rate=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_corda_is_initialized_by_the_trainer_s_own_data(base, tmp_path, kind):
    given = config("corda")
    if kind == "sft":
        trainer = runs.sft(residuals.load(base), tmp_path, given, learning_rate=1e-2)
    else:
        trainer = runs.dpo(peft.get_peft_model(residuals.load(base), given), tmp_path, learning_rate=0.0)
    assert not residual_errors(trainer.model)
    llmreg.initialize(trainer)
    assert all(error.kept <= error.qlora for error in residual_errors(trainer.model).values())
    before = residuals.bases(trainer.model)
    trainer.train()
    assert residuals.bases(trainer.model) == before
    if kind == "dpo":
        assert residual_errors(trainer.model, "ref") == residual_errors(trainer.model)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
