"""Damaged, altered and foreign adapters: one clear error each, before anything is touched."""

from __future__ import annotations

import json
import pickle

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from llmreg.errors import AdapterFileError, UnsupportedError

TARGETS = ["q_proj", "v_proj"]
SIDECAR, FACTORS, WEIGHTS = "llmreg.json", "llmreg_factors.safetensors", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(method, base, tmp_path):
    """A saved adapter, to be damaged."""
    model = saved.drift(peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=TARGETS)))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _refused(base, folder, method, match, error=AdapterFileError):
    """Every way of loading raises `error`; models that exist already keep every parameter and module."""
    bare = saved.load_base(base)
    before = tiny_models.structure(bare)
    with pytest.raises(error, match=match):
        PeftModel.from_pretrained(bare, folder)
    assert tiny_models.structure(bare) == before

    live = peft.get_peft_model(bare, method(r=4, target_modules=TARGETS, seed=5))
    structure, factors = tiny_models.structure(live), saved.factor_bytes(live)
    with pytest.raises(error, match=match):
        live.load_adapter(folder, "default", is_trainable=True)
    with pytest.raises(error, match=match):
        live.load_adapter(folder, "other")
    assert list(live.peft_config) == ["default"]
    assert tiny_models.structure(live) == structure
    assert saved.factor_bytes(live) == factors


def _edit(folder, change, redigest=False):
    """Change the sidecar's JSON; with `redigest` as somebody would who knows of its digest."""
    from llmreg.hub.sidecar import _content_digest

    content = json.loads((folder / SIDECAR).read_text())
    change(content)
    if redigest:
        content["digest"] = _content_digest(content)
    (folder / SIDECAR).write_text(json.dumps(content))


@pytest.mark.parametrize("name", [WEIGHTS, FACTORS])
@pytest.mark.parametrize("damage", ["truncated", "empty", "one-bit", "garbage"])
def test_damaged_tensors_are_refused(base, folder, method, name, damage):
    content = bytearray((folder / name).read_bytes())
    if damage == "truncated":
        content = content[: len(content) * 2 // 3]
    elif damage == "empty":
        content = bytearray()
    elif damage == "one-bit":
        content[-5] ^= 1
    else:
        content = bytearray(b"\xff" * 200)
    (folder / name).write_bytes(content)
    _refused(base, folder, method, f"{name} is not the file that was saved")


@pytest.mark.parametrize("name", [WEIGHTS, FACTORS])
def test_missing_tensors_are_refused(base, folder, method, name):
    (folder / name).unlink()
    _refused(base, folder, method, f"{name} is missing")


def test_changed_factors_are_refused_even_where_they_are_whole(base, folder, method):
    tensors = load_file(folder / FACTORS)
    save_file({key: value + 1e-3 for key, value in tensors.items()}, folder / FACTORS, metadata={"format": "pt"})
    _refused(base, folder, method, "not the file that was saved")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"text"', "{}", '{"format": 1}', "\x00\x01", "[" * 100_000]
)
def test_a_sidecar_that_is_no_sidecar_is_refused(base, folder, method, text):
    (folder / SIDECAR).write_text(text)
    _refused(base, folder, method, r"llmreg\.json is damaged")


def test_a_sidecar_in_another_encoding_is_refused(base, folder, method):
    (folder / SIDECAR).write_bytes(b"\xff\xfe" + (folder / SIDECAR).read_bytes())
    _refused(base, folder, method, r"llmreg\.json is damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["config"].update(lora_alpha=400),
        lambda content: content["config"].update(r=2),
        lambda content: content["config"].update(target_modules=["q_proj"]),
        lambda content: content["base"].update(digest=None),
        lambda content: content.update(start_hash="0" * 64),
        lambda content: content["versions"].update(torch="1.0"),
        lambda content: content.update(extra=1),
        lambda content: content["files"].update({WEIGHTS: "0" * 64}),
    ],
)
def test_an_altered_sidecar_is_refused(base, folder, method, change):
    _edit(folder, change)
    _refused(base, folder, method, "was changed after it was saved")


