"""Law 6: conflicts fail before a model or data set is loaded, with what to write instead."""

from __future__ import annotations

import importlib.util

import pytest

from llmreg.recipes import load_recipe, plan
from llmreg.recipes.conflicts import served_rank


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """A conflict that is found only by loading something fails its test."""
    import datasets
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.lora_dropout=0.1"], "set lora_dropout=0"),
        (["adapter.bias=all"], "leave bias='none'"),
        (["adapter.use_dora=true"], "DoRA rescales"),
        (["adapter.init_lora_weights=pissa"], "leave init_lora_weights out"),
        (["adapter.target_modules=[q_proj, lm_head]"], "lm_head cannot be a target"),
        (["adapter.target_modules=.*"], "lm_head cannot be a target"),
        (["adapter.r=0"], "must be a positive integer"),
        (["adapter.method=lora", "adapter.rank_pattern={q_proj: 0}"], "a rank must be a positive integer, not 0"),
        (["adapter.lora_alpha=0"], "lora_alpha must be a positive number"),
        (["adapter.lora_alpha=-1"], "lora_alpha must be a positive number"),
        (["adapter.method=lora", "adapter.lora_alpha=0"], "write a positive number"),
        (["adapter.method=lora", "adapter.init_lora_weights=pissa"], "changes the base weights"),
        (["adapter.method=lora", "adapter.init_lora_weights=olora"], "changes the base weights"),
        (["output.serve=vllm", "adapter.r=320"], "the exported rank is 640 (2 x r), and vLLM serves ranks up to 512"),
        (["output.serve=vllm", "adapter.method=lora", "adapter.r=513"], "the exported rank is 513, and vLLM"),
        (["output.serve=vllm", "adapter.modules_to_save=[lm_head]"], "does not load adapters with modules_to_save"),
        (
            ["output.serve=vllm", "adapter.method=lora", "adapter.target_modules=[embed_tokens, q_proj]"],
            "vLLM does not adapt embed_tokens, an embedding or head",
        ),
        (
            ["output.serve=vllm", "task=classification", "data.train=pocket/classification", "evaluation={}"],
            "vLLM does not load adapters that bring a classification head",
        ),
        (["output.serve=vllm", "adapter.alpha_pattern={q_proj: 4}"], "would misread alpha_pattern"),
        (["training.learning_rate=-1"], "training.learning_rate must be at least 0"),
        (["training.per_device_train_batch_size=0"], "must be at least 1"),
        (["training.max_steps=0"], "training.max_steps must be positive"),
        (["training.max_steps=-1", "training.num_train_epochs=0"], "training.num_train_epochs must be positive"),
        (["training.eval_strategy=steps"], "write data.test or evaluation.heldout"),
        (["training.load_best_model_at_end=true"], "argument 'training.load_best_model_at_end=true'"),
        (["data.test=pocket/word-problems", "evaluation.heldout=10"], "remove one of the two"),
        (["data.train=pocket/word-problem"], "did you mean 'pocket/word-problems'?"),
        (["data.train=missing.jsonl"], "the file 'missing.jsonl' does not exist"),
        (["data.train=words"], "names no data"),
        (["data.columns={prompt: q}"], "it must give one of: prompt and completion"),
        (["evaluation.forgetting=[pocket/facts, pocket/fact]"], "did you mean 'pocket/facts'?"),
        (["model.name=./no-such-folder"], "the model folder ./no-such-folder does not exist"),
    ],
)
def test_a_conflict_is_refused_at_its_place(complaint, overrides, said):
    message = complaint(*overrides)
    assert said in message
    assert message.startswith("argument ")


def test_a_missing_extra_is_named_with_its_install_command(complaint, monkeypatch):
    found = importlib.util.find_spec

    def without(name, *rest):
        return None if name in ("bitsandbytes", "wandb") else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert "pip install 'llmreg[quant]'" in complaint("model.quantization=nf4")
    assert "pip install wandb" in complaint("training.report_to=wandb")


def test_a_rank_that_is_recompressed_can_be_served(recipe_file):
    settled = plan(load_recipe(recipe_file(), ["output.serve=vllm", "adapter.r=320", "output.rank=64"]))
    assert settled.exported_rank == 64
    patterned = ["output.serve=vllm", "adapter.alpha_pattern={q_proj: 4}", "output.rank=16"]
    assert plan(load_recipe(recipe_file(), patterned)).exported_rank == 16


def test_served_ranks_are_those_of_vllm():
    assert [served_rank(rank) for rank in (1, 2, 16, 24, 512, 513)] == [1, 8, 16, 32, 512, None]


def test_an_output_folder_that_is_not_empty_is_refused(complaint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "out is not an empty folder; empty it or write another output.dir" in complaint()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_output_that_is_a_file_is_refused(complaint, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is not an empty folder" in complaint()


def test_validating_writes_nothing(recipe_file, tmp_path):
    plan(load_recipe(recipe_file()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
