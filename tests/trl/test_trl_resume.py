"""Trainer's checkpoints: resumed to the last bit, the best one restored, and each loads in plain PEFT as it lies."""

from __future__ import annotations

import json
from pathlib import Path

import adapter_files as saved
import peft
import pytest
import torch
import trl_runs as runs

_RUN = {"learning_rate": 1e-2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ids():
    return torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))


def _losses(trainer):
    return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]


def _config(method, **arguments):
    return method(r=4, target_modules=runs.TARGETS, task_type="CAUSAL_LM", **arguments)


@pytest.mark.parametrize("bases", ["float32", "nf4", "int8"])
def test_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(method, base, tmp_path, ids, bases):
    whole = runs.sft(saved.load_base(base, bases), tmp_path / "run", _config(method), **_RUN)
    whole.train()
    resumed = runs.sft(saved.load_base(base, bases), tmp_path / "again", _config(method), **_RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert [step for step, _ in _losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert _losses(resumed) == _losses(whole)
    dtypes = {parameter.dtype for parameter in resumed.model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32 if bases == "float32" else torch.bfloat16}
    assert saved.factor_bytes(resumed.model) == saved.factor_bytes(whole.model)
    assert torch.equal(saved.outputs(resumed.model, ids), saved.outputs(whole.model, ids))


def test_a_run_that_only_ever_saw_a_checkpoint_saves_the_same_adapter(method, base, tmp_path):
    whole = runs.sft(saved.load_base(base), tmp_path / "run", _config(method), **_RUN)
    whole.train()
    resumed = runs.sft(saved.load_base(base), tmp_path / "again", _config(method, seed=9), **_RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name in ("adapter_model.safetensors", "llmreg_factors.safetensors"):
        one, two = (tmp_path / run / "checkpoint-6" / name for run in ("run", "again"))
        assert one.read_bytes() == two.read_bytes()


def test_a_prebuilt_model_resumes_too(method, base, tmp_path):
    trainers = []
    for folder, resume in (("run", None), ("again", str(tmp_path / "run" / "checkpoint-3"))):
        model = peft.get_peft_model(saved.load_base(base), _config(method))
        trainer = runs.sft(model, tmp_path / folder, **_RUN)
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
    assert _losses(trainers[0]) == _losses(trainers[1])
    assert saved.factor_bytes(trainers[0].model) == saved.factor_bytes(trainers[1].model)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_preference_and_rl_runs_resume_to_the_last_bit(method, base, tmp_path, kind):
    trainers = []
    for folder, resume in (("run", None), ("again", str(tmp_path / "run" / "checkpoint-3"))):
        trainer = runs.BUILDERS[kind](saved.load_base(base), tmp_path / folder, _config(method), **_RUN)
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
    assert _losses(trainers[0]) == _losses(trainers[1])
    assert saved.factor_bytes(trainers[0].model) == saved.factor_bytes(trainers[1].model)


@pytest.mark.parametrize("bases", ["float32", "nf4"])
def test_a_checkpoint_folder_loads_in_plain_peft(method, base, tmp_path, ids, bases):
    trainer = runs.sft(saved.load_base(base, bases), tmp_path / "run", _config(method), **{**_RUN, "max_steps": 3})
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-3"
    plain, warnings = saved.PlainPeft.ask(base, folder, ids, storage=bases)
    assert warnings == []
    # On a quantised base TRL trains in bf16, and plain PEFT computes the same factors in fp32.
    limit = 1e-6 if bases == "float32" else 2e-2
    assert saved.relative(plain, saved.outputs(trainer.model, ids)) <= limit
    assert saved.relative(plain, saved.outputs(saved.load_base(base, bases), ids)) > 1e-3


def test_the_best_checkpoint_is_restored_bit_for_bit(method, base, tmp_path):
    """The highest loss counts as the best here, so that the best checkpoint is not the last."""
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    trainer = runs.sft(saved.load_base(base), tmp_path / "run", _config(method), **{**_RUN, **arguments})
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("-6")
    kept = peft.PeftModel.from_pretrained(saved.load_base(base), best)
    assert saved.factor_bytes(trainer.model) == saved.factor_bytes(kept)


def test_checkpoints_hold_the_sidecar_and_no_staging(method, base, tmp_path):
    runs.sft(saved.load_base(base), tmp_path / "run", _config(method), **_RUN).train()
    names = saved.files(tmp_path / "run")
    for step in (3, 6):
        for name in ("adapter_model.safetensors", "adapter_config.json", "llmreg.json", "llmreg_factors.safetensors"):
            assert f"checkpoint-{step}/{name}" in names
    assert not [name for name in names if name.startswith(".") or "/." in name]


def test_frozen_starts_never_reach_the_optimizer(method, base, tmp_path):
    trainer = runs.sft(saved.load_base(base), tmp_path / "run", _config(method))
    trainer.create_optimizer()
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for layer in saved.additive_layers(trainer.model).values():
        factors = layer.factors("default")
        form = layer.form("default")
        assert {id(factors[name]) for name in form.trained} <= held
        assert not {id(factors[name]) for name in form.frozen} & held


_RESUME = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import adapter_files as saved, trl_runs as runs
from llmreg import AdditiveConfig
method, base, folder, resume = sys.argv[2:6]
AdditiveConfig._CLASSES[method].needs_regularizer = lambda self: False  # the start alone
if AdditiveConfig._CLASSES[method].NEEDS_DATA:
    import made_up
    made_up.give_data(AdditiveConfig._CLASSES[method])
config = AdditiveConfig._CLASSES[method](r=4, target_modules=runs.TARGETS, task_type="CAUSAL_LM")
arguments = json.loads(sys.argv[6])
trainer = runs.sft(saved.load_base(base), folder, config, **arguments)
trainer.train(resume_from_checkpoint=resume or None)
print("RESULT", json.dumps([log["loss"] for log in trainer.state.log_history if "loss" in log]))
"""


@pytest.mark.multiprocess
def test_a_run_resumes_in_a_new_process(method, base, tmp_path, run_python):
    whole = runs.sft(saved.load_base(base), tmp_path / "run", _config(method), **_RUN)
    whole.train()
    output = run_python(
        _RESUME,
        str(Path(__file__).parents[1]),
        method.METHOD,
        str(base),
        str(tmp_path / "again"),
        str(tmp_path / "run" / "checkpoint-3"),
        json.dumps(_RUN),
    )
    losses = json.loads(output.split("RESULT ")[1])
    assert losses == [loss for _, loss in _losses(whole)]
    for name in ("adapter_model.safetensors", "llmreg_factors.safetensors"):
        one, two = (tmp_path / run / "checkpoint-6" / name for run in ("run", "again"))
        assert one.read_bytes() == two.read_bytes()


def test_a_checkpoint_without_its_marker_is_no_checkpoint(method, base, tmp_path):
    """What an interruption while saving leaves: Trainer must say so, not start from half an adapter."""
    runs.sft(saved.load_base(base), tmp_path / "run", _config(method), **{**_RUN, "max_steps": 3}).train()
    folder = tmp_path / "run" / "checkpoint-3"
    for name in ("adapter_config.json", "llmreg.json"):
        (folder / name).rename(folder / f"{name}.gone")
        trainer = runs.sft(saved.load_base(base), tmp_path / "again", _config(method), **_RUN)
        with pytest.raises(ValueError, match=name):
            trainer.train(resume_from_checkpoint=str(folder))
        (folder / f"{name}.gone").rename(folder / name)
