"""Law 3 for the orthonormal term: it acts once a step, exactly as much as its weight says, or the run stops."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import tiny_models
import torch
import trl_runs
from transformers import Trainer, TrainingArguments

import llmreg
from llmreg import RegularizerCallback, SorsaConfig
from llmreg.adapters import AdditiveLayer
from llmreg.errors import UnsupportedError
from llmreg.regularizers import DiversityRegularizer, OrthonormalRegularizer
from llmreg.trainers.factor_terms import FactorTerms, orthonormal_terms

ROWS = [{"input_ids": [1 + i % 5, 7, 9 + i % 3, 4], "labels": [1 + i % 5, 7, 9 + i % 3, 4]} for i in range(128)]


def sorsa(seed=0, **settings):
    config = SorsaConfig(r=4, target_modules=["q_proj", "down_proj"], seed=0, **settings)
    return peft.get_peft_model(tiny_models.llama(), config)


def run(model, folder, *, rows=ROWS, callbacks=None, **settings):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "optim": "sgd",
        "seed": 0,
    }
    callbacks = [RegularizerCallback()] if callbacks is None else callbacks
    trainer = Trainer(model, TrainingArguments(**{**defaults, **settings}), train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 4, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "loss"])
def test_its_effect_is_the_weight_s_at_any_accumulation(tmp_path, decoupled, accumulation):
    """Two runs that differ in the term alone: what it moved is the difference of their factors."""
    regularizer = OrthonormalRegularizer(weight=0.05, decoupled=decoupled)
    with_term, without = sorsa(), sorsa()
    perturb_alike(with_term, without)
    before = factors(with_term)
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 1, "lr_scheduler_type": "constant"}
    settings["max_grad_norm"] = 0.0
    run(with_term, tmp_path / "a", callbacks=[RegularizerCallback([regularizer])], **settings)
    unregularized(without)
    run(without, tmp_path / "b", callbacks=[], **settings)
    moved, alone = factors(with_term), factors(without)
    count = 2 * sum(isinstance(module, AdditiveLayer) for module in with_term.modules())
    for name, start in before.items():
        difference = moved[name] - alone[name]
        if "lora_S" in name:
            assert not difference.any()
            continue
        # The term sees the factors before the task's step: the paper's update, and in the loss times SGD's rate.
        rows = start if "lora_A" in name else start.mT
        G = regularizer.gradient(rows, count)
        expected = -0.05 * (1.0 if decoupled else 1e-2) * (G if "lora_A" in name else G.mT)
        torch.testing.assert_close(difference, expected, atol=2e-7, rtol=1e-3)


def perturb_alike(*models):
    for model in models:
        tiny_models.perturb(model, size=0.02)


def unregularized(model):
    for module in model.modules():
        if isinstance(module, AdditiveLayer):
            module.set_regularized("default", True)


def test_a_last_shorter_accumulation_window_adds_the_whole_term_too(tmp_path):
    regularizer = OrthonormalRegularizer(weight=0.05, decoupled=False)
    model, without = sorsa(), sorsa()
    perturb_alike(model, without)
    settings = {"gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0.0}
    settings["lr_scheduler_type"] = "constant"
    rows = ROWS[:2]  # one micro-batch in a window of four
    before = factors(model)
    run(model, tmp_path / "a", rows=rows, callbacks=[RegularizerCallback([regularizer])], **settings)
    unregularized(without)
    run(without, tmp_path / "b", rows=rows, callbacks=[], **settings)
    name = next(name for name in before if "lora_A" in name)
    count = 2 * sum(isinstance(module, AdditiveLayer) for module in model.modules())
    expected = -0.05 * 1e-2 * regularizer.gradient(before[name], count)
    torch.testing.assert_close(factors(model)[name] - factors(without)[name], expected, atol=2e-7, rtol=1e-3)


def test_in_the_loss_it_acts_at_the_first_step_beside_a_term_on_outputs_too(tmp_path):
    """To verify that term at its first step no backward pass may be run: hooks of parameters would fire in it too."""
    output_term = DiversityRegularizer(schedule="constant")
    model, without = sorsa(weights=None), sorsa(weights=None)
    perturb_alike(model, without)
    before = factors(model)
    settings = {"max_steps": 1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    regularizer = OrthonormalRegularizer(weight=0.05, decoupled=False)
    run(model, tmp_path / "a", callbacks=[RegularizerCallback([regularizer, output_term])], **settings)
    run(without, tmp_path / "b", callbacks=[RegularizerCallback([output_term])], **settings)
    name = next(name for name in before if "lora_A" in name)
    count = 2 * sum(isinstance(module, AdditiveLayer) for module in model.modules())
    expected = -0.05 * 1e-2 * regularizer.gradient(before[name], count)
    torch.testing.assert_close(factors(model)[name] - factors(without)[name], expected, atol=2e-7, rtol=1e-3)


def test_the_decoupled_step_follows_the_learning_rate_schedule(tmp_path):
    steps = []

    class Spy(RegularizerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            term = self._factors.terms[0]
            self.factor = term.factors[0].parameter
            self.gradient = term.gradient(term.factors[0])

        def on_optimizer_step(self, args, state, control, **kwargs):
            before = self.factor.detach().clone()
            super().on_optimizer_step(args, state, control, **kwargs)
            steps.append(float((self.factor.detach() - before).norm() / self.gradient.norm()))

    model = sorsa(weights=0.02)
    tiny_models.perturb(model, size=0.05)
    run(model, tmp_path, callbacks=[Spy()], max_steps=2)
    assert steps == pytest.approx([0.02, 0.01], rel=1e-3)


def test_steps_below_the_rounding_of_bfloat16_add_up(tmp_path):
    """TRL casts adapters on a quantised base to bfloat16, where one step of the paper's weight moves nothing."""
    orthonormal, ends = OrthonormalRegularizer(weight=1e-3), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = sorsa(weights=None)
        tiny_models.perturb(model, size=0.05)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
        terms = FactorTerms(
            list(orthonormal_terms(model, [orthonormal])), TrainingArguments(str(tmp_path), use_cpu=True)
        )
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for step in range(200):
            terms.before_optimizer_step(step)
            terms.after_optimizer_step(optimizer, 1.0)
        ends[dtype] = torch.cat([p.detach().flatten().float() for p in factors(model).values()])
    start = sorsa(weights=None)
    tiny_models.perturb(start, size=0.05)
    begun = torch.cat([p.flatten().bfloat16().float() for p in factors(start).values()])
    moved, exact = ends[torch.bfloat16] - begun, ends[torch.float32] - begun
    # to the rounding of the factors themselves, 2^-9, of which there is one and not one a step
    assert (moved - exact).norm() < 2**-9 * begun.norm()
    assert exact.norm() > 4 * 2**-9 * begun.norm()


