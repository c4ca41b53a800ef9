"""The additive PiSSA against PEFT's own, which subtracts the principal part from the base: one function."""

from __future__ import annotations

import peft
import pytest
import tiny_models
import torch

from llmreg import PissaConfig, SorsaConfig, SvfitConfig
from llmreg.initializers import Factors

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"]}


def pair(builder, **settings):
    """`(ours, peft's)` in float64 from equal float32 bases; both start from PEFT's very factors."""
    settings = {**SETTINGS, **settings}
    theirs = peft.get_peft_model(builder(), peft.LoraConfig(init_lora_weights="pissa", **settings))
    ours = peft.get_peft_model(builder(), PissaConfig(svd="exact", **settings))
    theirs, ours = theirs.double(), ours.double()
    for name, layer in ours.named_modules():
        if hasattr(layer, "set_start"):
            their_layer = theirs.get_submodule(name)
            A, B = their_layer.lora_A["default"].weight, their_layer.lora_B["default"].weight
            layer.set_start("default", Factors(A, B, A.new_empty(0)))
            # In float64 the residual is W - s B A to the last bit, so that only the two forms are compared.
            delta = their_layer.get_delta_weight("default").detach()
            their_layer.base_layer.weight.data.copy_(layer.base_layer.weight - delta)
    return ours, theirs


@pytest.fixture(params=["linear", "conv1d"])
def builder(request):
    return {"linear": tiny_models.mlp, "conv1d": tiny_models.conv1d_mlp}[request.param]


def test_our_start_equals_theirs_before_anything_is_copied(builder):
    theirs = peft.get_peft_model(builder(), peft.LoraConfig(init_lora_weights="pissa", **SETTINGS))
    ours = peft.get_peft_model(builder(), PissaConfig(svd="exact", **SETTINGS))
    for name in ("first", "second"):
        mine, other = ours.base_model.model.get_submodule(name), theirs.base_model.model.get_submodule(name)
        A, B = mine.lora_A["default"].weight, mine.lora_B["default"].weight
        signs = (A * other.lora_A["default"].weight).sum(dim=1).sign()
        torch.testing.assert_close(A * signs[:, None], other.lora_A["default"].weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(B * signs, other.lora_B["default"].weight, atol=1e-5, rtol=0)


def test_gradients_equal_theirs(builder):
    x = tiny_models.inputs(dtype=torch.float64).requires_grad_()
    grads = []
    for model in pair(builder):
        x.grad = None
        model(x).square().sum().backward()
        grads.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
            | {"x": x.grad}
        )
    ours, theirs = grads
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 1}, {"use_rslora": True}, {"rank_pattern": {"second": 7}}])
def test_training_gives_the_same_outputs_as_theirs(builder, settings):
    x = tiny_models.inputs(dtype=torch.float64)
    ours, theirs = pair(builder, **settings)
    start = ours(x).detach()
    losses = [tiny_models.train(model, x, steps=20, lr=0.01) for model in (ours, theirs)]
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-9, rtol=1e-9)
    assert (ours(x) - start).abs().max() > 1e-3


def test_training_with_adam_gives_the_same_outputs_as_theirs():
    x = tiny_models.inputs(dtype=torch.float64)
    models = pair(tiny_models.mlp)
    for model in models:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(models[0](x), models[1](x), atol=1e-8, rtol=1e-8)


def test_in_bfloat16_the_step_zero_error_is_zero_where_theirs_is_not():
    x = tiny_models.inputs(dtype=torch.bfloat16)
    base = tiny_models.mlp("bfloat16")
    before = base(x)
    theirs = peft.get_peft_model(tiny_models.mlp("bfloat16"), peft.LoraConfig(init_lora_weights="pissa", **SETTINGS))
    assert not torch.equal(theirs(x), before)
    ours = peft.get_peft_model(base, PissaConfig(**SETTINGS))
    assert torch.equal(ours(x), before)


@pytest.mark.parametrize(
    ("config_class", "with_factors", "with_values"), [(PissaConfig, 1, 0), (SorsaConfig, 1, 1), (SvfitConfig, 0, 1)]
)
def test_trains_as_many_parameters_as_the_method_says(capsys, config_class, with_factors, with_values):
    settings = {"r": 4, "target_modules": "all-linear"}
    lora = peft.get_peft_model(tiny_models.llama(), peft.LoraConfig(**settings))
    ours = peft.get_peft_model(tiny_models.llama(), config_class(**settings))
    layers = sum(hasattr(module, "lora_A0") for module in ours.modules())
    expected = with_factors * lora.get_nb_trainable_parameters()[0] + with_values * 4 * layers
    assert ours.get_nb_trainable_parameters()[0] == expected
    ours.print_trainable_parameters()
    assert f"trainable params: {expected:,}" in capsys.readouterr().out
