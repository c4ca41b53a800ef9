"""Rewards for reinforcement learning: numbers for completions, by rules that need no model.

Every function has the signature of TRL's reward functions, `(prompts, completions, **columns) -> list[float | None]`:
prompts and completions are texts or conversations, `columns` are the other columns of the rows, such as `answer`, each
repeated for every completion of its prompt. A reward is 1.0 for right and 0.0 for wrong; None means that the row cannot
be judged, and TRL leaves it out of the mean. (GRPO: DeepSeekMath, arXiv 2402.03300, section 4; rewards by rule: 4.1.)
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from llmreg.errors import RecipeError

__all__ = [
    "THINK_THEN_ANSWER",
    "exact_match",
    "final_answer",
    "format_of",
    "math_answer",
    "pocket_arithmetic",
    "text_of",
]

Rewards = list[float | None]
RewardFunction = Callable[..., Rewards]

#: One part in `<think>` tags, then one in `<answer>` tags, and none of these tags elsewhere.
THINK_THEN_ANSWER = r"<think>(?:(?!</?(?:think|answer)>).)*</think>\s*<answer>(?:(?!</?(?:think|answer)>).)*</answer>"


def text_of(completion: Any) -> str:
    """The text of a completion or prompt: itself, or what the last message of a conversation says."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def final_answer(text: str) -> str:
    """What stands behind the last `####`, as GSM8K writes its answers, without thousands' commas; else the whole text.

    >>> final_answer("She has 3 x 400 = 1200 left. #### 1,200")
    '1200'
    """
    _, mark, end = text.rpartition("####")
    return end.strip().replace(",", "") if mark else text


def exact_match(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> Rewards:
    """1.0 where the completion is the answer, spaces at both ends apart; None where the row has no answer."""
    return [
        None if right is None else float(text_of(completion).strip() == str(right).strip())
        for completion, right in zip(completions, answer, strict=True)
    ]


def pocket_arithmetic(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Rewards:
    """1.0 where the completion is the result, two digits and nothing else, that the question in the prompt has.

    It calculates from the prompt, in every phrasing of the pocket tasks; None for a prompt that is none of them.
    """
    from ..pocket import solve

    results = [solve(text_of(prompt)) for prompt in prompts]
    return [
        None if result is None else float(text_of(completion).strip() == result)
        for completion, result in zip(completions, results, strict=True)
    ]


def math_answer(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> Rewards:
    """1.0 where the completion's last mathematical expression equals the answer, by the package `math-verify`.

    `1/2`, `0.5` and `$\\frac{1}{2}$` are equal, and `\\boxed{...}` goes before anything else. None where the answer
    holds no number and no LaTeX between dollars.

    Raises:
        RecipeError: the package is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise RecipeError("the reward math needs the package math-verify; run pip install 'llmreg[math]'.") from None
    # The package limits its time by a signal, which only the main thread can have.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    if limit is None:
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)  # they warn at every call that there is no limit

    def judged(completion: Any, right: Any) -> float | None:
        expected = parse(str(right), parsing_timeout=limit) if right is not None else []
        if not expected:
            return None
        return float(verify(expected, parse(text_of(completion), parsing_timeout=limit), timeout_seconds=limit))

    return [judged(completion, right) for completion, right in zip(completions, answer, strict=True)]


def format_of(pattern: str = THINK_THEN_ANSWER) -> RewardFunction:
    """A reward function: 1.0 where the whole completion matches `pattern`, spaces at both ends apart; `.` matches any
    character, line breaks too.

    Raises:
        RecipeError: `pattern` is no regular expression.
    """
    try:
        expression = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RecipeError(f"{pattern!r} is no regular expression: {error}.") from None

    def matches(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Rewards:
        return [float(expression.fullmatch(text_of(completion).strip()) is not None) for completion in completions]

    return matches
