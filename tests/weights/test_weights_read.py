"""read_weight gives the weight a layer computes with, and leaves the layer as it was."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import nn

from llmreg.errors import UnsupportedError, WeightError
from llmreg.weights import check_finite, is_supported, read_weight, storage_of

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STORAGES = [torch.uint8, torch.float32, torch.bfloat16, torch.float16]


def fingerprint(module: nn.Module) -> str:
    """Hash of all tensors reachable from a layer's weight and quantisation state, with their places."""
    holders = [("module", module), ("weight", module.weight)]
    holders += [(k, getattr(o, k)) for o in (module, module.weight) for k in ("state", "quant_state") if hasattr(o, k)]
    text = [str(module.weight.data_ptr()), str(module.weight.dtype), str(module.weight.shape)]
    digest = hashlib.sha256(module.weight.data.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for label, holder in holders:
        for key, value in sorted(vars(holder).items() if holder is not None else ()):
            text.append(f"{label}.{key}")
            if isinstance(value, torch.Tensor):
                text.append(f"{value.data_ptr()} {value.dtype}")
                digest.update(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() + "".join(text)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_float_weight_is_read_in_logical_orientation_from_any_dtype(make, kind, dtype):
    layer = getattr(make, kind)(dtype)
    storage = storage_of(layer)
    assert (storage.kind, storage.shape, storage.dtype) == ("float", (96, 128), dtype)
    assert storage.transposed == (kind == "conv1d")
    assert not storage.quantized
    W = read_weight(layer)
    assert W.dtype == torch.float32
    assert not W.requires_grad
    assert torch.equal(W, make.gaussian().to(dtype).float())


def test_the_matrix_read_is_the_one_the_layer_multiplies_by(make):
    x = torch.randn(5, 128)
    for layer in (make.linear(), make.conv1d()):
        torch.testing.assert_close(x @ read_weight(layer).t(), layer(x), atol=1e-5, rtol=1e-5)


def test_an_fp32_read_shares_memory_and_another_dtype_does_not(make):
    layer = make.linear()
    assert read_weight(layer).data_ptr() == layer.weight.data_ptr()
    assert read_weight(layer, dtype=torch.float64).data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_reads_equal_bitsandbytes_own_in_every_quant_storage(make, quant_type, storage, double, dtype):
    from bitsandbytes.functional import dequantize_4bit

    layer = make.linear4bit(quant_type, storage, double, dtype)
    assert layer.weight.dtype == storage
    found = storage_of(layer)
    assert (found.kind, found.shape, found.quantized, found.dtype) == (quant_type, (96, 128), True, dtype)
    W = read_weight(layer)
    assert torch.equal(W, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())
    error = (W - make.gaussian()).norm() / make.gaussian().norm()
    assert 0.05 < error < 0.14


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_layer_of_a_few_weights_is_not_taken_for_a_transposed_one(make, storage):
    W = make.gaussian(2, 4)
    layer = make.linear4bit("nf4", storage, W=W)
    assert read_weight(layer).shape == (2, 4)
    assert (read_weight(layer) - W).norm() < 0.3 * W.norm()


@pytest.mark.parametrize("case", ["nf4", "fp4-double", "int8", "int8-used", "bf16", "conv1d"])
def test_a_read_changes_neither_bytes_nor_state_nor_the_next_forward(make, case):
    layer = {
        "nf4": lambda: make.linear4bit(),
        "fp4-double": lambda: make.linear4bit("fp4", torch.bfloat16, True),
        "int8": make.linear8bit,
        "int8-used": make.linear8bit,
        "bf16": lambda: make.linear(torch.bfloat16),
        "conv1d": make.conv1d,
    }[case]()
    x = torch.randn(7, 128).to(torch.bfloat16 if case == "bf16" else torch.float32)
    untouched = copy.deepcopy(layer)
    if case == "int8-used":
        layer(x), untouched(x)
    before = fingerprint(layer)
    first = read_weight(layer)
    assert fingerprint(layer) == before
    assert torch.equal(layer(x), untouched(x))
    assert torch.equal(layer(x), untouched(x))
    assert torch.equal(read_weight(layer), first)


def test_int8_is_read_alike_before_and_after_a_forward_and_in_training(make):
    layer = make.linear8bit()
    storage = storage_of(layer)
    assert (storage.kind, storage.shape, storage.quantized) == ("int8", (96, 128), True)
    before = read_weight(layer)
    assert (before - make.gaussian()).norm() < 0.02 * make.gaussian().norm()
    x = torch.randn(3, 128, requires_grad=True)
    expected = layer(x)
    assert layer.weight.SCB is None, "bitsandbytes moved the scales: the case this test is about"
    after = read_weight(layer)
    assert torch.equal(before, after)
    again = layer(x)
    assert torch.equal(again, expected)
    again.sum().backward()
    assert torch.equal(read_weight(layer), before)


def test_a_linear8bit_that_keeps_floats_is_a_float_layer(make):
    layer = make.linear8bit(keeps_float=True)
    assert storage_of(layer).kind == "float"
    assert torch.equal(read_weight(layer), make.gaussian())


def test_a_4bit_weight_that_lost_its_state_is_read_through_its_layer(make):
    layer = make.linear4bit(storage=torch.float32)
    expected = read_weight(layer)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    assert torch.equal(read_weight(layer), expected)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_layout_of_cpus_with_avx512_bf16_is_read_up_to_its_rounded_scales(make, quant_type, double):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = make.linear4bit(quant_type, torch.uint8, double)
    expected = read_weight(layer)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    before = fingerprint(layer)
    assert (read_weight(layer) - expected).norm() < 2**-8 * expected.norm()
    assert fingerprint(layer) == before


@pytest.mark.parametrize("kind", ["linear4bit", "linear8bit"])
def test_a_bitsandbytes_layer_not_yet_quantised_is_refused_with_what_to_do(make, kind):
    layer = getattr(make, kind)(moved=False)
    assert not storage_of(layer).quantized
    with pytest.raises(WeightError, match=r"'model\.q'.*not been quantised yet.*model\.to"):
        read_weight(layer, name="model.q")


def test_int8_without_scales_is_refused_with_the_reason(make):
    layer = make.linear8bit()
    layer.weight.SCB = None
    with pytest.raises(WeightError, match=r"int8 scales .* are gone"):
        read_weight(layer, name="q")


class QuantLinear(nn.Module):
    """Looks like a GPTQ or AWQ layer."""

    def __init__(self):
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
        self.qzeros = nn.Parameter(torch.zeros(1, 4, dtype=torch.int32), requires_grad=False)


class HQQLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


class AffineQuantizedTensor(torch.Tensor):
    """Looks like a torchao weight: a subclass inside an ordinary nn.Linear."""


def torchao_like():
    layer = nn.Linear(4, 4)
    weight = torch.randn(4, 4).as_subclass(AffineQuantizedTensor)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def packed_linear():
    layer = nn.Linear(4, 4)
    layer.qweight = torch.zeros(4, 4, dtype=torch.int32)
    return layer


def experts():
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.randn(2, 4, 4))
    return module


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.Embedding(4, 4), "Embedding"),
        (lambda: nn.Conv2d(1, 1, 1), "Conv2d"),
        (lambda: nn.MultiheadAttention(4, 1), "MultiheadAttention"),
        (lambda: nn.LazyLinear(3), "LazyLinear.*Uninitialized"),
        (lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (QuantLinear, "QuantLinear.*qweight"),
        (HQQLinear, "HQQLinear.*W_q"),
        (torchao_like, "AffineQuantizedTensor"),
        (packed_linear, "Linear"),
        (experts, "Module"),
    ],
)
def test_what_is_not_known_is_refused_by_name(build, names):
    module = build()
    assert not is_supported(module)
    with pytest.raises(UnsupportedError, match=names):
        storage_of(module)
    with pytest.raises(UnsupportedError, match=names):
        read_weight(module, name="x")


