"""Running recipes: what is measured, written and reported; what an interruption leaves; real models and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmreg.errors import RecipeError
from llmreg.evaluation.measure import Measurement, forgetting
from llmreg.recipes import load_recipe, run
from llmreg.recipes import results as results_module
from llmreg.recipes import running as running_module

RECIPES = Path(__file__).parents[2] / "recipes"
#: The validation split is the shorter one: preparing 6000 rows takes longer than two steps.
SHORT = ["data.split=validation", "training.max_steps=2", "evaluation.limit=8"]

LOAD_PLAIN = """
import sys, torch
assert "llmreg" not in sys.modules
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
torch.manual_seed(7)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
ids = torch.arange(1, 13).reshape(1, 12)
torch.save(model(input_ids=ids).logits.detach(), out)
assert not any(name.startswith("llmreg") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart, two steps of it: its report and its folder."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    return run(load_recipe(RECIPES / "quickstart.yaml", [*SHORT, f"output.dir={folder}"])), folder


def test_the_folder_holds_adapter_recipe_and_report_and_nothing_else(quickstart):
    _, folder = quickstart
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "recipe.yaml", "report.html", "report.json"]
    assert {"adapter_config.json", "adapter_model.safetensors", "llmreg.json"} <= {
        path.name for path in (folder / "adapter").iterdir()
    }


def test_the_report_says_what_happened(quickstart):
    report, folder = quickstart
    written = json.loads((folder / "report.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    assert [row["role"] for row in written["measurements"]] == ["task", "forgetting", "forgetting"]
    assert [row["metric"] for row in written["measurements"]] == ["exact match", "exact match", "perplexity"]
    assert all(row["rows"] == 8 for row in written["measurements"])
    assert written["measurements"][1]["before"] >= 0.95
    assert set(written["seconds"]) == {"load", "init", "evaluate", "train", "save", "total"}
    assert sum(written["seconds"].values()) <= 2 * written["seconds"]["total"] + 1
    assert written["steps"] == 2
    assert 0 < written["trainable_parameters"] < written["total_parameters"]
    assert written["rank"] == 32
    assert len(written["start_hash"]) == 64
    assert written["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert written["versions"]["peft"]
    assert written["load"][0] == "base = llmreg.pocket.load_model()"


def test_the_written_recipe_is_the_one_that_ran(quickstart, tmp_path):
    _, folder = quickstart
    again = load_recipe(folder / "recipe.yaml", [f"output.dir={tmp_path / 'again'}"])
    assert again.training["max_steps"] == 2
    assert again.evaluation.limit == 8


def test_the_adapter_loads_with_plain_peft_without_llmreg(quickstart, run_python, tmp_path):
    import llmreg.pocket

    _, folder = quickstart
    run_python(LOAD_PLAIN, llmreg.pocket.path(), folder / "adapter", tmp_path / "logits.pt")
    from peft import PeftModel

    model = PeftModel.from_pretrained(llmreg.pocket.load_model(), folder / "adapter").eval()
    with torch.no_grad():
        here = model(input_ids=torch.arange(1, 13).reshape(1, 12)).logits
    there = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (here - there).norm() <= 1e-6 * here.norm()


def test_the_same_recipe_gives_the_same_adapter(quickstart, tmp_path):
    report, folder = quickstart
    again = run(load_recipe(folder / "recipe.yaml", [f"output.dir={tmp_path / 'again'}"]))
    assert again.start_hash == report.start_hash
    assert again.train_loss == report.train_loss
    assert [row.after for row in again.measurements] == [row.after for row in report.measurements]
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()


def test_a_rank_and_dtype_of_the_output_are_exported_beside_the_adapter(tmp_path):
    recipe = load_recipe(
        RECIPES / "quickstart.yaml",
        [*SHORT, f"output.dir={tmp_path / 'out'}", "output.rank=8", "output.dtype=bfloat16", "evaluation={}"],
    )
    report = run(recipe)
    assert report.export is not None
    assert (report.export["rank"], report.export["dtype"]) == (8, "bfloat16")
    assert 0 <= report.export["relative_error"] < 1
    assert json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())["r"] == 8
    assert report.measurements == ()


#: Recipes that differ from one of the others in what is tested elsewhere.
SIBLINGS = {"pocket-bone", "pocket-classification", "pocket-dpo-lora", "pocket-lora"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[pytest.mark.slow] if path.stem in SIBLINGS else [])
        for path in sorted(RECIPES.glob("pocket-*.yaml"))
    ],
)
def test_the_other_pocket_recipes_run(name, tmp_path):
    if name == "pocket-nf4":
        pytest.importorskip("bitsandbytes")
    report = run(load_recipe(RECIPES / f"{name}.yaml", [*SHORT, f"output.dir={tmp_path / 'out'}"]))
    assert report.steps == 2
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.target_modules=[q_porj]"], "matches no layer of the model; its linear layers are down_proj"),
        (["adapter.target_modules=[embed_tokens]"], "cannot carry a pissa adapter"),
        (["adapter.r=200"], "Rank 200 is larger than layer"),
        (["training.max_length=3"], "no row has a token to learn within max_length 3"),
        (["training.assistant_only_loss=true"], "argument 'training.assistant_only_loss=true'"),
    ],
)
def test_what_only_the_model_can_tell_is_still_one_message_and_leaves_nothing(overrides, said, tmp_path):
    recipe = load_recipe(
        RECIPES / "quickstart.yaml", [*SHORT, f"output.dir={tmp_path / 'out'}", "evaluation={}", *overrides]
    )
    with pytest.raises(RecipeError) as caught:
        run(recipe)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_none_is_one_message(tmp_path):
    (tmp_path / "model").mkdir()
    recipe = load_recipe(
        RECIPES / "quickstart.yaml", [*SHORT, f"output.dir={tmp_path / 'out'}", f"model.name={tmp_path / 'model'}"]
    )
    with pytest.raises(RecipeError, match="cannot be loaded"):
        run(recipe)


