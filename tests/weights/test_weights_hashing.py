"""bytes_hash sees every stored bit of the weights and nothing else."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from llmreg.errors import LlmregError, WeightError
from llmreg.weights import bytes_hash, module_bytes_hash, requantize

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
KINDS = {
    "fp32": lambda make, W=None: make.linear(W=W),
    "bf16": lambda make, W=None: make.linear(torch.bfloat16, W=W),
    "conv1d": lambda make, W=None: make.conv1d(W=W),
    "nf4": lambda make, W=None: make.linear4bit(W=W),
    "nf4-double": lambda make, W=None: make.linear4bit(double=True, W=W),
    "fp4": lambda make, W=None: make.linear4bit("fp4", W=W),
    "int8": lambda make, W=None: make.linear8bit(W=W),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hash_is_stable_over_copies_and_forwards_and_differs_for_other_weights(make, kind):
    layer = KINDS[kind](make)
    first = module_bytes_hash(layer)
    assert len(first) == 64
    assert module_bytes_hash(copy.deepcopy(layer)) == first
    layer(torch.randn(3, 128).to(torch.bfloat16 if kind == "bf16" else torch.float32))
    assert module_bytes_hash(layer) == first
    assert module_bytes_hash(KINDS[kind](make)) == first
    assert module_bytes_hash(KINDS[kind](make, make.gaussian(seed=1))) != first


def test_every_storage_of_the_same_weight_hashes_differently(make):
    hashes = {kind: module_bytes_hash(build(make)) for kind, build in KINDS.items()}
    assert len(set(hashes.values())) == len(KINDS)


def test_packed_bytes_hash_the_same_however_they_are_typed(make):
    storages = [torch.uint8, torch.float32, torch.bfloat16, torch.float16]
    for quant_type, double in itertools.product(["nf4", "fp4"], [False, True]):
        assert len({module_bytes_hash(make.linear4bit(quant_type, s, double)) for s in storages}) == 1


def flip(tensor: torch.Tensor) -> None:
    """Change the lowest bit of the first element, in place."""
    tensor.detach().reshape(-1)[:1].view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize("part", ["codes", "absmax", "table", "offset", "nested absmax", "nested table"])
def test_one_bit_anywhere_in_a_4bit_weight_changes_its_hash(make, part):
    layer = make.linear4bit(double=True)
    state = layer.weight.quant_state
    before = module_bytes_hash(layer)
    state.code, state.state2.code = state.code.clone(), state.state2.code.clone()  # shared with other layers
    parts = {
        "codes": layer.weight.data,
        "absmax": state.absmax,
        "table": state.code,
        "offset": state.offset,
        "nested absmax": state.state2.absmax,
        "nested table": state.state2.code,
    }
    assert module_bytes_hash(layer) == before
    target = parts[part].reshape(-1)
    flip(target)
    assert module_bytes_hash(layer) != before
    flip(target)
    assert module_bytes_hash(layer) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_of_a_float_or_int8_weight_changes_its_hash(make, dtype):
    for layer, tensors in (
        (make.linear(dtype), lambda m: [m.weight.data]),
        (make.linear8bit(), lambda m: [m.weight.data, m.weight.SCB]),
    ):
        before = module_bytes_hash(layer)
        for tensor in tensors(layer):
            flip(tensor)
            assert module_bytes_hash(layer) != before
            flip(tensor)
        assert module_bytes_hash(layer) == before


def test_shape_and_dtype_belong_to_the_hash(make):
    W = torch.zeros(4, 6)
    shapes = [make.linear(W=W), make.linear(W=W.reshape(6, 4)), make.linear(torch.float16, W=torch.zeros(4, 12))]
    assert len({module_bytes_hash(layer) for layer in shapes}) == 3


def test_a_strided_weight_hashes_like_its_contiguous_copy(make):
    strided = make.linear()
    strided.weight = nn.Parameter(make.gaussian().t().contiguous().t())
    assert not strided.weight.is_contiguous()
    assert module_bytes_hash(strided) == module_bytes_hash(make.linear())


def test_many_chunks_hash_like_one(make, monkeypatch):
    import llmreg.weights.hashing as hashing

    layers = [make.linear(), make.linear(torch.bfloat16), make.linear4bit(), make.linear8bit()]
    strided = make.linear()
    strided.weight = nn.Parameter(make.gaussian().t().contiguous().t())
    whole = [module_bytes_hash(layer) for layer in [*layers, strided]]
    monkeypatch.setattr(hashing, "_CHUNK", 100)
    assert [module_bytes_hash(layer) for layer in [*layers, strided]] == whole


def test_the_order_of_names_and_the_wrapping_of_peft_do_not_matter(llama):
    from peft import LoraConfig, get_peft_model

    model = llama()
    plain = bytes_hash(model, NAMES)
    assert bytes_hash(model, reversed(NAMES)) == plain
    assert bytes_hash(model, [*NAMES, NAMES[0]]) == plain
    assert bytes_hash(model, NAMES[:1]) != plain
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert bytes_hash(wrapped, NAMES) == plain
    assert bytes_hash(wrapped, [f"base_model.model.{name}.base_layer" for name in NAMES]) == plain


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_saving_and_loading_a_quantised_model_keeps_its_stored_bytes(llama_folder, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**(four if bits == "nf4" else {"load_in_8bit": True}))
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config, device_map="cpu")
    before = bytes_hash(model, NAMES)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert bytes_hash(loaded, NAMES) == bytes_hash(model, NAMES) == before


def test_swapping_two_layers_changes_the_hash(make):
    a, b = make.linear(), make.linear(W=make.gaussian(seed=1))
    one, other = nn.ModuleDict({"a": a, "b": b}), nn.ModuleDict({"a": b, "b": a})
    assert bytes_hash(one, ["a", "b"]) != bytes_hash(other, ["a", "b"])


def test_a_merged_layer_hashes_differently(make):
    layer = make.linear8bit()
    before = module_bytes_hash(layer)
    layer.weight = requantize(layer, make.gaussian() + 0.01)
    assert module_bytes_hash(layer) != before


@pytest.mark.parametrize("names", [[], ["nothing.here"], ["model.embed_tokens"]])
def test_names_that_cannot_be_hashed_are_refused(llama, names):
    with pytest.raises(LlmregError):
        bytes_hash(llama(), names)


def test_a_layer_without_data_is_refused(make):
    with pytest.raises(WeightError, match="meta device"):
        module_bytes_hash(make.linear().to("meta"), name="q")
    with pytest.raises(WeightError, match="not been quantised yet"):
        module_bytes_hash(make.linear8bit(moved=False), name="q")


def test_a_weight_whose_scales_bitsandbytes_dropped_says_so(make):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = make.linear4bit(double=True)
    packed, state = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    with pytest.raises(WeightError, match=r"repacked .* AVX512-BF16"):
        module_bytes_hash(layer)


def test_another_process_computes_the_same_hash(run_python):
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from llmreg.weights import bytes_hash\n"
        "W = torch.arange(96.0).reshape(8, 12)\n"
        "layers = {name: torch.nn.Linear(12, 8) for name in 'dcba'}\n"
        "for layer in layers.values(): layer.weight.data = W.bfloat16()\n"
        "print(bytes_hash(torch.nn.ModuleDict(layers), set(layers)))\n"
    )
    out = [run_python(code, PYTHONHASHSEED=seed) for seed in "12"]
    layers = nn.ModuleDict({name: nn.Linear(12, 8) for name in "abcd"})
    for layer in layers.values():
        layer.weight.data = torch.arange(96.0).reshape(8, 12).bfloat16()
    assert out == [bytes_hash(layers, "abcd")] * 2
