"""The task grpo: from prompts and rewards to an adapter; what is refused, and what comes back when a run is resumed."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from datasets import Dataset
from valid_recipe import VALID

from llmreg.errors import RecipeError
from llmreg.recipes import dry_run, evaluate, load_recipe, make_recipe, plan, preview, run
from llmreg.recipes.data import load_training_data, scoring_rows
from llmreg.recipes.reinforcement import steps_of_a_generation
from llmreg.recipes.resuming import Checkpoints, differences
from llmreg.recipes.rewards import reward_functions
from llmreg.trainers.prompt_order import with_epochs

RECIPE = Path(__file__).parents[2] / "recipes" / "pocket-grpo.yaml"
SHORT = [
    "data.split=validation",
    "training.max_steps=2",
    "training.per_device_train_batch_size=8",
    "training.num_generations=4",
    "training.logging_steps=1",
    "adapter.r=4",
    "evaluation={tasks: [pocket/reworded-arithmetic], limit: 8}",
]


_SHARING = ("num_iterations", "steps_per_generation", "gradient_accumulation_steps")


def recipe(folder, *overrides):
    return load_recipe(RECIPE, [*SHORT, f"output.dir={folder}", *overrides])


def sums(count=8):
    return [{"prompt": f"Answer: {n:02d} plus 21 is", "answer": f"{n + 21:02d}"} for n in range(10, 10 + count)]


@pytest.fixture
def module(monkeypatch):
    """A module with reward functions, as a user would write one."""
    made = types.ModuleType("my_rewards")
    made.seen = []

    def length(prompts, completions, source=None, **columns):
        made.seen.append(source)
        return [float(len(text)) for text in completions]

    made.length = length
    made.too_few = lambda prompts, completions, **columns: [1.0]
    made.words = lambda prompts, completions, **columns: ["good"] * len(completions)
    made.narrow = lambda prompts, completions: [1.0]
    made.number = 3
    monkeypatch.setitem(sys.modules, "my_rewards", made)
    return made


# -- end to end -------------------------------------------------------------------------------------------------


def test_a_run_scores_rewards_and_reports_them(tmp_path):
    two = "rewards=[pocket_arithmetic, {name: format, pattern: '\\d\\d', weight: 0.5}]"
    report = run(recipe(tmp_path / "out", two, "training.temperature=1.5", "adapter.method=sorsa"))
    assert [row.metric for row in report.measurements] == ["exact match"]
    first = report.losses[0]
    assert {"reward", "entropy", "rewards/pocket_arithmetic/mean", "rewards/format/mean"} <= set(first)
    weighted = first["rewards/pocket_arithmetic/mean"] + 0.5 * first["rewards/format/mean"]
    assert first["reward"] == pytest.approx(weighted)
    page = (tmp_path / "out" / "report.html").read_text()
    for heading in ("Reward pocket_arithmetic", "Reward format", "Entropy of the policy", "Training loss"):
        assert heading in page
    assert "KL to the reference" not in page  # beta is 0, so there is none
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "task: grpo" in card
    assert "pocket_arithmetic" in card
    assert [row["base"] for row in evaluate(tmp_path / "out").scores] == [report.measurements[0].before]


def test_the_first_step_is_at_the_reference(tmp_path):
    report = run(recipe(tmp_path / "out", "training.beta=0.1", "training.max_steps=1", "evaluation={}"))
    assert report.losses[0]["kl"] == 0


@pytest.mark.parametrize(
    "shared",
    ["training.num_iterations=1", *(pytest.param(f"training.{name}=2", marks=pytest.mark.slow) for name in _SHARING)],
)
def test_a_run_resumed_in_a_later_epoch_ends_with_the_same_bits(tmp_path, jsonl, shared):
    """Eight prompts are four steps, so the checkpoint lies in the second epoch (or at its start)."""
    settings = [
        f"data={{train: {jsonl(sums())}}}",
        shared,
        "rewards=[exact_match]",
        "training.temperature=2.0",
        "training.max_steps=8",
        "training.max_completion_length=3",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "evaluation={}",
    ]
    whole = run(recipe(tmp_path / "whole", *settings))
    assert len({line["loss"] for line in whole.losses}) > 2  # something is learned, so that a difference would show
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "again" / "checkpoints")
    again = run(recipe(tmp_path / "again", *settings), resume="checkpoint-6")
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    assert again.losses == whole.losses


def test_sigterm_waits_for_the_last_step_on_a_batch_of_completions(tmp_path):
    from transformers import TrainerControl, TrainerState

    checkpoints = Checkpoints(recipe(tmp_path / "out"), every=3)
    checkpoints.stopped = True
    for step, stops in ((1, False), (2, False), (3, True)):
        control = TrainerControl()
        checkpoints.on_step_end(types.SimpleNamespace(output_dir=tmp_path), TrainerState(global_step=step), control)
        assert (control.should_training_stop, control.should_save) == (stops, stops)


def test_the_order_of_prompts_is_trls_in_every_epoch():
    from trl.trainer.utils import RepeatSampler

    def made():
        return RepeatSampler(range(6), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=5)

    theirs = made()
    epochs = [list(theirs) for _ in range(3)]
    assert epochs[0] != epochs[1]
    for epoch in (2, 0, 1):
        ours = with_epochs(made())
        ours.set_epoch(epoch)
        assert list(ours) == epochs[epoch]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_learns_what_it_was_not_taught_and_forgets_nothing(tmp_path):
    report = run(load_recipe(RECIPE, [f"output.dir={tmp_path / 'out'}"]))
    task, *kept = report.measurements
    assert task.after > task.before + 0.2
    assert all(row.after > 0.9 * row.before for row in kept if row.metric == "exact match")


# -- data -------------------------------------------------------------------------------------------------------


def rows_of(path, *overrides):
    loaded = make_recipe(
        {
            "model": {"name": "pocket"},
            "task": "grpo",
            "data": {"train": str(path)},
            "rewards": ["exact_match"],
            "adapter": {"method": "lora", "target_modules": "all-linear"},
            "output": {"dir": "none"},
        },
        overrides,
    )
    return loaded, load_training_data(loaded).train


def test_answers_come_from_answer_or_completion_or_gsm8k(jsonl):
    _, rows = rows_of("pocket/word-problems", "data.split=test")
    assert rows.column_names == ["prompt", "answer"]
    assert rows[0]["answer"].strip().isdigit()
    gsm8k = [{"question": "2 x 600?", "answer": "It is <<2*600=1200>>1200.\n#### 1,200"}]
    _, rows = rows_of(jsonl(gsm8k))
    assert (rows[0]["prompt"], rows[0]["answer"]) == ("Question: 2 x 600?\nAnswer:", "1200")
    _, rows = rows_of(jsonl(gsm8k), "data.columns={prompt: '{question} Think.', answer: answer}")
    assert (rows[0]["prompt"], rows[0]["answer"]) == ("2 x 600? Think.", "1200")


def test_real_gsm8k_is_read_as_published(real_data):
    _, rows = rows_of(real_data / "gsm8k" / "train.jsonl")
    assert all("####" not in row and "," not in row for row in rows["answer"])
    assert rows[0]["prompt"].startswith("Question: ")


def test_conversations_and_other_columns_reach_the_rewards(jsonl):
    chat = [{"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]}]
    _, rows = rows_of(jsonl([{**chat[0], "source": "a", "level": 3}]))
    assert rows.to_list() == [{"prompt": chat[0]["prompt"], "answer": "4", "source": "a", "level": 3}]


def test_evaluation_takes_rows_with_answers_by_greedy_exact_match(jsonl):
    loaded, _ = rows_of(jsonl(sums(2)))
    assert scoring_rows(loaded, loaded.data.train)[0] == {"prompt": "Answer: 10 plus 21 is", "completion": " 31"}
    gsm8k = jsonl([{"question": "2 x 600?", "answer": "It is 1200.\n#### 1,200"}], "g.jsonl")
    assert scoring_rows(loaded, str(gsm8k))[0]["completion"] == " 1200"
    assert set(scoring_rows(loaded, "pocket/preferences")[0]) == {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a"}], "the reward exact_match compares with the column answer, which .* does not have"),
        ([{"prompt": "a", "answer": 4}], "row 1: column 'answer' holds a number"),
        ([{"text": "a"}], "give prompt and answer; prompt and completion; prompt"),
        ([{"prompt": "a", "answer": None}, {"prompt": "a", "answer": "b"}], "row 1: column 'answer' is missing"),
    ],
)
def test_rows_that_cannot_be_rewarded_are_named(jsonl, rows, said):
    with pytest.raises(RecipeError, match=said):
        rows_of(jsonl(rows))


def test_conversations_need_a_chat_template(tmp_path, jsonl):
    rows = [{"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}]
    with pytest.raises(RecipeError, match=r"has no chat template; give prompts as text\."):
        run(recipe(tmp_path / "out", f"data={{train: {jsonl(rows)}}}", "rewards=[exact_match]", "evaluation={}"))
    assert not (tmp_path / "out").exists()


def test_conversations_are_answered_and_judged(tmp_path, jsonl):
    from llmreg import pocket

    tokenizer = pocket.load_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for part in (pocket.load_model(), tokenizer):
        part.save_pretrained(tmp_path / "chat")
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in sums()]
    both = "rewards=[exact_match, pocket_arithmetic]"
    settings = [f"model.name={tmp_path / 'chat'}", f"data={{train: {jsonl(rows)}}}", both, "evaluation={}"]
    line = run(recipe(tmp_path / "out", *settings, "training.max_steps=1")).losses[0]
    assert line["rewards/exact_match/mean"] == line["rewards/pocket_arithmetic/mean"] > 0


# -- rewards ----------------------------------------------------------------------------------------------------

GRPO = VALID.replace("task: sft", "task: grpo\nrewards: [exact_match]")


def test_rewards_are_written_as_names_or_with_a_weight(recipe_file):
    loaded = load_recipe(recipe_file(GRPO), ["rewards=[math, {name: format, weight: 2}, {name: format, pattern: a+}]"])
    assert [(reward.name, reward.weight) for reward in loaded.rewards] == [
        ("math", 1.0),
        ("format", 2.0),
        ("format", 1.0),
    ]
    loaded = load_recipe(recipe_file(GRPO), ["rewards=[exact_match, format, {name: format, pattern: a+}]"])
    assert [function.__name__ for function in reward_functions(loaded)] == ["exact_match", "format", "format_2"]
    assert load_recipe(recipe_file(GRPO), ["rewards=format"]).rewards[0].name == "format"
    assert plan(load_recipe(recipe_file(GRPO), ["rewards=[{name: format, weight: 2}]"])).training.reward_weights == [
        2.0
    ]


def test_a_function_of_the_user_is_given_the_columns(recipe_file, module, tmp_path, jsonl):
    rows = [{**row, "source": "mine"} for row in sums()]
    report = run(
        recipe(tmp_path / "out", f"data={{train: {jsonl(rows)}}}", "rewards=[my_rewards:length]", "evaluation={}")
    )
    assert module.seen[0] == ["mine"] * 8
    assert "rewards/my_rewards:length/mean" in report.losses[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", r"my_rewards:too_few returned 1 values for 8 completions"),
        ("words", r"my_rewards:words returned 'good' for 8 completions; it must return a number or None for each"),
    ],
)
def test_a_function_that_returns_no_rewards_is_refused(module, tmp_path, name, said):
    with pytest.raises(RecipeError, match=said):
        run(recipe(tmp_path / "out", f"rewards=[my_rewards:{name}]", "evaluation={}"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards=[exact_mach]", "there is no reward 'exact_mach'; did you mean 'exact_match'?"),
        ("rewards=[zzz]", "known here: exact_match, format, math, pocket_arithmetic."),
        ("rewards=[{nam: math}]", "unknown key 'rewards.0.nam'; did you mean 'name'?"),
        ("rewards=[{name: math, weight: x}]", "rewards.0.weight should be a valid number, not 'x'"),
        ("rewards=[]", "grpo learns from rewards and the recipe has none; write rewards: [pocket_arithmetic"),
        ("rewards=[{name: exact_match, weight: 0}]", "no reward has a weight other than 0"),
        ("rewards=[{name: exact_match, pattern: a}]", "a pattern is for the reward format, not for exact_match"),
        ("rewards=[{name: format, pattern: '('}]", "'(' is no regular expression"),
        ("rewards=[my_rewards:lenth]", "the module my_rewards has no 'lenth'; did you mean 'length'?"),
        ("rewards=[my_rewards:narrow]", "my_rewards:narrow is no reward function; write one that takes (prompts, comp"),
        ("rewards=[my_rewards:number]", "my_rewards:number is no reward function"),
        ("rewards=[no_such_module_of_mine:f]", "cannot be imported (No module named 'no_such_module_of_mine')"),
        ("rewards=[':f']", "':f' is no path of a function; write package.module:function"),
        ("rewards=['.rewards:f']", "'.rewards:f' is no path of a function"),
        ("rewards=['builtins:type']", "builtins:type is no reward function"),
        ("rewards=3", "rewards should be a list, not 3"),
        ("task=sft", "rewards are for task grpo, and this is sft; remove the section"),
    ],
)
def test_rewards_that_do_not_exist_are_named(complaint, module, override, said):
    assert said in complaint(override, text=GRPO)


def test_grpo_without_rewards_says_which_there_are(complaint):
    assert "grpo learns from rewards and the recipe has none" in complaint(text=VALID.replace("sft", "grpo"))


def test_math_without_its_package_is_one_sentence(complaint, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "math_verify" else found(name, *a)
    )
    assert "needs the package math-verify; run pip install 'llmreg[math]'" in complaint("rewards=[math]", text=GRPO)


# -- conflicts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["training.num_generations=3"],
            "num_generations 3 does not divide the 8 completions that are generated at a time",
        ),
        (["training.num_generations=3"], "write 2, 4, 8, or change the batch size"),
        (["training.per_device_train_batch_size=4"], "num_generations 8 does not divide the 4 completions"),
        (["training.num_generations=1"], "training.num_generations must be at least 2, not 1"),
        (["training.num_generations=0"], "training.num_generations must be at least 2, not 0"),
        (["training.gradient_accumulation_steps=0"], "training.gradient_accumulation_steps must be at least 1"),
        (["training.generation_batch_size=12"], "generation_batch_size (12) must be divisible by"),
        (["training.max_completion_length=0"], "training.max_completion_length must be at least 1, not 0"),
        (["training.max_completion_length="], "training.max_completion_length must be at least 1, not None"),
        (["training.temperature=0.0"], "training.temperature must be above 0"),
        (["training.beta=-0.1"], "training.beta must be at least 0"),
        (["training.loss_type=dpo"], "training.loss_type cannot be 'dpo'; did you mean"),
        (["training.scale_rewards=groups"], "did you mean 'group'?"),
        (["training.packing=true"], "unknown key 'training.packing' (not a field of GRPOConfig)"),
        (["training.max_length=64"], "unknown key 'training.max_length' (not a field of GRPOConfig)"),
        (["training.use_vllm=true"], "vLLM generates on a GPU, and this training runs on the CPU; remove use_vllm"),
        (["training.remove_unused_columns=true"], "would keep answers from the rewards"),
        (["training.reward_weights=[1.0]"], "write each reward's weight beside its name under rewards"),
        (["training.sync_ref_model=true"], "the reference is the untouched base"),
        (["training.eval_strategy=steps"], "grpo has no held-out loss; write evaluation.tasks"),
        (["data.test=pocket/word-problems"], "grpo has no held-out loss, so data.test has no use"),
        (["evaluation.heldout=4"], "grpo has no held-out loss, so evaluation.heldout has no use"),
        (
            ["training.num_iterations=2", "training.save_strategy=steps", "training.save_steps=3"],
            "save_steps 3 falls within the 2 steps that share one batch of completions",
        ),
        (
            ["adapter.residual=quantized", "model.quantization=nf4", "training.beta=0.1"],
            "so that a disabled adapter is no reference for grpo",
        ),
    ],
)
def test_a_conflict_of_grpo_is_refused_before_anything_loads(complaint, overrides, said):
    message = complaint("training.use_cpu=true", *overrides, text=GRPO)
    assert said in message
    assert message.startswith("argument ") or "per_device_train_batch_size=4" in overrides[0]


def test_a_quantized_residual_is_no_obstacle_without_a_reference(recipe_file):
    plan(load_recipe(recipe_file(GRPO), ["adapter.residual=quantized", "model.quantization=nf4"]))


def test_steps_that_share_completions_are_counted(recipe_file):
    def shared(*overrides):
        batch = ["training.per_device_train_batch_size=8", 'training.save_strategy="no"']
        return steps_of_a_generation(plan(load_recipe(recipe_file(GRPO), [*batch, *overrides])).training)

    assert shared() == 1
    assert shared("training.gradient_accumulation_steps=4") == 1
    assert shared("training.steps_per_generation=4") == 4
    assert shared("training.steps_per_generation=4", "training.gradient_accumulation_steps=2") == 2
    assert shared("training.steps_per_generation=3", "training.gradient_accumulation_steps=2") == 3
    assert shared("training.num_iterations=3") == 3


# -- the other commands -----------------------------------------------------------------------------------------


def test_a_dry_run_counts_what_generation_keeps(tmp_path):
    shown = preview(recipe(tmp_path / "out", "training.max_completion_length=6"))
    from llmreg import pocket

    config = pocket.load_model().config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = 8 * 2 * config.num_hidden_layers * width * 4
    assert shown.memory.generation > cache * (6 + 5)  # prompts have more than five tokens
    assert shown.memory.activations
    assert "Of generation the cache and the scores are counted, not the pass over the prompts." in shown.notes


def test_a_dry_run_assumes_a_length_where_it_cannot_know(tmp_path):
    settled = plan(recipe(tmp_path / "out", "data={train: owner/name}", "rewards=[exact_match]", "evaluation={}"))
    tokens, notes = dry_run._tokens(settled)
    assert tokens == 512 + 6
    assert "512 tokens are assumed" in notes[0]


def test_checkpoints_and_rewards_of_a_changed_recipe_are_compared(tmp_path):
    from llmreg.recipes import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(tmp_path / "out")))
    assert differences(recipe(tmp_path / "out"), tmp_path) == ()
    changed = differences(recipe(tmp_path / "out", "rewards=[format]"), tmp_path)
    assert len(changed) == 1
    assert changed[0].startswith("rewards ")


def test_the_schema_takes_names_and_mappings():
    jsonschema = pytest.importorskip("jsonschema")
    from llmreg.recipes import recipe_schema

    schema = recipe_schema()
    values = json.loads(json.dumps({"model": {"name": "pocket"}, "task": "grpo", "data": {"train": "pocket/facts"}}))
    values |= {"adapter": {"method": "lora"}, "output": {"dir": "x"}, "training": {"num_generations": 4}}
    for good in (["math"], [{"name": "format", "weight": 0.5}], ["a.b:c"]):
        jsonschema.validate(values | {"rewards": good}, schema)
    for bad in (["mth"], [{"weight": 1}], "math"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values | {"rewards": bad}, schema)


def test_a_dataset_row_of_other_tasks_is_told_apart():
    from llmreg.recipes.data import in_format
    from llmreg.recipes.tasks import TASKS

    with pytest.raises(RecipeError, match="these are rows for task"):
        in_format(Dataset.from_list([{"text": "a"}]), None, TASKS["grpo"].formats)
