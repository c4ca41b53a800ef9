"""Registration with PEFT: any order of imports, imports repeated, every way to reach an enum member, new processes."""

from __future__ import annotations

import copy
import enum
import inspect
import json
import multiprocessing
import pickle
import re

import fresh_process
import peft
import pytest
import tiny_models
import torch
import unpickling_worker
from contract_cases import ALL_CASES, CASES, cells
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import llmreg
from llmreg.adapters.registry import peft_type

#: The life of one adapter in a few lines, for other processes: (config class, settings) -> digest of what it was.
LIFE = """
import hashlib
import torch

def life(case, folder):
    import llmreg, peft
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 24))
    x = torch.randn(3, 20)
    before = base(x).detach()
    config_class = getattr(llmreg, case[0])
    config = config_class(target_modules=["0", "2"], **case[1])
    assert peft.PeftType(config.peft_type.value) is config.peft_type
    model = peft.get_peft_model(base, config)
    if getattr(config_class, "NEEDS_DATA", False):
        llmreg.initialize(model, [torch.randn(40, 20)])
    assert type(model.base_model).__module__.startswith("llmreg."), type(model.base_model)
    assert torch.equal(model(x), before), "the start is not the base"
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, "a trained parameter has no gradient"
                parameter -= 0.05 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)
    trained = model(x).detach()
    assert not torch.equal(trained, before), "training changed nothing"
    with model.disable_adapter():
        assert torch.equal(model(x), before), "disabled it is not the base"
    model.add_adapter("other", config_class(target_modules=["0"], **case[1]))
    model.delete_adapter("other")
    model.save_pretrained(folder)
    restored = peft.PeftModel.from_pretrained(model.unload(), folder, is_trainable=True)
    assert torch.equal(restored(x), trained), "what was saved did not come back"
    assert isinstance(restored.peft_config["default"], config_class), type(restored.peft_config["default"])
    return restored, x, digest.hexdigest()
"""
FORGET = "for name in [n for n in sys.modules if n.split('.')[0] == 'llmreg']: del sys.modules[name]"
#: What is run before a life; the first is what the others are compared with. `{config}` is a config class's name.
IMPORTS = {
    "llmreg first": "import llmreg, peft",
    "peft first": "import peft, llmreg",
    "a config first": "from llmreg import {config}\nimport peft",
    "a submodule first": "import llmreg.adapters.registry, peft",
    "the hub first": "import llmreg.hub.peft_io, peft",
    "a tuner of peft first": "import peft.tuners.lora, llmreg",
    "after a model": "import peft\npeft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), "
    "peft.LoraConfig(r=1, target_modules=['0']))\nimport llmreg",
    "in a thread": "import threading\nt = threading.Thread(target=lambda: __import__('llmreg'))\nt.start()\n"
    "t.join()\nimport peft",
    "reloaded": "import importlib, peft, llmreg\nimportlib.reload(llmreg)",
    "reloaded before peft": "import importlib, llmreg\nimportlib.reload(llmreg)\nimport peft",
    "registry reloaded": "import importlib, peft, llmreg\nllmreg.{config}\n"
    "import llmreg.adapters.registry as r, llmreg.adapters as a\nimportlib.reload(r)\nimportlib.reload(a)",
    "forgotten before peft": f"import llmreg\n{FORGET}\nimport llmreg, peft",
    "forgotten and imported again": f"import peft, llmreg\nllmreg.{{config}}\n{FORGET}\nimport llmreg",
}
#: What each of `IMPORTS` asks for is done in a fork of a process that has imported what is heavy and not ours.
FORKS = (
    LIFE
    + """
import json, os, sys, tempfile, traceback
assert not {"peft", "llmreg"} & set(sys.modules)
cases = json.loads(sys.argv[2])
results = {}
for name, code in json.loads(sys.argv[1]).items():
    read, write = os.pipe()
    if os.fork() == 0:
        lived = {}
        try:
            exec(code.format(config=cases[0][0]))
        except BaseException:
            lived = dict.fromkeys(map(str, cases), traceback.format_exc())
        for case in cases if not lived else ():
            try:
                with tempfile.TemporaryDirectory() as folder:
                    lived[str(case)] = life(case, folder)[2]
            except BaseException:
                lived[str(case)] = traceback.format_exc()
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            json.dump(lived, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        results[name] = json.load(pipe)
    os.wait()
print(json.dumps(results))
"""
)


