"""Law 1 in TRL: the reference is the base model, and building a trainer changes nothing."""

from __future__ import annotations

import math

import adapter_files as saved
import peft
import pytest
import torch
import trl_runs as runs

#: How a base is stored, and whether TRL is given a config or a model that carries the adapter.
STARTS = pytest.mark.parametrize(
    ("bases", "passed"),
    [
        ("float32", "config"),
        ("float32", "prebuilt"),
        ("nf4", "prebuilt"),
        ("int8", "config"),
        pytest.param("nf4", "config", marks=pytest.mark.slow),
        pytest.param("int8", "prebuilt", marks=pytest.mark.slow),
    ],
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def ids():
    return torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))


def _trainer(kind, base, storage, config, passed, folder, **arguments):
    """(trainer, logits of the base before) with the adapter passed as `peft_config=` or as a `PeftModel`."""
    model = saved.load_base(base, storage)
    if passed == "prebuilt":
        return runs.BUILDERS[kind](peft.get_peft_model(model, config), folder, **arguments)
    return runs.BUILDERS[kind](model, folder, config, **arguments)


@STARTS
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_building_a_trainer_leaves_the_logits_to_the_bit(method, base, tmp_path, ids, kind, bases, passed):
    expected = saved.outputs(saved.load_base(base, bases), ids)
    config = method(r=4, target_modules=runs.TARGETS)
    trainer = _trainer(kind, base, bases, config, passed, tmp_path)
    assert torch.equal(saved.outputs(trainer.model, ids), expected)
    with trainer.model.disable_adapter():
        assert torch.equal(saved.outputs(trainer.model, ids), expected)


@STARTS
def test_first_dpo_loss_is_ln_2_and_the_margin_is_0(method, base, tmp_path, bases, passed):
    config = method(r=4, target_modules=runs.TARGETS)
    trainer = _trainer("dpo", base, bases, config, passed, tmp_path, learning_rate=0.0, max_steps=2)
    trainer.train()
    for entry in (log for log in trainer.state.log_history if "loss" in log):
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert entry["rewards/margins"] == 0


@STARTS
def test_grpo_kl_is_0_at_the_start(method, base, tmp_path, bases, passed):
    config = method(r=4, target_modules=runs.TARGETS)
    trainer = _trainer("grpo", base, bases, config, passed, tmp_path, learning_rate=0.0)
    trainer.train()
    assert [log["kl"] for log in trainer.state.log_history if "kl" in log] == [0.0]


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_reference_copy_of_a_prebuilt_adapter_equals_it(method, base, tmp_path, ids, kind):
    """TRL adds an adapter "ref" and copies the parameters by name: also where the adapter was trained before."""
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=runs.TARGETS))
    saved.drift(model, size=0.1)
    before = saved.outputs(model, ids)
    trainer = runs.BUILDERS[kind](model, tmp_path)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert saved.factor_bytes(trainer.model, "ref") == saved.factor_bytes(trainer.model, "default")
    assert torch.equal(saved.outputs(trainer.model, ids), before)
    trainer.model.set_adapter("ref")
    assert torch.equal(saved.outputs(trainer.model, ids), before)


@pytest.mark.parametrize(
    ("kind", "accumulation"),
    [
        ("sft", 1),
        ("dpo", 1),
        ("grpo", 2),
        *[pytest.param(*cell, marks=pytest.mark.slow) for cell in (("sft", 2), ("dpo", 2), ("grpo", 1))],
    ],
)
def test_training_moves_only_what_trains_of_the_trained_adapter(method, base, tmp_path, kind, accumulation):
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=runs.TARGETS))
    arguments = {"learning_rate": 1e-2, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    trainer = runs.BUILDERS[kind](model, tmp_path, **arguments)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    trained = next(iter(saved.additive_layers(model).values())).form("default").trained
    expected = {name for name in before if any(f".{container}.default." in name for container in trained)}
    assert moved == expected
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert all(map(math.isfinite, losses))


def _layers(trainer):
    return saved.additive_layers(trainer.model).values()


def test_gradient_accumulation_gives_the_gradients_of_one_batch(method, base, tmp_path):
    factors = []
    for batch, accumulation in ((4, 1), (2, 2)):
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        config = method(r=4, target_modules=runs.TARGETS)
        trainer = runs.sft(saved.load_base(base), tmp_path, config, learning_rate=1e-3, optim="sgd", **arguments)
        trainer.train()
        factors.append([next(iter(layer.factors("default").values())).detach() for layer in _layers(trainer)])
    for one, two in zip(*factors, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-8)


def test_the_result_of_a_dpo_run_loads_in_plain_peft(method, base, tmp_path, ids):
    config = method(r=4, target_modules=runs.TARGETS)
    trainer = runs.dpo(saved.load_base(base), tmp_path / "run", config, learning_rate=1e-2, max_steps=3)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    plain, warnings = saved.PlainPeft.ask(base, tmp_path / "adapter", ids)
    assert warnings == []
    mine = saved.outputs(trainer.model, ids)
    assert saved.relative(plain, mine) <= 1e-6
    assert saved.relative(mine, saved.outputs(saved.load_base(base), ids)) > 1e-3
