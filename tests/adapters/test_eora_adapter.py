"""EoRA: an adapter that makes up for the quantisation of its base from the first step on."""

from __future__ import annotations

import math

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
import trl_runs as runs

import llmreg
from llmreg import EoraConfig
from llmreg.adapters.loading import use_statistics
from llmreg.calibration import calibrate
from llmreg.errors import UnsupportedError, WeightError
from llmreg.initializers import pissa
from llmreg.weights import original_checkpoint, read_weight

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("base"))


def spread(seed, rows=16):
    """Batches of token ids in which few tokens are frequent."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.logspace(0, -2, 28)
    return [{"input_ids": 3 + torch.multinomial(weights, 12 * 8, True, generator=generator).view(8, 12)}] * (rows // 8)


def compensated(base, storage="nf4", r=4, **settings):
    model = peft.get_peft_model(saved.load_base(base, storage), EoraConfig(r=r, target_modules=TARGETS, **settings))
    llmreg.initialize(model, spread(0, 64))
    return model


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_the_outputs_of_every_layer_come_nearer_on_data_that_was_not_seen(base, storage):
    """Below no compensation and below the best one by the weights alone."""
    model = compensated(base, storage)
    original = saved.load_base(base)
    errors = {"none": [], "svd": [], "eora": []}
    names = list(saved.additive_layers(model))
    held_out = calibrate(original, spread(7, 64), [name.removeprefix("base_model.model.") for name in names])
    for name in names:
        layer, short = model.get_submodule(name), name.removeprefix("base_model.model.")
        error = read_weight(original.get_submodule(short)) - read_weight(layer.base_layer)
        C = held_out[short].second_moment().double()
        best = pissa(error, 4, 1.0)
        for label, correction in (("none", 0), ("svd", best.B @ best.A), ("eora", layer.get_delta_weight("default"))):
            left = (error - correction).double()
            errors[label].append(torch.trace(left @ C @ left.T))
    none, svd, eora = (float(sum(errors[label])) for label in ("none", "svd", "eora"))
    assert eora < svd < none


def test_scaling_does_not_change_what_the_adapter_adds(base):
    one, other = compensated(base), compensated(base, lora_alpha=16)
    for mine, theirs in zip(*(saved.additive_layers(m).values() for m in (one, other)), strict=True):
        assert theirs.scaling["default"] == 4
        torch.testing.assert_close(
            mine.get_delta_weight("default"), theirs.get_delta_weight("default"), atol=1e-6, rtol=1e-4
        )


def test_a_disabled_adapter_is_the_quantised_base_and_unloading_gives_it_back(base):
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    quantised = saved.load_base(base, "nf4")
    before = saved.outputs(quantised, ids)
    model = compensated(base)
    assert not torch.equal(saved.outputs(model, ids), before)
    with model.disable_adapter():
        assert torch.equal(saved.outputs(model, ids), before)
    assert torch.equal(saved.outputs(model.unload(), ids), before)


def test_it_is_saved_as_a_plain_lora_of_its_rank(base, tmp_path):
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    model = compensated(base)
    tiny_models.train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").r == 4
    plain, warnings = saved.PlainPeft.ask(base, tmp_path / "adapter", ids, storage="nf4")
    assert warnings == []
    assert saved.relative(plain, saved.outputs(model, ids)) <= 1e-6
    loaded = peft.PeftModel.from_pretrained(saved.load_base(base, "nf4"), tmp_path / "adapter", is_trainable=True)
    assert saved.factor_bytes(loaded) == saved.factor_bytes(model)
    assert tiny_models.train(loaded, ids) == tiny_models.train(model, ids)


def test_a_base_in_floats_or_without_its_checkpoint_is_refused(base, tmp_path):
    model = peft.get_peft_model(saved.load_base(base), EoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(UnsupportedError, match=r"'model\.layers\.0\.self_attn\.q_proj' is not quantised"):
        llmreg.initialize(model, spread(0))
    bare = peft.get_peft_model(tiny_models.llama("nf4"), EoraConfig(r=4, target_modules=TARGETS))
    data = [{"input_ids": torch.randint(1, 90, (2, 8))}]
    with pytest.raises(WeightError, match=r"loaded from 'nowhere on disk'.*original_checkpoint\(folder\)"):
        llmreg.initialize(bare, data)
    other = saved.checkpoint(tmp_path / "other", seed=5)
    with original_checkpoint(other), pytest.raises(WeightError, match="was not quantised from"):
        llmreg.initialize(bare, data)
    own = saved.checkpoint(tmp_path / "own")
    with original_checkpoint(own):
        llmreg.initialize(bare, data)


def test_the_base_is_no_reference_for_it_but_a_copy_of_it_is(base, tmp_path):
    config = EoraConfig(r=4, target_modules=runs.TARGETS)
    trainer = runs.dpo(saved.load_base(base, "nf4"), tmp_path / "a", config, learning_rate=0.0)
    with pytest.raises(UnsupportedError, match=r"reference is the base; put the adapter on the model first"):
        llmreg.initialize(trainer)
    prebuilt = peft.get_peft_model(saved.load_base(base, "nf4"), config)
    trainer = runs.dpo(prebuilt, tmp_path / "b", learning_rate=0.0)
    llmreg.initialize(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    runs.sft(saved.load_base(base, "nf4"), tmp_path / "c", config)  # SFT has no reference


def test_statistics_gathered_before_serve_it_too(base):
    model = saved.load_base(base, "nf4")
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in TARGETS]
    with use_statistics(calibrate(model, spread(0, 64), names)):
        wrapped = peft.get_peft_model(model, EoraConfig(r=4, target_modules=TARGETS))
    assert saved.factor_bytes(wrapped) == saved.factor_bytes(compensated(base))
