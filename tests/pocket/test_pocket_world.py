"""The generators: what they promise about the world, the splits and their own determinism."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from llmreg import pocket
from llmreg.errors import RecipeError
from llmreg.pocket import arithmetic
from llmreg.pocket.arithmetic import sums
from llmreg.pocket.corpus import REPEATS, corpus, reading_order
from llmreg.pocket.frozen import compute_hashes
from llmreg.pocket.seeded import Dice
from llmreg.pocket.word_problems import STORIES
from llmreg.pocket.world import HELD_OUT_PHRASING, PHRASINGS, RELATIONS

SEEDS = (0, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_corpus_tasks_and_splits_are_the_frozen_ones(seed):
    frozen = {k: v for k, v in pocket.frozen_hashes().items() if k.startswith(f"world-{seed}/")}
    assert compute_hashes(seed) == frozen


def test_every_task_and_split_is_frozen():
    expected = {
        f"world-{seed}/{name}/{split}" for seed in SEEDS for name, task in pocket.TASKS.items() for split in task.splits
    }
    assert expected <= set(pocket.frozen_hashes())


def run_alone(program, **environment):
    """Run `program` in a new process with `llmreg.pocket` and not the rest of the package; return its output."""
    stub = (
        "import sys, types; package = types.ModuleType('llmreg'); "
        "package.__path__ = sys.argv[1:]; sys.modules['llmreg'] = package; "
    )
    return subprocess.run(
        [sys.executable, "-c", stub + program, str(pocket.path().parents[1])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_another_hash_seed_and_process_generates_the_same_rows():
    program = (
        "import json; from llmreg import pocket; "
        "print(json.dumps([pocket.World(3).people, *(pocket.TASKS[n].load(s, 3)[:50] "
        "for n in pocket.TASKS for s in pocket.TASKS[n].splits)]))"
    )
    first, second = (run_alone(program, PYTHONHASHSEED=seed) for seed in ("1", "4242"))
    assert first == second
    assert json.loads(first)[0] == list(pocket.World(3).people)


def test_generators_leave_the_global_random_state_alone():
    before = random.getstate()
    pocket.World(5)
    pocket.load_split("pocket/word-problems", "test", seed=5)
    assert random.getstate() == before


def test_importing_the_pocket_loads_neither_torch_nor_transformers():
    heavy = run_alone(
        "import llmreg.pocket; print([m for m in ('torch', 'transformers', 'peft', 'tokenizers') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_world_has_200_people_and_every_value_has_five_owners(seed):
    world = pocket.World(seed)
    assert len(set(world.people)) == 200
    assert len(world.facts) == 600
    for relation in RELATIONS:
        owners = [world.value(person, relation) for person in world.people]
        assert all(owners.count(value) == 5 for value in world.values[relation])
        assert len(world.values[relation]) == 40


def test_two_worlds_tell_different_things():
    first, second = pocket.World(0), pocket.World(1)
    shared = set(first.people) & set(second.people)
    assert len(shared) < 100
    assert len(set(first.facts) & set(second.facts)) < 20


def test_no_phrasing_occurs_twice():
    phrasings = [p for four in PHRASINGS.values() for p in four] + list(HELD_OUT_PHRASING.values())
    stories = [s for told in STORIES.values() for s in told]
    assert len(set(phrasings)) == 15
    assert len(set(stories)) == 4
    sums_taught = [p for taught in arithmetic.PHRASINGS.values() for p in taught]
    assert len(set(sums_taught)) == len(sums_taught)
    assert not set(stories) & set(sums_taught)


@pytest.mark.parametrize("seed", SEEDS)
def test_operands_of_validation_and_test_occur_in_no_training_text(seed):
    taught = set(sums(seed, "train"))
    held_out = set(sums(seed, "validation")) | set(sums(seed, "test"))
    assert len(taught) + len(held_out) == 10_100
    assert not taught & held_out
    assert not set(sums(seed, "validation")) & set(sums(seed, "test"))
    corpus_prompts = {d.prompt for d in corpus(seed)}
    for split in ("validation", "test"):
        assert not corpus_prompts & {r["prompt"] for r in pocket.load_split("pocket/arithmetic", split, seed)}


@pytest.mark.parametrize("seed", SEEDS)
def test_splits_share_no_row_and_no_operands(seed):
    splits = {s: pocket.load_split("pocket/word-problems", s, seed) for s in ("train", "validation", "test")}
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    operands = {s: {o for o in map(_operands, rows) if o[1] != 0} for s, rows in splits.items()}
    assert not operands["train"] & (operands["validation"] | operands["test"])
    assert not operands["validation"] & operands["test"]
    read = {row["text"] for row in pocket.load_split("pocket/corpus", "train", seed)}
    assert not read & {row["text"] for row in pocket.load_split("pocket/corpus", "test", seed)}


def _operands(row):
    """Return (first number, second number, answer): the answer tells a sum from a difference unless 0 is added."""
    numbers = [int(word.strip(".,?")) for word in row["prompt"].split() if word.strip(".,?").isdigit()]
    return (*numbers, int(row["completion"]))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_answer_of_a_word_problem_follows_from_its_numbers(split):
    for row in pocket.load_split("pocket/word-problems", split):
        a, b, answer = _operands(row)
        assert answer in (a + b, a - b)
        assert row["completion"] == f" {answer:02d}"


def test_the_answers_of_the_fact_tasks_are_those_of_the_world():
    world = pocket.World(0)
    for split in ("train", "test", "paraphrase"):
        for row in pocket.load_split("pocket/facts", split):
            person = next(w for w in row["prompt"].replace("?", "").split() if w in world.people)
            assert row["completion"].strip() in {world.value(person, r) for r in RELATIONS}


def test_the_held_out_phrasing_is_in_no_document():
    starts = {p.split("{x}")[0] for p in HELD_OUT_PHRASING.values()}
    assert not [d for d in corpus(0) if d.kind == "fact" and d.prompt.startswith(tuple(starts))]


def test_reading_order_has_every_document_as_often_as_planned():
    counts: dict[str, int] = {}
    for document in reading_order(1):
        counts[document.kind] = counts.get(document.kind, 0) + 1
    for kind, repeats in REPEATS.items():
        assert counts[kind] == repeats * sum(d.kind == kind for d in corpus(1))


def test_all_rows_have_exactly_the_columns_of_their_task():
    for task in pocket.TASKS.values():
        for split in task.splits:
            assert all(tuple(row) == task.columns for row in task.load(split))


def test_rows_belong_to_the_caller():
    pocket.load_split("pocket/facts")[0]["completion"] = "spoilt"
    assert pocket.load_split("pocket/facts")[0]["completion"] != "spoilt"


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="Did you mean 'pocket/word-problems'"):
        pocket.load_split("pocket/word-problem")


def test_an_unknown_split_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"Did you mean 'validation'.*Known: train, validation, test"):
        pocket.load_split("pocket/word-problems", split="valid")


def test_dice_are_uniform_enough_and_shuffle_everything():
    dice = Dice("test")
    throws = [dice.below(6) for _ in range(6000)]
    assert set(throws) == set(range(6))
    assert all(800 < throws.count(i) < 1200 for i in range(6))
    assert sorted(dice.shuffled(range(100))) == list(range(100))
