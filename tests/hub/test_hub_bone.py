"""Laws 2 and 4 for Bone: saved as PEFT's MiSS where that computes the same, as BONE elsewhere; back bit for bit."""

from __future__ import annotations

import functools
import json
import logging

import adapter_files as saved
import bone_models
import peft
import pytest
import tiny_models
import torch
from bone_models import LINEAR, each_variant
from peft import AutoPeftModelForCausalLM, MissConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import llmreg
from llmreg import BoneConfig
from llmreg.errors import AdapterFileError, BaseMismatchError, UnsupportedError
from llmreg.hub.card import write_card
from llmreg.hub.peft_io import find_sidecar

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


def adapted(base, variant, storage="float32", **settings):
    config = bone_models.config(variant, task_type="CAUSAL_LM", **settings)
    return bone_models.drift(peft.get_peft_model(saved.load_base(base, storage), config))


def written(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def same(loaded, model, tokens, name="default"):
    assert bone_models.block_bytes(loaded, name) == bone_models.block_bytes(model)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))


# -- plain PEFT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", tiny_models.STORAGES)
@each_variant
def test_it_loads_in_plain_peft_with_equal_logits(base, tmp_path, tokens, variant, storage):
    """Half precision and int8 differ by their own rounding.

    MiSS computes `bat` as one product in fp32, so without the rounding of a bf16 layer's output, or of the activations
    that an int8 layer quantises.
    """
    model = adapted(base, variant, storage)
    model.save_pretrained(tmp_path)
    plain, warnings = saved.PlainPeft.ask(base, tmp_path, tokens, storage=storage)
    assert warnings == []
    limit = {"float32": 1e-6, "nf4": 1e-6, "float16": 2e-3, "bfloat16": 1e-2, "int8": 1e-6}[storage]
    if variant == "bat" and storage in ("bfloat16", "int8"):
        limit = 3e-2
    assert saved.relative(plain, saved.outputs(model, tokens)) <= limit
    assert written(tmp_path)["peft_type"] == "MISS"


@pytest.mark.parametrize("variant", ["bone", "mini"])
def test_a_rank_that_does_not_divide_the_inputs_loads_in_plain_peft(base, tmp_path, tokens, variant):
    model = adapted(base, variant, r=7)
    model.save_pretrained(tmp_path)
    plain, warnings = saved.PlainPeft.ask(base, tmp_path, tokens)
    assert warnings == []
    assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6


@each_variant
def test_selections_whole_modules_and_dropout_load_in_plain_peft(base, tmp_path, tokens, variant):
    settings = [
        {"target_modules": r".*\.self_attn\.[qv]_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers", "bone_dropout": 0.2},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ]
    for number, given in enumerate(settings):
        model = adapted(base, variant, **given)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.1)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        plain, warnings = saved.PlainPeft.ask(base, folder, tokens)
        assert warnings == []
        assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6
        same(PeftModel.from_pretrained(saved.load_base(base), folder), model, tokens)


