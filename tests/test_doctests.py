"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import llmreg

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(llmreg.__path__, "llmreg.") if not module.name.endswith("__main__")
)


def examples(name: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples(name):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_there_are_examples_where_people_look_first():
    for name in ("llmreg.linalg.svd", "llmreg.adapters.svd_configs", "llmreg.recipes.load", "llmreg.methods"):
        assert examples(name), name
