"""Every field that `LoraConfig` has, or will have, is supported or refused by name; nothing slips through unread."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import tiny_models
import torch
from transformers import LlamaForCausalLM

from llmreg import AdditiveConfig
from llmreg.adapters.config import REFUSED_FIELDS, SUPPORTED_FIELDS
from llmreg.adapters.registry import ADDITIVE
from llmreg.errors import UnsupportedError

TARGETS = {"r": 2, "target_modules": ["first", "second"]}

#: A value other than the default for every refused field.
REFUSED_VALUES = {
    "lora_dropout": 0.05,
    "bias": "all",
    "init_lora_weights": "pissa",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": peft.EvaConfig(),
    "corda_config": peft.tuners.lora.config.CordaConfig(),
    "lora_ga_config": peft.tuners.lora.config.LoraGAConfig(),
    "use_dora": True,
    "velora_config": {"num_groups": 4},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {},
    "layer_replication": [(0, 1)],
    "lora_bias": True,
    "target_parameters": ["experts.down_proj"],
    "megatron_config": {"hidden_size": 4},
    "use_bdlora": peft.tuners.lora.config.BdLoraConfig(),
    "arrow_config": peft.tuners.lora.config.ArrowConfig(),
    "kasa_config": peft.tuners.lora.config.KasaConfig(),
    "ensure_weight_tying": True,
}

#: Supported fields that have no effect of their own on the layers -> what they are.
WITHOUT_EFFECT = {
    "auto_mapping": "filled in by PEFT when it saves",
    "peft_version": "filled in by PEFT when it saves",
    "base_model_name_or_path": "filled in by PEFT when it wraps",
    "revision": "read by PEFT when it loads",
    "runtime_config": "moves DoRA's computations to a GPU; nothing to move here",
    "megatron_core": "the name of a package, read only with megatron_config",
    "task_type": "chooses PeftModel's class (tests/adapters/test_minilm.py)",
}


def wrapped(method, **settings):
    return peft.get_peft_model(tiny_models.mlp(), method(**{**TARGETS, **settings}))


def ranks_and_scalings(model):
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A0")}
    return {name.split("model.")[-1]: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}


def lora_llama(method, **settings):
    """Names of the adapted layers of a two-layer Llama, ours and those of plain LoRA with the same settings."""
    names = []
    for config in (method, peft.LoraConfig):
        model = peft.get_peft_model(tiny_models.llama(), config(r=2, **settings))
        names.append({name for name, module in model.named_modules() if hasattr(module, "lora_A")})
    return names


def test_every_field_of_peft_s_config_is_supported_or_refused_and_none_both():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == SUPPORTED_FIELDS | REFUSED_FIELDS.keys(), "PEFT changed LoraConfig: decide about the new fields"
    assert not SUPPORTED_FIELDS & REFUSED_FIELDS.keys()


def test_this_module_knows_a_value_for_every_refused_field_and_an_effect_of_every_supported_one():
    assert REFUSED_VALUES.keys() == REFUSED_FIELDS.keys()
    assert set(WITHOUT_EFFECT) | EFFECTS.keys() == SUPPORTED_FIELDS


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_a_refused_field_raises_with_its_name_and_the_reason(method, name):
    if name in method.ALSO_SUPPORTED:
        pytest.skip("this method supports it")
    with pytest.raises(UnsupportedError) as caught:
        method(**TARGETS, **{name: REFUSED_VALUES[name]})
    assert f"{method.__name__} does not support {name}=" in str(caught.value)
    assert REFUSED_FIELDS[name] in str(caught.value)
    assert len(REFUSED_FIELDS[name]) > 20


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_a_refused_field_may_be_given_its_default(method, name):
    default = getattr(peft.LoraConfig(), name)
    assert getattr(method(**TARGETS, **{name: default}), name) == default


def check_r(method):
    assert ranks_and_scalings(wrapped(method, r=3)) == {"first": (3, 1.0), "second": (3, 1.0)}


def check_lora_alpha(method):
    assert method(r=6).lora_alpha == 6
    assert ranks_and_scalings(wrapped(method, r=4, lora_alpha=2)) == {"first": (4, 0.5), "second": (4, 0.5)}


def check_use_rslora(method):
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True}
    assert ranks_and_scalings(wrapped(method, **settings)) == {"first": (4, 3.0), "second": (4, 3.0)}


def check_rank_pattern(method):
    model = wrapped(method, r=2, lora_alpha=6, rank_pattern={"^second": 3, "fir.t": 6})
    assert ranks_and_scalings(model) == {"first": (6, 1.0), "second": (3, 2.0)}


def check_alpha_pattern(method):
    model = wrapped(method, alpha_pattern={"second": 8})
    assert ranks_and_scalings(model) == {"first": (2, 1.0), "second": (2, 4.0)}


def check_target_modules(method):
    for targets in (
        ["q_proj", "down_proj"],
        r".*\.1\.mlp\.(up|gate)_proj",
        "all-linear",
        ["layers.0.mlp.up_proj"],
        None,
    ):
        ours, theirs = lora_llama(method, target_modules=targets)
        assert ours == theirs
        assert ours


def check_exclude_modules(method):
    for excluded in (["q_proj"], r".*layers\.0.*"):
        ours, theirs = lora_llama(method, target_modules=["q_proj", "up_proj"], exclude_modules=excluded)
        assert ours == theirs
        assert len(ours) == 2


def check_layers_to_transform(method):
    ours, theirs = lora_llama(method, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    assert ours == theirs
    assert len(ours) == 2
    assert all("layers.1." in name for name in ours)


def check_layers_pattern(method):
    settings = {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}
    ours, theirs = lora_llama(method, **settings)
    assert ours == theirs
    assert len(ours) == 1


def check_modules_to_save(method):
    model = wrapped(method, modules_to_save=["head"])
    x = tiny_models.inputs()
    assert torch.equal(tiny_models.logits(model, x), tiny_models.logits(tiny_models.mlp(), x))
    tiny_models.train(model, x)
    head = model.base_model.model.head
    assert torch.equal(head.original_module.weight, tiny_models.mlp().head.weight)
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, x), tiny_models.logits(tiny_models.mlp(), x))


def check_fan_in_fan_out(method):
    """The layer says which layout it has, so the field is corrected rather than believed."""
    for builder, transposed in ((tiny_models.mlp, False), (tiny_models.conv1d_mlp, True)):
        for given in (False, True):
            config = method(**TARGETS, fan_in_fan_out=given)
            model = peft.get_peft_model(builder(), config)
            assert model.base_model.model.first.fan_in_fan_out is transposed
            assert model.peft_config["default"].fan_in_fan_out is transposed


def test_dropout_acts_in_training_where_it_is_supported(method):
    if "lora_dropout" not in method.ALSO_SUPPORTED:
        pytest.skip("this method refuses dropout")
    model = tiny_models.perturb(wrapped(method, lora_dropout=0.5))
    x = tiny_models.inputs()
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def check_inference_mode(method):
    model = wrapped(method, inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def check_trainable_token_indices(method):
    tokens = torch.tensor([[1, 2, 3]])
    config = method(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    model = peft.get_peft_model(tiny_models.llama(), config)
    before = tiny_models.logits(tiny_models.llama(), tokens)
    assert torch.equal(tiny_models.logits(model, tokens), before)
    tiny_models.train(model, tokens)
    assert any("token" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, tokens), before)
    assert torch.equal(model.unload().model.embed_tokens.weight, tiny_models.llama().model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens_are_saved_and_come_back_beside_the_factors(method, tied, tmp_path):
    tokens = torch.tensor([[1, 2, 3]])
    tiny_models.llama(tied=tied).save_pretrained(tmp_path / "base")

    def base():
        return LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()

    config = method(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    model = peft.get_peft_model(base(), config)
    tiny_models.train(model, tokens)
    trained = tiny_models.logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    restored = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(tiny_models.logits(restored, tokens), trained)
    with restored.disable_adapter():
        assert torch.equal(tiny_models.logits(restored, tokens), tiny_models.logits(base(), tokens))


def check_peft_type(method):
    assert method(**TARGETS).peft_type == ADDITIVE


EFFECTS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("name", sorted(EFFECTS))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_a_supported_field_has_its_effect(method, name):
    EFFECTS[name](method)


def test_a_config_round_trips_and_plain_peft_refuses_it_loudly(method, tmp_path, run_python):
    config = method(r=3, lora_alpha=5, target_modules=["b", "a"], seed=7, rank_pattern={"a": 2}, exact_unmerge=True)
    config.save_pretrained(tmp_path)
    for cls in (method, AdditiveConfig, peft.PeftConfig):
        restored = cls.from_pretrained(tmp_path)
        assert type(restored) is method
        assert restored.to_dict() == config.to_dict()
    code = """
