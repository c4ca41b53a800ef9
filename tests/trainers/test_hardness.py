"""Policy-specific hardness weighting: known factors, and which rewards it takes."""

from __future__ import annotations

import pytest
import torch

from llmreg.errors import RecipeError
from llmreg.trainers.hardness import hardness, hardness_weights


def test_the_factor_is_largest_where_all_answers_are_wrong():
    torch.testing.assert_close(hardness(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([1.512, 1.256, 1.0]))


def test_advantages_are_centred_by_group_and_weighted_by_its_hardness():
    rewards = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    advantages = hardness_weights(rewards, 4)
    factor = 1.256 + 0.256 / 2
    torch.testing.assert_close(advantages[:4], torch.tensor([1.5, -0.5, -0.5, -0.5]) * factor)
    assert not advantages[4:].any()
    torch.testing.assert_close(hardness_weights((rewards + 1) / 2, 4), advantages)
    torch.testing.assert_close(hardness_weights((rewards > 0).int(), 4), advantages)


@pytest.mark.parametrize(
    ("rewards", "group_size", "message"),
    [
        ([1.0, 0.5], 2, "rewards must all be -1 or 1, or all be 0 or 1"),
        ([1.0, 0.0, -1.0, 1.0], 2, "rewards must all be -1 or 1, or all be 0 or 1"),
        ([1.0, float("nan")], 2, "rewards must all be -1 or 1"),
        ([1.0, 0.0, 1.0], 2, r"shape \(3,\) and group_size is 2"),
        ([1.0, 0.0], 0, "group_size is 0"),
    ],
)
def test_other_rewards_are_refused(rewards, group_size, message):
    with pytest.raises(RecipeError, match=message):
        hardness_weights(torch.tensor(rewards), group_size)
