"""SafetensorsSource opens checkpoints by tensor name and refuses what is damaged or a pickle."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmreg.errors import LlmregError, WeightError
from llmreg.weights import SafetensorsSource, read_weight

LAYER = "model.layers.1.self_attn.q_proj"


def meta_llama(folder, dtype=torch.float32):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


@pytest.mark.parametrize("which", ["llama_folder", "sharded_folder"])
def test_every_tensor_is_read_by_name_from_one_file_or_shards(which, request, llama):
    source = SafetensorsSource(request.getfixturevalue(which))
    state = llama().state_dict()
    assert set(source.names()) <= set(state)
    for name in source.names():
        assert torch.equal(source.read(name), state[name])
    assert f"{LAYER}.weight" in source.names()


def test_a_single_file_and_an_index_file_are_sources_too(llama_folder, sharded_folder):
    single = SafetensorsSource(llama_folder / "model.safetensors")
    index = SafetensorsSource(str(sharded_folder / "model.safetensors.index.json"))
    assert single.names() == index.names()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_meta_layer_is_read_from_its_checkpoint_as_loading_would_round_it(sharded_folder, llama, dtype, prefix):
    layer = meta_llama(sharded_folder, dtype).get_submodule(LAYER)
    W = read_weight(layer, name=prefix + LAYER, source=SafetensorsSource(sharded_folder))
    assert torch.equal(W, llama().get_submodule(LAYER).weight.detach().to(dtype).float())


def test_a_meta_conv1d_is_read_from_a_checkpoint_saved_without_the_models_prefix(tmp_path, make):
    layer = make.conv1d()
    save_file({"h.0.attn.c_attn.weight": layer.weight.data}, tmp_path / "model.safetensors")
    meta = make.conv1d().to("meta")
    W = read_weight(meta, name="transformer.h.0.attn.c_attn", source=SafetensorsSource(tmp_path))
    assert torch.equal(W, make.gaussian())


def test_a_meta_layer_without_source_is_refused_with_what_to_do(make):
    with pytest.raises(WeightError, match=r"'q_proj'.*meta device.*SafetensorsSource"):
        read_weight(make.linear().to("meta"), name="q_proj")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with pytest.raises(WeightError, match=r"'q_proj'.*quantised layer on the meta device"):
        read_weight(bitsandbytes.nn.Linear4bit(128, 96, device="meta"), name="q_proj")


def test_a_meta_layer_of_another_shape_is_refused(tmp_path, make):
    save_file({"q.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"'q'.*holds \(2, 2\).*expects \(96, 128\)"):
        read_weight(make.linear().to("meta"), name="q", source=SafetensorsSource(tmp_path))


def test_packed_bytes_in_a_checkpoint_are_not_taken_for_a_weight(tmp_path, make):
    save_file({"q.weight": torch.zeros(96, 128, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="uint8"):
        read_weight(make.linear().to("meta"), name="q", source=SafetensorsSource(tmp_path))


def test_a_layer_that_accelerate_offloaded_is_read_from_where_it_went(llama):
    from accelerate import cpu_offload

    model = llama()
    expected = model.get_submodule(LAYER).weight.detach().clone()
    cpu_offload(model, execution_device="cpu")
    layer = model.get_submodule(LAYER)
    assert layer.weight.is_meta
    assert torch.equal(read_weight(layer, name=LAYER), expected)
    assert layer.weight.is_meta


def test_a_missing_name_is_answered_with_the_nearest(llama_folder):
    with pytest.raises(WeightError, match=r"no tensor 'model\.layers\.1\.self_attn\.q_prj\.weight'.*nearest.*q_proj"):
        SafetensorsSource(llama_folder).read("model.layers.1.self_attn.q_prj.weight")


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1])
def test_a_truncated_file_is_one_clear_sentence(tmp_path, llama_folder, keep):
    data = (llama_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(WeightError, match="truncated or damaged") as caught:
        SafetensorsSource(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_of_noise_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(WeightError, match="truncated or damaged"):
        SafetensorsSource(tmp_path)


def test_an_index_naming_a_missing_shard_is_refused(tmp_path, sharded_folder):
    shutil.copytree(sharded_folder, tmp_path, dirs_exist_ok=True)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(WeightError, match=rf"names {gone.name}, which is not there \(1 of"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 99999],
    ids=repr,
)
def test_a_malformed_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightError, match=r"index\.json"):
        SafetensorsSource(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path, llama_folder):
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    shutil.copy(llama_folder / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightError, match="beside it"):
        SafetensorsSource(inside)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_pickle_is_refused_with_the_reason_and_not_opened(tmp_path, name, as_folder):
    (tmp_path / name).write_bytes(b"not even a pickle")
    with pytest.raises(LlmregError, match="pickle, which can run any code"):
        SafetensorsSource(tmp_path if as_folder else tmp_path / name)


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(WeightError, match="no checkpoint at"):
        SafetensorsSource(tmp_path / "absent")
    with pytest.raises(WeightError, match="no safetensors file"):
        SafetensorsSource(tmp_path)


def test_real_weights_are_read(stories_folder):
    source = SafetensorsSource(stories_folder)
    expected = load_file(stories_folder / "model.safetensors")
    assert source.names() == sorted(expected)
    layer = meta_llama(stories_folder).get_submodule(LAYER)
    assert torch.equal(read_weight(layer, name=LAYER, source=source), expected[f"{LAYER}.weight"].float())
