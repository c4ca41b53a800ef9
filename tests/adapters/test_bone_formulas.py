"""What each variant of Bone computes: its definition entry by entry, exact gradients, and what is kept for them."""

from __future__ import annotations

import bone_models
import peft
import pytest
import tiny_models
import torch
from bone_models import each_variant
from torch import nn
from torch.nn import functional as F

from llmreg import BoneConfig
from llmreg.adapters.bone_function import add_bat, add_shared, bat_delta, bat_linear, fold, shared_delta


class One(nn.Module):
    """One linear layer, for PEFT to wrap."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.linear = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x):
        return self.linear(x)


def wrapped(in_features, out_features, *, adapter="default", bias=True, seed=0, dtype=torch.float32, **settings):
    torch.manual_seed(seed)
    model = One(in_features, out_features, bias=bias).to(dtype)
    return peft.get_peft_model(model, BoneConfig(target_modules=["linear"], **settings), adapter_name=adapter)


def layer_of(model):
    return model.base_model.model.linear


def pushed_identity(model):
    """The update, from pushing an identity matrix through the layer."""
    layer = layer_of(model)
    eye = torch.eye(layer.in_features, dtype=layer.base_layer.weight.dtype)
    with torch.no_grad():
        return (model(eye) - layer.base_layer(eye)).t()


CASES = [
    pytest.param({"variant": "bone", "r": 4}, 12, 10, id="bone"),
    pytest.param({"variant": "bone", "r": 16}, 100, 12, id="bone-ragged"),
    pytest.param({"variant": "bone", "r": 7}, 7, 5, id="bone-one-group"),
    pytest.param({"variant": "mini", "r": 4, "mini_r": 3}, 12, 9, id="mini"),
    pytest.param({"variant": "mini", "r": 5, "mini_r": 2}, 13, 8, id="mini-ragged"),
    pytest.param({"variant": "mini", "r": 4}, 12, 9, id="mini-of-one-column"),
    pytest.param({"variant": "bat", "r": 4}, 12, 8, id="bat"),
    pytest.param({"variant": "bat", "r": 1}, 6, 5, id="bat-of-scalars"),
]


@pytest.mark.parametrize(("settings", "inputs", "outputs"), CASES)
def test_the_update_is_the_definition_entry_by_entry_in_forward_merge_and_delta(settings, inputs, outputs):
    model = bone_models.drift(wrapped(inputs, outputs, dtype=torch.float64, **settings), size=0.5)
    layer = layer_of(model)
    W = layer.base_layer.weight.detach().clone()
    expected = bone_models.dense_delta(settings["variant"], W, layer.block("default").detach().double())
    for train in (False, True):
        model.train(train)
        torch.testing.assert_close(pushed_identity(model), expected)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), expected)
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight.detach(), W + expected)


def test_the_update_of_the_paper_s_example():
    D = torch.tensor([[10.0 * i + o for o in range(3)] for i in range(2)])
    assert shared_delta(D, 3, 4).tolist() == [[o, 10 + o, o, 10 + o] for o in range(3)]


@pytest.mark.parametrize(("inputs", "outputs", "r"), [(12, 10, 4), (100, 16, 16)])
def test_row_sharing_is_lora_with_a_frozen_tiled_identity(inputs, outputs, r):
    model = bone_models.drift(wrapped(inputs, outputs, r=r), size=0.3)
    torch.manual_seed(0)
    lora = peft.get_peft_model(One(inputs, outputs), peft.LoraConfig(r=r, lora_alpha=r, target_modules=["linear"]))
    theirs = layer_of(lora)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(torch.eye(r).repeat(1, -(-inputs // r))[:, :inputs])
        theirs.lora_B["default"].weight.copy_(layer_of(model).block("default").t())
    x = torch.randn(9, inputs)
    torch.testing.assert_close(model(x), lora(x))


def test_mini_with_all_columns_is_row_sharing():
    bone, mini = wrapped(12, 10, r=4), wrapped(12, 10, r=4, variant="mini", mini_r=10)
    for model in (bone, mini):
        bone_models.drift(model, size=0.3)
    x = torch.randn(5, 12)
    assert torch.equal(bone(x), mini(x))


def test_parameter_counts():
    def count(**settings):
        return layer_of(wrapped(24, 16, **settings)).block("default").numel()

    assert count(r=8) == 8 * 16
    assert count(r=8, variant="mini", mini_r=4) == 8 * 4
    assert count(r=8, variant="bat") == 16 // 8 * 8 * 8 == 8 * 16


def test_row_sharing_has_rank_r_at_most_and_bat_full_rank():
    bone = layer_of(bone_models.drift(wrapped(64, 64, r=4), size=0.3)).get_delta_weight("default")
    mini = layer_of(bone_models.drift(wrapped(64, 64, r=8, variant="mini", mini_r=2), size=0.3))
    bat = layer_of(bone_models.drift(wrapped(64, 64, r=4, variant="bat"), size=0.3)).get_delta_weight("default")
    assert int(torch.linalg.matrix_rank(bone)) == 4
    assert int(torch.linalg.matrix_rank(mini.get_delta_weight("default"))) == 2
    assert int(torch.linalg.matrix_rank(bat)) == 64


def test_gradients_are_exact():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    W, bias, result, x, B = random(12, 8).detach(), random(12), random(2, 3, 12), random(2, 3, 8), random(3, 4, 4)

    def read(dtype):
        return W.to(dtype)

    assert torch.autograd.gradcheck(lambda x, B, bias: bat_linear(x, B, bias, read), (x, B, bias))
    assert torch.autograd.gradcheck(lambda result, x, B: add_bat(result, x, B, read), (result, x, B))
    for D in (random(3, 12), random(3, 4), random(8, 1)):
        assert torch.autograd.gradcheck(add_shared, (result, x, D))
    torch.testing.assert_close(bat_linear(x, B, bias, read), F.linear(x, W + bat_delta(W, B), bias))
    torch.testing.assert_close(add_bat(result, x, B, read), result + F.linear(x, bat_delta(W, B)))


def test_backward_in_pieces_is_backward_in_one(monkeypatch):
    from llmreg.adapters import bone_function

    def gradients():
        model = bone_models.drift(wrapped(24, 40, r=8, variant="bat"), size=0.3)
        x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(x).square().sum().backward()
        return x.grad, layer_of(model).block("default").grad

    whole = gradients()
    monkeypatch.setattr(bone_function, "_CHUNK", 24 * 8)
    for one, other in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_fold_sums_groups_of_columns_in_the_dtype_asked_for():
    x = torch.arange(10.0).to(torch.bfloat16)
    assert fold(x, 4, torch.float32).tolist() == [0 + 4 + 8, 1 + 5 + 9, 2 + 6, 3 + 7]
    assert fold(x, 4, torch.float32).dtype == torch.float32


@each_variant
def test_a_vector_and_an_empty_batch_go_through_as_through_the_base(variant):
    model = bone_models.drift(wrapped(24, 16, **bone_models.VARIANTS[variant]), size=0.3)
    x = torch.randn(24)
    torch.testing.assert_close(model(x), model(x[None])[0])
    assert model(torch.randn(0, 24)).shape == (0, 16)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@each_variant
def test_nothing_the_size_of_a_weight_is_kept_for_backward(variant, dropout, storage):
    """Tokens are few here, so that whatever has as many elements as a weight is a weight (or made of one)."""
    base = tiny_models.llama(storage)
    model = peft.get_peft_model(base, bone_models.config(variant, bone_dropout=dropout))
    bone_models.drift(model).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, ...]] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    tokens = torch.randint(1, tiny_models.VOCABULARY, (1, 3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss
    shapes = {shape for shape in kept.values() if torch.Size(shape).numel() >= 64 * 32}
    assert not shapes
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("bone_block.default" in name)
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
