"""Registration with PEFT: any order of imports, imports repeated, every way to reach an enum member, new processes."""

from __future__ import annotations

import copy
import enum
import inspect
import json
import pickle

import peft
import pytest
import tiny_models
import torch
from contract_cases import ALL_CASES, CASES
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import llmreg
from llmreg.adapters.registry import peft_type

#: The life of one adapter in a few lines, for other processes; `case` names the config class and its settings.
LIFE = """
import torch
def life(case):
    import llmreg, peft
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 24))
    x = torch.randn(3, 20)
    before = base(x).detach()
    config = getattr(llmreg, case[0])(target_modules=["0", "2"], **case[1])
    model = peft.get_peft_model(base, config)
    assert torch.equal(model(x), before), "the start is not the base"
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter -= 0.05 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)
    assert not torch.equal(model(x), before), "training changed nothing"
    with model.disable_adapter():
        assert torch.equal(model(x), before), "disabled it is not the base"
    model.add_adapter("other", getattr(llmreg, case[0])(target_modules=["0"], **case[1]))
    assert type(model.base_model).__module__.startswith("llmreg."), type(model.base_model)
    assert peft.PeftType(config.peft_type.value) is config.peft_type
    return model, x
"""
FORGET = "import sys\nfor name in [n for n in sys.modules if n.split('.')[0] == 'llmreg']: del sys.modules[name]\n"
IMPORTS = {
    "llmreg first": "import llmreg, peft",
    "peft first": "import peft, llmreg",
    "a config first": "from llmreg import {config}\nimport peft",
    "a submodule first": "import llmreg.adapters.registry, peft",
    "the hub first": "import llmreg.hub.peft_io, peft",
    "peft's tuners first": "import peft.tuners.lora, llmreg",
    "transformers first": "import transformers, llmreg, peft",
    "after a model": "import peft, torch\npeft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), "
    "peft.LoraConfig(r=1, target_modules=['0']))\nimport llmreg",
    "reloaded": "import importlib, peft, llmreg\nimportlib.reload(llmreg)",
    "reloaded before peft": "import importlib, llmreg\nimportlib.reload(llmreg)\nimport peft",
    "submodules reloaded": "import importlib, peft, llmreg\nllmreg.{config}\n"
    "import llmreg.adapters.registry as r, llmreg.adapters as a\nimportlib.reload(r)\nimportlib.reload(a)",
    "forgotten and imported again": "import peft, llmreg\nllmreg.{config}\n" + FORGET + "import llmreg",
    "forgotten before peft": "import llmreg\n" + FORGET + "import llmreg, peft",
    "in a thread": "import threading\nt = threading.Thread(target=lambda: __import__('llmreg'))\nt.start()\nt.join()\n"
    "import peft",
}


def members():
    """The peft types of the cases, once each."""
    return list({case.config(target_modules=["a"]).peft_type: None for case in CASES})


@pytest.fixture(params=members(), ids=lambda member: member.value)
def member(request):
    return request.param


def test_every_config_class_the_package_exports_is_under_contract():
    exported = {name for name in dir(llmreg) + list(llmreg.__all__) if name.endswith("Config")} - {"AdditiveConfig"}
    assert exported <= {case.config_class for case in ALL_CASES}, "list the new method in contract_cases.ALL_CASES"
    methods = set(llmreg.AdditiveConfig._CLASSES.values())
    assert {cls.__name__ for cls in methods} <= {case.config_class for case in ALL_CASES}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_an_adapter_lives_whatever_was_imported_in_which_order(case, imports, run_python):
    settings = (case.config_class, {"r": case.r, **case.settings})
    code = imports.format(config=case.config_class) + "\n" + LIFE + f"\nlife({settings!r})\nprint('ok')"
    assert run_python(code) == "ok"


# -- the enum ------------------------------------------------------------------------------------------------------


def test_a_member_is_found_in_every_way_an_enum_offers(member):
    name = member.value
    assert PeftType(name) is member
    assert PeftType(member) is member
    assert PeftType[name] is member
    assert getattr(PeftType, name) is member
    assert PeftType.__members__[name] is member
    assert member in PeftType
    assert member in list(PeftType)
    assert member in tuple(reversed(PeftType))
    assert name in dir(PeftType)
    assert name in [each.name for each in PeftType]
    assert PeftType._member_map_[name] is PeftType._value2member_map_[name] is member
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert type(member) is PeftType


def test_a_member_is_found_without_the_metaclass_s_fallbacks(member):
    """From Python 3.12 on `PeftType.NAME` is an ordinary class attribute: the enum's `__getattr__` is gone."""
    assert inspect.getattr_static(PeftType, member.name) is member
    assert type.__getattribute__(PeftType, member.name) is member
    assert vars(PeftType)[member.name] is member


def test_a_value_is_contained_as_the_python_that_runs_it_says(member):
    """Up to 3.11 `"NAME" in PeftType` raises for any string, from 3.12 on it asks for values (and PEFT for members)."""
    try:
        expected = "LORA" in PeftType
    except TypeError:
        with pytest.raises(TypeError):
            _ = str(member.value) in PeftType
    else:
        assert (str(member.value) in PeftType) is expected
        assert "NO_SUCH_TYPE" not in PeftType


