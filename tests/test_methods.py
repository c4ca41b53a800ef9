"""The catalogue: every row is whole and true, and other packages add rows through an entry point."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from llmreg import AdditiveConfig, methods
from llmreg.errors import LlmregError, LlmregWarning, RecipeError

ROWS = methods.catalogue()


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_every_row_is_whole(row):
    for name in ("name", "title", "kind", "what", "when", "when_not", "cost", "recipe"):
        assert getattr(row, name), name
    assert row.paper.arxiv.count(".") == 1
    assert (Path(__file__).parents[1] / row.recipe).is_file()
    config = row.config_class()(r=4, target_modules=["q_proj"])
    stored = config.to_lora_config() if isinstance(config, AdditiveConfig) else config
    assert stored.r == 4 * row.saved_rank
    assert row.as_dict()["paper"]["arxiv"] == row.paper.arxiv


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_the_defaults_of_a_row_are_those_of_its_config(row):
    config = row.config_class()(target_modules=["q_proj"])
    for name, value in row.defaults.items():
        assert getattr(config, name) == (config.r if value == "r" else value), name


def test_every_additive_config_has_a_row():
    assert set(AdditiveConfig._CLASSES) <= set(ROWS)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(
        RecipeError, match=r"there is no method 'PISA'; did you mean 'pissa'\? Known methods: pissa, sorsa"
    ):
        methods.get_method("PISA")


@pytest.fixture
def installed(monkeypatch):
    """A function (name, value) that makes an entry point look installed."""

    def install(name: str, value: str) -> None:
        point = EntryPoint(name=name, value=value, group=methods.ENTRY_POINT_GROUP)
        monkeypatch.setattr(
            methods, "entry_points", lambda group: [point] if group == methods.ENTRY_POINT_GROUP else []
        )

    return install


THEIRS = replace(ROWS["lora"], name="theirs")
BROKEN = "not a method"


def test_another_package_adds_a_method(installed):
    installed("theirs", "test_methods:THEIRS")
    assert methods.catalogue()["theirs"] == THEIRS
    assert methods.get_method("theirs") == THEIRS
    with pytest.raises(RecipeError, match="did you mean 'theirs'"):
        methods.get_method("their")


@pytest.mark.parametrize("value", ["test_methods:BROKEN", "no_such_module:x", "test_methods:NOTHING"])
def test_a_broken_package_is_named_and_spoils_nothing_else(installed, value):
    installed("theirs", value)
    with pytest.warns(LlmregWarning, match="theirs"):
        assert set(methods.catalogue()) == set(ROWS)
    assert methods.get_method("pissa") == ROWS["pissa"]
    with pytest.raises(LlmregError, match="theirs"):
        methods.get_method("theirs")


def test_a_name_that_is_taken_is_refused(installed):
    installed("pissa", "test_methods:THEIRS")
    with pytest.raises(LlmregError, match=r"adds a method under the name 'pissa', which is taken"):
        methods.catalogue()


def test_a_config_class_that_is_gone_is_named():
    with pytest.raises(LlmregError, match=r"names the config class 'llmreg\.adapters:Gone'"):
        replace(THEIRS, config="llmreg.adapters:Gone").config_class()
