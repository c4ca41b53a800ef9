"""requantize stores a matrix as its layer would, without touching the layer."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmreg.errors import WeightError
from llmreg.weights import dequantize, module_bytes_hash, read_weight, requantize

STORAGES = [torch.uint8, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("quant_type", "storage", "double"), list(itertools.product(["nf4", "fp4"], STORAGES, [False, True])), ids=str
)
def test_4bit_settings_are_kept_and_the_layer_is_not_touched(make, quant_type, storage, double):
    layer = make.linear4bit(quant_type, storage, double)
    before = module_bytes_hash(layer)
    W = make.gaussian(seed=1)
    parameter = requantize(layer, W)
    assert module_bytes_hash(layer) == before
    state = parameter.quant_state
    assert (state.quant_type, state.blocksize, state.nested) == (quant_type, 64, double)
    assert (parameter.dtype, parameter.quant_storage, tuple(state.shape)) == (storage, storage, (96, 128))
    # What the same matrix would become if the model had been loaded with it.
    reference = read_weight(make.linear4bit(quant_type, storage, double, W=W))
    assert torch.equal(dequantize(parameter).float(), reference)


def test_a_requantised_parameter_put_into_the_layer_is_what_the_layer_computes_with(make):
    W = make.gaussian(seed=1)
    x = torch.randn(4, 128)
    for layer in (make.linear4bit(double=True), make.linear8bit()):
        parameter = requantize(layer, W)
        expected = dequantize(parameter).float()
        layer.weight = parameter
        assert torch.equal(read_weight(layer), expected)
        assert (layer(x) - x @ expected.t()).norm() < 0.02 * (x @ expected.t()).norm()


def test_int8_round_trip_before_and_after_a_forward(make):
    layer = make.linear8bit()
    W = make.gaussian(seed=1)
    first = requantize(layer, W)
    expected = layer(torch.ones(2, 128))
    second = requantize(layer, W)
    assert torch.equal(first.data, second.data)
    assert torch.equal(first.SCB, second.SCB)
    assert torch.equal(dequantize(first), read_weight(make.linear8bit(W=W)))
    assert torch.equal(layer(torch.ones(2, 128)), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_requantising_what_was_read_changes_nothing_without_double_quantisation(make, quant_type):
    layer = make.linear4bit(quant_type)
    parameter = requantize(layer, read_weight(layer))
    # Values, not bytes: fp4 has two codes for zero.
    assert torch.equal(dequantize(parameter), read_weight(layer))
    assert torch.equal(parameter.quant_state.absmax, layer.weight.quant_state.absmax)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_float_layer_gets_its_own_dtype_and_orientation(make, kind):
    layer = getattr(make, kind)(torch.bfloat16)
    W = make.gaussian(seed=1)
    parameter = requantize(layer, W)
    assert (parameter.dtype, parameter.shape) == (torch.bfloat16, layer.weight.shape)
    assert parameter.is_contiguous()
    layer.weight = parameter
    assert torch.equal(read_weight(layer), W.bfloat16().float())


def test_a_float_requantisation_never_shares_memory(make):
    layer = make.linear()
    assert requantize(layer, read_weight(layer)).data_ptr() != layer.weight.data_ptr()


def test_what_cannot_be_stored_is_refused(make):
    with pytest.raises(WeightError, match=r"cannot store a \(3, 3\)"):
        requantize(make.linear8bit(), torch.zeros(3, 3), name="q")
    with pytest.raises(WeightError, match="do not fit"):
        requantize(make.linear8bit(), torch.full((96, 128), 1e6), name="q")
    W = make.gaussian()
    W[0, 0] = float("nan")
    with pytest.raises(WeightError, match="1 NaN"):
        requantize(make.linear4bit(), W, name="q")
    with pytest.raises(WeightError, match="not been quantised yet"):
        requantize(make.linear4bit(moved=False), make.gaussian())
