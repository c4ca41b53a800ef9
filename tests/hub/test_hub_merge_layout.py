"""A merged checkpoint has the base's own layout, appears whole or not at all, and is never held in memory."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil

import adapter_files as saved
import pytest
import torch
from merge_cases import edit, file_bytes, lora, sharded_checkpoint, tensor_bytes
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmreg import files
from llmreg.errors import LlmregError, RecipeError
from llmreg.hub import merge as merging
from llmreg.hub import streaming
from llmreg.hub.merge import merge
from llmreg.hub.streaming import SafetensorsFile


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return sharded_checkpoint(tmp_path_factory.mktemp("sharded"))


# -- the layout ----------------------------------------------------------------------------------------------------


def test_untouched_tensors_and_the_layout_are_the_bases_to_the_byte(sharded, tmp_path):
    before = file_bytes(sharded)
    adapter = lora(sharded, tmp_path / "lora", target_modules=["q_proj", "up_proj"])
    report = merge(adapter, tmp_path / "merged", check=False)
    assert file_bytes(sharded) == before
    assert set(saved.files(tmp_path / "merged")) == {*before, "README.md"}
    for path in sharded.glob("*.safetensors"):
        mine, theirs = SafetensorsFile(tmp_path / "merged" / path.name), SafetensorsFile(path)
        assert mine.header == theirs.header  # names, order, dtypes, shapes, metadata
    old, new = tensor_bytes(sharded), tensor_bytes(tmp_path / "merged")
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {name for name in old if name.split(".")[-2] in ("q_proj", "up_proj")}
    assert (report.merged, report.replaced, report.copied) == (4, 0, len(old) - 4)
    assert report.bytes == sum(map(len, old.values()))
    assert report.dtypes == {"bfloat16": len(old)}
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (tmp_path / "merged" / name).read_bytes() == before[name]


def test_what_is_written_reads_back_with_safetensors(sharded, tmp_path):
    merge(lora(sharded, tmp_path / "lora"), tmp_path / "merged", check=False)
    for path in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.bfloat16])
def test_another_dtype_converts_every_float_tensor_once(sharded, tmp_path, dtype):
    adapter = lora(sharded, tmp_path / "lora")
    report = merge(adapter, tmp_path / "exact", dtype="float32", check=False)
    wanted = str(dtype).removeprefix("torch.")
    report = merge(adapter, tmp_path / "merged", dtype=dtype)
    assert set(report.dtypes) == {wanted}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == wanted
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes
    for path in (tmp_path / "exact").glob("*.safetensors"):
        exact, tensors = load_file(path), load_file(tmp_path / "merged" / path.name)
        assert all(torch.equal(tensors[name], exact[name].to(getattr(torch, wanted))) for name in exact)


def test_integers_stay_and_stay_aligned_under_another_dtype(base, tmp_path):
    adapter = lora(base, tmp_path / "lora")
    extra = {"a.flag": torch.ones(3, dtype=torch.bool), "b.ids": torch.arange(5), "c.empty": torch.zeros(0, 4)}
    mixed = shutil.copytree(base, tmp_path / "mixed")
    edit(mixed / "model.safetensors", lambda tensors: tensors.update(extra))
    merge(adapter, tmp_path / "merged", base=mixed, dtype="bfloat16", check=False)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(tensors["a.flag"], extra["a.flag"])
    assert torch.equal(tensors["b.ids"], extra["b.ids"])
    assert tensors["c.empty"].shape == (0, 4)
    for entry in SafetensorsFile(tmp_path / "merged" / "model.safetensors").entries.values():
        assert entry.start % (entry.dtype.itemsize if entry.dtype else 1) == 0


def test_pickles_and_hidden_files_are_not_copied_and_tokenizers_are(base, tmp_path):
    adapter = lora(base, tmp_path / "lora")
    full = shutil.copytree(base, tmp_path / "full")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "1_Pooling/config.json", "modeling_own.py"):
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_text("text")
    for name in ("pytorch_model.bin", "optimizer.pt", "scaler.pkl", ".cache/x.json", "other.gguf", "README.md"):
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_text("not to be copied")
    merge(adapter, tmp_path / "merged", base=full, check=False)
    expected = {*saved.files(base), "tokenizer.json", "chat_template.jinja", "LICENSE", "1_Pooling/config.json"}
    assert set(saved.files(tmp_path / "merged")) == {*expected, "modeling_own.py", "README.md"}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "not to be copied" not in card
    assert str(tmp_path) not in card


def test_the_report_is_plain_json(base, tmp_path):
    report = merge(lora(base, tmp_path / "lora"), tmp_path / "merged", check=False)
    as_dict = json.loads(json.dumps(dataclasses.asdict(report)))
    assert as_dict["parity"] is None
    assert as_dict["parity_skipped"] == "it was not asked for"
    assert as_dict["path"] == str(tmp_path / "merged")
    assert as_dict["seconds"] > 0


_MEASURE = r"""
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from llmreg.hub.merge import merge
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
merge(sys.argv[2], sys.argv[3] + "-small", check=False)  # imports and buffers of the first use
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
before = status("VmRSS")
merge(sys.argv[1], sys.argv[3], check=False)
print((status("VmHWM") - before) / 1024)
"""


def test_memory_stays_far_below_the_checkpoint(tmp_path, base, run_python):
    """200 MB in 5 files; the largest tensor has 32 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=16000,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model.save_pretrained(tmp_path / "large", max_shard_size="48MB")
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 190e6
    assert len(list((tmp_path / "large").glob("*.safetensors"))) >= 4
    settings = LoraConfig(r=16, target_modules="all-linear", base_model_name_or_path=str(tmp_path / "large"))
    settings.save_pretrained(adapter := tmp_path / "lora")
    factors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            factors[f"base_model.model.{name}.lora_A.weight"] = torch.full((16, layer.in_features), 0.01)
            factors[f"base_model.model.{name}.lora_B.weight"] = torch.full((layer.out_features, 16), 0.01)
    save_file(factors, adapter / "adapter_model.safetensors")
    del model
    small = lora(base, tmp_path / "small")
    extra = float(run_python(_MEASURE, adapter, small, tmp_path / "merged"))
    assert extra < 60, f"{extra:.0f} MiB more than before"
    assert saved.files(tmp_path / "merged") == sorted({*saved.files(tmp_path / "large"), "README.md"})


