"""What goes wrong with PiSSA in plain PEFT and TRL, case by case, and what happens here instead.

Each test is one way in which users of `LoraConfig(init_lora_weights="pissa...")` get a wrong model without a word (or
an error): ours is right, or refuses with the reason. The letters are those of the project's list of such cases.
"""

from __future__ import annotations

import importlib
import math
import time

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
import trl_runs as runs
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import llmreg
from llmreg import PissaConfig
from llmreg.errors import UnsupportedError
from llmreg.linalg import truncated_svd

TARGETS = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A checkpoint with a tokenizer, for TRL."""
    return runs.checkpoint(tmp_path_factory.mktemp("chat"))


def _trained(base, folder, tokens, **arguments):
    model = peft.get_peft_model(saved.load_base(base), PissaConfig(r=4, target_modules=TARGETS, **arguments))
    tiny_models.train(model, tokens)
    model.save_pretrained(folder)
    return model


def test_a_reload_is_exact_and_decomposes_nothing(base, tmp_path, tokens, monkeypatch):
    """A: PEFT's "pissa" repeats the full SVD of every layer when it loads."""
    model = _trained(base, tmp_path, tokens)
    monkeypatch.setattr(PissaConfig, "start", lambda *args, **kwargs: pytest.fail("decomposed while loading"))
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))


def test_b_randomised_start_reloads_under_another_seed(base, tmp_path, tokens):
    """B: "pissa_niter_4" repeats a random SVD with another seed: an error larger than what was trained."""
    model = _trained(base, tmp_path, tokens, svd="randomized", power_iterations=1, oversample=1)
    torch.manual_seed(999)
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))
    plain, _ = saved.PlainPeft.ask(base, tmp_path, tokens)
    assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6


def test_f_low_cpu_mem_usage_loads(base, tmp_path, tokens):
    """F: RuntimeError (incompatible tensor type)."""
    model = _trained(base, tmp_path, tokens)
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))


def test_g_disabled_adapter_is_the_base(base, tmp_path, tokens):
    """G: a disabled adapter leaves the residual weight, not the base."""
    expected = saved.outputs(saved.load_base(base), tokens)
    model = _trained(base, tmp_path, tokens)
    with model.disable_adapter():
        assert torch.equal(saved.outputs(model, tokens), expected)


def test_h_unload_gives_the_base_back(base, tmp_path, tokens):
    """H: `unload()` leaves the residual weight."""
    expected = tiny_models.state_bytes(saved.load_base(base))
    assert tiny_models.state_bytes(_trained(base, tmp_path, tokens).unload()) == expected