def test_training_a_configured_regularizer_without_applying_it_is_refused(tokens):
    model = sorsa(weights=1e-3)
    assert torch.isfinite(model.eval()(tokens).logits).all(), "inference needs no regulariser"
    with pytest.raises(UnsupportedError, match=r"RegularizerCallback|weights=None"):
        model.train()(tokens)
    with torch.no_grad():
        model.train()(tokens)
    inspected = sorsa(weights=1e-3)
    inspected.get_base_model().eval()
    for module in inspected.modules():  # as get_peft_model leaves it on a model in evaluation mode
        if isinstance(module, AdditiveLayer):
            module.training = True
    assert torch.isfinite(inspected(tokens).logits).all()
    sorsa(weights=None).train()(tokens)
    sorsa(weights=0).train()(tokens)


def test_after_training_the_model_asks_for_it_again(tmp_path, tokens):
    model = sorsa(weights=1e-3)
    run(model, tmp_path)
    with pytest.raises(UnsupportedError, match="RegularizerCallback"):
        model.train()(tokens)


def test_weight_zero_is_training_without_the_term_bit_for_bit(tmp_path):
    plain, zero = sorsa(weights=None), sorsa(weights=None)
    run(plain, tmp_path / "a", callbacks=[], optim="adamw_torch")
    run(
        zero, tmp_path / "b", callbacks=[RegularizerCallback([OrthonormalRegularizer(weight=0.0)])], optim="adamw_torch"
    )
    for name, value in factors(plain).items():
        assert torch.equal(value, factors(zero)[name]), name


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "loss"])
def test_it_keeps_factors_nearer_to_orthonormal_and_is_logged(tmp_path, decoupled):
    drifts, logs = {}, {}
    for weight in (0.0, 0.1):
        model = sorsa(weights=None)
        callback = RegularizerCallback([OrthonormalRegularizer(weight=weight, decoupled=decoupled)])
        trainer = run(model, tmp_path / str(weight), callbacks=[callback], max_steps=12, optim="adamw_torch")
        rows = [log for log in trainer.state.log_history if "loss" in log]
        logs[weight] = rows
        drifts[weight] = rows[-1]["regularizer/orthonormal"]
    assert drifts[0.1] < 0.8 * drifts[0.0]
    assert {"regularizer/orthonormal", "regularizer/orthonormal_weight", "regularizer/condition_number"} <= set(
        logs[0.1][0]
    )
    assert logs[0.1][-1]["regularizer/condition_number"] < logs[0.0][-1]["regularizer/condition_number"]


