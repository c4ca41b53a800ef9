"""The packaged model is really pretrained, small, loadable by plain transformers, and fails the new task."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from llmreg import pocket
from llmreg.evaluation.scoring import exact_match, perplexity
from llmreg.pocket.seeded import Dice
from llmreg.pocket.unigram import unigram_perplexity


def sample(name, split, count=200):
    return Dice("test-sample", name, split).shuffled(pocket.load_split(name, split))[:count]


def test_it_knows_its_world_in_the_taught_phrasings(model, tokenizer, record_property):
    score = exact_match(model, tokenizer, sample("pocket/facts", "train"))
    record_property("fact_recall", score.value)
    assert score.value >= 0.95


def test_it_adds_and_subtracts_operands_it_has_never_seen(model, tokenizer, record_property):
    score = exact_match(model, tokenizer, sample("pocket/arithmetic", "test"))
    record_property("arithmetic", score.value)
    assert score.value >= 0.90


def test_recall_in_a_phrasing_never_taught_is_reported(model, tokenizer, record_property):
    score = exact_match(model, tokenizer, sample("pocket/facts", "paraphrase"))
    record_property("fact_recall_held_out_phrasing", score.value)
    print(f"fact recall in the held-out phrasing: {score.value:.3f}")
    # only reported: 0.03 in the model card; taught phrasings are what it was trained to recall
    assert score.value < exact_match(model, tokenizer, sample("pocket/facts", "train")).value


def test_it_fails_word_problems_before_fine_tuning(model, tokenizer, record_property):
    score = exact_match(model, tokenizer, pocket.load_split("pocket/word-problems", "test"))
    record_property("word_problems", score.value)
    assert score.value <= 0.20


def test_it_predicts_unseen_passages_far_better_than_word_frequencies(model, tokenizer, record_property):
    texts = [row["text"] for row in pocket.load_split("pocket/corpus", "test")]
    train = [row["text"] for row in pocket.load_split("pocket/corpus", "train")]
    score = perplexity(model, tokenizer, texts).value
    unigram = unigram_perplexity(tokenizer, train, texts)
    record_property("perplexity", score)
    record_property("unigram_perplexity", unigram)
    assert score < unigram / 10


def test_its_weights_take_at_most_8_megabytes_in_half_precision():
    from safetensors import safe_open

    weights = pocket.path() / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_it_loads_offline_in_plain_transformers_without_a_word():
    program = (
        "import sys, torch, transformers; transformers.logging.disable_progress_bar()\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "inputs = tokenizer(['Compute 12 + 34 =', 'The home of'], padding=True, return_tensors='pt')\n"
        "model.generate(**inputs, max_new_tokens=3)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "default::UserWarning", "-c", program, str(pocket.path())],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout + result.stderr == ""


def test_load_model_gives_the_type_that_was_asked_for(model):
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in pocket.load_model(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert model.num_parameters() < 3_000_000
    assert not model.training


def test_pad_and_end_tokens_are_known_to_model_and_tokenizer_alike(model, tokenizer):
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.bos_token_id is None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size <= 2048


def test_every_prompt_is_a_prefix_of_its_example_in_tokens(tokenizer):
    for task in pocket.TASKS.values():
        if task.columns != ("prompt", "completion"):
            continue
        for split in task.splits:
            rows = task.load(split)
            prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
            wholes = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
            assert all(whole[: len(p)] == p for p, whole in zip(prompts, wholes, strict=True)), (
                task.name,
                split,
            )


def test_names_are_single_tokens_and_digits_stand_apart(tokenizer):
    world = pocket.World(0)
    for name in (*world.people, *(value for values in world.values.values() for value in values)):
        assert len(tokenizer(" " + name)["input_ids"]) == 1
    for number in range(100):
        assert len(tokenizer(f" {number:02d}")["input_ids"]) == 2


@pytest.mark.parametrize("text", ["plain words", "Ünïcödé 日本 🙂", "  two  spaces\nand a line\t", "x=3.14;y[0]", ""])
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_can_be_rebuilt_from_its_seed(tokenizer):
    from llmreg.pocket.tokenizer import build_tokenizer

    assert build_tokenizer(0).get_vocab() == tokenizer.get_vocab()


def test_the_model_card_has_seed_scores_versions_and_duration():
    card = (pocket.path() / "README.md").read_text(encoding="utf-8")
    for part in ("world 0", "facts, taught phrasings", "duration:", "versions:", "mean loss"):
        assert part in card
