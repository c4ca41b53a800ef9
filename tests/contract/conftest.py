"""What the tests of the contract are given: a `Cell`, that is one adapter on one model in one storage."""

from __future__ import annotations

import warnings

import made_up
import pytest
from contract_cases import CASES, cells

from llmreg import AdditiveConfig


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """One adapter under contract."""
    return request.param


#: Models on which every storage is tested by default: an MLP and a language model.
IN_EVERY_STORAGE = ("mlp", "llama")


def _by_default(cell):
    return cell.storage == "float32" or cell.model.name in IN_EVERY_STORAGE


@pytest.fixture(
    params=[pytest.param(cell, marks=[] if _by_default(cell) else [pytest.mark.slow]) for cell in cells()], ids=str
)
def cell(request):
    """Every adapter on every model in every storage; slow are the other models in other storages than fp32."""
    return request.param


@pytest.fixture(params=cells(storages=("float32",)), ids=str)
def float_cell(request):
    """Every adapter on every model, in fp32."""
    return request.param


@pytest.fixture(params=cells("mlp", storages=("float32",)), ids=str)
def mlp_cell(request):
    """Every adapter on the MLP, in fp32."""
    return request.param


@pytest.fixture(params=cells("llama", storages=("float32",)), ids=str)
def llama_cell(request):
    """Every adapter on the Llama, in fp32."""
    return request.param


@pytest.fixture(params=cells("bert", storages=("float32",)), ids=str)
def bert_cell(request):
    """Every adapter on the classifier, in fp32."""
    return request.param


@pytest.fixture(autouse=True)
def _data(monkeypatch):
    """Methods that start from data are given some as soon as they are put on a model."""
    for config in AdditiveConfig._CLASSES.values():
        if config.NEEDS_DATA:
            made_up.give_data(config, monkeypatch.setattr)


@pytest.fixture(autouse=True)
def _no_notes_of_peft():
    """PEFT notes rounding and its own switches as warnings; tests that are about a warning ask for it."""
    with warnings.catch_warnings():
        for note in (
            "Merge .* module",
            "Unmerge .* module",
            "Adapter .* was active",
            "Already unmerged",
            "fan_in_fan_out is set",
        ):
            warnings.filterwarnings("ignore", message=note)
        yield