def test_conversations_need_a_chat_template(jsonl, tmp_path):
    path = jsonl([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}] * 4)
    recipe = load_recipe(
        RECIPES / "quickstart.yaml", [*SHORT, f"output.dir={tmp_path / 'out'}", f"data.train={path}", "evaluation={}"]
    )
    with pytest.raises(RecipeError, match="the tokenizer of pocket has no chat template"):
        run(recipe)


STOPS = [KeyboardInterrupt, SystemExit(143), OSError("No space left on device")]
PLACES = ["measure_suites", "_train", "commit_folder"]


@pytest.mark.parametrize(
    ("where", "stop"),
    [
        pytest.param(
            where, stop, marks=[] if where == "commit_folder" or stop is KeyboardInterrupt else [pytest.mark.slow]
        )
        for where in PLACES
        for stop in STOPS
    ],
)
def test_an_interruption_leaves_no_half_adapter_and_no_occupied_folder(stop, where, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise stop

    monkeypatch.setattr(results_module if where == "commit_folder" else running_module, where, interrupted)
    recipe = load_recipe(
        RECIPES / "quickstart.yaml",
        [*SHORT, f"output.dir={tmp_path / 'out'}", "evaluation={}", "adapter.r=2", "adapter.target_modules=[q_proj]"],
    )
    with pytest.raises((KeyboardInterrupt, SystemExit, OSError)):
        run(recipe)
    assert list(tmp_path.iterdir()) == []


def test_forgetting_is_positive_when_something_was_lost():
    assert forgetting("exact match", 1.0, 0.25) == 0.75
    assert forgetting("perplexity", 2.0, 4.0) == pytest.approx(0.6931, abs=1e-4)
    assert Measurement("x", "exact match", "task", 1, 0.0, 1.0).forgotten is None


def test_gsm8k_recipe_on_a_real_model_and_real_data_lowers_the_heldout_loss(real_data, jsonl, tmp_path, run_python):
    problems = (real_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:400]
    overrides = [
        f"model.name={real_data / 'stories260k'}",
        f"data.train={jsonl(problems)}",
        "data.test=",
        "evaluation.heldout=16",
        "training.max_steps=20",
        "training.learning_rate=1e-3",
        "training.gradient_accumulation_steps=1",
        "training.max_length=160",
        "adapter.r=8",
        f"output.dir={tmp_path / 'out'}",
    ]
    report = run(load_recipe(RECIPES / "gsm8k-pissa.yaml", overrides))
    assert report.heldout_loss is not None
    assert report.heldout_loss["after"] < report.heldout_loss["before"] - 0.2, report.heldout_loss
    run_python(LOAD_PLAIN, real_data / "stories260k", tmp_path / "out" / "adapter", tmp_path / "logits.pt")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(real_data / "stories260k", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    with torch.no_grad():
        here = model(input_ids=torch.arange(1, 13).reshape(1, 12)).logits
    there = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (here - there).norm() <= 1e-6 * here.norm()


def test_trackers_receive_the_losses_and_the_scores_before_and_after(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    settings = ["training.report_to=tensorboard", "training.logging_steps=1", "adapter.r=2"]
    report = run(load_recipe(RECIPES / "quickstart.yaml", [*SHORT, *settings, f"output.dir={out}"]))
    (events,) = out.rglob("events.out.tfevents*")
    written = EventAccumulator(str(events)).Reload()
    assert [event.step for event in written.Scalars("train/loss")] == [1, 2]
    for when in ("before", "after"):
        for row in report.measurements:
            (event,) = written.Scalars(f"train/score/{when}/{row.name} ({row.metric})")
            assert event.value == pytest.approx(getattr(row, when), rel=1e-6)
