"""Law 4: the same recipe gives the same numbers, an adapter knows its base, and everything is recorded with it."""

from __future__ import annotations

import functools
import json
import logging
from importlib.metadata import version
from pathlib import Path

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from peft import PeftModel

import llmreg
from llmreg.errors import BaseMismatchError

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


def _save(model, folder, method, **arguments):
    wrapped = saved.drift(peft.get_peft_model(model, method(r=4, target_modules=TARGETS, **arguments)))
    wrapped.save_pretrained(folder)
    return wrapped


def _sidecar(folder):
    return json.loads((Path(folder) / "llmreg.json").read_text())


_START = """
import sys, torch, peft
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[4]))
from transformers import AutoModelForCausalLM
from llmreg import AdditiveConfig
if AdditiveConfig._CLASSES[sys.argv[3]].NEEDS_DATA:
    sys.path.insert(0, sys.argv[5])
    import made_up
    made_up.give_data(AdditiveConfig._CLASSES[sys.argv[3]])
config = AdditiveConfig(method=sys.argv[3], r=4, target_modules=["q_proj", "v_proj", "down_proj"])
peft.get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), config).save_pretrained(sys.argv[2])
"""


@pytest.mark.multiprocess
def test_two_processes_start_alike_to_the_last_bit(method, base, tmp_path, run_python):
    run_python(_START, str(base), str(tmp_path / "one"), method.METHOD, "1", str(Path(tiny_models.__file__).parent))
    torch.manual_seed(2)
    config = method(r=4, target_modules=TARGETS)
    peft.get_peft_model(saved.load_base(base), config).save_pretrained(tmp_path / "two")
    for name in ("llmreg.json", "llmreg_factors.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_training_does_not_change_the_start_hash_and_the_recipe_does(method, base, tmp_path):
    hashes = {}
    for name, arguments in (("a", {}), ("b", {}), ("rank", {"rank_pattern": {"q_proj": 3}})):
        _save(saved.load_base(base), tmp_path / name, method, **arguments)
        hashes[name] = _sidecar(tmp_path / name)["start_hash"]
    assert hashes["a"] == hashes["b"]
    assert len(set(hashes.values())) == 2


def test_the_start_leaves_the_global_generators_alone(method, base):
    model = saved.load_base(base)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    peft.get_peft_model(model, method(r=4, target_modules=TARGETS))
    assert torch.equal(torch.get_rng_state(), before)


def test_config_versions_and_both_base_hashes_are_recorded(method, base, tmp_path):
    arguments = {"lora_alpha": 6, "rank_pattern": {"q_proj": 3}, "seed": 5}
    _save(saved.load_base(base), tmp_path / "adapter", method, **arguments)
    content = _sidecar(tmp_path / "adapter")
    assert content["method"] == method.METHOD
    for name, value in {"r": 4, **arguments}.items():
        assert content["config"][name] == value
    for name in ("torch", "transformers", "peft", "trl"):
        assert content["versions"][name] == version(name)
    assert content["versions"]["llmreg"] == llmreg.__version__
    assert content["base"]["source"] == "checkpoint"
    assert content["base"]["storage"] == "float32"
    for digest in (content["start_hash"], content["base"]["digest"], content["base"]["stored_bytes"]):
        assert len(bytes.fromhex(digest)) == 32


@pytest.mark.parametrize("again", [False, True], ids=["first-save", "saved-after-loading"])
def test_no_local_path_stands_in_the_sidecar(method, base, tmp_path, again):
    _save(saved.load_base(base), tmp_path / "adapter", method)
    folder = tmp_path / "adapter"
    if again:
        PeftModel.from_pretrained(saved.load_base(base), folder).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    text = (folder / "llmreg.json").read_text()
    assert str(base) not in text
    assert "/" not in text
    assert _sidecar(folder)["config"]["base_model_name_or_path"] is None


@pytest.mark.parametrize("where", ["bare", "live", "beside"])
@pytest.mark.parametrize("kind", ["checkpoint", "memory"])
def test_another_base_is_refused_before_anything_is_touched(method, base, tmp_path, where, kind):
    if kind == "checkpoint":
        _save(saved.load_base(base), tmp_path / "adapter", method)
        other = saved.load_base(saved.checkpoint(tmp_path / "other", seed=1))
    else:
        _save(tiny_models.llama(), tmp_path / "adapter", method)
        other = tiny_models.llama(seed=1)
    if where != "bare":
        other = peft.get_peft_model(other, method(r=4, target_modules=TARGETS))
    before, state = tiny_models.structure(other), tiny_models.state_bytes(other)
    load = functools.partial(PeftModel.from_pretrained, other)
    if where != "bare":
        load = functools.partial(other.load_adapter, adapter_name="default" if where == "live" else "second")
    with pytest.raises(BaseMismatchError, match=r"was trained on .* load the base it was trained on"):
        load(model_id=tmp_path / "adapter")
    assert tiny_models.structure(other) == before
    assert tiny_models.state_bytes(other) == state


def test_one_changed_weight_in_the_checkpoint_is_another_base(method, base, tmp_path):
    _save(saved.load_base(base), tmp_path / "adapter", method)
    model = saved.load_base(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    changed = saved.checkpoint(tmp_path / "changed", model)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(saved.load_base(changed), tmp_path / "adapter")


@pytest.mark.parametrize(("trained", "used"), [("nf4", "bfloat16"), ("float32", "int8"), ("bfloat16", "float32")])
def test_the_same_base_in_another_storage_is_allowed_with_a_note(method, base, tmp_path, tokens, caplog, trained, used):
    model = _save(saved.load_base(base, trained), tmp_path / "adapter", method)
    with caplog.at_level(logging.INFO, logger="llmreg"):
        loaded = PeftModel.from_pretrained(saved.load_base(base, used), tmp_path / "adapter")
    assert f"trained on a base stored as {trained}, used on the same base stored as {used}" in caplog.text
    assert saved.factor_bytes(loaded) == saved.factor_bytes(model)
    assert torch.isfinite(saved.outputs(loaded, tokens)).all()


def test_the_same_base_at_another_place_is_the_same_base(method, base, tmp_path, caplog):
    _save(saved.load_base(base), tmp_path / "adapter", method)
    copy = saved.checkpoint(tmp_path / "copy", saved.load_base(base))
    with caplog.at_level(logging.INFO, logger="llmreg"):
        PeftModel.from_pretrained(saved.load_base(copy), tmp_path / "adapter")
    assert "trained on" not in caplog.text


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_base_without_files_is_compared_by_the_bytes_of_its_layers(method, base, tmp_path, wrapped):
    _save(saved.load_base(base), tmp_path / "adapter", method)

    def load(model):
        if not wrapped:
            return PeftModel.from_pretrained(model, tmp_path / "adapter")
        model = peft.get_peft_model(model, method(r=2, target_modules=["q_proj"]))
        return model.load_adapter(tmp_path / "adapter", "second")

    load(tiny_models.llama())
    with pytest.raises(BaseMismatchError):
        load(tiny_models.llama(seed=1))


def test_the_plain_adapter_still_loads_on_any_base_when_asked_for_without_sidecar(method, base, tmp_path):
    _save(saved.load_base(base), tmp_path / "adapter", method)
    (tmp_path / "adapter" / "llmreg.json").unlink()
    PeftModel.from_pretrained(tiny_models.llama(seed=1), tmp_path / "adapter")
