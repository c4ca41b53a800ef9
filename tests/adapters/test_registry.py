"""One peft type added to PEFT's enum: everywhere, in any order of imports, and into processes that know nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

from llmreg import AdditiveConfig
from llmreg.adapters import AdditiveModel
from llmreg.adapters.registry import ADDITIVE, check_peft_version, peft_type, register
from llmreg.errors import LlmregError


def test_the_member_is_found_by_value_name_and_attribute():
    assert PeftType("LLMREG_ADDITIVE") is ADDITIVE
    assert PeftType["LLMREG_ADDITIVE"] is ADDITIVE
    assert PeftType.LLMREG_ADDITIVE is ADDITIVE
    assert ADDITIVE in list(PeftType)
    assert ADDITIVE in PeftType
    assert isinstance(ADDITIVE, PeftType)
    assert (ADDITIVE.name, ADDITIVE.value, ADDITIVE == "LLMREG_ADDITIVE") == ("LLMREG_ADDITIVE",) * 2 + (True,)


def test_peft_s_own_members_are_as_before():
    assert PeftType("LORA") is PeftType.LORA
    assert len(set(PeftType)) == len(list(PeftType)) == len(PeftType.__members__)
    assert list(PeftType)[-1] is ADDITIVE


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy]
    + [
        lambda value, p=protocol: pickle.loads(pickle.dumps(value, p))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ],
)
def test_copies_and_pickles_are_the_member_itself(duplicate):
    assert duplicate(ADDITIVE) is ADDITIVE
    assert duplicate({"key": [ADDITIVE]})["key"][0] is ADDITIVE


def test_it_hashes_compares_and_prints_like_any_member():
    assert {ADDITIVE: 1}[PeftType("LLMREG_ADDITIVE")] == 1
    assert ADDITIVE != PeftType.LORA
    assert repr(ADDITIVE) == "<PeftType.LLMREG_ADDITIVE: 'LLMREG_ADDITIVE'>"
    assert str(ADDITIVE) == "PeftType.LLMREG_ADDITIVE"


def test_registering_twice_does_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register(ADDITIVE, AdditiveConfig, AdditiveModel, "lora_")
    assert peft_type("LLMREG_ADDITIVE") is ADDITIVE
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
    assert PEFT_TYPE_TO_CONFIG_MAPPING[ADDITIVE] is AdditiveConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[ADDITIVE] is AdditiveModel


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.9.dev0"])
def test_a_peft_of_the_tested_range_is_accepted(version):
    check_peft_version(version)


@pytest.mark.parametrize("version", ["0.20.4", "0.22.0", "0.22.0.dev0", "1.0"])
def test_another_peft_is_one_clear_error_that_says_what_to_install(version):
    with pytest.raises(LlmregError, match=rf'peft {version} is installed; run: pip install "peft>=0.21,<0.22"'):
        check_peft_version(version)


def test_a_model_wrapped_before_the_import_takes_an_additive_adapter_after_it(run_python):
    code = """
import peft, torch
base = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
x = torch.randn(3, 8)
before = model(x).detach()
import llmreg
model.add_adapter("ours", llmreg.PissaConfig(r=2, target_modules=["0", "2"]))
model.set_adapter("ours")
assert torch.equal(model(x), before)
model(x).sum().backward()
assert model.base_model.model[2].lora_B["ours"].weight.grad is not None
print("ok")
"""
    assert run_python(code) == "ok"
