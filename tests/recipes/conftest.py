"""Recipes as files, and a function that says what is wrong with a changed one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from valid_recipe import VALID

from llmreg.errors import RecipeError
from llmreg.recipes import load_recipe, plan


@pytest.fixture
def recipe_file(tmp_path):
    """A function (text) -> path of a file with it; `OUTPUT` becomes a folder that does not exist."""

    def write(text: str = VALID) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace("OUTPUT", str(tmp_path / "out")), encoding="utf-8")
        return path

    return write


@pytest.fixture
def complaint(recipe_file, tmp_path):
    """A function (*overrides, text) -> the message of the `RecipeError`, with the folder left out."""

    def check(*overrides: str, text: str = VALID) -> str:
        path = recipe_file(text)
        with pytest.raises(RecipeError) as caught:
            plan(load_recipe(path, overrides))
        message = str(caught.value).replace(f"{tmp_path}/", "")
        assert "\n" not in message
        return message

    return check


@pytest.fixture
def jsonl(tmp_path):
    """A function (rows, name) -> path of a JSON-lines file; a row that is text is written as it is."""

    def write(rows: list, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real models and data made by others, where they are."""
    folder = Path(os.environ.get("LLMREG_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if not (folder / "stories260k").is_dir():
        pytest.skip(f"real data is not there: set LLMREG_REAL_DATA (looked in {folder})")
    return folder
