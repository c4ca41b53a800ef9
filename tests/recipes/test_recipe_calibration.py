"""Methods that start from data, in recipes: what is refused, what is read, what is kept, and that it comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmreg.errors import RecipeError
from llmreg.recipes import calibrating as calibrating_module
from llmreg.recipes import dump_recipe, load_recipe, make_recipe, plan, run
from llmreg.recipes.calibrating import calibration_folder, kept_statistics
from llmreg.recipes.dry_run import preview
from llmreg.recipes.evaluating import evaluate
from llmreg.recipes.starting import StatisticsReport, prepare_starts

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = [
    "data.split=validation",
    "training.max_steps=2",
    "training.warmup_steps=0",
    "training.logging_steps=1",
    "adapter.r=4",
    "calibration.samples=24",
    "evaluation={tasks: [pocket/word-problems], limit: 4}",
]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("LLMREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def recipe(folder, name="pocket-eva", *overrides):
    return load_recipe(RECIPES / f"{name}.yaml", [*SHORT, f"output.dir={folder}", *overrides])


def factors(folder):
    return load_file(folder / "adapter" / "llmreg_factors.safetensors")


# -- refused before anything is loaded ------------------------------------------------------------------------------


EVA, KPM = "adapter={method: eva, r: 4}", "adapter={method: corda, mode: kpm, r: 4}"
EORA = "adapter={method: eora, r: 4}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["calibration={samples: 8}"], "pissa takes no calibration data; remove the section, or choose corda"),
        ([EVA, "calibration={data: pocket/fact}"], "no pocket task 'pocket/fact'; did you mean 'pocket/facts'?"),
        ([EVA, "calibration={data: nothing.jsonl}"], "the file 'nothing.jsonl' does not exist"),
        ([EVA, "calibration={sample: 8}"], "unknown key 'calibration.sample'; did you mean 'samples'?"),
        (
            [EVA, "calibration={samples: 0}"],
            "calibration.samples should be a number of rows, at least 1, or all, not 0",
        ),
        (
            [EVA, "calibration={memory_budget: 2 parsecs}"],
            "should be bytes or a size with a unit, such as 2GB, not '2 p",
        ),
        ([EVA, "calibration={memory_budget: 0}"], "calibration.memory_budget should be bytes or a size"),
        ([EVA, "calibration={exact: true, sketch: 64}"], "exact: true and sketch: 64 contradict each other"),
        ([EVA, "calibration={split: test}"], "split is about calibration.data, which is not given"),
        ([EVA, "calibration={max_length: 8}"], "max_length is about calibration.data, which is not given"),
        ([EVA, "output.serve=vllm"], "rho=2.0 gives each layer a rank of its own, which vLLM would misread"),
        ([KPM], "kpm keeps what calibration data shows; write calibration.data"),
        ([KPM, "calibration={samples: 8}"], "kpm keeps what calibration data shows; write calibration.data"),
        ([EORA], "eora makes up for quantisation, and the model is not quantised; write model.quantization"),
        (
            [EORA, "model.quantization=nf4", "task=dpo", "data.train=pocket/preferences"],
            "eora does not start at the base: its disabled adapter, DPO's reference, is the quantised model",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(complaint, overrides, said):
    message = complaint(*overrides)
    assert said in message
    assert message.startswith(("argument", "recipe.yaml:"))


def test_sizes_rows_and_exactness_are_taken_as_written():
    values = {"model": {"name": "pocket"}, "data": {"train": "pocket/word-problems"}, "output": {"dir": "x"}}
    values |= {"adapter": {"method": "eva", "r": 4, "rho": 1}}
    settings = make_recipe(values, ["calibration={samples: all, memory_budget: 1.5MB, exact: false, sketch: 32}"])
    plan(settings)
    assert (settings.calibration.rows, settings.calibration.budget) == (None, 1_500_000)
    again = make_recipe(settings.resolved())
    assert again.calibration == settings.calibration
    assert "calibration" not in dump_recipe(make_recipe(values))


def test_a_rank_for_all_layers_makes_chosen_ranks_servable():
    values = {"model": {"name": "pocket"}, "data": {"train": "pocket/word-problems"}}
    values |= {"adapter": {"method": "eva", "r": 4}, "output": {"dir": "x", "serve": "vllm", "rank": 8}}
    assert plan(make_recipe(values)).exported_rank == 8


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks", "saved"),
    [("pocket-eva", True, None), ("pocket-corda", False, 8), ("pocket-corda-kpm", False, 8)],
)
def test_a_run_says_what_it_calibrated_on_and_eval_finds_the_adapter_again(name, ranks, saved, tmp_path):
    report = run(recipe(tmp_path / "out", name))
    done = report.calibration
    assert done["data"] == ("pocket/facts" if name.endswith("kpm") else "pocket/word-problems")
    assert (done["inputs"], done["exact"], done["sketched"], done["cached"]) == (16, 16, 0, False)
    assert done["batches"] == 2
    assert report.seconds["init"] >= done["seconds"] > 0
    if ranks:
        assert sum(done["ranks"].values()) == 28 * 4
        assert report.rank == max(done["ranks"].values()) > 4
    else:
        assert (done["ranks"], report.rank) == (None, saved)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["calibration"] == done
    assert "Start from data" in (tmp_path / "out" / "report.html").read_text()
    assert "calibration:\n  " in (tmp_path / "out" / "adapter" / "README.md").read_text()
    again = evaluate(tmp_path / "out")
    for row, before in zip(again.scores, report.measurements, strict=True):
        assert row["adapter"] == pytest.approx(before.after)
        assert row["merged"] == pytest.approx(before.after, rel=1e-3)


@pytest.mark.parametrize(
    "task",
    [
        ["task=dpo", "data.train=pocket/preferences", "evaluation={}"],
        ["task=classification", "data.train=pocket/classification", "evaluation={}"],
    ],
    ids=["dpo", "classification"],
)
@pytest.mark.parametrize("name", ["pocket-corda", "pocket-eva"])
def test_every_task_starts_from_its_own_rows_or_from_others(name, task, tmp_path):
    report = run(recipe(tmp_path / "own", name, *task))
    assert report.calibration["data"] == task[1].split("=")[1]
    other = run(recipe(tmp_path / "other", name, *task, "calibration.data=pocket/corpus", "calibration.max_length=16"))
    assert other.calibration["tokens"] <= 24 * 16
    assert other.losses[0]["loss"] == pytest.approx(report.losses[0]["loss"], abs=1e-5), "both start at the base"
    assert other.start_hash != report.start_hash
    if task[0] == "task=dpo":
        assert report.losses[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_eora_begins_better_than_its_base_and_is_compared_with_the_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    task = ["data.train=pocket/corpus", "data.split=train", "evaluation={heldout: 32}", "calibration.samples=64"]
    task.append("training.learning_rate=0")
    still = run(recipe(tmp_path / "out", "pocket-eora", *task, "adapter.r=64"))
    quantized, whole = (recipe(tmp_path / q, "pocket-eva", *task, f"model.quantization={q}") for q in ("nf4", "null"))
    assert still.heldout_loss["before"] == run(quantized).heldout_loss["before"]
    float_loss = run(whole).heldout_loss["before"]
    errors = [abs(still.heldout_loss[when] - float_loss) for when in ("before", "after")]
    assert errors[1] < errors[0], "nothing was trained: the start alone makes up for the quantisation"


def test_rows_of_a_calibration_source_may_have_the_recipes_columns(jsonl, tmp_path):
    path = jsonl([{"question": f"What is {n}?", "answer": str(n)} for n in range(12)])
    given = recipe(tmp_path / "out", "pocket-eva", f"calibration.data={path}", "evaluation={}")
    assert run(given).calibration["tokens"] > 12


def test_data_without_a_known_column_is_named_at_its_place(jsonl, tmp_path):
    path = jsonl([{"number": n} for n in range(4)])
    with pytest.raises(RecipeError, match=r"^argument 'calibration\.data=.*columns number are in no known format"):
        run(recipe(tmp_path / "out", "pocket-eva", f"calibration.data={path}"))
    assert not (tmp_path / "out").exists()


def test_a_budget_that_is_too_small_is_refused_with_the_bytes_that_are_enough(tmp_path):
    given = recipe(tmp_path / "out", "pocket-corda", "calibration.memory_budget=1k")
    for work in (run, preview):
        with pytest.raises(RecipeError, match=r"argument .calibration\.memory_budget=1k.*alone needs \d+ bytes"):
            work(given)


# -- same recipe, same numbers --------------------------------------------------------------------------------------


def test_statistics_are_kept_and_a_second_run_reads_them_to_the_same_bits(cache, tmp_path):
    first, second = (run(recipe(tmp_path / folder, "pocket-corda", "evaluation={}")) for folder in ("a", "b"))
    assert (first.calibration["cached"], second.calibration["cached"]) == (False, True)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert first.losses == second.losses
    assert len(kept_statistics(cache)) == 1
    run(recipe(tmp_path / "c", "pocket-corda", "evaluation={}", "seed=1"))
    assert len(kept_statistics(cache)) == 2, "another seed reads other rows"


def test_the_oldest_statistics_make_room(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREG_CACHE_LIMIT", "1MB")
    for number in range(2):
        prepare_starts(recipe(tmp_path / "out", "pocket-corda", f"seed={number}"))
        assert len(kept_statistics(cache)) == 1, "the newest stays, however large"
    (cache / "notes.txt").write_text("mine")
    assert calibrating_module.clear_statistics(cache)[0] == 1
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kept", [True, False], ids=["from the cache", "calibrated again"])
@pytest.mark.parametrize("name", ["pocket-eva", "pocket-corda"])
def test_a_resumed_run_ends_with_the_same_bits_and_ranks(name, kept, tmp_path):
    saving = [
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.max_steps=4",
        "training.warmup_steps=1",
    ]
    report = run(recipe(tmp_path / "whole", name, *saving))
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "out" / "checkpoints")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    if not kept:
        shutil.rmtree(calibration_folder())
    again = run(recipe(tmp_path / "out", name, *saving), resume=True)
    assert again.calibration["cached"] is kept
    assert again.calibration["ranks"] == report.calibration["ranks"]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    whole, resumed = factors(tmp_path / "whole"), factors(tmp_path / "out")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert (again.losses, again.measurements) == (report.losses, report.measurements)


def test_a_changed_calibration_is_a_changed_recipe(tmp_path):
    saving = ["training.save_strategy=steps", "training.save_steps=1", "evaluation={}"]
    run(recipe(tmp_path / "whole", "pocket-corda", *saving))
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-1", tmp_path / "out/checkpoints/checkpoint-1")
    with pytest.raises(RecipeError, match=r"calibration\.samples 24 there, 25 here"):
        run(recipe(tmp_path / "out", "pocket-corda", *saving, "calibration.samples=25"), resume=True)


# -- before training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pocket-eva", "pocket-corda-kpm"])
def test_init_leaves_the_statistics_where_training_finds_them(name, cache, tmp_path):
    given = recipe(tmp_path / "out", name, "evaluation={}")
    first, second = prepare_starts(given), prepare_starts(given)
    assert isinstance(first, StatisticsReport)
    assert (first.found, second.found, first.path, first.layers, first.inputs) == (False, True, str(cache), 28, 16)
    assert (second.entries, second.tokens) == (1, first.tokens)
    assert second.bytes == kept_statistics(cache)[0].stat().st_size
    assert not (tmp_path / "out").exists()
    assert run(given).calibration["cached"]


@pytest.mark.parametrize("name", ["pocket-eva", "pocket-corda", "pocket-corda-kpm", "gsm8k-eva"])
def test_a_dry_run_tells_what_a_run_then_has(name, tmp_path):
    local = ["model.name=pocket", "output.serve=", "output.rank="] if name.startswith("gsm8k") else []
    seen = preview(recipe(tmp_path / "out", name, *local))
    _, trained, frozen = seen.parameters
    assert seen.layers == 28
    assert trained == 4 * 4 * (4 * (128 + 128) + 3 * (128 + 384))  # r in each of 4 blocks
    assert frozen == (4 * 4 * (4 * 128 + 2 * 128 + 384) if "eva" in name else trained)  # A0 alone, or A0 and B0
    assert seen.memory.start > 16 * 4 * 128 * 129 // 2
    assert seen.start_seconds > 0
    notes = " ".join(seen.notes)
    assert "16 distinct layer inputs" in notes
    assert ("Ranks are chosen from the calibration data" in notes) is ("eva" in name)
    assert (seen.vllm_rank is None) is ("eva" in name)
    assert not (tmp_path / "out").exists()
    assert not calibration_folder().exists()


def test_a_dry_run_of_eora_says_that_it_does_not_start_at_zero(tmp_path):
    pytest.importorskip("bitsandbytes")
    seen = preview(recipe(tmp_path / "out", "pocket-eora"))
    assert "does not start at zero" in " ".join(seen.notes)
    assert seen.exported_rank == 4


def test_a_memory_budget_shows_in_the_dry_run(tmp_path):
    whole = preview(recipe(tmp_path / "out", "pocket-corda"))
    half = preview(recipe(tmp_path / "out", "pocket-corda", "calibration.memory_budget=1MB"))
    assert "passes of at most" in " ".join(half.notes)
    assert "exact in one pass" in " ".join(whole.notes)
