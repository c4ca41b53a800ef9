"""Lp-Reg's term: which tokens it selects, what it is worth there, and on what its gradient pushes."""

from __future__ import annotations

import math

import dense_policy as dense
import pytest
import torch

from llmreg.errors import RecipeError, UnsupportedError
from llmreg.regularizers import LowProbabilityRegularizer, low_probability
from llmreg.regularizers.base import Regularizer
from llmreg.regularizers.low_probability import THRESHOLD
from llmreg.regularizers.vocabulary import TokenStatistics

RARE, NOISE = 2, 3  # of dense.KNOWN: probabilities 0.09 (kept) and 0.01 (below 0.02 * 0.6)
Z = 0.99
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def statistics(monkeypatch):
    """Counts what the vocabulary is gone through for."""
    rows, stock = [], low_probability.token_statistics

    def counted(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return stock(hidden, *args, **kwargs)

    monkeypatch.setattr(low_probability, "token_statistics", counted)
    return rows


def loss_and_push(regularizer, labels, advantages, probabilities=dense.KNOWN, threshold=0.1, proxy=None):
    """The term, its gradient with respect to every logit, and what was logged."""
    logits, head = dense.policy(probabilities, len(labels))
    context = dense.context(logits, head, labels, advantages, threshold, proxy)
    loss = regularizer.loss(context)
    return float(loss.detach()), torch.autograd.grad(loss, logits)[0], context.log


def test_it_is_a_regularizer():
    assert isinstance(LowProbabilityRegularizer(), Regularizer)
    assert LowProbabilityRegularizer().needs == {"hidden", "log_probs", "advantages"}
    assert LowProbabilityRegularizer(policy="old").needs == {"log_probs", "advantages"}


# -- what it is worth -------------------------------------------------------------------------------------------------


def test_the_four_token_policy_has_the_known_mass_divergence_and_proxy():
    regularizer = LowProbabilityRegularizer()
    logits, head = dense.policy(count=4)
    kept, log_mass = regularizer.keeps(logits, head, torch.arange(4))
    assert kept.tolist() == [True, True, True, False]
    torch.testing.assert_close(log_mass.exp(), torch.full((4,), Z, dtype=torch.float64))
    proxy = [p / Z for p in dense.KNOWN[:3]]
    assert proxy == pytest.approx([0.60606, 0.30303, 0.090909], abs=1e-5)
    divergence = loss_and_push(LowProbabilityRegularizer(divergence="exact"), [RARE], [-1.0])[0]
    assert divergence == pytest.approx(0.0100503, abs=1e-7)
    assert divergence == pytest.approx(sum(q * math.log(q / p) for q, p in zip(proxy, dense.KNOWN[:3], strict=True)))
    d = -math.log(Z)
    assert loss_and_push(regularizer, [RARE], [-1.0])[0] == pytest.approx(math.exp(d) - d - 1)


def test_the_gradient_of_the_exact_divergence_is_the_policy_less_its_proxy():
    push = loss_and_push(LowProbabilityRegularizer(divergence="exact"), [RARE], [-1.0])[1]
    proxy = torch.tensor([0.6 / Z, 0.3 / Z, 0.09 / Z, 0], dtype=torch.float64)
    expected = torch.tensor(dense.KNOWN, dtype=torch.float64) - proxy
    torch.testing.assert_close(push[0], expected, atol=1e-15, rtol=0)


def test_the_push_on_a_token_s_own_logit_is_weaker_by_its_probability_where_exact():
    """k3 pushes by (1/Z - 1)(1 - p), the exact divergence by (1/Z - 1) p; the paper's example is Z = .922, p = .02."""
    probabilities = (0.6, 0.302, 0.02, *[0.0078] * 10)
    for divergence, expected in (("k3", 1 - 0.02), ("exact", 0.02)):
        regularizer = LowProbabilityRegularizer(divergence=divergence)
        push = loss_and_push(regularizer, [2], [-1.0], probabilities)[1]
        assert float(push[0, 2]) == pytest.approx(-(1 / 0.922 - 1) * expected, rel=1e-9)


def test_over_all_sampled_tokens_k3_has_the_exact_gradient_on_average():
    """Filtered tokens count with e^d = 0. Over the selected tokens alone this does not hold."""
    count = 100_000
    probabilities = torch.tensor((0.5, 0.3, 0.1, 0.092, 0.008), dtype=torch.float64)
    samples = torch.multinomial(probabilities, count, replacement=True, generator=torch.Generator().manual_seed(0))
    logits, head = dense.policy(probabilities.tolist())
    kept, log_mass = LowProbabilityRegularizer().keeps(logits.expand(count, -1), head, samples)
    log_probs = torch.log_softmax(logits, 1)[0, samples]
    d = (log_probs.detach() - log_mass).masked_fill(~kept, -INF) - log_probs
    coefficient = 1 - d.detach().exp()
    push = torch.autograd.grad((coefficient * log_probs).mean(), logits)[0][0]
    proxy = torch.where(probabilities > 0.01, probabilities, 0) / 0.992
    error = (probabilities * (1 - probabilities) / count).sqrt()  # a standard deviation of a token's frequency
    assert ((push - (probabilities - proxy)).abs() < 5 * error).all()


def test_the_term_is_a_mean_over_all_scored_tokens():
    once = loss_and_push(LowProbabilityRegularizer(), [RARE], [-1.0])[0]
    among = loss_and_push(LowProbabilityRegularizer(), [RARE, 0, 1, RARE], [-1.0, 1.0, -1.0, -2.0])[0]
    assert among == pytest.approx(once * 2 / 4)


def test_no_gradient_goes_through_the_proxy():
    """k3's gradient is (1 - e^d) d log pi, which a proxy that followed the policy would make zero."""
    logits, head = dense.policy()
    context = dense.context(logits, head, [RARE], [-1.0], 0.1)
    push = torch.autograd.grad(LowProbabilityRegularizer().loss(context), logits)[0]
    expected = torch.autograd.grad((1 - 1 / Z) * torch.log_softmax(logits, 1)[0, RARE], logits)[0]
    torch.testing.assert_close(push, expected)
    context = dense.context(logits, head, [RARE], [-1.0], 0.1)
    through = torch.autograd.grad(LowProbabilityRegularizer().loss(context), context.hidden, allow_unused=True)[0]
    torch.testing.assert_close(through, expected)  # `hidden` is reached by log_probs alone


# -- which tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["current", "old"])
@pytest.mark.parametrize(
    ("label", "advantage", "threshold", "selected"),
    [
        (RARE, -1.0, 0.1, True),
        (RARE, 0.0, 0.1, False),
        (RARE, 1.0, 0.1, False),
        (NOISE, -1.0, 0.1, False),
        (1, -1.0, 0.1, False),
        (RARE, -1.0, 0.09, False),  # not below: it is the threshold
        (RARE, -1.0, NAN, False),
        (RARE, -1.0, 0.0, False),
    ],
)
def test_selected_are_unlikely_kept_tokens_of_negative_advantage(policy, label, advantage, threshold, selected):
    proxy = [-INF if label == NOISE else math.log(dense.KNOWN[label] / Z)] if policy == "old" else None
    value, push, log = loss_and_push(
        LowProbabilityRegularizer(policy=policy), [label], [advantage], threshold=threshold, proxy=proxy
    )
    assert (value > 0) == selected
    assert bool(push.any()) == selected
    assert float(log["regularizer/low_probability_share"]) == selected


def test_the_vocabulary_is_gone_through_for_candidates_alone(statistics):
    labels, advantages = [0, RARE, RARE, NOISE, 1], [-1.0, -1.0, 1.0, -1.0, -1.0]
    log = loss_and_push(LowProbabilityRegularizer(), labels, advantages)[2]
    assert statistics == [2]
    assert float(log["regularizer/low_probability_share"]) == pytest.approx(1 / 5)
    assert float(log["regularizer/spark_share"]) == pytest.approx(1 / 2)
    assert float(log["regularizer/low_probability_threshold"]) == pytest.approx(0.1)
    statistics.clear()
    loss_and_push(LowProbabilityRegularizer(), labels, [1.0] * 5)
    loss_and_push(LowProbabilityRegularizer(policy="old"), labels, advantages, proxy=[NAN] * 5)
    assert statistics == [0]  # a head that is sharded is gathered by all ranks, so the call is made


@pytest.mark.parametrize("divergence", ["k3", "exact"])
def test_without_selected_tokens_a_zero_goes_backward(divergence):
    for labels, advantages in (([0, 1], [-1.0, -1.0]), ([NOISE], [-1.0]), ([], [])):
        labels = torch.tensor(labels, dtype=torch.long)
        value, push, _ = loss_and_push(LowProbabilityRegularizer(divergence=divergence), labels, advantages)
        assert value == 0
        assert not push.any()


def test_a_fixed_cut_replaces_the_relative_one():
    probabilities = (0.3, 0.3, 0.25, 0.1, 0.05)
    kept = {}
    for regularizer in (
        LowProbabilityRegularizer(),
        LowProbabilityRegularizer(tau=0.2),
        LowProbabilityRegularizer(tau=0.5),
    ):
        logits, head = dense.policy(probabilities, 5)
        kept[regularizer.tau] = regularizer.keeps(logits, head, torch.arange(5))
    assert kept[None][0].all()
    assert kept[0.2][0].tolist() == [True, True, True, False, False]
    assert float(kept[0.2][1][0].exp()) == pytest.approx(0.85)
    assert not kept[0.5][0].any()
    push = loss_and_push(LowProbabilityRegularizer(tau=0.5, divergence="exact"), [3], [-1.0], probabilities, 0.2)[1]
    assert not push.any()


def test_the_old_policy_may_say_what_is_unlikely():
    logits, head = dense.policy(count=2)
    context = dense.context(logits, head, [RARE, RARE], [-1.0, -1.0], 0.05)
    context.old_log_probs = torch.tensor([0.04, 0.3]).double().log()
    shares = {}
    for selection_policy in ("current", "old"):
        LowProbabilityRegularizer(selection_policy=selection_policy).loss(context)
        shares[selection_policy] = float(context.log["regularizer/low_probability_share"])
    assert shares == {"current": 0, "old": 0.5}
    context.old_log_probs = None  # the policy that sampled is the current one
    LowProbabilityRegularizer(selection_policy="old").loss(context)
    assert float(context.log["regularizer/low_probability_share"]) == 0


# -- far from the old policy ------------------------------------------------------------------------------------------


def test_the_further_a_token_has_fallen_the_more_it_is_pushed_and_the_reference_stops():
    """No dead zone at d = 5; the authors' clamp of the value has one from d = 2.6 on."""
    distances, count = (0.5, 2.5, 2.7, 5.0, 12.0), 200  # the reference selects two of 200 tokens
    pushes = {"paper": [], "reference": []}
    for variant, found in pushes.items():
        regularizer = LowProbabilityRegularizer(policy="old", variant=variant)
        for d in distances:
            proxy = [math.log(0.09) + d] * count
            push = loss_and_push(regularizer, [RARE] * count, [-1.0] * count, proxy=proxy)[1]
            found.append(-float(push[:, RARE].min()) * count)
    assert pushes["paper"] == pytest.approx([math.expm1(d) * (1 - 0.09) for d in distances])
    assert pushes["reference"][:2] == pytest.approx(pushes["paper"][:2])
    assert pushes["reference"][2:] == [0, 0, 0]


def test_the_exact_divergence_has_no_dead_zone_either():
    """d = 5 on-policy: all but e^-5 of the mass is filtered."""
    mass = math.exp(-5)
    probabilities = (0.6 * mass, 0.4 * mass, *[(1 - mass) / 1000] * 1000)
    push = loss_and_push(LowProbabilityRegularizer(tau=0.0015, divergence="exact"), [1], [-1.0], probabilities)[1]
    assert float(push[0, 1]) == pytest.approx(probabilities[1] * (1 - math.exp(5)), rel=1e-6)


# -- the authors' variant ---------------------------------------------------------------------------------------------


def test_the_reference_takes_a_share_of_the_negative_tokens_of_the_micro_batch():
    logits, head = dense.policy(count=402)
    labels = torch.tensor([RARE] * 3 + [0] * 199 + [RARE] * 200)
    advantages = torch.tensor([-1.0] * 202 + [1.0] * 200)
    context = dense.context(logits, head, labels, advantages)
    del context.extra[THRESHOLD]
    regularizer = LowProbabilityRegularizer(variant="reference")
    regularizer.loss(context)
    assert float(context.log["regularizer/low_probability_share"]) == pytest.approx(2 / 402)
    assert float(context.log["regularizer/low_probability_threshold"]) == pytest.approx(0.09)
    few = dense.context(*dense.policy(count=100), [RARE] * 100, [-1.0] * 100)
    assert float(regularizer.loss(few).detach()) == 0  # 1 % of them is one token: the authors skip it


def test_the_reference_keeps_a_token_at_the_cut_and_the_paper_does_not(monkeypatch):
    at_the_cut = TokenStatistics(*torch.tensor([[math.log(0.25)], [0.0], [0.0], [0.0], [0.0]], dtype=torch.float64))
    monkeypatch.setattr(low_probability, "token_statistics", lambda *args, **kwargs: at_the_cut)
    for variant, expected in (("paper", False), ("reference", True)):
        kept, _ = LowProbabilityRegularizer(kappa=0.25, variant=variant).keeps(*dense.policy(), torch.tensor([3]))
        assert kept.tolist() == [expected]


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1.0}, RecipeError, "weight must be a number >= 0"),
        ({"schedule": "cosin"}, RecipeError, "did you mean 'cosine'"),
        ({"kappa": 0}, RecipeError, "kappa must be a number between 0 and 1, got 0"),
        ({"kappa": True}, RecipeError, "kappa must be a number between 0 and 1, got True"),
        ({"tau": 1.5}, RecipeError, "tau must be a number between 0 and 1, got 1.5"),
        ({"percentile": 1}, RecipeError, "percentile must be a number between 0 and 1, got 1"),
        ({"threshold": "last"}, RecipeError, "threshold must be 'exact' or 'previous_batch', got 'last'"),
        ({"divergence": "kl"}, RecipeError, "divergence must be 'k3' or 'exact'"),
        ({"divergence": "exact", "policy": "old"}, UnsupportedError, "needs the whole distribution of the policy that"),
        ({"divergence": "exact", "variant": "reference"}, UnsupportedError, "variant='reference' is the authors' k3"),
        (
            {"threshold": "previous_batch", "variant": "reference"},
            UnsupportedError,
            "leave divergence and threshold out",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LowProbabilityRegularizer(**arguments)


def test_a_context_without_what_generation_prepares_is_refused():
    context = dense.context(*dense.policy(), [RARE], [-1.0])
    with pytest.raises(UnsupportedError, match="'low_probability_proxy' was not prepared"):
        LowProbabilityRegularizer(policy="old").loss(context)
    context.extra.clear()
    with pytest.raises(UnsupportedError, match="'low_probability_threshold' was not prepared"):
        LowProbabilityRegularizer().loss(context)