def test_pissa_s_factors_are_held_to_their_own_start_not_to_orthonormality(tmp_path):
    drifts = {}
    for weight in (0.0, 0.5):
        config = llmreg.PissaConfig(r=4, target_modules=["q_proj", "down_proj"], seed=0)
        model = peft.get_peft_model(tiny_models.llama(), config)
        callback = RegularizerCallback([OrthonormalRegularizer(weight=weight, target="initial_gram")])
        trainer = run(model, tmp_path / str(weight), callbacks=[callback], max_steps=12, optim="adamw_torch")
        drifts[weight] = [log["regularizer/orthonormal"] for log in trainer.state.log_history if "loss" in log]
        layer = next(module for module in model.modules() if isinstance(module, AdditiveLayer))
        A, A0 = layer.lora_A["default"].weight.detach(), layer.lora_A0["default"].weight.detach()
        assert (A @ A.T - A0 @ A0.T).norm() < (A @ A.T - torch.eye(4)).norm()
    assert drifts[0.5][-1] < 0.5 * drifts[0.0][-1]
    plain = peft.get_peft_model(tiny_models.llama(), llmreg.PissaConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="initial_gram"):
        run(plain, tmp_path / "c", callbacks=[RegularizerCallback([OrthonormalRegularizer()])])


def test_of_eva_the_rows_of_a_are_kept_orthonormal(tmp_path):
    config = llmreg.EvaConfig(r=4, target_modules=["q_proj", "down_proj"], rho=1.0)
    model = peft.get_peft_model(tiny_models.llama(), config)
    llmreg.initialize(model, [{"input_ids": torch.arange(1, 41).reshape(4, 10) % 90}])
    callback = RegularizerCallback([OrthonormalRegularizer(weight=1e-4)])
    trainer = run(model, tmp_path, callbacks=[callback], max_steps=2)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["regularizer/orthonormal"] < 1e-3
    assert all(bool(m.lora_B["default"].weight.any()) for m in model.modules() if isinstance(m, AdditiveLayer))


def test_where_it_could_not_act_training_does_not_begin(tmp_path):
    plain = peft.get_peft_model(tiny_models.llama(), llmreg.PissaConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="found no adapter"):
        run(plain, tmp_path / "a")
    frozen = sorsa(weights=1e-3)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("lora_S" in name)
    with pytest.raises(UnsupportedError, match="no factor of adapter 'default' is trainable"):
        run(frozen, tmp_path / "b")


@pytest.mark.parametrize("told_by", ["arguments", "parameters"])
def test_factors_in_shards_are_refused_before_training(told_by):
    model = sorsa()
    if told_by == "parameters":
        for parameter in model.parameters():
            parameter.ds_id = 0  # ZeRO-3's mark
    args = SimpleNamespace(deepspeed="zero3.json" if told_by == "arguments" else None, fp16=False)
    with pytest.raises(UnsupportedError, match="DeepSpeed and FSDP keep parameters in shards"):
        FactorTerms(list(orthonormal_terms(model, None)), args)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_s_own_trainers_take_it_as_they_are(tmp_path, kind):
    config = SorsaConfig(r=4, target_modules=trl_runs.TARGETS)
    model = str(trl_runs.checkpoint(tmp_path / "base"))
    trainer = getattr(trl_runs, kind)(model, tmp_path / "run", config, max_steps=2)
    with pytest.raises(UnsupportedError, match="RegularizerCallback"):
        trainer.train()
    trainer.add_callback(RegularizerCallback())
    trainer.train()
    assert all("regularizer/orthonormal" in log for log in trainer.state.log_history if "loss" in log)


def test_a_factor_that_the_optimizer_lacks_stops_the_run(tmp_path):
    model = sorsa(weights=1e-3)
    values = [parameter for name, parameter in model.named_parameters() if "lora_S" in name]
    optimizer = torch.optim.SGD(values, lr=1e-2)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, args, train_dataset=ROWS, callbacks=[RegularizerCallback()], optimizers=(optimizer, None))
    with pytest.raises(UnsupportedError, match="the optimizer lacks some"):
        trainer.train()


def test_a_run_after_an_interrupted_one_adds_the_term_once(tmp_path):
    hooks = []

    class Interrupted(RegularizerCallback):
        def on_step_begin(self, *args, **kwargs):
            super().on_step_begin(*args, **kwargs)
            hooks.append(len(self._factors._hooks))
            if len(hooks) == 1:
                raise KeyboardInterrupt

    callback, model = Interrupted([OrthonormalRegularizer(weight=0.05, decoupled=False)]), sorsa()
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "a", callbacks=[callback], max_steps=1)
    run(model, tmp_path / "b", callbacks=[callback], max_steps=1)
    assert hooks[0] == hooks[1] > 0