def test_another_format_number_is_refused_with_what_to_do(base, folder, method):
    _edit(folder, lambda content: content.update(format=99), redigest=True)
    _refused(base, folder, method, "format 99.*upgrade llmreg")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: (content.update(method="nope"), content["config"].update(method="nope")), "nope"),
        (lambda content: content["config"].update(no_such_field=1), "no_such_field"),
        (lambda content: content.update(config=[]), "cannot mount|damaged"),
        (lambda content: content["base"].update(nickname="x"), "damaged"),
        (lambda content: content["config"].update(bias="all"), "bias"),
        (lambda content: content["files"].update({"../../etc/passwd": "0"}), "damaged"),
    ],
)
def test_the_sidecar_of_another_version_is_refused(base, folder, method, change, match):
    _edit(folder, change, redigest=True)
    _refused(base, folder, method, match)


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 100}, {"r": 5}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}]
)
def test_a_plain_config_that_was_edited_is_refused(base, folder, method, change):
    """Plain PEFT would scale the update by the edited value and llmreg by the sidecar's."""
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **change}))
    _refused(base, folder, method, f"{next(iter(change))}=.*was changed after it was saved")


def test_a_missing_plain_config_is_refused(base, folder, method):
    (folder / "adapter_config.json").unlink()
    _refused(base, folder, method, r"adapter_config\.json is missing")


def test_a_pickle_in_the_place_of_the_weights_is_refused_unread(base, folder, method, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    _refused(base, folder, method, "is a pickle")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_beside_the_weights_is_never_read(base, folder, tokens, tmp_path):
    expected = saved.outputs(PeftModel.from_pretrained(saved.load_base(base), folder), tokens)
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert torch.equal(saved.outputs(PeftModel.from_pretrained(saved.load_base(base), folder), tokens), expected)


@pytest.mark.parametrize(
    "arguments", [{"r": 2}, {"lora_alpha": 9}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}]
)
def test_resuming_into_an_adapter_of_another_shape_is_refused(base, folder, method, arguments):
    live = peft.get_peft_model(saved.load_base(base), method(**{"r": 4, "target_modules": TARGETS, **arguments}))
    before = saved.factor_bytes(live)
    with pytest.raises(AdapterFileError, match="the one to resume has"):
        live.load_adapter(folder, "default", is_trainable=True)
    assert saved.factor_bytes(live) == before


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj", "up_proj"], ["up_proj"]])
def test_resuming_into_an_adapter_of_other_layers_is_refused(base, folder, method, targets):
    live = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=targets))
    before = saved.factor_bytes(live)
    with pytest.raises(AdapterFileError, match="layer"):
        live.load_adapter(folder, "default", is_trainable=True)
    assert saved.factor_bytes(live) == before


def test_resuming_from_a_folder_without_sidecar_is_refused(base, folder, method):
    (folder / SIDECAR).unlink()
    live = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=TARGETS))
    with pytest.raises(AdapterFileError, match="cannot continue from it"):
        live.load_adapter(folder, "default", is_trainable=True)


def test_a_base_of_another_architecture_is_refused(folder, method):
    for other in (tiny_models.gpt2(), tiny_models.llama(layers=1)):
        before = tiny_models.structure(other)
        with pytest.raises(AdapterFileError, match="this base model lacks"):
            PeftModel.from_pretrained(other, folder)
        assert tiny_models.structure(other) == before
    wrapped = peft.get_peft_model(tiny_models.gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(AdapterFileError, match="this base model lacks"):
        wrapped.load_adapter(folder, "other")
    assert list(wrapped.peft_config) == ["default"]


def test_pickle_and_conversion_are_refused_when_saving(base, method, tmp_path):
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=TARGETS))
    with pytest.raises(UnsupportedError, match="safe_serialization=False would write a pickle"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.raises(UnsupportedError, match="path_initial_model_for_weight_conversion is not needed"):
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert saved.files(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(method, base, tmp_path, value):
    model = peft.get_peft_model(saved.load_base(base), method(r=4, target_modules=TARGETS))
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).view(-1)[0] = value
    model.save_pretrained(tmp_path / "adapter")
    _refused(base, tmp_path / "adapter", method, "NaN or infinite")


def test_a_save_that_would_lack_the_sidecar_is_refused(method, base, tmp_path):
    model = saved.load_base(base)
    model.add_adapter(method(r=4, target_modules=TARGETS))  # transformers' integration of PEFT
    with pytest.raises(UnsupportedError, match=r"saved by PeftModel\.save_pretrained"):
        model.save_pretrained(tmp_path / "adapter")
