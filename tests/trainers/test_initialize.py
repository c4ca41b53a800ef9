"""`llmreg.initialize` in TRL's own trainers, and llmreg's, which call it: on what data, when, and what then holds."""

from __future__ import annotations

import math

import adapter_files as saved
import peft
import pytest
import torch
import transformers
import trl
import trl_runs as runs
from datasets import Dataset

import llmreg
from llmreg import CordaConfig, EvaConfig
from llmreg.errors import LlmregWarning, RecipeError, UnsupportedError
from llmreg.trainers import DPOTrainer, GRPOTrainer, SFTTrainer
from llmreg.trainers.calibration_data import batches_of_rows, batches_of_trainer

METHODS = [EvaConfig, CordaConfig]
OURS = {"sft": SFTTrainer, "dpo": DPOTrainer, "grpo": GRPOTrainer}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ids():
    return torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))


def build(kind, base, folder, config, passed="config", storage="float32", **arguments):
    model = saved.load_base(base, storage)
    if passed == "prebuilt":
        return runs.BUILDERS[kind](peft.get_peft_model(model, config), folder, **arguments)
    return runs.BUILDERS[kind](model, folder, config, **arguments)


@pytest.mark.parametrize("config_class", METHODS)
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_unmodified_trainers_train_once_initialized_and_not_before(config_class, kind, base, tmp_path, ids):
    trainer = build(kind, base, tmp_path, config_class(r=4, target_modules=runs.TARGETS), learning_rate=1e-2)
    before = saved.outputs(trainer.model, ids)
    with pytest.raises(UnsupportedError, match=r"llmreg\.initialize\(trainer\)"):
        trainer.train()
    trainer = build(kind, base, tmp_path, config_class(r=4, target_modules=runs.TARGETS), learning_rate=1e-2)
    report = llmreg.initialize(trainer)
    assert report.calibration[0]["tokens"] > 0
    assert torch.equal(saved.outputs(trainer.model, ids), before)
    trainer.train()
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert not torch.equal(saved.outputs(trainer.model, ids), before)


@pytest.mark.parametrize("config_class", METHODS)
@pytest.mark.parametrize("passed", ["config", "prebuilt"])
def test_references_are_the_base(config_class, passed, base, tmp_path):
    config = config_class(r=4, target_modules=runs.TARGETS)
    trainer = build("dpo", base, tmp_path / "dpo", config, passed, learning_rate=0.0)
    llmreg.initialize(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer = build("grpo", base, tmp_path / "grpo", config, passed, learning_rate=0.0)
    llmreg.initialize(trainer)
    trainer.train()
    assert [log["kl"] for log in trainer.state.log_history if "kl" in log] == [0.0]


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_bases(storage, base, tmp_path, ids):
    for config_class in METHODS:
        trainer = build("sft", base, tmp_path, config_class(r=4, target_modules=runs.TARGETS), storage=storage)
        before = saved.outputs(trainer.model, ids)
        llmreg.initialize(trainer)
        assert torch.equal(saved.outputs(trainer.model, ids), before)
        trainer.train()


# -- data -----------------------------------------------------------------------------------------------------------


def calibrated_rows(trainer):
    """The token ids of every row, without padding."""
    rows = []
    for batch in batches_of_trainer(trainer, samples=None):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(tuple(ids[mask.bool()].tolist()))
    return sorted(rows)


def test_each_trainer_calibrates_on_what_its_model_is_given(base, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config = EvaConfig(r=4, target_modules=runs.TARGETS)

    def encoded(texts, end=()):
        return sorted((*tokenizer(text)["input_ids"], *end) for text in texts)

    end = (tokenizer.eos_token_id,)
    chosen = [p + c for p, c in zip(runs.PREFERENCE["prompt"], runs.PREFERENCE["chosen"], strict=True)]
    assert calibrated_rows(build("sft", base, tmp_path, config)) == encoded(runs.TEXT["text"], end)
    assert calibrated_rows(build("dpo", base, tmp_path, config)) == encoded(chosen, end)
    assert calibrated_rows(build("grpo", base, tmp_path, config)) == encoded(runs.PROMPTS["prompt"])


def test_packed_rows_count_every_token(base, tmp_path):
    config = EvaConfig(r=4, target_modules=runs.TARGETS, use_label_mask=False)
    plain = llmreg.initialize(build("sft", base, tmp_path, config)).calibration[0]["tokens"]
    packing = {"packing": True, "packing_strategy": "bfd"}
    packed = llmreg.initialize(build("sft", base, tmp_path, config, **packing)).calibration[0]
    assert packed["tokens"] == plain
    assert packed["groups"][0]["samples"] == len(runs.TEXT)


def test_another_data_set_takes_the_place_of_the_training_set(base, tmp_path):
    config = EvaConfig(r=2, target_modules=runs.TARGETS, use_label_mask=False)
    rows = Dataset.from_dict({"text": ["abc", "de"]})
    report = llmreg.initialize(build("sft", base, tmp_path, config), calibration_dataset=rows)
    assert (report.calibration[0]["tokens"], report.calibration[0]["batches"]) == (7, 1)  # with their ends
    report = llmreg.initialize(build("grpo", base, tmp_path, config), calibration_dataset=rows.to_list())
    assert report.calibration[0]["tokens"] == 7
    report = llmreg.initialize(build("sft", base, tmp_path, config), samples=3)
    assert report.calibration[0]["groups"][0]["samples"] == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the calibration data is empty"),
        ([{"question": "?"}], "row 1 of the calibration data has the columns question; give text, prompt"),
        ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], "of different kinds"),
        ([{"messages": [{"role": "user", "content": "b"}]}], "no chat template"),
    ],
)
def test_bad_rows_are_named(rows, message, base, tmp_path):
    trainer = build("sft", base, tmp_path, EvaConfig(r=4, target_modules=runs.TARGETS))
    with pytest.raises(RecipeError, match=message):
        llmreg.initialize(trainer, calibration_dataset=rows)


