"""Law 3 around the terms themselves: what was asked for is applied, once, and nothing else; or it is said why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import peft
import pytest
import tiny_models
import torch
import trl_runs
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import llmreg
import llmreg.trainers
from llmreg import BaLoraConfig, PissaConfig, RegularizerCallback, SorsaConfig
from llmreg.errors import RecipeError, UnsupportedError
from llmreg.regularizers import (
    ConsistencyRegularizer,
    DiversityRegularizer,
    LowProbabilityRegularizer,
    OrthonormalRegularizer,
    TargetedEntropyRegularizer,
)
from llmreg.regularizers.base import Context
from llmreg.trainers.callback import _Windows

ROWS = [{"input_ids": [1 + i % 5, 7, 9 + i % 3, 4], "labels": [1 + i % 5, 7, 9 + i % 3, 4]} for i in range(16)]


@dataclass
class Counted:
    """The mean log-probability; counts how often it is asked for."""

    weight: float = 0.5
    schedule: str = "constant"
    reduction: str = "batch"
    needs: frozenset = frozenset({"log_probs"})
    name: str = "counted"
    calls: list[int] = field(default_factory=list)

    def loss(self, context: Context):
        self.calls.append(1)
        return context.log_probs.mean()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(trl_runs.checkpoint(tmp_path_factory.mktemp("base") / "model"))


def lora(**settings):
    return peft.LoraConfig(r=4, target_modules=trl_runs.TARGETS, init_lora_weights="gaussian", **settings)


def wrapped(config):
    return peft.get_peft_model(tiny_models.llama(), config)


def train(model, folder, *callbacks, **settings):
    """transformers' own Trainer."""
    defaults = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    defaults |= {"per_device_train_batch_size": 2, "logging_steps": 1}
    args = TrainingArguments(str(folder), **{**defaults, **settings})
    trainer = Trainer(model, args, train_dataset=ROWS, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return logged(trainer)


def logged(trainer):
    log = next(log for log in trainer.state.log_history if "loss" in log)
    return {name.removeprefix("regularizer/") for name in log if "regularizer/" in name and "weight" not in name}


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


# -- once -------------------------------------------------------------------------------------------------------


def test_a_callback_that_an_interrupted_run_left_on_the_model_acts_no_more(tmp_path):
    model, left = wrapped(lora()), Counted()
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, RegularizerCallback([left]), Interrupt())
    left.calls.clear()
    train(model, tmp_path, RegularizerCallback([Counted(name="another")]))
    assert not left.calls


def test_llmreg_s_trainers_leave_nothing_on_an_interrupted_model(tmp_path, base):
    trainer = trl_runs.sft(base, tmp_path, SorsaConfig(r=4, target_modules=trl_runs.TARGETS), llmreg.trainers)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    batch = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(UnsupportedError, match="nothing applies it"):
        trainer.model.train()(input_ids=batch, labels=batch)


def test_two_callbacks_in_one_trainer_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="two RegularizerCallbacks"):
        train(wrapped(lora()), tmp_path, RegularizerCallback([Counted()]), RegularizerCallback([Counted(name="b")]))


@pytest.mark.parametrize("config", [SorsaConfig, BaLoraConfig])
def test_an_explicit_list_takes_the_place_of_the_config_s_callback(tmp_path, base, config):
    """As recipes do it: after the trainer was made for an adapter that asks for regularisers."""
    trainer = trl_runs.sft(base, tmp_path, config(r=4, target_modules=trl_runs.TARGETS), llmreg.trainers)
    trainer.use_regularizers(RegularizerCallback())
    trainer.train()
    assert sum(isinstance(one, RegularizerCallback) for one in trainer.callback_handler.callbacks) == 1


def test_regularizers_beside_a_callback_are_not_dropped_in_silence(tmp_path, base):
    own = {"regularizers": [Counted()], "callbacks": [RegularizerCallback([Counted(name="b")])]}
    with pytest.raises(RecipeError, match="has regularisers already"):
        trl_runs.sft(base, tmp_path, lora(), llmreg.trainers, own)
    trainer = trl_runs.sft(base, tmp_path, lora(), llmreg.trainers, {"regularizers": [Counted()]})
    with pytest.raises(RecipeError, match="has regularisers already"):
        trainer.add_callback(RegularizerCallback([Counted(name="b")]))


