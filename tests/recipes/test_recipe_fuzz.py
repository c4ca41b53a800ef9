"""Whatever a recipe holds, only `RecipeError` is raised; at least half of the inputs pass the YAML parser."""

from __future__ import annotations

import copy
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valid_recipe import VALID

from llmreg.errors import RecipeError
from llmreg.recipes import load_recipe, plan

BASE = yaml.safe_load(VALID.replace("OUTPUT", "runs/never-made"))
GRPO = {**BASE, "task": "grpo", "rewards": ["exact_match"]}
KEYS = sorted(
    {*BASE, *(key for section in BASE.values() if isinstance(section, dict) for key in section)}
    | set("rank_pattern alpha_pattern lora_dropout lora_alpha bias optim warmup_steps fsdp deepspeed packing".split())
    | set("include task max_length beta test split config save_strategy resume_from_checkpoint".split())
    | set("revision dtype quantization heldout limit columns serve rank svd oversample seed report_to".split())
    | set("rewards weight pattern num_generations steps_per_generation beta loss_type temperature".split())
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*KEYS, "all-linear", "pocket", "lora", "nf4", "vllm", "steps", "1e-3", ".inf", "~", "<<"])
    | st.sampled_from(
        [
            "dpo",
            "classification",
            "grpo",
            "exact_match",
            "a.b:c",
            "${HOME}",
            "${LLMREG_GONE}",
            "${A:-b}",
            "recipe.yaml",
            "pocket/preferences",
        ]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
PATHS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)


@st.composite
def changed_recipes(draw) -> str:
    """The valid recipe with some places set to anything."""
    values = copy.deepcopy(draw(st.sampled_from([BASE, GRPO])))
    for section, key, value in draw(
        st.lists(st.tuples(st.sampled_from(sorted(GRPO)), st.sampled_from(KEYS), VALUES), min_size=1, max_size=3)
    ):
        inner = values.get(section)
        if isinstance(inner, dict) and draw(st.booleans() | st.just(True)):
            inner[key] = value
        else:
            values[section] = value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=draw(st.booleans()))


@st.composite
def damaged_texts(draw) -> str:
    """The valid recipe with a piece cut out and something put in."""
    start = draw(st.integers(0, len(VALID)))
    end = draw(st.integers(start, min(len(VALID), start + 12)))
    piece = draw(
        st.text(max_size=6) | st.sampled_from(["&a ", "*a", "!!int ", "{", "]", "\t", "- ", ": ", "---\n", "'"])
    )
    return VALID[:start] + piece + VALID[end:]


TEXTS = changed_recipes() | changed_recipes() | damaged_texts() | VALUES.map(yaml.safe_dump) | st.text(max_size=60)


def fuzz(folder, examples: int) -> None:
    path = folder / "recipe.yaml"
    seen = {"all": 0, "parsed": 0, "valid": 0}

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(text=TEXTS, override=st.none() | st.tuples(PATHS, VALUES))
    def check(text: str, override) -> None:
        seen["all"] += 1
        try:
            yaml.compose(text, Loader=yaml.SafeLoader)
            seen["parsed"] += 1
        except (yaml.YAMLError, ValueError):
            pass
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        overrides = [] if override is None else [f"{'.'.join(override[0])}={yaml.safe_dump(override[1])}"]
        start = time.monotonic()
        try:
            plan(load_recipe(path, overrides))
            seen["valid"] += 1
            message = str(path)
        except RecipeError as error:
            message = str(error)
        assert message.startswith((str(path), "argument "))
        assert len(message) < 2000
        assert time.monotonic() - start < 20

    check()
    assert seen["parsed"] >= seen["all"] / 2, seen
    assert seen["valid"] > 0, seen


def test_no_recipe_causes_anything_but_a_recipe_error(tmp_path):
    fuzz(tmp_path, 400)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_recipe_causes_anything_but_a_recipe_error_at_length(tmp_path):
    fuzz(tmp_path, 20_000)
