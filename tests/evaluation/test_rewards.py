"""Rewards: exact checkers, on texts and conversations, that say when a row cannot be judged."""

from __future__ import annotations

import sys
import threading

import pytest

from llmreg import pocket
from llmreg.errors import RecipeError
from llmreg.evaluation.rewards import exact_match, final_answer, format_of, math_answer, pocket_arithmetic, text_of

ARITHMETIC = ("pocket/arithmetic", "pocket/reworded-arithmetic", "pocket/word-problems")


def said(text):
    return [{"role": "assistant", "content": text}]


def test_the_text_of_a_conversation_is_its_last_message():
    assert text_of("a") == "a"
    assert text_of([{"role": "user", "content": "q"}, *said("a")]) == "a"
    assert text_of([]) == text_of([{"role": "assistant", "content": None}]) == ""


def test_an_exact_match_is_of_the_whole_completion():
    completions = [" 42", "42\n", "42.", "the answer is 42", "", said("42"), "42"]
    assert exact_match([""] * 7, completions, answer=["42"] * 6 + [None]) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, None]
    assert exact_match(["", ""], ["42", "41"], answer=[42, 42], other=[1, 2]) == [1.0, 0.0]


def test_gsm8k_answers_are_what_follows_the_mark():
    assert final_answer("48/2 = <<48/2=24>>24 clips\n#### 1,072") == "1072"
    assert final_answer("a #### b #### -3.5 ") == "-3.5"
    assert final_answer(" no mark") == " no mark"


# -- pocket -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("task", ARITHMETIC)
def test_the_answer_key_is_right_on_every_row_and_pays_for_no_other_row(task, seed):
    for split in pocket.TASKS[task].splits:
        rows = pocket.load_split(task, split, seed)
        prompts, answers = [row["prompt"] for row in rows], [row["completion"] for row in rows]
        assert set(pocket_arithmetic(prompts, answers)) == {1.0}
        wrong = [f" {(int(answer) + 1) % 100:02d}" for answer in answers]
        assert set(pocket_arithmetic(prompts, wrong)) == {0.0}


def test_the_answer_key_is_exact_and_keeps_to_its_questions():
    prompts = ["Compute 34 + 21 ="] * 5 + ["Compute 34 + 21 = ", "Compute 4 + 21 =", "Compute 90 + 21 =", "Who is Ana?"]
    completions = ["55", " 55 ", "55.", "055", "5 5", "55", "25", "111", "Ana"]
    assert pocket_arithmetic(prompts, completions) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, None, None, None]
    assert pocket_arithmetic([[{"role": "user", "content": prompts[0]}]], [said("55")]) == [1.0]


def test_reworded_prompts_are_distinct_and_their_held_out_operands_new():
    for seed in (0, 1):
        rows = {split: pocket.load_split("pocket/reworded-arithmetic", split, seed) for split in ("train", "test")}
        prompts = {split: {row["prompt"] for row in members} for split, members in rows.items()}
        assert [len(prompts[split]) for split in ("train", "test")] == [4000, 200]
        operands = {split: {tuple(filter(str.isdigit, text)) for text in texts} for split, texts in prompts.items()}
        taught = {
            tuple(filter(str.isdigit, row["prompt"])) for row in pocket.load_split("pocket/arithmetic", "train", seed)
        }
        assert operands["train"] <= taught


# -- format -----------------------------------------------------------------------------------------------------


def test_the_format_is_of_the_whole_completion_over_lines():
    good = "<think>\na\nb</think>\n<answer>42</answer>\n"
    bad = [
        "<answer>42</answer>",
        f"well, {good}",
        f"{good} or so",
        "<think>a<think>b</think></think><answer>42</answer>",
        "<think>a</think><answer>4</answer><answer>2</answer>",
        "",
    ]
    assert format_of()([""] * 8, [good, said(good), *bad]) == [1.0, 1.0] + [0.0] * len(bad)
    assert format_of(r"\d\d")(["", "", ""], [" 42 ", "42.", "142"]) == [1.0, 0.0, 0.0]


def test_a_bad_pattern_is_one_sentence():
    with pytest.raises(RecipeError, match=r"'\(' is no regular expression: missing \)"):
        format_of("(")


# -- math-verify ------------------------------------------------------------------------------------------------


def test_without_math_verify_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RecipeError, match=r"needs the package math-verify; run pip install 'llmreg\[math\]'"):
        math_answer([""], ["1"], answer=["1"])


def test_equal_expressions_are_equal_answers():
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    completions = [
        "so #### 18",
        r"\boxed{\frac{1}{2}}",
        "1/2",
        r"\boxed{17}, not 18",
        "no number",
        said("it is 18."),
        "5",
    ]
    answers = ["18", "0.5", r"$\frac{1}{2}$", "18", "18", "18", "Paris"]
    assert math_answer([""] * 7, completions, answer=answers) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, None]
    assert math_answer([""] * 2, ["18", "18"], answer=["18", None]) == [1.0, None]


def test_answers_are_judged_outside_of_the_main_thread_too():
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    out: list = []
    thread = threading.Thread(target=lambda: out.append(math_answer([""], ["18"], answer=["18"])))
    thread.start()
    thread.join()
    assert out == [[1.0]]