def test_prompts_carry_no_label():
    class Letters:
        pad_token_id, eos_token_id, chat_template = 0, 1, None

        def __call__(self, text):
            return {"input_ids": [ord(letter) for letter in text]}

    batch = batches_of_rows([{"prompt": "ab", "completion": "c"}, {"text": "d"}], Letters(), batch_size=2)[0]
    assert batch["input_ids"].tolist() == [[97, 98, 99, 1], [100, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 99, 1], [100, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_what_is_to_be_kept_must_be_shown(base, tmp_path):
    trainer = build("sft", base, tmp_path, CordaConfig(r=4, mode="kpm", target_modules=runs.TARGETS))
    with pytest.warns(LlmregWarning, match="pass calibration_dataset= with what is to be kept"):
        llmreg.initialize(trainer)


def test_ranks_are_chosen_before_there_is_an_optimizer(base, tmp_path):
    trainer = build("sft", base, tmp_path, EvaConfig(r=4, target_modules=runs.TARGETS))
    trainer.create_optimizer()
    with pytest.raises(UnsupportedError, match=r"before train\(\), and let the trainer make the optimizer"):
        llmreg.initialize(trainer)
    trainer = build("sft", base, tmp_path, CordaConfig(r=4, target_modules=runs.TARGETS))
    trainer.create_optimizer()
    llmreg.initialize(trainer)
    trainer.train()


def test_a_trainer_of_transformers(base, tmp_path):
    model = peft.get_peft_model(saved.load_base(base), EvaConfig(r=4, target_modules=runs.TARGETS))
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [1, 1, 1]} for _ in range(4)]
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none")
    trainer = transformers.Trainer(model, args=args, train_dataset=rows)
    assert llmreg.initialize(trainer).calibration[0]["tokens"] == 12
    trainer.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataloader": [], "calibration_dataset": []}, "dataloader and calibration_dataset were given"),
        ({"dataloader": {"input_ids": torch.ones(1, 2)}}, "dataloader is dict, not a sequence of batches"),
        ({"calibration_dataset": "rows.jsonl"}, "calibration_dataset is str, not rows"),
        ({"statistics": ["statistics.safetensors"]}, "what llmreg.calibration.calibrate or load_statistics returns"),
        ({"samples": 0}, "samples is 0; give a positive number"),
        ({"memory_budget": "much"}, "give bytes, or a size such as '2GB'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments, message, base, tmp_path):
    trainer = build("sft", base, tmp_path, EvaConfig(r=4, target_modules=runs.TARGETS))
    with pytest.raises(RecipeError, match=message):
        llmreg.initialize(trainer, **arguments)
    assert llmreg.initialize(trainer, memory_budget="1GB").adapters == {"default": "eva"}


def test_one_iterator_serves_several_adapters(base):
    model = peft.get_peft_model(saved.load_base(base), EvaConfig(r=4, target_modules=runs.TARGETS))
    model.add_adapter("corda", CordaConfig(r=4, target_modules=runs.TARGETS))
    ids = torch.randint(3, 30, (4, 20), generator=torch.Generator().manual_seed(0))
    report = llmreg.initialize(model, iter([{"input_ids": ids}]))
    assert set(report.adapters) == {"default", "corda"}


def test_a_reference_taken_before_the_start_is_refused(base, tmp_path):
    config = llmreg.EoraConfig(r=4, target_modules=runs.TARGETS)
    model = peft.get_peft_model(saved.load_base(base, "nf4"), config)
    trainer = runs.dpo(model, tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(UnsupportedError, match="took the reference before eora had its start"):
        llmreg.initialize(trainer)


# -- llmreg's trainers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_our_trainers_initialize_before_the_first_step(kind, base, tmp_path, monkeypatch):
    monkeypatch.setattr(trl, {"sft": "SFTTrainer", "dpo": "DPOTrainer", "grpo": "GRPOTrainer"}[kind], OURS[kind])
    trainer = build(kind, base, tmp_path, EvaConfig(r=4, target_modules=runs.TARGETS), learning_rate=1e-2)
    assert type(trainer) is OURS[kind]
    assert trainer.initialization is None
    trainer.train()
    assert trainer.initialization.adapters == {"default": "eva"}
    assert sum(trainer.initialization.ranks["default"].values()) == 4 * 6


def test_our_trainers_take_other_data_and_settings(base, tmp_path):
    rows = Dataset.from_dict({"text": ["abc", "de", "f"]})
    args = trl.SFTConfig(str(tmp_path), **{**runs._COMMON, "max_length": 32})
    config = EvaConfig(r=2, rho=1, target_modules=runs.TARGETS)
    trainer = SFTTrainer(
        saved.load_base(base),
        args=args,
        train_dataset=runs.TEXT,
        peft_config=config,
        calibration_dataset=rows,
        calibration={"batch_size": 1, "max_tokens": 5},
    )
    trainer.train()
    assert trainer.initialization.calibration[0]["tokens"] == 5
    assert trainer.initialization.calibration[0]["batches"] == 2


def test_our_trainers_apply_the_regulariser_that_a_config_asks_for(base, tmp_path):
    args = trl.SFTConfig(str(tmp_path), **{**runs._COMMON, "max_length": 32})
    config = llmreg.SorsaConfig(r=2, target_modules=runs.TARGETS)
    trainer = SFTTrainer(saved.load_base(base), args=args, train_dataset=runs.TEXT, peft_config=config)
    trainer.train()
    assert "regularizer/orthonormal" in trainer.state.log_history[0]
    plain = SFTTrainer(
        saved.load_base(base),
        args=args,
        train_dataset=runs.TEXT,
        peft_config=peft.LoraConfig(r=2, target_modules=runs.TARGETS),
    )
    assert not any(isinstance(callback, llmreg.RegularizerCallback) for callback in plain.callback_handler.callbacks)
    plain.train()


@pytest.mark.parametrize("config_class", METHODS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(config_class, base, tmp_path):
    """The resumed trainer chooses the same ranks from the same rows, then takes the checkpoint's factors."""

    def trainer(folder, **arguments):
        args = trl.SFTConfig(
            str(folder),
            **{
                **runs._COMMON,
                "max_length": 32,
                "learning_rate": 1e-2,
                "save_strategy": "steps",
                "save_steps": 2,
                **arguments,
            },
        )
        config = config_class(r=4, target_modules=runs.TARGETS)
        return SFTTrainer(saved.load_base(base), args=args, train_dataset=runs.TEXT, peft_config=config)

    whole = trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    resumed = trainer(tmp_path / "whole", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert saved.factor_bytes(resumed.model) == saved.factor_bytes(whole.model)
