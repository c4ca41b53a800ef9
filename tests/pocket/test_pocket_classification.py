"""The classification task: unequal classes that the text decides and no single word does."""

from __future__ import annotations

import re

import pytest

from llmreg import pocket
from llmreg.pocket.classification import CLASSES, SIZES
from llmreg.pocket.corpus import corpus

SEEDS = (0, 1)
EVERYTHING = [(seed, split) for seed in SEEDS for split in SIZES]


def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


def class_read_from(text):
    lost = " lost a " in text
    if text.endswith(("home alone.", "home singing.")):
        return "expected" if lost == text.endswith("alone.") else "mood"
    return "expected" if lost == text.endswith("again.") else "turn"


@pytest.mark.parametrize(("seed", "split"), EVERYTHING)
def test_80_15_and_5_percent_of_the_rows_are_of_the_three_classes(seed, split):
    labels = [row["label"] for row in pocket.load_split("pocket/classification", split, seed)]
    assert len(labels) == {"train": 2000, "validation": 400, "test": 400}[split]
    assert [labels.count(label) / len(labels) for label in (0, 1, 2)] == [0.80, 0.15, 0.05]
    assert all(type(label) is int for label in labels)


def test_the_labels_have_names():
    assert pocket.TASKS["pocket/classification"].classes == CLASSES
    assert len(CLASSES) == 3


@pytest.mark.parametrize(("seed", "split"), EVERYTHING)
def test_the_text_alone_decides_its_class(seed, split):
    for row in pocket.load_split("pocket/classification", split, seed):
        assert CLASSES[row["label"]] == class_read_from(row["text"]), row


@pytest.mark.parametrize("seed", SEEDS)
def test_no_text_occurs_twice_or_in_the_pretraining_corpus(seed):
    texts = [row["text"] for split in SIZES for row in pocket.load_split("pocket/classification", split, seed)]
    assert len(set(texts)) == len(texts) == 2800
    assert not set(texts) & {d.completion for d in corpus(seed)}


@pytest.mark.parametrize("seed", SEEDS)
def test_no_single_word_separates_the_classes(seed, record_property):
    rows = pocket.load_split("pocket/classification", "train", seed)
    texts = [[words_of(row["text"]) for row in rows if row["label"] == label] for label in range(3)]
    best = 0.0
    for word in set().union(*(words for texts_of_class in texts for words in texts_of_class)):
        present = [sum(word in words for words in of_class) / len(of_class) for of_class in texts]
        # the best rule names one class where the word stands and one where it does not
        best = max(best, *((present[i] + 1 - present[j]) / 3 for i in range(3) for j in range(3) if i != j))
    record_property("best_one_word_balanced_accuracy", best)
    assert best < 0.62  # one third is chance


@pytest.mark.parametrize("seed", SEEDS)
def test_no_length_separates_the_classes(seed, record_property):
    rows = pocket.load_split("pocket/classification", "train", seed)
    lengths = [[len(row["text"].split()) for row in rows if row["label"] == label] for label in range(3)]
    best = 0.0
    for limit in range(min(map(min, lengths)), max(map(max, lengths)) + 1):
        longer = [sum(n > limit for n in of_class) / len(of_class) for of_class in lengths]
        best = max(best, *((longer[i] + 1 - longer[j]) / 3 for i in range(3) for j in range(3) if i != j))
    record_property("best_length_balanced_accuracy", best)
    assert best < 0.60


def test_texts_fit_64_tokens_in_whole_words(tokenizer):
    for split in SIZES:
        for row in pocket.load_split("pocket/classification", split):
            tokens = tokenizer(row["text"])["input_ids"]
            assert len(tokens) <= 64
            assert len(tokens) == len(re.findall(r"\w+|[^\w\s]", row["text"]))


def test_the_texts_have_no_invented_names():
    names = {name.lower() for name in (*pocket.World(0).people, *pocket.World(0).values["town"])}
    for row in pocket.load_split("pocket/classification", "train"):
        assert not names & words_of(row["text"])
