"""Lp-Reg and targeted entropy in GRPO: the gradient is the policy's and the weighted term's, whatever the threshold."""

from __future__ import annotations

import json

import pytest
import torch
import trl
import trl_runs
from peft import LoraConfig
from transformers import TrainerCallback

import llmreg.trainers
from llmreg.errors import UnsupportedError
from llmreg.regularizers import LowProbabilityRegularizer, TargetedEntropyRegularizer
from llmreg.trainers.hardness import hardness_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(trl_runs.checkpoint(tmp_path_factory.mktemp("base") / "model"))


def trainer_of(base, folder, regularizers, **arguments):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "seed": 1,
        "beta": 0.0,
        **arguments,
    }
    config = LoraConfig(r=4, lora_alpha=8, target_modules=trl_runs.TARGETS, init_lora_weights="gaussian")
    trainer = trl_runs.grpo(
        base, folder, config, trainers=llmreg.trainers, own={"regularizers": regularizers}, **settings
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in factors(trainer):
            parameter.normal_(std=0.1)
    return trainer


def factors(trainer):
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


@pytest.fixture
def terms(monkeypatch):
    """Of each call of Lp-Reg's loss: the number of tokens, the value, and its gradients."""
    seen: list = []
    stock = LowProbabilityRegularizer.loss

    def loss(self, context):
        value = stock(self, context)
        trainable = [p for p in context.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(value, trainable, retain_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(trainable, gradients, strict=True)]
        seen.append((len(context.log_probs), float(value.detach()), zeros))
        return value

    monkeypatch.setattr(LowProbabilityRegularizer, "loss", loss)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"percentile": 0.7},
        {"percentile": 0.7, "divergence": "exact"},
        {"percentile": 0.7, "policy": "old"},
        {"percentile": 0.7, "threshold": "previous_batch"},
        {"percentile": 0.7, "variant": "reference"},
    ],
    ids=lambda options: " ".join(map(str, list(options.values())[1:])) or "default",
)
def test_the_gradient_is_the_policy_s_and_the_term_s(tmp_path, base, terms, options):
    weight, ends = 0.5, []
    steps = 2 if options.get("threshold") else 1
    for regularizers in ([LowProbabilityRegularizer(weight=weight, kappa=0.3, **options)], None):
        trainer = trainer_of(base, tmp_path / str(regularizers is None), regularizers, max_steps=steps)
        if steps == 2:  # the first step moves nothing, and completes the threshold of the second
            trainer.create_optimizer()
            trainer.optimizer.param_groups[0]["lr"] = 0.0
            trainer.add_callback(_FirstStepStill())
        before = [p.detach().clone() for p in factors(trainer)]
        trainer.train()
        ends.append([p.detach().clone() for p in factors(trainer)])
        if regularizers:
            logged = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert sum(value for _, value, _ in terms) > 0, "nothing was selected, so nothing is tested"
    of_step = terms[-2:]
    total = sum(count for count, _, _ in of_step)
    expected = [weight * sum(n / total * g[i] for n, _, g in of_step) for i in range(len(before))]
    size = max(float(one.norm()) for one in expected)
    for mine, stock, gradient in zip(*ends, expected, strict=True):
        torch.testing.assert_close(stock - mine, gradient, atol=2e-5 * size + 1e-7, rtol=1e-3)
    assert {"regularizer/low_probability", "regularizer/low_probability_share", "regularizer/spark_share"} <= set(
        logged
    )


class _FirstStepStill(TrainerCallback):
    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1.0


def test_the_threshold_of_the_previous_batch_survives_a_checkpoint(tmp_path, base):
    regularizer = LowProbabilityRegularizer(threshold="previous_batch", percentile=0.3)
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    trainer = trainer_of(base, tmp_path, [regularizer], **arguments)
    trainer.train()
    kept = json.loads((tmp_path / "checkpoint-2" / "low_probability_state.json").read_text())
    assert kept["log_threshold"] < 0
    resumed = trainer_of(base, tmp_path, [regularizer], **{**arguments, "max_steps": 3})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_entropy_is_pulled_to_its_target_from_both_sides(tmp_path, base):
    moved = {}
    for target in (0.0, 10.0):
        trainer = trainer_of(
            base, tmp_path / str(target), [TargetedEntropyRegularizer(target=target, weight=5.0)], max_steps=4
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        moved[target] = logs[-1]["entropy"] - logs[0]["entropy"]
    assert moved[0.0] < 0 < moved[10.0]


def test_losses_that_weigh_sequences_are_refused_at_once(tmp_path, base):
    with pytest.raises(UnsupportedError, match="luspo"):
        trainer_of(base, tmp_path, [LowProbabilityRegularizer()], loss_type="luspo")


def test_hardness_weighting_puts_its_advantages_in_the_place_of_trl_s(tmp_path, base):
    def right(completions, **_):
        return [float(len(text) % 2) for text in completions]

    arguments = trl.GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=4, max_completion_length=6, max_steps=1,
        use_cpu=True, bf16=False, report_to="none", scale_rewards="none", loss_type="dr_grpo", disable_tqdm=True,
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules=trl_runs.TARGETS)
    trainer = llmreg.trainers.GRPOTrainer(
        base, right, args=arguments, train_dataset=trl_runs.PROMPTS, peft_config=config, hardness_weighting=True
    )
    seen = []
    generate = trainer._generate_and_score_completions

    def spied(inputs):
        output = generate(inputs)
        seen.append((trainer._rewards.clone(), output["advantages"].clone()))
        return output

    trainer._generate_and_score_completions = spied
    trainer.train()
    rewards, advantages = seen[0]
    assert torch.equal(advantages, hardness_weights(rewards.sum(1), 4))
    with pytest.raises(UnsupportedError, match="scale_rewards='none' and loss_type='dr_grpo'"):
        trl_runs.grpo(base, tmp_path, config, trainers=llmreg.trainers, own={"hardness_weighting": True})
