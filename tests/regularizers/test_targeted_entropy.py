"""Targeted entropy: the mean entropy is drawn to its target from both sides."""

from __future__ import annotations

import math

import dense_policy as dense
import pytest
import torch

from llmreg.errors import RecipeError
from llmreg.regularizers import TargetedEntropyRegularizer, targeted_entropy
from llmreg.regularizers.base import Context, Regularizer

ENTROPY = -sum(p * math.log(p) for p in dense.KNOWN)


def test_it_is_the_distance_from_the_target_on_either_side():
    assert isinstance(TargetedEntropyRegularizer(), Regularizer)
    logits, head = dense.policy(count=3)
    gradients = []
    for target in (ENTROPY - 0.1, ENTROPY + 0.1):
        context = Context(hidden=logits, head=head)
        loss = TargetedEntropyRegularizer(target=target).loss(context)
        assert float(loss.detach()) == pytest.approx(0.1)
        assert float(context.log["regularizer/mean_entropy"]) == pytest.approx(ENTROPY)
        gradients.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(gradients[0], -gradients[1])
    assert gradients[0].any()


def test_the_entropy_that_a_trainer_has_is_taken(monkeypatch):
    monkeypatch.setattr(targeted_entropy, "token_statistics", None)
    entropy = torch.tensor([0.2, 0.4], requires_grad=True)
    loss = TargetedEntropyRegularizer().loss(Context(extra={"entropy": entropy}))
    assert float(loss) == pytest.approx(0.25)
    assert torch.autograd.grad(loss, entropy)[0].tolist() == [-0.5, -0.5]


def test_without_scored_tokens_a_zero_goes_backward():
    entropy = torch.zeros(0, requires_grad=True)
    loss = TargetedEntropyRegularizer().loss(Context(extra={"entropy": entropy}))
    loss.backward()
    assert float(loss) == 0


def test_entropy_is_held_at_the_target_from_above_and_from_below():
    for start in ((0.97, 0.01, 0.01, 0.01), (0.25, 0.25, 0.24, 0.26)):
        logits, head = dense.policy(start)
        for _ in range(400):
            loss = TargetedEntropyRegularizer(target=0.55).loss(Context(hidden=logits, head=head))
            logits = (logits - 0.1 * torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
        assert float(loss) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": -0.1}, "target must be an entropy in nats, a number >= 0, got -0.1"),
        ({"target": None}, "target must be an entropy in nats"),
        ({"weight": math.inf}, "weight must be a number >= 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        TargetedEntropyRegularizer(**arguments)
