"""Policy-specific hardness weighting: advantages that count more where the policy seldom succeeds.

    A = (R - mu) D(mu),    D(mu) = 1.256 - 0.256 mu,    R in {-1, 1},  mu the mean of a prompt's group

`D` is 1.512 where all answers to a prompt are wrong and 1 where all are right. There is no division by the standard
deviation, and none by length: in TRL that is `scale_rewards="none"` with `loss_type="dr_grpo"`.
`llmreg.trainers.GRPOTrainer(..., hardness_weighting=True)` puts these advantages in the place of TRL's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import RecipeError, UnsupportedError

__all__ = ["HardnessWeighting", "hardness", "hardness_weights"]


def hardness(mean: Tensor) -> Tensor:
    """`D(mu)` of groups' mean rewards on the scale -1 to 1, any shape.

    Example:
        >>> import torch
        >>> hardness(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([1.5120, 1.2560, 1.0000])
    """
    return 1.256 - 0.256 * mean


def hardness_weights(rewards: Tensor, group_size: int) -> Tensor:
    """Advantages `A` (n,), in the dtype of `rewards` or float32.

    Args:
        rewards: (n,) each -1 or 1; or each 0 or 1, which is taken as -1 or 1. Those of one prompt stand together.
        group_size: answers to each prompt.

    Raises:
        RecipeError: other rewards, or a number of them that is no multiple of `group_size`.

    Example:
        >>> import torch
        >>> hardness_weights(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
        tensor([ 2.0760, -0.6920, -0.6920, -0.6920])
    """
    if group_size < 1 or rewards.dim() != 1 or rewards.numel() % group_size:
        raise RecipeError(
            f"rewards has the shape {tuple(rewards.shape)} and group_size is {group_size}; give one reward an answer, "
            "(prompts * group_size,)."
        )
    exact = rewards if rewards.is_floating_point() else rewards.float()
    if bool(((exact == 0) | (exact == 1)).all()):
        exact = 2 * exact - 1
    elif not bool((exact.abs() == 1).all()):
        raise RecipeError("rewards must all be -1 or 1, or all be 0 or 1: right or wrong; scale others first.")
    groups = exact.view(-1, group_size)
    mean = groups.mean(1, keepdim=True)
    return ((groups - mean) * hardness(mean)).flatten()


class HardnessWeighting:
    """Mixin in front of `trl.GRPOTrainer`, which acts where `_hardness_weighting` is set."""

    _hardness_weighting = False
    _rewards: Tensor | None = None

    def _weigh_by_hardness(self: Any) -> None:
        """Switch it on.

        Raises:
            UnsupportedError: the trainer's arguments divide advantages or lengths.
        """
        scaled = self.args.scale_rewards not in ("none", False)
        if scaled or self.args.loss_type != "dr_grpo" or self.args.multi_objective_aggregation != "sum_then_normalize":
            raise UnsupportedError(
                f"hardness_weighting has advantages of its own, and the trainer has scale_rewards="
                f"{self.args.scale_rewards!r} and loss_type={self.args.loss_type!r}, which divide them; set "
                "scale_rewards='none' and loss_type='dr_grpo'."
            )
        self._hardness_weighting = True

    def _calculate_rewards(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self._hardness_weighting and self.model.training:
            of_all = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(dim=1)
            advantages = hardness_weights(of_all, self.num_generations)
            rows = output["advantages"].shape[0]
            start = self.accelerator.process_index * rows
            output["advantages"] = advantages[start : start + rows].to(output["advantages"])
        return output
