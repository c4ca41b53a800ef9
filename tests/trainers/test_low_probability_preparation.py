"""What Lp-Reg is given where completions are generated: a threshold of the whole batch, and the old policy's proxy."""

from __future__ import annotations

import json
import math

import adapter_files as saved
import numpy as np
import peft
import pytest
import torch
import trl
import trl_runs as runs
from hypothesis import given
from hypothesis import strategies as st

from llmreg.errors import LlmregWarning, RecipeError, UnsupportedError
from llmreg.regularizers import LowProbabilityRegularizer, low_probability
from llmreg.regularizers.low_probability import PROXY, THRESHOLD
from llmreg.trainers.low_probability import (
    SECONDS,
    LowProbabilityPreparation,
    RunningThreshold,
    check_grpo,
    generation_threshold,
)

NAN, INF = math.nan, math.inf


# -- the threshold ----------------------------------------------------------------------------------------------------


def padded(values, width):
    return torch.cat([values, values.new_full((width - len(values),), NAN)])


@given(
    st.lists(st.floats(-30, 0), min_size=1, max_size=60),
    st.floats(0.0, 1.0),
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
)
def test_the_threshold_is_numpy_s_percentile_however_many_ranks_share_the_tokens(log_probs, percentile, cuts):
    values = torch.tensor(log_probs, dtype=torch.float64)
    expected = np.percentile(np.exp(values.numpy()), 100 * percentile)
    parts = torch.tensor_split(values, sorted(cuts))
    width = max(map(len, parts)) + 1

    def gather(own):
        assert torch.equal(own, parts[0])
        return torch.cat([padded(part, width) for part in parts])

    threshold = generation_threshold(parts[0], torch.ones_like(parts[0]), percentile, gather)
    assert threshold.exp().item() == pytest.approx(expected, rel=1e-9)


def test_masked_tokens_do_not_count_and_none_protect_nothing():
    log_probs = torch.tensor([[-1.0, -9.0, -2.0], [-3.0, -9.0, -9.0]])
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    assert generation_threshold(log_probs, mask, 0.5) == -2.0
    assert generation_threshold(log_probs, torch.zeros_like(mask), 0.5) == -INF


def test_a_token_at_the_quantile_is_not_below_it():
    log_probs = torch.randn(101, generator=torch.Generator().manual_seed(0)).neg().exp().neg()
    threshold = generation_threshold(log_probs, torch.ones(101), 0.1)
    assert (log_probs == threshold).sum() == 1
    assert (log_probs < threshold).sum() == 10


def test_the_running_threshold_is_of_the_last_complete_window():
    running = RunningThreshold(0.5)
    assert running.complete() == -INF
    for tokens in ([-1.0, -2.0], [-3.0, -8.0]):
        running.add(torch.tensor(tokens), torch.tensor([1, tokens[1] > -8]))
    assert running.log_threshold == -INF
    assert running.complete() == -2.0
    running.add(torch.tensor([-5.0]), torch.ones(1))
    assert running.log_threshold == -2.0
    assert running.complete(lambda own: torch.cat([own, torch.tensor([-5.0, NAN])])) == -5.0
    assert running.complete() == -5.0


def test_the_running_threshold_goes_through_json():
    running, resumed = RunningThreshold(0.5), RunningThreshold(0.5)
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert resumed.log_threshold == -INF
    running.add(torch.tensor([-2.0]), torch.ones(1))
    running.complete()
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert resumed.log_threshold == -2.0
    with pytest.raises(RecipeError, match=r"of percentile 0.5, and the regulariser asks for 0.1"):
        RunningThreshold(0.1).load_state_dict(running.state_dict())


# -- in TRL's trainer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("base"))


class Trainer(LowProbabilityPreparation, trl.GRPOTrainer):
    """Keeps what it is given to train on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generated, self.trained_on, self.passes = [], [], 0

    def _generate_and_score_completions(self, inputs):
        self.generated.append(super()._generate_and_score_completions(inputs))
        return self.generated[-1]

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.passes += 1
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        self.trained_on.append(inputs)
        return super()._compute_loss(model, inputs)


@pytest.fixture
def trained(base, tmp_path, monkeypatch):
    """A function: train a tiny model with a regulariser prepared, and return the trainer."""
    monkeypatch.setattr(trl, "GRPOTrainer", Trainer)

    def train(regularizer, model=None, config=None, **arguments):
        settings = {"beta": 0.0, "temperature": 0.7, "learning_rate": 0.0, "max_completion_length": 5}
        settings |= {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "save_steps": 2}
        model = saved.load_base(base) if model is None else model
        trainer = runs.grpo(model, tmp_path, config, **{**settings, **arguments})
        trainer._regularizers = [regularizer] if regularizer else []
        trainer.train()
        return trainer

    return train


def probabilities(trainer, batch):
    """(B, T, vocabulary) from the model's own logits, at the trainer's temperature."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits
    return (logits[:, -width - 1 : -1] / trainer.temperature).softmax(-1)


