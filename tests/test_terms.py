"""The catalogue of regularisers tells the truth about the classes."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from llmreg.recipes import load_recipe, plan
from llmreg.recipes.regularizing import known_regularizers
from llmreg.terms import TERMS

ROOT = Path(__file__).parents[1]


def test_every_regulariser_of_a_recipe_is_listed():
    assert set(TERMS) == set(known_regularizers())


@pytest.mark.parametrize("row", TERMS.values(), ids=TERMS)
def test_every_row_is_whole(row, tmp_path):
    module, _, name = row.config.partition(":")
    kind = getattr(importlib.import_module(module), name)
    assert kind is known_regularizers()[row.name]
    made = kind()
    fields = {field.name for field in dataclasses.fields(kind)}
    for key, value in row.defaults.items():
        assert key in fields
        expected = {("singular_values", "k"): 10}.get((row.name, key), getattr(made, key))  # by the task
        assert value == expected
    for sentence in (row.what, row.when, row.when_not, row.cost):
        assert sentence.endswith(".")
    if row.recipe:
        settled = plan(load_recipe(ROOT / row.recipe, [f"output.dir={tmp_path}"]))
        asked = [one.name for one in (*settled.regularizers, *settled.adapter.regularizers())]
        assert row.name in asked
