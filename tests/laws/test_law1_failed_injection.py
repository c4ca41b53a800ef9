"""Law 1 when adding an adapter fails: the layer is named, and the model is exactly as it was."""

from __future__ import annotations

import peft
import pytest
import tiny_models
import torch
from torch import nn

from llmreg.errors import LlmregError, UnsupportedError, WeightError


class Mixed(nn.Module):
    """A linear layer that could carry an adapter, and after it one of every kind that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.linear = nn.Linear(12, 8)
        self.embedding = nn.Embedding(10, 12)
        self.conv1 = nn.Conv1d(3, 4, 3)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.attention = nn.MultiheadAttention(12, 2)
        self.bilinear = nn.Bilinear(4, 4, 2)
        self.norm = nn.LayerNorm(12)


def spoil(model, kind):
    """Make the last of the three layers impossible: a rank, the layer's name, the error and a word of its message."""
    if kind == "rank":
        return 6, "head", WeightError, "5 x 24"
    value = {"nan": float("nan"), "inf": float("inf")}[kind]
    with torch.no_grad():
        model.head.weight[2, 3] = value
    return 4, "head", WeightError, {"nan": "1 NaN", "inf": "1 infinite"}[kind]


@pytest.fixture(params=["nan", "inf", "rank"])
def kind(request, method):
    if request.param != "rank" and not reads_weights(method):
        pytest.skip("the start of this method does not read weights")
    return request.param


def reads_weights(method):
    return method.METHOD != "eva"


def everything(model):
    return tiny_models.structure(model), tiny_models.state_bytes(model), sorted(vars(model))


def test_a_first_adapter_that_fails_leaves_the_bare_model(method, kind):
    base = tiny_models.mlp()
    base.second.weight.requires_grad_(False)
    rank, layer, error, word = spoil(base, kind)
    before = everything(base)
    with pytest.raises(error, match=layer) as caught:
        peft.get_peft_model(base, method(r=rank, target_modules=["first", "second", "head"]))
    assert word in str(caught.value)
    assert everything(base) == before


def test_after_a_failure_the_same_model_can_be_wrapped_again(method, recwarn):
    base = tiny_models.mlp()
    with pytest.raises(WeightError):
        peft.get_peft_model(base, method(r=6, target_modules=["first", "second", "head"]))
    model = peft.get_peft_model(base, method(r=5, target_modules=["first", "second", "head"]))
    assert len([name for name, module in model.named_modules() if hasattr(module, "lora_A0")]) == 3
    assert not [w for w in recwarn if "second time" in str(w.message) or "peft_config" in str(w.message)]


@pytest.mark.parametrize("first", ["same method", "plain lora"])
def test_a_second_adapter_that_fails_leaves_the_first_as_it_was(method, kind, first):
    base = tiny_models.mlp()
    rank, layer, error, word = spoil(base, kind)
    config = method(r=2, target_modules=["first"])
    if first == "plain lora":
        config = peft.LoraConfig(r=2, target_modules=["first"])
    model = peft.get_peft_model(base, config)
    tiny_models.perturb(model)
    x = tiny_models.inputs()
    before = everything(model), set(model.peft_config), model.active_adapters, type(model.base_model)
    first_layer = tiny_models.logits(model.base_model.model.first, x)
    with pytest.raises(error, match=layer) as caught:
        model.add_adapter("other", method(r=rank, target_modules=["first", "second", "head"]))
    assert word in str(caught.value)
    assert (everything(model), set(model.peft_config), model.active_adapters, type(model.base_model)) == before
    assert model.base_model.targeted_module_names == ["first"]
    assert torch.equal(tiny_models.logits(model.base_model.model.first, x), first_layer)


def test_a_failure_with_modules_to_save_unwraps_them_too(method):
    if not reads_weights(method):
        pytest.skip("the start of this method does not read weights")
    base = tiny_models.mlp()
    with torch.no_grad():
        base.second.weight[0, 0] = float("nan")
    before = everything(base)
    with pytest.raises(WeightError, match="second"):
        peft.get_peft_model(base, method(r=2, target_modules=["first", "second"], modules_to_save=["head"]))
    assert everything(base) == before


def test_a_second_adapter_with_modules_to_save_that_fails_leaves_no_copy_behind(method):
    if not reads_weights(method):
        pytest.skip("the start of this method does not read weights")
    base = tiny_models.mlp()
    with torch.no_grad():
        base.second.weight[0, 0] = float("nan")
    model = peft.get_peft_model(base, method(r=2, target_modules=["first"], modules_to_save=["head"]))
    before = everything(model)
    with pytest.raises(WeightError, match="second"):
        model.add_adapter("other", method(r=2, target_modules=["second"], modules_to_save=["head"]))
    assert everything(model) == before


@pytest.mark.parametrize("layer", ["embedding", "conv1", "conv2", "attention", "bilinear", "norm"])
def test_a_layer_that_cannot_be_decomposed_is_refused_by_name_and_class(method, layer):
    model = Mixed()
    before = everything(model)
    with pytest.raises(UnsupportedError, match=layer) as caught:
        peft.get_peft_model(model, method(r=2, target_modules=["linear", layer]))
    assert type(getattr(model, layer)).__name__ in str(caught.value)
    assert everything(model) == before


@pytest.mark.parametrize("layer", ["embedding", "conv2"])  # PEFT's attention layer renews its parameters when asked
def test_a_layer_that_already_carries_plain_lora_is_refused_by_name_too(method, layer):
    model = peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, target_modules=["linear", layer]))
    before = everything(model)
    with pytest.raises(UnsupportedError, match=layer):
        model.add_adapter("ours", method(r=2, target_modules=["linear", layer]))
    assert everything(model) == before


def test_no_matching_layer_is_peft_s_own_error(method):
    base = tiny_models.mlp()
    before = everything(base)
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(base, method(r=2, target_modules=["nowhere"]))
    assert everything(base) == before


def test_the_error_says_what_to_write_instead(method):
    with pytest.raises(LlmregError, match=r"r can be at most 5; lower r, set rank_pattern"):
        peft.get_peft_model(tiny_models.mlp(), method(r=6, target_modules=["head"]))


def test_rank_pattern_decides_whether_a_rank_is_too_large(method):
    config = method(r=6, target_modules=["first", "head"], rank_pattern={"head": 5})
    model = peft.get_peft_model(tiny_models.mlp(), config)
    assert model.base_model.model.head.r["default"] == 5
    with pytest.raises(WeightError, match="Rank 25 is larger than layer 'second'"):
        peft.get_peft_model(tiny_models.mlp(), method(r=6, target_modules=["second"], rank_pattern={"second": 25}))


def test_interrupting_the_decomposition_leaves_the_bare_model(method, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    base = tiny_models.mlp()
    before = everything(base)
    monkeypatch.setattr(method, "starts" if method.NEEDS_DATA else "start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        peft.get_peft_model(base, method(r=2, target_modules=["first"]))
    assert everything(base) == before
