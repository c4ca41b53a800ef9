"""The preference task: a program decides it, both endings are true to the story, and the base does not prefer it."""

from __future__ import annotations

import re

import pytest
import torch

from llmreg import pocket
from llmreg.pocket.corpus import corpus
from llmreg.pocket.preferences import SIZES
from llmreg.pocket.vocabulary import CHARACTERS, PLACES, WEATHER

SEEDS = (0, 1)
PRONOUNS = dict(CHARACTERS)
EVERYTHING = [(seed, split) for seed in SEEDS for split in SIZES]


def log_prob_of_completion(model, tokenizer, prompt, completion):
    """log p(completion and end | prompt), as DPO sums it."""
    start = tokenizer(prompt)["input_ids"]
    end = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([start + end])).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(end)[:, None]).sum().item()


def is_true_to(prompt, ending):
    """Whether weather, character, pronoun and place of `ending` are those that the story allows."""
    who = next(word for word in re.findall(r"\w+", prompt) if word in PRONOUNS)
    after = next(after for weather, _, after in WEATHER.values() if weather in prompt)
    home = re.fullmatch(r" (.+), and the (\w+) went home \w+\.", ending)
    if home:
        return home.groups() == (after, who)
    told = re.fullmatch(r" The next day (\w+) went to the (\w+) and told the story again\.", ending)
    first_place = re.search(rf"the ({'|'.join(PLACES)})\b", prompt)[1]
    return told[1] == PRONOUNS[who] and told[2] in PLACES and told[2] != first_place


@pytest.mark.parametrize(("seed", "split"), EVERYTHING)
def test_every_chosen_ending_is_preferred_and_no_rejected_one(seed, split):
    rows = pocket.load_split("pocket/preferences", split, seed)
    assert len(rows) == SIZES[split]
    assert all(pocket.is_preferred(row["prompt"], row["chosen"]) for row in rows)
    assert not any(pocket.is_preferred(row["prompt"], row["rejected"]) for row in rows)


@pytest.mark.parametrize(("seed", "split"), EVERYTHING)
def test_both_endings_are_true_to_the_story(seed, split):
    for row in pocket.load_split("pocket/preferences", split, seed):
        assert is_true_to(row["prompt"], row["chosen"]), row
        assert is_true_to(row["prompt"], row["rejected"]), row


@pytest.mark.parametrize("seed", SEEDS)
def test_no_story_is_in_two_splits_or_in_the_pretraining_corpus(seed):
    prompts = [row["prompt"] for split in SIZES for row in pocket.load_split("pocket/preferences", split, seed)]
    assert len(set(prompts)) == len(prompts) == sum(SIZES.values())
    read = {d.completion.rsplit(". ", 1)[0] + "." for d in corpus(seed) if d.kind == "passage"}
    assert not read & set(prompts)


@pytest.mark.parametrize(
    ("completion", "preferred"),
    [
        (" The rain stopped, and the queen went home singing.", True),
        ("The rain stopped, and the queen went home singing. ", True),
        (" The fog lifted at last, and the queen went home singing.", True),  # manner, not truth
        (" The rain stopped, and the king went home singing.", False),
        (" The rain stopped, and the queen went home smiling.", False),
        (" The queen went home singing.", False),
        (" The rain stopped, and the queen went home singing", False),
        (" The rain stopped, and the queen went home singing. singing.", False),
        (" singing", False),
        ("", False),
    ],
)
def test_the_checker_decides_of_any_text(completion, preferred):
    prompt = "One evening a tall queen found a red lamp near the mill. It rained all day, but the queen did not mind."
    assert pocket.is_preferred(prompt, completion) is preferred


def test_length_does_not_give_the_preferred_ending_away():
    rows = pocket.load_split("pocket/preferences", "train")
    longer = sum(len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows) / len(rows)
    assert longer < 0.6


def test_texts_fit_64_tokens_in_whole_words_and_prompts_are_prefixes(tokenizer):
    for split in SIZES:
        for row in pocket.load_split("pocket/preferences", split):
            prompt = tokenizer(row["prompt"])["input_ids"]
            for column in ("chosen", "rejected"):
                whole = tokenizer(row["prompt"] + row[column])["input_ids"]
                assert whole[: len(prompt)] == prompt
                assert len(whole) + 1 <= 64
                assert len(whole) == len(re.findall(r"\w+|[^\w\s]", row["prompt"] + row[column]))


def test_the_pretrained_model_does_not_prefer_it(model, tokenizer, record_property):
    rows = pocket.load_split("pocket/preferences", "test")
    margins = [
        log_prob_of_completion(model, tokenizer, row["prompt"], row["chosen"])
        - log_prob_of_completion(model, tokenizer, row["prompt"], row["rejected"])
        for row in rows
    ]
    accuracy = sum(margin > 0 for margin in margins) / len(rows)
    record_property("preference_accuracy", accuracy)
    assert accuracy <= 0.60
