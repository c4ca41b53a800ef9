"""identity_hash says which checkpoint a model is, whatever it was loaded as."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmreg.errors import WeightError
from llmreg.weights import bytes_hash, digests, identity_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def load(folder, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def quantized(folder, **kwargs):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return load(folder, quantization_config=BitsAndBytesConfig(**kwargs), device_map="cpu")


def every_loading(folder):
    yield load(folder)
    yield load(folder, dtype=torch.bfloat16)
    yield load(folder, dtype=torch.float16)
    yield quantized(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    yield quantized(folder, load_in_8bit=True)


def test_one_checkpoint_has_one_identity_in_every_dtype_and_quantisation(llama_folder):
    expected = identity_hash(llama_folder)
    assert (expected.source, expected.name, len(expected.digest)) == ("checkpoint", None, 64)
    stored = set()
    for model in every_loading(llama_folder):
        assert identity_hash(model) == expected
        stored.add(bytes_hash(model, ["model.layers.0.mlp.down_proj"]))
    assert len(stored) == 5, "the stored bytes, in contrast, differ"


def test_a_real_checkpoint_has_one_identity(stories_folder):
    expected = identity_hash(str(stories_folder))
    for model in (load(stories_folder), quantized(stories_folder, load_in_8bit=True)):
        assert identity_hash(model) == expected


def test_another_checkpoint_has_another_identity(llama_folder, tmp_path, llama):
    llama(seed=1).save_pretrained(tmp_path / "other")
    other = identity_hash(load(tmp_path / "other"))
    assert other.digest != identity_hash(llama_folder).digest
    assert other != identity_hash(llama_folder)


def test_a_copied_folder_keeps_its_identity_and_its_path_stays_out(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "secret-place")
    copied = identity_hash(load(tmp_path / "secret-place"))
    assert copied == identity_hash(llama_folder)
    assert "secret-place" not in repr(copied)
    assert copied.name is None


def test_sharded_checkpoints_are_identified_and_a_missing_shard_is_named(sharded_folder, tmp_path):
    shutil.copytree(sharded_folder, tmp_path, dirs_exist_ok=True)
    assert identity_hash(load(tmp_path)) == identity_hash(sharded_folder)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(WeightError, match=gone.name):
        identity_hash(tmp_path)


def test_peft_wrapping_keeps_the_identity(llama_folder, llama):
    from peft import LoraConfig, get_peft_model

    def wrap(model):
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))

    assert identity_hash(wrap(load(llama_folder))) == identity_hash(llama_folder)
    assert identity_hash(wrap(llama())) == identity_hash(llama())


def test_a_model_built_in_memory_is_identified_by_its_parameters_and_says_so(llama):
    identity = identity_hash(llama())
    assert identity.source == "memory"
    assert identity_hash(llama()) == identity
    assert identity_hash(llama(seed=1)) != identity
    assert identity_hash(llama().bfloat16()) != identity


def test_a_model_whose_folder_is_gone_is_identified_by_its_parameters(llama_folder, tmp_path, monkeypatch):
    shutil.copytree(llama_folder, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    model = load("runs/mine")
    shutil.rmtree(tmp_path / "runs")
    identity = identity_hash(model)
    assert (identity.source, identity.name) == ("memory", None)


def test_quantised_models_in_memory_have_an_identity_that_a_forward_does_not_change(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "gone")
    model = quantized(tmp_path / "gone", load_in_8bit=True)
    shutil.rmtree(tmp_path / "gone")
    before = identity_hash(model)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert identity_hash(model) == before


def hub_cache(tmp_path, monkeypatch, llama_folder):
    """A Hub cache holding org/tiny at COMMIT, with the symbolic links a real one has."""
    import huggingface_hub.constants

    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(llama_folder.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(module, key, str(tmp_path / "hub"), raising=False)
    return snapshot


def test_a_hub_model_is_known_by_id_and_commit_without_a_network(tmp_path, monkeypatch, llama_folder):
    snapshot = hub_cache(tmp_path, monkeypatch, llama_folder)
    expected = identity_hash(llama_folder)
    model = load(snapshot)
    for asked in (snapshot, "org/tiny", model):
        found = identity_hash(asked)
        assert found == expected
        assert (found.name, found.revision) == ("org/tiny", COMMIT)
    model.config._name_or_path, model.config._commit_hash = "org/tiny", COMMIT
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)  # an output folder that happens to have its name
    found = identity_hash(model)
    assert (found.name, found.revision, found.source) == ("org/tiny", COMMIT, "checkpoint")


@pytest.mark.parametrize("what", ["absent/model", "/absent/folder", "not a name at all!"])
def test_no_checkpoint_is_one_clear_sentence(what):
    with pytest.raises(WeightError, match="no checkpoint files for"):
        identity_hash(what)


def test_an_empty_folder_and_a_model_without_data_are_refused(tmp_path, llama):
    with pytest.raises(WeightError, match="no checkpoint files"):
        identity_hash(tmp_path)
    with pytest.raises(WeightError, match="meta device"):
        identity_hash(llama().to("meta"))


# The cache of file digests


def old_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    return path


def test_an_unchanged_file_is_hashed_once_and_a_changed_one_again(tmp_path, monkeypatch):
    file = old_file(tmp_path / "w.bin", b"a" * 1000)
    hashed = []
    stream = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: hashed.append(path) or stream(path))
    first = digests.cached_file_digest(file)
    assert digests.cached_file_digest(file) == first
    assert len(hashed) == 1
    # The same size and modification time, as after `cp -p`: the status-change time tells.
    old_file(file, b"b" * 1000)
    assert digests.cached_file_digest(file) != first


def test_a_file_written_just_now_is_not_remembered(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"a")
    digests.cached_file_digest(tmp_path / "w.bin")
    assert not digests.cache_file().exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"x": 3}', b"null", b"[" * 99999], ids=repr)
def test_a_damaged_cache_costs_only_time(tmp_path, content):
    file = old_file(tmp_path / "w.bin", b"a")
    expected = digests.cached_file_digest(file)
    digests.cache_file().write_bytes(content)
    assert digests.cached_file_digest(file) == expected
    assert list(json.loads(digests.cache_file().read_text()).values()) == [expected]


def test_an_unwritable_cache_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("LLMREG_CACHE", str(tmp_path / "a-file" / "below"))
    assert len(digests.cached_file_digest(old_file(tmp_path / "w.bin", b"a"))) == 64


def test_the_cache_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_MOST_ENTRIES", 5)
    for number in range(9):
        last = digests.cached_file_digest(old_file(tmp_path / f"{number}.bin", bytes([number])))
    entries = json.loads(digests.cache_file().read_text())
    assert len(entries) == 5
    assert list(entries.values())[-1] == last


@pytest.mark.multiprocess
def test_processes_writing_the_cache_at_once_leave_it_whole(tmp_path, run_python):
    for number in range(40):
        old_file(tmp_path / f"{number}.bin", bytes([number]))
    code = (
        "import sys, pathlib\n"
        "sys.modules['llmreg.weights'] = room = type(sys)('llmreg.weights')\n"
        "room.__path__ = ['llmreg/weights']\n"  # without importing torch
        "from llmreg.weights import digests\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).glob('*.bin')): digests.cached_file_digest(file)\n"
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: run_python(code, str(tmp_path)), range(2)))
    entries = json.loads(digests.cache_file().read_text())
    assert len(entries) > 20
    for key, value in entries.items():
        assert value == digests.file_digest(Path(key.split("|")[0]))
    assert not list(digests.cache_file().parent.glob("*.tmp"))