def test_an_adapted_layer_is_sent_to_its_base_layer(llama):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with pytest.raises(UnsupportedError, match="read its base_layer"):
        storage_of(layer)
    assert is_supported(layer.base_layer)


def test_a_zero3_shard_is_refused_until_it_is_gathered(make):
    layer = make.linear()
    full = layer.weight.data
    layer.weight.ds_id, layer.weight.ds_shape = 0, full.shape
    layer.weight.data = torch.empty(0)
    with pytest.raises(UnsupportedError, match=r"ZeRO-3 shard.*GatheredParameters"):
        read_weight(layer)
    layer.weight.data = full
    assert torch.equal(read_weight(layer), make.gaussian())


def test_a_flattened_parameter_is_refused(make):
    layer = make.linear()
    layer.weight = nn.Parameter(layer.weight.data.reshape(-1))
    with pytest.raises(UnsupportedError, match="gathered first"):
        storage_of(layer)


def test_a_dtensor_is_gathered(make, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = make.linear()
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]), requires_grad=False)
        W = read_weight(layer)
        assert type(W) is torch.Tensor
        assert torch.equal(W, make.gaussian())
    finally:
        dist.destroy_process_group()


def test_check_finite_names_the_layer_and_counts(make):
    W = make.gaussian(300, 5000)
    check_finite(W, "fine")
    check_finite(W.t(), "fine")
    check_finite(torch.empty(0, 4), "fine")
    W[3, 4] = W[299, 4999] = float("nan")
    W[0, 0] = float("inf")
    W[1, 0] = float("-inf")
    for matrix in (W, W.t(), W.bfloat16()):
        with pytest.raises(WeightError, match=r"'model\.layers\.3\.q_proj'.* 2 NaN and 2 infinite of 1500000"):
            check_finite(matrix, "model.layers.3.q_proj")


@pytest.mark.parametrize("dtype", FLOATS)
def test_check_finite_accepts_the_largest_finite_values(dtype):
    check_finite(torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype), "huge")


def test_the_room_imports_without_bitsandbytes_or_transformers(run_python):
    run_python(
        "import sys\n"
        "sys.modules['bitsandbytes'] = None\n"
        "import torch, llmreg.weights as w\n"
        "assert w.read_weight(torch.nn.Linear(3, 2)).shape == (2, 3)\n"
        "assert 'transformers' not in sys.modules and 'safetensors' not in sys.modules\n"
    )