@pytest.mark.parametrize("how", ["regularizers", "callbacks"])
def test_however_it_comes_into_llmreg_s_grpo_the_low_probability_term_is_checked(tmp_path, base, how):
    given = [LowProbabilityRegularizer()]
    own = {how: given if how == "regularizers" else [RegularizerCallback(given)]}
    with pytest.raises(UnsupportedError, match="luspo"):
        trl_runs.grpo(base, tmp_path, lora(), llmreg.trainers, own, loss_type="luspo")
    trainer = trl_runs.grpo(base, tmp_path, lora(), llmreg.trainers, loss_type="luspo")
    with pytest.raises(UnsupportedError, match="luspo"):
        trainer.add_callback(RegularizerCallback(given))


# -- what was asked for -----------------------------------------------------------------------------------------


def test_a_list_that_leaves_out_what_the_config_asks_for_is_refused(tmp_path, base):
    for config, missing in ((BaLoraConfig, "consistency, diversity, singular_values"), (SorsaConfig, "orthonormal")):
        for given in ([TargetedEntropyRegularizer()], []):
            peft_config = config(r=4, target_modules=trl_runs.TARGETS)
            trainer = trl_runs.sft(base, tmp_path, peft_config, llmreg.trainers, {"regularizers": given})
            with pytest.raises(UnsupportedError, match=f"asks for {missing}"):
                trainer.train()
    off = BaLoraConfig(r=4, target_modules=trl_runs.TARGETS, weights=None)
    trainer = trl_runs.sft(base, tmp_path, off, llmreg.trainers, {"regularizers": [TargetedEntropyRegularizer()]})
    trainer.train()
    assert logged(trainer) == {"targeted_entropy", "mean_entropy"}


def test_an_empty_list_is_none(tmp_path, base):
    trainer = trl_runs.sft(base, tmp_path, lora(), llmreg.trainers, {"regularizers": []})
    trainer.train()
    assert logged(trainer) == set()


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("config", [SorsaConfig, BaLoraConfig])
def test_trl_s_frozen_copy_of_an_adapter_asks_for_nothing(tmp_path, base, kind, config):
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, config(r=4, target_modules=trl_runs.TARGETS, task_type="CAUSAL_LM"))
    trainer = trl_runs.BUILDERS[kind](model, tmp_path, None, llmreg.trainers)
    assert "ref" in model.peft_config
    trainer.train()
    assert logged(trainer) & {"consistency", "orthonormal"}


def test_an_adapter_that_is_not_active_asks_for_nothing(tmp_path):
    model = wrapped(BaLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("other", lora())
    model.set_adapter("other")
    with pytest.raises(UnsupportedError, match="found no adapter with a regulariser"):
        train(model, tmp_path, RegularizerCallback())


def test_a_config_that_asked_for_nothing_asks_for_nothing_afterwards(tmp_path, tokens):
    model = wrapped(PissaConfig(r=4, target_modules=["q_proj"]))
    train(model, tmp_path, RegularizerCallback([OrthonormalRegularizer(target="initial_gram")]))
    assert torch.isfinite(model.train()(tokens).logits).all()


# -- what users get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ConsistencyRegularizer(), "must be a list"),
        ("consistency", "must be a list"),
        ([ConsistencyRegularizer], r"write ConsistencyRegularizer\(\)"),
        ([Counted(weight=float("nan"))], "weight must be"),
        ([Counted(schedule="cosin")], "did you mean 'cosine'"),
        ([Counted(needs=frozenset({"log_prob"}))], "needs 'log_prob'; known are .*log_probs"),
        ([Counted(reduction="mean")], "'tokens' or 'batch'"),
    ],
)
def test_what_is_no_list_of_regularisers_is_refused_at_once(given, message):
    with pytest.raises(RecipeError, match=message):
        RegularizerCallback(given)


def test_the_same_twice_is_refused_at_once():
    for twice in ([DiversityRegularizer()] * 2, [OrthonormalRegularizer(1e-3), OrthonormalRegularizer(1e-2)]):
        with pytest.raises(UnsupportedError, match="is there twice"):
            RegularizerCallback(twice)


# -- windows ----------------------------------------------------------------------------------------------------


def test_windows_are_counted_within_the_epoch():
    """Eight batches, three a window: of three, three and two."""
    windows = _Windows(SimpleNamespace(gradient_accumulation_steps=3, ignore_data_skip=False), range(8))
    windows.begin_epoch(0)
    assert [windows.at(step) for step in range(3)] == [3, 3, 2]
    windows.begin_epoch(4)  # resumed in the second epoch
    assert [windows.at(step) for step in (4, 5)] == [3, 2]
    anew = _Windows(SimpleNamespace(gradient_accumulation_steps=3, ignore_data_skip=True), range(8))
    anew.begin_epoch(4)  # resumed, and the epoch's data begins again
    assert [anew.at(step) for step in (4, 5, 6)] == [3, 3, 2]
