"""BA-LoRA (arXiv 2408.04556) as an adapter: PiSSA's, with three regularisers that its config asks for."""

from __future__ import annotations

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch

from llmreg import BaLoraConfig, PissaConfig, SorsaConfig
from llmreg.errors import UnsupportedError
from llmreg.regularizers import (
    ConsistencyRegularizer,
    DiversityRegularizer,
    OrthonormalRegularizer,
    SingularValueRegularizer,
)

LINEAR = ["q_proj", "v_proj", "down_proj"]
TERMS = (ConsistencyRegularizer, DiversityRegularizer, SingularValueRegularizer)


def wrap(base, **settings):
    config = BaLoraConfig(**{"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings})
    return peft.get_peft_model(base, config)


def applied(model):
    """What the callback does: say that something applies the regularisers."""
    for layer in saved.additive_layers(model).values():
        layer.set_regularized("default", True)
    return model


# -- what it asks for -------------------------------------------------------------------------------------------


def test_it_asks_for_the_paper_s_three_terms():
    assert BaLoraConfig().regularizers() == [term(task="nlg") for term in TERMS]
    assert BaLoraConfig(task_type="SEQ_CLS").regularizers() == [term(task="nlu") for term in TERMS]
    assert BaLoraConfig(variant="v1").regularizers() == [term(task="nlg", variant="v1") for term in TERMS]


def test_the_kind_of_task_can_be_said():
    assert BaLoraConfig(task_kind="nlu").regularizers() == [term(task="nlu") for term in TERMS]
    assert BaLoraConfig(task_kind="nlg", task_type="SEQ_CLS").regularizers()[0].task == "nlg"
    assert BaLoraConfig(task_type=peft.TaskType.SEQ_CLS).task() == "nlu"


def test_each_term_has_a_weight_of_its_own_and_zero_leaves_it_out():
    first, second = BaLoraConfig(consistency=0.5, diversity=0).regularizers()
    assert (first.name, first.weight) == ("consistency", 0.5)
    assert (second.name, second.weight) == ("singular_values", 0.005)


def test_weights_is_a_factor_on_all_of_them():
    weights = [term.weight for term in BaLoraConfig(weights=2, consistency=0.5).regularizers()]
    assert weights == pytest.approx([1.0, 0.01, 0.01])


@pytest.mark.parametrize(
    "settings",
    [{"weights": None}, {"weights": 0}, {"consistency": 0, "diversity": 0.0, "singular_values": 0}],
    ids=str,
)
def test_without_weights_it_asks_for_nothing(settings):
    config = BaLoraConfig(**settings)
    assert not config.needs_regularizer()
    assert config.regularizers() == []


def test_other_configs_say_what_they_ask_for_too():
    assert PissaConfig().regularizers() == []
    assert SorsaConfig(weights=0.5, squared=True).regularizers() == [OrthonormalRegularizer(0.5, squared=True)]
    assert SorsaConfig(weights=None).regularizers() == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weights": -1}, "weights must be a number >= 0, or None for the start only"),
        ({"consistency": True}, "consistency must be a number >= 0, or None for the paper's"),
        ({"singular_values": "0.1"}, "singular_values must be a number"),
        ({"variant": "v2"}, "variant must be 'iclr' or 'v1'"),
        ({"task_kind": "sft"}, "task_kind must be 'nlg', 'nlu' or None"),
        ({"residual": "quantized"}, "a disabled adapter is no base; write consistency=0"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save trains 'lm_head'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, match):
    with pytest.raises(UnsupportedError, match=match):
        BaLoraConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"residual": "quantized", "consistency": 0},
        {"residual": "quantized", "weights": None},
        {"modules_to_save": ["lm_head"], "singular_values": 0},
        {"modules_to_save": ["lm_head"], "weights": None},
        {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
    ],
    ids=str,
)
def test_a_term_that_is_off_refuses_nothing(settings):
    BaLoraConfig(**settings)


# -- training ---------------------------------------------------------------------------------------------------


def test_training_without_its_regularisers_is_refused(tokens):
    model = wrap(tiny_models.llama())
    tiny_models.logits(model, tokens)  # inference is not training
    with pytest.raises(UnsupportedError, match=r"RegularizerCallback|weights=None"):
        model.train()(input_ids=tokens, labels=tokens)
    applied(model)(input_ids=tokens, labels=tokens).loss.backward()


def test_the_start_alone_trains_as_pissa_bit_for_bit(tokens):
    losses, factors = [], []
    for config_class, settings in ((BaLoraConfig, {"weights": None}), (PissaConfig, {})):
        config = config_class(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(tiny_models.llama(), config)
        losses.append(tiny_models.train(model, tokens, steps=3))
        factors.append(saved.factor_bytes(model))
    assert losses[0] == losses[1]
    assert factors[0] == factors[1]


def test_its_start_and_its_disabled_adapter_are_the_base_bit_for_bit(tokens):
    expected = tiny_models.logits(tiny_models.llama(), tokens)
    model = wrap(tiny_models.llama())
    assert torch.equal(tiny_models.logits(model, tokens), expected)
    tiny_models.perturb(model)
    assert not torch.equal(tiny_models.logits(model, tokens), expected)
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, tokens), expected), "the teacher"


# -- merged and saved -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_merged_it_is_pissa_merged(tokens):
    merged = []
    for model in (
        wrap(tiny_models.llama()),
        peft.get_peft_model(tiny_models.llama(), PissaConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")),
    ):
        unmerged = tiny_models.logits(tiny_models.perturb(model), tokens)
        merged.append(tiny_models.logits(model.merge_and_unload(), tokens))
        torch.testing.assert_close(merged[-1], unmerged, atol=2e-5, rtol=1e-5)
    assert torch.equal(*merged)


def test_saved_and_loaded_it_asks_for_the_same_and_is_the_same_to_the_last_bit(base, tmp_path, tokens):
    settings = {"consistency": 0.5, "diversity": 0, "variant": "v1", "weights": 2.0}
    model = saved.drift(wrap(saved.load_base(base), **settings), size=0.05)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(saved.load_base(base), tmp_path, is_trainable=True)
    config = loaded.peft_config["default"]
    assert type(config) is BaLoraConfig
    assert config.regularizers() == model.peft_config["default"].regularizers()
    assert len(config.regularizers()) == 2
    assert saved.factor_bytes(loaded) == saved.factor_bytes(model)
    assert torch.equal(tiny_models.logits(loaded, tokens), tiny_models.logits(model, tokens))
    with pytest.raises(UnsupportedError, match="RegularizerCallback"):
        loaded.train()(input_ids=tokens, labels=tokens)


def test_for_inference_it_is_a_plain_lora_of_twice_the_rank(base, tmp_path, tokens):
    model = saved.drift(wrap(saved.load_base(base)), size=0.05)
    model.save_pretrained(tmp_path)
    stored = peft.LoraConfig.from_pretrained(tmp_path)
    assert (stored.peft_type, stored.r) == (peft.PeftType.LORA, 8)
    loaded = peft.PeftModel.from_pretrained(saved.load_base(base), tmp_path)
    torch.testing.assert_close(tiny_models.logits(loaded, tokens), tiny_models.logits(model, tokens))