import sys, peft
for cls in (peft.PeftConfig, peft.LoraConfig):
    try:
        cls.from_pretrained(sys.argv[1])
    except Exception as error:
        print(type(error).__name__, error)
    else:
        raise SystemExit("loaded silently")
assert "llmreg" not in sys.modules
"""
    assert "LLMREG_ADDITIVE" in run_python(code, tmp_path)


def test_the_method_s_name_gives_its_config_class(method):
    config = AdditiveConfig(method=method.METHOD, r=4, target_modules=["a"])
    assert type(config) is method
    assert config.method == method.METHOD
    assert config.to_dict() == method(r=4, target_modules=["a"]).to_dict()


def test_an_unknown_or_missing_method_is_refused(method):
    with pytest.raises(UnsupportedError, match=f"Unknown method 'pizza'; known here.*{method.METHOD}"):
        AdditiveConfig(method="pizza")
    with pytest.raises(UnsupportedError, match="abstract"):
        AdditiveConfig()
    with pytest.raises(UnsupportedError, match="leave method out"):
        method(method="other")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": -1},
        {"r": 1.5},
        {"r": "8"},
        {"lora_alpha": 0},
        {"lora_alpha": -1},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": "8"},
        {"rank_pattern": {"a": 0}},
        {"rank_pattern": {"a": 2.5}},
        {"alpha_pattern": {"a": 0}},
        {"alpha_pattern": {"a": None}},
    ],
    ids=str,
)
def test_a_number_that_makes_no_sense_is_refused_by_name(method, settings):
    with pytest.raises(UnsupportedError, match=next(iter(settings))):
        method(**settings)


def test_pissa_refuses_an_unknown_way_to_decompose():
    with pytest.raises(UnsupportedError, match="svd must be 'randomized' or 'exact', got 'fast'"):
        AdditiveConfig(method="pissa", svd="fast")