# -- all or nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "No space left on device")], ids=repr
)
@pytest.mark.parametrize("occupied", [False, True], ids=["new", "empty-folder"])
def test_an_interruption_at_any_write_leaves_nothing(sharded, tmp_path, monkeypatch, error, occupied):
    adapter = lora(sharded, tmp_path / "lora")
    before = file_bytes(sharded)
    targets = [
        (streaming.os, "fsync"),
        (merging.os, "rename"),
        (merging.shutil, "copyfile"),
        (merging, "write_text"),
        (files.os, "replace"),
        (streaming.SafetensorsWriter, "write"),
    ]
    for number, (owner, name) in enumerate(targets):
        for stop_at in (0, 2):
            folder = tmp_path / f"trial{number}-{stop_at}"
            folder.mkdir()
            if occupied:
                (folder / "merged").mkdir()
            with monkeypatch.context() as patch:
                _stop(patch, owner, name, stop_at, error)
                try:
                    merge(adapter, folder / "merged", check=False)
                except (type(error), LlmregError):
                    assert saved.files(folder) == []
                    assert [path.name for path in folder.iterdir()] == (["merged"] if occupied else [])
                else:
                    assert stop_at
    assert file_bytes(sharded) == before


def _stop(patch, owner, name, stop_at, error):
    original, calls = getattr(owner, name), []

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == stop_at + 1:
            raise error
        return original(*args, **kwargs)

    patch.setattr(owner, name, stopped)


def test_a_folder_that_is_not_empty_is_left_alone(base, tmp_path):
    adapter = lora(base, tmp_path / "lora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for place in (tmp_path / "out", tmp_path / "out" / "notes.txt", adapter):
        with pytest.raises(RecipeError, match="not an empty folder"):
            merge(adapter, place)
    with pytest.raises(RecipeError, match="folder of the base"):
        merge(adapter, base / "merged")
    assert saved.files(tmp_path / "out") == ["notes.txt"]


def test_a_disk_that_is_too_small_is_refused_before_it_is_filled(base, tmp_path, monkeypatch):
    adapter = lora(base, tmp_path / "lora")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(RecipeError, match="GiB free"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