def sampled(trainer, batch):
    return probabilities(trainer, batch).gather(2, batch["completion_ids"][..., None]).squeeze(2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_threshold_is_of_the_whole_generation_batch_on_and_off_policy(trained, accumulation):
    steps = 2 // accumulation
    trainer = trained(
        LowProbabilityRegularizer(percentile=0.2), gradient_accumulation_steps=accumulation, max_steps=steps
    )
    (batch,) = trainer.generated
    assert ("old_per_token_logps" in batch) == (accumulation == 1)
    tokens = sampled(trainer, batch)[batch["completion_mask"].bool()].numpy()
    assert batch[THRESHOLD].shape == (4,)
    assert batch[THRESHOLD].exp().tolist() == pytest.approx([np.percentile(tokens, 20)] * 4, rel=1e-5)
    assert [len(part[THRESHOLD]) for part in trainer.trained_on] == [2, 2]
    assert trainer.passes == 3  # one at generation, whether TRL's own or ours, and one a micro-batch
    seconds = [log[SECONDS] for log in trainer.state.log_history if SECONDS in log]
    assert len(seconds) == 1
    assert seconds[0] > 0


@pytest.mark.parametrize("adapter", [False, True])
def test_the_old_proxy_stays_with_its_completion_through_shuffle_and_split(trained, adapter):
    config = peft.LoraConfig(r=2, target_modules=runs.TARGETS, init_lora_weights=False) if adapter else None
    trainer = trained(LowProbabilityRegularizer(policy="old", percentile=0.2, kappa=0.2), config=config)
    found = {"kept": 0, "filtered": 0}
    for batch in trainer.trained_on:
        assert batch[PROXY].shape == batch["completion_ids"].shape
        whole, own = probabilities(trainer, batch), sampled(trainer, batch)
        cut = 0.2 * whole.max(2).values
        mass = torch.where(whole > cut[..., None], whole, 0).sum(2)
        expected = torch.where(own > cut, (own / mass).log(), -INF)
        looked_at = batch["completion_mask"].bool() & (batch["advantages"] < 0)[:, None]
        expected = expected.masked_fill(~looked_at, NAN)
        torch.testing.assert_close(batch[PROXY], expected, equal_nan=True, atol=1e-4, rtol=1e-4)
        found["kept"] += int((expected > -INF).sum())
        found["filtered"] += int((expected == -INF).sum())
    assert all(found.values()), found


def test_the_head_is_the_one_that_trl_scores_with(trained, base, monkeypatch):
    """With a soft cap and a scale of the logits: the proxy's own log-probabilities are TRL's."""
    seen, stock = [], low_probability.token_statistics

    def spy(*args, **kwargs):
        found = stock(*args, **kwargs)
        seen.append(found.log_probs)
        return found

    monkeypatch.setattr(low_probability, "token_statistics", spy)
    model = saved.load_base(base)
    model.config.final_logit_softcapping, model.config.logit_scale = 3.0, 1.7
    trainer = trained(LowProbabilityRegularizer(policy="old"), model, steps_per_generation=4, max_steps=4)
    (batch,) = trainer.generated
    looked_at = batch["completion_mask"].bool() & (batch["advantages"] < 0)[:, None]
    torch.testing.assert_close(torch.cat(seen), batch["old_per_token_logps"][looked_at], atol=1e-5, rtol=1e-5)


def test_the_previous_batch_s_threshold_costs_no_pass_and_survives_a_checkpoint(trained, tmp_path):
    regularizer = LowProbabilityRegularizer(percentile=0.2, threshold="previous_batch")
    trainer = trained(regularizer, gradient_accumulation_steps=2, max_steps=2)
    first, second = trainer.generated
    assert trainer.passes == 4
    assert first[THRESHOLD].tolist() == [-INF] * 4
    tokens = sampled(trainer, first)[first["completion_mask"].bool()].numpy()
    assert second[THRESHOLD].exp().tolist() == pytest.approx([np.percentile(tokens, 20)] * 4, rel=1e-5)
    trainer._save_checkpoint(trainer.model, None)
    resumed = trained(None, gradient_accumulation_steps=2, max_steps=1)
    resumed._regularizers = [regularizer]
    resumed._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-2"))
    assert resumed._running_threshold.log_threshold == trainer._running_threshold.log_threshold


@pytest.mark.parametrize("regularizer", [None, LowProbabilityRegularizer(variant="reference")])
def test_where_nothing_is_to_be_prepared_the_batch_is_trl_s(trained, regularizer):
    trainer = trained(regularizer, gradient_accumulation_steps=2, max_steps=1)
    (batch,) = trainer.generated
    assert not {THRESHOLD, PROXY} & set(batch)
    assert trainer.passes == 2


def test_two_low_probability_terms_are_refused(trained):
    trainer = trained(None)
    trainer._regularizers = [LowProbabilityRegularizer(), LowProbabilityRegularizer(tau=0.1)]
    with pytest.raises(UnsupportedError, match="2 low_probability regularisers were given; give one"):
        trainer._low_probability()


# -- TRL's losses -----------------------------------------------------------------------------------------------------


def arguments(folder, **settings):
    return trl.GRPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **settings)


PAPER = {"epsilon": 1, "epsilon_high": 9, "delta": 10}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_losses_with_a_ratio_a_token_are_accepted(loss_type, tmp_path):
    check_grpo(arguments(tmp_path, loss_type=loss_type))
    check_grpo(arguments(tmp_path, loss_type=loss_type, num_iterations=2, **PAPER))


@pytest.mark.parametrize("setting", [{"loss_type": "vespo"}, {"importance_sampling_level": "sequence"}])
def test_losses_with_a_ratio_a_sequence_are_refused(setting, tmp_path):
    with pytest.raises(UnsupportedError, match="weighs a token by the ratio of its whole sequence"):
        check_grpo(arguments(tmp_path, **setting))
    with pytest.raises(UnsupportedError, match=r"model_init_kwargs=\{'use_kernels': True\}"):
        check_grpo(arguments(tmp_path, use_liger_kernel=True))


def test_another_clip_than_the_paper_s_is_named_where_it_acts(tmp_path):
    check_grpo(arguments(tmp_path))  # on-policy: the ratio is 1
    with pytest.warns(LlmregWarning, match=r"clip is epsilon=0.2, epsilon_high=0.2, delta=None; .* epsilon_high=9"):
        check_grpo(arguments(tmp_path, num_iterations=2))
