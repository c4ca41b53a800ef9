"""Exact match and perplexity against plain, unbatched references, and what they leave behind."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
import torch

from llmreg import pocket
from llmreg.errors import RecipeError
from llmreg.evaluation.scoring import Perplexity, Score, exact_match, perplexity


@pytest.fixture(scope="module")
def model():
    return pocket.load_model()


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.load_tokenizer()


@pytest.fixture(scope="module")
def problems():
    """Prompts of very different lengths, some answered rightly and some not."""
    rows = pocket.load_split("pocket/facts", "paraphrase")[:12]
    return rows + pocket.load_split("pocket/arithmetic", "test")[:12]


@pytest.fixture(scope="module")
def texts():
    return [row["text"] for row in pocket.load_split("pocket/corpus", "test")[:7]] + ["The home of Boros"]


def greedy_by_hand(model, tokenizer, prompt, steps):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = []
    for _ in range(steps):
        token = model(input_ids=ids).logits[0, -1].argmax().view(1, 1)
        if token.item() == tokenizer.eos_token_id:
            break
        answer.append(token.item())
        ids = torch.cat([ids, token], dim=1)
    return tokenizer.decode(answer).strip()


@torch.no_grad()
def test_exact_match_agrees_with_greedy_decoding_by_hand(model, tokenizer, problems):
    right = sum(greedy_by_hand(model, tokenizer, r["prompt"], 4) == r["completion"].strip() for r in problems)
    score = exact_match(model, tokenizer, problems, max_new_tokens=4)
    assert score == Score(right, len(problems))
    assert right > 0


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batch_size_does_not_change_the_scores(model, tokenizer, problems, texts, batch_size):
    assert exact_match(model, tokenizer, problems, batch_size=batch_size) == exact_match(model, tokenizer, problems)
    reference = perplexity(model, tokenizer, texts, batch_size=3)
    score = perplexity(model, tokenizer, texts, batch_size=batch_size)
    assert score.denominator == reference.denominator
    assert score.value == pytest.approx(reference.value, rel=1e-5)


def test_a_right_answer_followed_by_more_words_is_wrong(model, tokenizer):
    row = pocket.load_split("pocket/arithmetic", "train")[0]
    first_digit = {"prompt": row["prompt"], "completion": row["completion"][:-1]}
    assert exact_match(model, tokenizer, [row], max_new_tokens=4).numerator == 1
    assert exact_match(model, tokenizer, [first_digit], max_new_tokens=4).numerator == 0


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_loss_per_token(model, tokenizer, texts):
    loss, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        loss += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    score = perplexity(model, tokenizer, texts)
    assert score.denominator == tokens
    assert score.value == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_max_length_cuts_the_texts(model, tokenizer, texts):
    assert perplexity(model, tokenizer, texts[:3], max_length=10).denominator == 3 * 9


def test_a_peft_model_is_scored_with_its_adapter(tokenizer, problems):
    from peft import LoraConfig, get_peft_model

    base = pocket.load_model()
    before = exact_match(base, tokenizer, problems)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with adapted.disable_adapter():
        assert exact_match(adapted, tokenizer, problems) == before
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(100)
    assert exact_match(adapted, tokenizer, problems).numerator < before.numerator


def test_training_flags_padding_side_and_random_state_are_left_as_they_were(tokenizer, problems, texts):
    model = pocket.load_model().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    side, state = tokenizer.padding_side, torch.get_rng_state()
    for tokenizer.padding_side in ("left", "right"):
        exact_match(model, tokenizer, problems[:4])
        perplexity(model, tokenizer, texts[:2])
        assert [module.training for module in model.modules()] == modes
    assert tokenizer.padding_side == "right"
    tokenizer.padding_side = side
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_flags_come_back_after_an_interruption(tokenizer, problems):
    model = pocket.load_model().train()

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exact_match(model, tokenizer, problems, progress=interrupt)
    assert model.training


def test_nothing_is_printed_even_with_checkpointing_and_sampling_defaults(tokenizer, problems, texts, capfd):
    model = pocket.load_model().train()
    model.activation_checkpointing_enable()
    model.generation_config.temperature, model.generation_config.top_p = 0.5, 0.9
    model.generation_config.do_sample = True
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = exact_match(model, tokenizer, problems)
        perplexity(model, tokenizer, texts[:2])
    assert capfd.readouterr() == ("", "")
    assert model.generation_config.temperature == 0.5
    assert score == exact_match(pocket.load_model(), tokenizer, problems)


def test_progress_counts_up_to_the_number_of_examples(model, tokenizer, problems, texts):
    calls = []
    exact_match(model, tokenizer, problems[:10], batch_size=4, progress=lambda *c: calls.append(c))
    assert calls == [(4, 10), (8, 10), (10, 10)]
    calls.clear()
    perplexity(model, tokenizer, texts[:3], batch_size=2, progress=lambda *c: calls.append(c))
    assert calls == [(2, 3), (3, 3)]


def test_no_examples_missing_columns_and_empty_prompts_are_refused(model, tokenizer):
    with pytest.raises(RecipeError, match="no examples"):
        exact_match(model, tokenizer, [])
    with pytest.raises(RecipeError, match="example 0 has no column 'completion'; it has prompt, text"):
        exact_match(model, tokenizer, [{"prompt": "a", "text": "b"}])
    with pytest.raises(RecipeError, match="empty prompt"):
        exact_match(model, tokenizer, [{"prompt": "", "completion": "b"}])
    with pytest.raises(RecipeError, match="nothing to predict"):
        perplexity(model, tokenizer, [""])


def test_scores_keep_both_parts():
    assert Score(3, 4).value == 0.75
    assert Perplexity(math.log(8), 3).value == pytest.approx(2)
    assert Perplexity(1e9, 1).value == math.inf


def test_scoring_does_not_import_the_pocket():
    program = "import sys, llmreg.evaluation.scoring; print('llmreg.pocket' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_cuda_are_those_of_the_cpu(model, tokenizer, problems, texts):
    on_cuda = pocket.load_model().to("cuda")
    assert exact_match(on_cuda, tokenizer, problems) == exact_match(model, tokenizer, problems)
    reference = perplexity(model, tokenizer, texts).value
    assert perplexity(on_cuda, tokenizer, texts).value == pytest.approx(reference, rel=1e-3)