def recipe(case):
    """(config class, settings), for another process."""
    return [case.config_class, {"r": case.r, **case.settings}]


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """A function (key of `IMPORTS`, case) -> the digest of that life, or the traceback that ended it."""
    cases = json.dumps([recipe(case) for case in CASES])
    done = fresh_process.run(FORKS, json.dumps(IMPORTS), cases, folder=tmp_path_factory.mktemp("lives"))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return lambda imports, case: results[imports][str(recipe(case))]


def members():
    """The peft types of the cases, once each."""
    return list({case.config(target_modules=["a"]).peft_type: None for case in CASES})


@pytest.fixture(params=members(), ids=lambda member: member.value)
def member(request):
    return request.param


#: EoRA does not start at the base and needs a checkpoint: tests/adapters/test_eora_adapter.py.
ELSEWHERE = {"EoraConfig"}


def test_every_config_class_the_package_exports_is_under_contract():
    exported = {name for name in dir(llmreg) + list(llmreg.__all__) if name.endswith("Config")} - {"AdditiveConfig"}
    known = {case.config_class for case in ALL_CASES} | ELSEWHERE
    assert exported <= known, "list the new method in contract_cases.ALL_CASES"
    methods = {cls for cls in llmreg.AdditiveConfig._CLASSES.values() if cls.__name__ not in ELSEWHERE}
    assert {cls.__name__ for cls in methods} <= {case.config_class for case in ALL_CASES}


@pytest.mark.parametrize("imports", IMPORTS)
def test_an_adapter_lives_the_same_whatever_was_imported_in_which_order(case, imports, lives):
    result = lives(imports, case)
    assert re.fullmatch("[0-9a-f]{64}", result), result
    assert result == lives("llmreg first", case), "another start than with llmreg imported first"


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


@pytest.mark.filterwarnings("ignore:.*__contains__:DeprecationWarning")
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


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_a_member_is_entered_in_every_book_that_the_enum_of_that_python_keeps(python, monkeypatch):
    """A stand-in for `PeftType` with that version's books, and its lookups spelled out as its `EnumType` has them.

    3.11 finds members through `_member_map_`, 3.12 as class attributes, and `in` asks `_value2member_map_`; from 3.13
    on `in` asks the list `_hashable_values_`.
    """
    Stand = enum.Enum("Stand", {"LORA": "LORA", "MISS": "MISS"}, type=str, module=__name__)
    if python == "3.13" and not hasattr(Stand, "_hashable_values_"):
        type.__setattr__(Stand, "_hashable_values_", [each.value for each in Stand])
        type.__setattr__(Stand, "_unhashable_values_", [])
    monkeypatch.setattr("llmreg.adapters.registry.PeftType", Stand)
    member = peft_type("LLMREG_NEW")
    assert peft_type("LLMREG_NEW") is member
    assert Stand._member_names_ == ["LORA", "MISS", "LLMREG_NEW"]
    found = {
        "3.11": lambda name: Stand._member_map_[name],
        "3.12": lambda name: type.__getattribute__(Stand, name),
        "3.13": lambda name: type.__getattribute__(Stand, name),
    }[python]
    assert found("LLMREG_NEW") is member
    values = Stand._hashable_values_ if python == "3.13" else list(Stand._value2member_map_)
    assert values == ["LORA", "MISS", "LLMREG_NEW"]
    assert set(vars(member)) >= set(vars(Stand["LORA"]))
    assert member.__objclass__ is Stand


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


def start_worker(start, lives):
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    worker = context.Process(target=unpickling_worker.work, args=(lives, queue))
    worker.start()
    try:
        return queue.get(timeout=200)
    finally:
        worker.join(20)


@pytest.mark.parametrize("start", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_worker_that_knows_neither_peft_nor_llmreg_unpickles_models_and_uses_them(start):
    lives = []
    for cell in cells("mlp", storages=("float32",)):
        model, x = cell.moved(), cell.batch()
        lives.append((cell.case.config_class, pickle.dumps((model, x, model(x).detach()))))
    assert start_worker(start, lives) == len(CASES)


@pytest.mark.slow
def test_the_spawned_workers_of_a_data_loader_can_hold_a_model(mlp_cell):
    """As a preprocessing step would: the dataset carries the wrapped model."""
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