@each_variant
def test_on_conv1d_plain_peft_refuses_it_and_llmreg_loads_it(tmp_path, tokens, variant):
    base = saved.checkpoint(tmp_path / "base", tiny_models.gpt2())
    config = bone_models.config(variant, target_modules=["c_attn", "c_fc"])
    model = bone_models.drift(peft.get_peft_model(saved.load_base(base), config))
    model.save_pretrained(tmp_path / "adapter")
    assert written(tmp_path / "adapter")["peft_type"] == "BONE"
    with pytest.raises(RuntimeError, match="KeyError: 'BONE'"):
        saved.PlainPeft.ask(base, tmp_path / "adapter", tokens)
    same(PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter"), model, tokens)
    card = write_card(tmp_path / "adapter")
    assert "Plain PEFT refuses it" in card
    assert "With plain PEFT:" not in card
    (tmp_path / "adapter" / "llmreg.json").unlink()
    same(PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter"), model, tokens)


def test_files_are_safetensors_and_json_and_the_config_is_a_plain_missconfig(base, tmp_path):
    settings = {"bone": (True, 1), "mini": ("mini", 4), "bat": ("bat", 1)}
    for variant, (init, mini_r) in settings.items():
        folder = tmp_path / variant
        adapted(base, variant, bone_dropout=0.25).save_pretrained(folder)
        assert saved.files(folder) == ["README.md", "adapter_config.json", WEIGHTS, "llmreg.json"]
        config = written(folder)
        assert set(config) == set(MissConfig().to_dict()), "no key that plain PEFT does not know"
        assert (config["init_weights"], config["mini_r"], config["r"]) == (init, mini_r, 8)
        assert config["miss_dropout"] == 0.25
        assert config["target_modules"] == sorted(LINEAR)
        assert all(key.endswith(".miss_block") for key in load_file(folder / WEIGHTS))


@each_variant
def test_untrained_it_adds_exactly_nothing_in_plain_peft(base, tmp_path, tokens, variant):
    peft.get_peft_model(saved.load_base(base), bone_models.config(variant)).save_pretrained(tmp_path)
    plain, _ = saved.PlainPeft.ask(base, tmp_path, tokens)
    torch.testing.assert_close(plain, saved.outputs(saved.load_base(base), tokens), rtol=1e-6, atol=1e-6)


def test_without_sidecar_a_miss_folder_is_peft_s_own(base, tmp_path, tokens):
    model = adapted(base, "bat")
    model.save_pretrained(tmp_path)
    (tmp_path / "llmreg.json").unlink()
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path)
    assert type(loaded.peft_config["default"]) is MissConfig
    assert saved.relative(saved.outputs(loaded, tokens), saved.outputs(model, tokens)) <= 1e-6


# -- llmreg ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
@each_variant
def test_loaded_it_is_the_same_adapter_to_the_last_bit(
    base, tmp_path, tokens, variant, low_cpu_mem_usage, is_trainable
):
    model = adapted(base, variant, bone_dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        saved.load_base(base), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    same(loaded, model, tokens)
    config = loaded.peft_config["default"]
    assert type(config) is BoneConfig
    assert (config.variant, config.r, config.bone_dropout) == (variant, 8, 0.1)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == (expected if is_trainable else set())


@each_variant
def test_training_continues_as_if_never_interrupted(base, tmp_path, tokens, variant):
    model = adapted(base, variant)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path, is_trainable=True)
    assert tiny_models.train(loaded, tokens) == tiny_models.train(model, tokens)
    same(loaded, model, tokens)


@each_variant
def test_saving_what_was_loaded_gives_the_same_bytes(base, tmp_path, variant):
    adapted(base, variant).save_pretrained(tmp_path / "one")
    PeftModel.from_pretrained(saved.load_base(base), tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in (WEIGHTS, "llmreg.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("storage", ["nf4", "int8", "bfloat16"])
@each_variant
def test_loading_into_a_live_adapter_is_bit_exact_in_its_dtype(base, tmp_path, tokens, variant, storage):
    """What Trainer's resume does; TRL trains on a quantised base in bf16."""
    live = adapted(base, variant, storage)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    before, out = bone_models.block_bytes(live), saved.outputs(live, tokens)
    live.save_pretrained(tmp_path)
    parameters = {name: id(parameter) for name, parameter in live.named_parameters()}
    bone_models.drift(live, size=0.2, seed=1)
    live.load_adapter(tmp_path, "default", is_trainable=True)
    assert bone_models.block_bytes(live) == before
    assert torch.equal(saved.outputs(live, tokens), out)
    assert {name: id(parameter) for name, parameter in live.named_parameters()} == parameters, "optimizers hold these"
    fresh = PeftModel.from_pretrained(saved.load_base(base, storage), tmp_path, autocast_adapter_dtype=False)
    assert bone_models.block_bytes(fresh) == before


def test_fp32_blocks_over_a_half_precision_base_are_not_rounded_on_loading(base, tmp_path):
    model = adapted(base, "bone", "bfloat16")
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            saved.load_base(base, "bfloat16"),
            tmp_path,
            autocast_adapter_dtype=False,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        assert bone_models.block_bytes(loaded) == bone_models.block_bytes(model)


def test_several_adapters_of_several_variants_come_back_from_their_folders(base, tmp_path, tokens):
    model = adapted(base, "bat")
    for name in ("bone", "mini"):
        model.add_adapter(name, bone_models.config(name, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        bone_models.drift(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path)
    for name in ("bone", "mini"):
        loaded.load_adapter(tmp_path / name, name, is_trainable=name == "mini")
        assert bone_models.block_bytes(loaded, name) == bone_models.block_bytes(model, name)
        assert loaded.peft_config[name].variant == name
        trainable = [p.requires_grad for key, p in loaded.named_parameters() if f"bone_block.{name}." in key]
        assert set(trainable) == {name == "mini"}
    assert bone_models.block_bytes(loaded) == bone_models.block_bytes(model)
    alone = PeftModel.from_pretrained(saved.load_base(base), tmp_path, subfolder="mini", adapter_name="mine")
    assert alone.peft_config["mine"].variant == "mini"


@each_variant
def test_peft_s_state_dict_functions_and_auto_class_keep_the_adapter(base, tmp_path, tokens, variant):
    model = adapted(base, variant)
    other = peft.get_peft_model(saved.load_base(base), bone_models.config(variant))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert result.unexpected_keys == []
    same(other, model, tokens)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    same(AutoPeftModelForCausalLM.from_pretrained(tmp_path), model, tokens)


def test_a_plain_lora_saved_over_it_loads_as_itself(base, tmp_path, tokens):
    adapted(base, "bone").save_pretrained(tmp_path)
    lora = peft.get_peft_model(
        saved.load_base(base), peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(saved.load_base(base), tmp_path)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(lora, tokens))


@pytest.mark.parametrize("field", ["variant", "r", "layers", "method"])
def test_an_adapter_does_not_resume_from_another(base, tmp_path, field):
    adapted(base, "bone").save_pretrained(tmp_path)
    config = {
        "variant": bone_models.config("bat"),
        "r": bone_models.config("bone", r=4),
        "layers": bone_models.config("bone", target_modules=["q_proj"]),
        "method": llmreg.PissaConfig(r=8, target_modules=LINEAR),
    }[field]
    live = peft.get_peft_model(saved.load_base(base), config)
    said = {
        "variant": "variant='bone'",
        "r": "r=8",
        "layers": "do not have the same layers",
        "method": "another method",
    }
    with pytest.raises(AdapterFileError, match=said[field]):
        live.load_adapter(tmp_path, "default", is_trainable=True)


def test_a_folder_without_sidecar_does_not_resume_a_live_adapter(base, tmp_path):
    live = adapted(base, "bone")
    live.save_pretrained(tmp_path)
    (tmp_path / "llmreg.json").unlink()
    with pytest.raises(AdapterFileError, match=r"has no llmreg\.json.*or load it under another name\."):
        live.load_adapter(tmp_path, "default", is_trainable=True)


# -- law 4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["bare", "live", "beside"])
def test_another_base_is_refused_before_anything_is_touched(base, tmp_path, where):
    adapted(base, "bone").save_pretrained(tmp_path / "adapter")
    other = saved.load_base(saved.checkpoint(tmp_path / "other", seed=1))
    if where != "bare":
        other = peft.get_peft_model(other, bone_models.config("bone"))
    before, state = tiny_models.structure(other), tiny_models.state_bytes(other)
    load = functools.partial(PeftModel.from_pretrained, other)
    if where != "bare":
        load = functools.partial(other.load_adapter, adapter_name="default" if where == "live" else "second")
    with pytest.raises(BaseMismatchError, match=r"was trained on .* load the base it was trained on"):
        load(model_id=tmp_path / "adapter")
    assert tiny_models.structure(other) == before
    assert tiny_models.state_bytes(other) == state


def test_the_same_base_in_another_storage_is_allowed_with_a_note(base, tmp_path, tokens, caplog):
    model = adapted(base, "bat", "nf4")
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="llmreg"):
        loaded = PeftModel.from_pretrained(saved.load_base(base, "bfloat16"), tmp_path)
    assert "trained on a base stored as nf4, used on the same base stored as bfloat16" in caplog.text
    assert torch.isfinite(saved.outputs(loaded, tokens)).all()


def test_the_sidecar_records_config_base_shapes_and_versions_and_no_local_path(base, tmp_path):
    adapted(base, "mini").save_pretrained(tmp_path)
    text = (tmp_path / "llmreg.json").read_text()
    assert "/" not in text
    content = json.loads(text)
    assert content["method"] == "bone"
    assert (content["config"]["variant"], content["config"]["mini_r"]) == ("mini", 4)
    assert list(content["files"]) == [WEIGHTS]
    assert content["base"]["source"] == "checkpoint"
    assert content["layers"]["base_model.model.model.layers.0.mlp.down_proj"] == [64, 96, 0]
    assert content["versions"]["llmreg"] == llmreg.__version__


# -- damaged ---------------------------------------------------------------------------------------------------------


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (WEIGHTS, lambda path: path.unlink(), "is missing"),
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-8]), "not the file that was saved"),
        ("llmreg.json", lambda path: _edit(path, lambda c: c["config"].update(r=4)), "changed after it was saved"),
        ("adapter_config.json", lambda path: _edit(path, lambda c: c.update(r=4)), "has r=4, but llmreg.json"),
        ("adapter_config.json", lambda path: _edit(path, lambda c: c.update(init_weights="bat")), "init_weights='bat'"),
        ("adapter_config.json", lambda path: path.write_text("[]"), "missing or damaged"),
        ("adapter_config.json", lambda path: path.unlink(), "missing or damaged"),
    ],
)
def test_a_damaged_folder_is_one_clear_message(base, tmp_path, name, damage, said):
    adapted(base, "bone").save_pretrained(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(AdapterFileError, match=said):
        PeftModel.from_pretrained(saved.load_base(base), tmp_path)


# -- BONE of older PEFT ----------------------------------------------------------------------------------------------


def legacy(folder, variant, tensors=None, **settings):
    """A folder as PEFT <= 0.18 saved it, its tensors by a formula."""
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": "somewhere/else",
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": "bat" if variant == "bat" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "BONE",
        "r": 8,
        "revision": None,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **settings,
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is None:
        tensors = {}
        for layer in range(2):
            for name in ("self_attn.q_proj", "mlp.down_proj"):
                shape = (8, 8, 8) if variant == "bat" else (8, 64)
                values = torch.arange(512.0).mul(0.37 + layer).sin() * 0.02
                tensors[f"base_model.model.model.layers.{layer}.{name}.bone_block"] = values.view(shape)
    save_file(tensors, folder / WEIGHTS)
    return folder, tensors


@pytest.mark.parametrize("loading", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("said", ["as saved", True, False])
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_bone_of_older_peft_loads_as_what_its_tensors_are(base, tmp_path, tokens, variant, said, loading):
    """The first version said `init_weights: true` for 3-D tensors too."""
    settings = {} if said == "as saved" else {"init_weights": said}
    folder, tensors = legacy(tmp_path / "old", variant, **settings)
    model = saved.load_base(base)
    weights = {name: W.detach().clone() for name, W in model.named_parameters()}
    if loading == "from_pretrained":
        model = PeftModel.from_pretrained(model, folder)
    else:
        model = peft.get_peft_model(model, bone_models.config("mini"))
        model.load_adapter(folder, "old")
        model.set_adapter("old")
    config = model.peft_config["old" if loading == "load_adapter" else "default"]
    assert (type(config), config.variant, config.r) == (BoneConfig, variant, 8)
    expected = saved.load_base(base)
    with torch.no_grad():
        for key, block in tensors.items():
            name = key.removeprefix("base_model.model.").removesuffix(".bone_block")
            W = weights[f"{name}.weight"]
            expected.get_submodule(name).weight.add_(bone_models.dense_delta(variant, W, block))
    torch.testing.assert_close(saved.outputs(model, tokens), saved.outputs(expected, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_bone_of_older_peft_is_saved_as_miss_and_then_loads_in_plain_peft(base, tmp_path, tokens, variant):
    folder, tensors = legacy(tmp_path / "old", variant)
    with pytest.raises(RuntimeError, match="KeyError: 'BONE'"):
        saved.PlainPeft.ask(base, folder, tokens)
    model = PeftModel.from_pretrained(saved.load_base(base), folder)
    model.save_pretrained(tmp_path / "new")
    plain, _ = saved.PlainPeft.ask(base, tmp_path / "new", tokens)
    assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6
    new = load_file(tmp_path / "new" / WEIGHTS)
    assert all(torch.equal(new[key.replace("bone_block", "miss_block")], value) for key, value in tensors.items())


KEY = "base_model.model.model.layers.0.self_attn.q_proj.bone_block"


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [
        ({KEY: torch.ones(8)}, {}, "has 1-D Bone tensors"),
        ({KEY: torch.ones(8, 64), KEY.replace("0", "1"): torch.ones(8, 8, 8)}, {}, "has 2-D and 3-D Bone tensors"),
        ({"other": torch.ones(8)}, {}, "has no Bone tensors"),
        ({KEY: torch.ones(4, 64)}, {}, r"impossible shape \(4, 64\)"),
        ({KEY: torch.ones(8, 8, 4)}, {}, r"impossible shape \(8, 8, 4\)"),
        ({KEY: torch.ones(7, 8, 8)}, {}, r"shape \(7, 8, 8\) for layer .* has \(8, 8, 8\)"),
        ({KEY: torch.ones(8, 63)}, {}, r"shape \(8, 63\) for layer .* has \(8, 64\)"),
        ({KEY.replace("q_proj", "qq_proj"): torch.ones(8, 64)}, {}, "which this base model lacks"),
        ({KEY: torch.full((8, 64), torch.nan)}, {}, "NaN or infinite"),
        ({KEY: torch.ones(8, 64, dtype=torch.int32)}, {}, "not of floats"),
        ({KEY: torch.ones(7, 7, 7)}, {"r": 7}, "cannot be cut into 7 x 7 blocks"),
        (None, {"bias": "all"}, "does not support bias='all'"),
        (None, {"r": None}, "r must be a positive integer"),
    ],
)
def test_bone_tensors_that_cannot_be_are_refused_before_anything_is_touched(base, tmp_path, tensors, settings, said):
    folder, _ = legacy(tmp_path / "old", "bone", tensors, **settings)
    model = saved.load_base(base)
    before = tiny_models.structure(model)
    with pytest.raises(AdapterFileError, match=said):
        PeftModel.from_pretrained(model, folder)
    assert tiny_models.structure(model) == before


def test_a_pickle_of_older_peft_is_refused(base, tmp_path):
    folder, tensors = legacy(tmp_path / "old", "bone")
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="llmreg reads no pickle"):
        PeftModel.from_pretrained(saved.load_base(base), folder)


# -- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"r": 7}, {"r": 2, "mini_r": 4}, {"r": 7, "mini_r": 4}], ids=str)
def test_exported_it_is_a_plain_lora_of_the_same_function(base, tmp_path, tokens, settings):
    variant = "mini" if "mini_r" in settings else "bone"
    model = adapted(base, variant, **settings)
    model.save_pretrained(tmp_path / "adapter")
    report = llmreg.export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert report.rank == (min(settings["r"], 4) if variant == "mini" else settings.get("r", 8))
    plain, warnings = saved.PlainPeft.ask(base, tmp_path / "lora", tokens)
    assert warnings == []
    assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6
    again = llmreg.export_lora(tmp_path / "adapter", tmp_path / "small", rank=2, dtype="bfloat16")
    assert again.rank == 2
    assert "Bone" in (tmp_path / "lora" / "README.md").read_text()


def test_on_conv1d_it_exports_too(tmp_path, tokens):
    base = saved.checkpoint(tmp_path / "base", tiny_models.gpt2())
    model = bone_models.drift(
        peft.get_peft_model(saved.load_base(base), bone_models.config("bone", target_modules=["c_attn", "c_fc"]))
    )
    model.save_pretrained(tmp_path / "adapter")
    llmreg.export_lora(tmp_path / "adapter", tmp_path / "lora")
    plain, warnings = saved.PlainPeft.ask(base, tmp_path / "lora", tokens)
    assert warnings == []
    assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6


def test_bat_is_not_exported_and_says_why(base, tmp_path):
    adapted(base, "bat").save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="whose update has full rank"):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_merging_on_disk_is_refused_with_the_way_that_works(base, tmp_path):
    adapted(base, "bone").save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"holds a MISS adapter.*merge_and_unload"):
        llmreg.merge(tmp_path / "adapter", tmp_path / "merged", base=base)


@each_variant
def test_the_card_and_the_files_to_push_are_of_bone(base, tmp_path, variant):
    from llmreg.hub.push_files import contents

    adapted(base, variant).save_pretrained(tmp_path)
    card = write_card(tmp_path)
    assert card.count("Bone") >= 2
    assert "With plain PEFT:" in card
    assert "the trained tensors themselves" in card
    assert "plain LoRA of rank" not in card
    assert {WEIGHTS, "adapter_config.json", "llmreg.json"} <= set(contents(tmp_path, online=False))
    assert find_sidecar(tmp_path).method == "bone"