def test_an_enum_that_keeps_its_values_in_a_list_too_is_told(member, monkeypatch):
    """From 3.13 on, `_hashable_values_` answers `in`; it must hold what the enum's own members put there."""
    values = getattr(PeftType, "_hashable_values_", None)
    if values is not None:
        assert values.count(member.value) == 1
        assert set(values) == {each.value for each in PeftType}


def test_a_member_looks_and_compares_like_peft_s_own(member):
    lora = PeftType.LORA
    assert (member.name, member.value, member._sort_order_) == (
        str.__str__(member),
        str.__str__(member),
        list(PeftType).index(member),
    )
    assert repr(member) == repr(lora).replace("LORA", member.name)
    assert str(member) == str(lora).replace("LORA", member.name)
    assert f"{member}" == f"{lora}".replace("LORA", member.name)
    assert json.dumps({"peft_type": member}) == json.dumps({"peft_type": member.value})
    assert member == member.value
    assert member != lora
    assert hash(member) == hash(PeftType(member.value))
    assert {member: 1}[PeftType(member.value)] == 1
    assert sorted([member, lora]) == sorted([lora, member])
    assert {attribute for attribute in vars(lora) if not attribute.startswith("__")} <= set(vars(member))
    match PeftType(member.value):
        case PeftType.LORA:
            raise AssertionError("matched another member")
        case found:
            assert found is member


def test_a_member_cannot_be_told_from_others_by_what_the_enum_forbids(member):
    with pytest.raises(AttributeError):
        setattr(PeftType, member.name, "other")
    with pytest.raises((AttributeError, TypeError)):
        delattr(PeftType, member.name)
    with pytest.raises(ValueError, match="NO_SUCH_TYPE"):
        PeftType("NO_SUCH_TYPE")
    with pytest.raises(TypeError):
        enum.Enum("More", ["A"], type=PeftType)
    assert enum.unique(PeftType) is PeftType


def test_a_member_copies_and_pickles_to_itself(member):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps({"type": [member]}, protocol))["type"][0] is member
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(PeftType)) is PeftType
    assert copy.deepcopy(PeftType.LORA) is PeftType.LORA


def test_asking_again_registers_nothing_new(member):
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    assert peft_type(member.value) is member
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before
    assert len(list(PeftType)) == len(PeftType) == len(set(PeftType)) == len(PeftType.__members__)


def test_peft_finds_config_tuner_and_prefix_of_every_case(case):
    config = case.config(target_modules=["a"])
    assert isinstance(config, PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type])
    assert PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix == PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    assert peft.get_peft_config(config.to_dict()).to_dict() == config.to_dict()


# -- other processes -----------------------------------------------------------------------------------------------

WORKER = """
import multiprocessing, pickle, sys
import torch
torch.set_num_threads(1)

def work(data, queue):
    assert "llmreg" not in sys.modules and "peft" not in sys.modules, "the worker knows them already"
    model, x, expected = pickle.loads(data)
    assert torch.equal(model(x), expected)
    import peft
    config = model.peft_config["default"]
    assert peft.PeftType(config.peft_type.value) is config.peft_type
    model(x).sum().backward()
    model.merge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-4)
    queue.put(type(config).__name__)

if __name__ == "__main__":
    exec(LIFE)
    model, x = life(CASE)
    data = pickle.dumps((model, x, model(x).detach()))
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    worker = context.Process(target=work, args=(data, queue))
    worker.start()
    try:
        print(queue.get(timeout=120))
    finally:
        worker.join(5)
"""


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_worker_that_knows_neither_unpickles_a_model_and_uses_it(case, start, run_python, tmp_path):
    settings = (case.config_class, {"r": case.r, **case.settings})
    script = tmp_path / "worker_script.py"  # a worker imports the main file again, so it has to be a file
    script.write_text(f"LIFE = {LIFE!r}\nCASE = {settings!r}\n{WORKER}")
    run_file = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    assert run_python(run_file, script, start) == case.config_class


def test_a_config_s_pickle_makes_itself_known_in_a_process_without_imports(case, run_python, tmp_path):
    config = case.config(target_modules=["a"])
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    code = """
import pickle, sys
config = pickle.load(open(sys.argv[1], "rb"))
import peft
print(type(config).__name__, peft.PeftType[config.peft_type.name] is config.peft_type)
"""
    assert run_python(code, tmp_path / "config.pickle") == f"{case.config_class} True"


def test_a_data_loader_s_workers_can_hold_a_model(mlp_cell):
    """As a preprocessing step would: the dataset carries the wrapped model into spawned workers."""
    model = mlp_cell.moved()
    data = Embedded(model, tiny_models.inputs(4))
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    rows = torch.cat(list(loader))
    torch.testing.assert_close(rows, tiny_models.logits(model, data.x), atol=1e-6, rtol=1e-6)


class Embedded(torch.utils.data.Dataset):
    """Rows of `x` through `model`."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(self.x[index : index + 1])[0]