def test_i_adding_beside_a_plain_lora_changes_nothing(base, tokens):
    """I: adding a second, PiSSA-initialised adapter changes the first one's model without a warning."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(saved.load_base(base), lora)
    expected = saved.outputs(model, tokens)
    model.add_adapter("pissa", PissaConfig(r=4, target_modules=TARGETS))
    assert torch.equal(saved.outputs(model, tokens), expected)
    model.set_adapter("pissa")
    assert torch.equal(saved.outputs(model, tokens), saved.outputs(saved.load_base(base), tokens))


def test_j_loading_beside_a_plain_lora_changes_nothing(base, tmp_path, tokens):
    """J: the same through `load_adapter`."""
    trained = _trained(base, tmp_path, tokens)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(saved.load_base(base), lora)
    expected = saved.outputs(model, tokens)
    model.load_adapter(tmp_path, "pissa")
    assert torch.equal(saved.outputs(model, tokens), expected)
    model.set_adapter("pissa")
    assert torch.equal(saved.outputs(model, tokens), saved.outputs(trained, tokens))


def test_k_references_are_the_base_with_a_config(chat, tmp_path):
    """K: with `peft_config=` DPO starts at 0.665 instead of ln 2 and GRPO at a KL of 2.33."""
    config = {"r": 4, "target_modules": runs.TARGETS}
    dpo = runs.dpo(saved.load_base(chat), tmp_path, PissaConfig(**config), learning_rate=0.0)
    dpo.train()
    assert dpo.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert dpo.state.log_history[0]["rewards/margins"] == 0
    grpo = runs.grpo(saved.load_base(chat), tmp_path, PissaConfig(**config), learning_rate=0.0)
    grpo.train()
    assert grpo.state.log_history[0]["kl"] == 0


@pytest.mark.parametrize("kind", ["dpo", "grpo", "sft"])
def test_l_m_building_a_trainer_with_a_prebuilt_model_changes_nothing(chat, tmp_path, kind):
    """L: constructing DPOTrainer or GRPOTrainer destroys a prebuilt PiSSA policy. M: SFTTrainer does not."""
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    model = peft.get_peft_model(saved.load_base(chat), PissaConfig(r=4, target_modules=runs.TARGETS))
    saved.drift(model, size=0.1)
    expected = saved.outputs(model, ids)
    trainer = runs.BUILDERS[kind](model, tmp_path)
    assert torch.equal(saved.outputs(trainer.model, ids), expected)


def test_n_the_conversion_ritual_is_refused_as_not_needed(base, tmp_path, tokens):
    """N: PEFT converts when every step of a ritual is followed; here what is saved is plain LoRA already."""
    model = _trained(base, tmp_path / "adapter", tokens)
    with pytest.raises(UnsupportedError, match="not needed"):
        model.save_pretrained(tmp_path / "again", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_o_p_quantised_bases_start_without_moving_the_outputs(base, tokens, storage):
    """O: TypeError for PiSSA on NF4 and int8. P: OLoRA, which does run, moves the outputs by 1e-1 and 2e-2."""
    expected = saved.outputs(saved.load_base(base, storage), tokens)
    model = peft.get_peft_model(saved.load_base(base, storage), PissaConfig(r=4, target_modules=TARGETS))
    assert torch.equal(saved.outputs(model, tokens), expected)
    losses = tiny_models.train(model, tokens)
    assert losses[-1] < losses[0]


def test_s_dropout_is_refused_with_the_reason():
    """S: dropout of 0.05 is 23 % noise on the logits at step 0."""
    with pytest.raises(UnsupportedError, match="lora_dropout=0"):
        PissaConfig(r=4, lora_dropout=0.05)


def test_w_registering_again_does_nothing():
    """W: PEFT refuses a new method's name unless its enum is edited."""
    from llmreg.adapters import AdditiveModel, registry
    from llmreg.hub import peft_io

    before, save = dict(PEFT_TYPE_TO_CONFIG_MAPPING), PeftModel.save_pretrained
    members = list(peft.PeftType)
    registry.register(registry.ADDITIVE, llmreg.AdditiveConfig, AdditiveModel, "lora_")
    peft_io.install()
    importlib.import_module("llmreg")
    assert registry.peft_type("LLMREG_ADDITIVE") is registry.ADDITIVE
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
    assert list(peft.PeftType) == members
    assert PeftModel.save_pretrained is save


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "sorsa", False, "gaussian"])
def test_x_init_lora_weights_is_refused_at_once(value):
    """X: PEFT's config accepts any string and fails when the model is built."""
    with pytest.raises(UnsupportedError, match="the config class is the initialisation"):
        PissaConfig(r=4, init_lora_weights=value)


def test_z_truncated_svd_beats_a_full_one():
    """Z: a full SVD of every layer takes minutes to hours where a truncated one takes seconds."""
    U, _ = torch.linalg.qr(torch.randn(768, 768, generator=torch.Generator().manual_seed(0)))
    V, _ = torch.linalg.qr(torch.randn(768, 768, generator=torch.Generator().manual_seed(1)))
    S = torch.arange(1, 769).pow(-0.6)
    W = (U * S) @ V.t()

    def shortest(function):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    full = shortest(lambda: torch.linalg.svd(W, full_matrices=False))
    truncated = shortest(lambda: truncated_svd(W, 16, seed=0))
    assert truncated < full / 2
    U16, S16, V16 = truncated_svd(W, 16, seed=0)
    best = float(S[16:].norm())
    assert float((W - (U16 * S16) @ V16).norm()) <= 1.001 * best
