"""The cache of starts: a hit is the bits of a miss, whatever happened to the folder meanwhile."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import peft
import pytest
import safetensors
import safetensors.torch
import tiny_models
import torch
from torch import nn

from llmreg import PissaConfig
from llmreg.adapters import start_cache, start_key
from llmreg.adapters.start_cache import clear, contents, default_folder, default_limit, limit, use_starts
from llmreg.adapters.start_key import start_keys
from llmreg.errors import LlmregWarning, RecipeError, WeightError
from llmreg.initializers import Factors

TARGETS = ["q_proj", "o_proj", "down_proj"]


def start(folder, model=None, **config):
    """The factors of a PiSSA adapter on `model` (a tiny Llama), by parameter name, and (hits, layers)."""
    config = {"r": 4, "target_modules": TARGETS} | config
    with use_starts(folder) as cache:
        model = peft.get_peft_model(tiny_models.llama() if model is None else model, PissaConfig(**config))
    factors = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
    return factors, (None if cache is None else (cache.hits, cache.layers))


def mlp_start(folder, model=None, **config):
    return start(folder, model or tiny_models.mlp(), **{"target_modules": ["first", "second"]} | config)


def assert_same(factors, others):
    assert factors.keys() == others.keys()
    assert factors
    for name, value in factors.items():
        assert value.dtype == others[name].dtype
        assert torch.equal(value, others[name]), name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "starts"


@pytest.fixture
def no_decomposition(monkeypatch):
    """A function after whose call every decomposition fails."""

    def fail(*args, **kwargs):
        raise AssertionError("decomposed")

    return lambda: monkeypatch.setattr(sys.modules["llmreg.initializers.components"], "truncated_svd", fail)


# -- a hit is a miss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "nf4", "int8"])
def test_a_hit_gives_the_bits_of_a_miss_and_of_no_cache(storage, folder):
    if storage in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    plain, _ = start(None, tiny_models.llama(storage))
    miss, missed = start(folder, tiny_models.llama(storage))
    hit, found = start(folder, tiny_models.llama(storage))
    assert missed == (0, 6)
    assert found == (6, 6)
    assert_same(plain, miss)
    assert_same(plain, hit)


def test_transposed_layers_are_cached_too(folder):
    config = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    miss, _ = start(folder, tiny_models.gpt2(), **config)
    hit, found = start(folder, tiny_models.gpt2(), **config)
    assert found == (6, 6)
    assert_same(miss, hit)


def test_a_hit_decomposes_nothing(folder, no_decomposition):
    miss, _ = start(folder)
    no_decomposition()
    assert_same(miss, start(folder)[0])
    with pytest.raises(AssertionError, match="decomposed"):
        start(folder, r=3)


def test_layers_decomposed_together_hit_only_together(folder):
    """Two layers of equal shape share one stopping rule, so a layer alone may have other last bits."""

    def model():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
        with torch.no_grad():  # a steep and a flat spectrum
            net[0].weight.copy_(torch.linalg.qr(net[0].weight)[0] * torch.logspace(0, -4, 600))
        net.config = {"model_type": "custom"}
        return net

    alone, _ = start(folder, model(), target_modules=["0"])
    both, found = start(folder, model(), target_modules=["0", "1"])
    assert found == (0, 2)
    assert_same(both, start(None, model(), target_modules=["0", "1"])[0])
    again, found = start(folder, model(), target_modules=["0"])
    assert found == (1, 1)
    assert_same(again, alone)


def test_the_hits_are_logged(folder, caplog):
    with caplog.at_level(logging.INFO, logger="llmreg"):
        start(folder)
        start(folder)
    assert [record.getMessage() for record in caplog.records] == [
        "0 of 6 layers from the cache",
        "6 of 6 layers from the cache",
    ]


def test_nothing_is_kept_outside_the_context(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREG_CACHE", str(tmp_path))
    with use_starts(tmp_path / "outer"):
        start(None)
    peft.get_peft_model(tiny_models.llama(), PissaConfig(r=4, target_modules=TARGETS))
    assert names(tmp_path) == []


# -- what an entry is found by ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"r": 3}, {"seed": 1}, {"lora_alpha": 8}, {"svd": "exact"}, {"oversample": 5}, {"power_iterations": 3}],
    ids=lambda other: next(iter(other)),
)
def test_another_setting_is_another_entry(folder, other):
    mlp_start(folder)
    first = set(names(folder))
    assert len(first) == 2
    _, found = mlp_start(folder, **other)
    assert found == (0, 2)
    assert len(set(names(folder)) - first) == 2


def test_an_edited_weight_is_another_entry_and_the_others_stay(folder):
    mlp_start(folder)
    model = tiny_models.mlp()
    with torch.no_grad():
        model.first.weight[3, 5] += 1e-6
    expected, _ = mlp_start(None, tiny_models.twin(model))
    factors, found = mlp_start(folder, model)
    assert found == (1, 2)
    assert_same(factors, expected)


def test_another_storage_of_the_same_model_is_another_entry(folder):
    pytest.importorskip("bitsandbytes")
    for count, storage in enumerate(("float32", "bfloat16", "nf4", "int8"), 1):
        _, found = mlp_start(folder, tiny_models.mlp(storage))
        assert found == (0, 2)
        assert len(names(folder)) == 2 * count


def test_every_field_of_the_key_counts():
    (key,) = start_keys([nn.Linear(8, 6)], PissaConfig(r=2), "", 2, 1.0)
    changed = {field.name: dataclasses.replace(key, **{field.name: "other"}) for field in dataclasses.fields(key)}
    assert len({key.file_name, *(other.file_name for other in changed.values())}) == len(changed) + 1


def test_another_arithmetic_is_another_entry(monkeypatch):
    layer, config = nn.Linear(8, 6), PissaConfig(r=2)
    plain = start_keys([layer], config, "", 2, 1.0)
    assert start_keys([layer], config, "", 2, 1.0) == plain
    assert start_keys([layer], config, "", 2, 1.0, "cuda") != plain
    try:
        torch.set_float32_matmul_precision("high")
        assert start_keys([layer], config, "", 2, 1.0) != plain
    finally:
        torch.set_float32_matmul_precision("highest")
    assert start_keys([layer], config, "", 2, 1.0) == plain
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert start_keys([layer], config, "", 2, 1.0) != plain


def test_a_method_from_elsewhere_is_not_cached(folder, monkeypatch):
    monkeypatch.setattr(PissaConfig, "__module__", "elsewhere.methods")
    expected, _ = start(None)
    factors, found = start(folder)
    assert found == (0, 6)
    assert_same(factors, expected)
    assert not folder.exists()


def test_settings_that_json_cannot_express_are_not_cached(monkeypatch):
    monkeypatch.setattr(PissaConfig, "start_settings", lambda self: (float("nan"),))
    assert start_keys([nn.Linear(8, 6)], PissaConfig(r=2), "", 2, 1.0) is None
    monkeypatch.setattr(PissaConfig, "start_settings", lambda self: (object(),))
    assert start_keys([nn.Linear(8, 6)], PissaConfig(r=2), "", 2, 1.0) is None


def test_sharded_weights_and_weights_without_data_are_not_cached(folder, monkeypatch):
    with torch.device("meta"):
        assert start_keys([nn.Linear(8, 6)], PissaConfig(r=2), "", 2, 1.0) is None
    monkeypatch.setattr(start_key, "is_sharded", lambda module: True)
    expected, _ = start(None)
    factors, found = start(folder)
    assert found == (0, 6)
    assert_same(factors, expected)
    assert not folder.exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_with_a_full_cache_too(folder, bad):
    mlp_start(folder)
    for _ in range(2):
        model = tiny_models.mlp()
        with torch.no_grad():
            model.second.weight[0, 0] = bad
        with pytest.raises(WeightError, match="second"):
            mlp_start(folder, model)
    assert len(names(folder)) == 2


def test_an_entry_says_in_json_what_it_is(folder):
    mlp_start(folder, r=3, lora_alpha=6, seed=7)
    for name in names(folder):
        with safetensors.safe_open(folder / name, "pt") as file:
            key = json.loads(file.metadata()["llmreg_start"])
            assert set(file.keys()) == {"A", "B", "singular_values"}
        assert {"method": "pissa", "rank": 3, "scaling": 2.0, "seed": 7, "batch": None}.items() <= key.items()
        assert key["shape"] in ([32, 20], [24, 32])
        assert key["torch"] == torch.__version__


# -- damage -----------------------------------------------------------------------------------------------------


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def resave(path, **changes):
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(path) | changes, path, metadata)


def become_a_link(path):
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 300),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"1234"),
    "huge": lambda path: os.truncate(path, 1 << 33),
    "one bit of a factor": lambda path: flip(path, -1),
    "one bit of the header": lambda path: flip(path, 40),
    "no metadata": lambda path: safetensors.torch.save_file(safetensors.torch.load_file(path), path),
    "another shape": lambda path: resave(path, A=torch.zeros(4, 19)),
    "another dtype": lambda path: resave(path, A=torch.zeros(4, 20, dtype=torch.bfloat16)),
    "another value": lambda path: resave(path, singular_values=torch.ones(4)),
    "another tensor": lambda path: resave(path, C=torch.ones(4)),
    "a link": become_a_link,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_computed_again(folder, damage):
    expected, _ = mlp_start(folder)
    for name in names(folder):
        damage(folder / name)
    factors, found = mlp_start(folder)
    assert found == (0, 2)
    assert_same(factors, expected)
    factors, found = mlp_start(folder)
    assert found == (2, 2)
    assert_same(factors, expected)
    assert all(not (folder / name).is_symlink() for name in names(folder))


def test_an_entry_under_another_ones_name_is_computed_again(folder):
    expected, _ = mlp_start(folder)
    one, two = (folder / name for name in names(folder))
    contents_of_one = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(contents_of_one)
    factors, found = mlp_start(folder)
    assert found == (0, 2)
    assert_same(factors, expected)


def test_a_folder_in_the_place_of_an_entry_costs_only_the_caching(folder):
    expected, _ = mlp_start(folder)
    for name in names(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    with pytest.warns(LlmregWarning, match="cannot be written to"):
        factors, _ = mlp_start(folder)
    assert_same(factors, expected)


WORKER = """
import sys, warnings, peft, torch
sys.path.insert(0, sys.argv[2])
import tiny_models
from llmreg import PissaConfig
from llmreg.adapters.start_cache import clear, use_starts
from llmreg.errors import LlmregWarning
torch.set_num_threads(1)
warnings.simplefilter("error", LlmregWarning)
hits = 0
for turn in range(30):
    with use_starts(sys.argv[1]) as cache:
        model = peft.get_peft_model(tiny_models.mlp(), PissaConfig(r=4, target_modules=["first", "second"]))
    hits += cache.hits
    if turn % 5 == 4:
        clear(sys.argv[1])
print(hits, sum(p.detach().double().sum().item() for n, p in model.named_parameters() if "lora_" in n).hex())
"""


@pytest.mark.multiprocess
def test_two_processes_fill_and_clear_one_folder_at_once(folder, run_python):
    tests = os.path.dirname(tiny_models.__file__)
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: run_python(WORKER, folder, tests), range(2)))
    expected, _ = mlp_start(None)
    total = sum(float(value.double().sum()) for value in expected.values()).hex()
    for output in outputs:
        hits, found = output.splitlines()[-1].split()
        assert found == total
        assert int(hits) > 0
    assert_same(mlp_start(folder)[0], expected)
    assert all(name.startswith("start-") for name in names(folder))  # nothing unfinished is left


# -- a folder that cannot be used -------------------------------------------------------------------------------


def assert_runs_on_with_one_warning(folder):
    expected, _ = mlp_start(None)
    with warnings.catch_warnings(record=True) as caught, use_starts(folder):
        warnings.simplefilter("always")
        model = peft.get_peft_model(tiny_models.mlp(), PissaConfig(r=4, target_modules=["first", "second"]))
        model.add_adapter("second", PissaConfig(r=2, target_modules=["first", "second"]))
    (warning,) = [one for one in caught if issubclass(one.category, LlmregWarning)]
    assert "cannot be written to" in str(warning.message)
    factors = {name: value for name, value in model.named_parameters() if "lora_" in name and "default" in name}
    assert_same(factors, expected)


def test_a_folder_that_cannot_be_made_costs_only_the_caching(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert_runs_on_with_one_warning(tmp_path / "file" / "starts")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_costs_only_the_caching(folder):
    folder.mkdir(mode=0o555)
    assert_runs_on_with_one_warning(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_disk_costs_only_the_caching(folder, monkeypatch, code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(start_cache.tempfile, "mkstemp", fail)
    assert_runs_on_with_one_warning(folder)


def test_a_read_only_folder_still_gives_hits(folder, monkeypatch, no_decomposition):
    expected, _ = mlp_start(folder)

    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(start_cache.os, "utime", fail)
    no_decomposition()
    assert_same(mlp_start(folder)[0], expected)


# -- size -------------------------------------------------------------------------------------------------------


def entry(folder, seed=0, age=0.0):
    """Write one entry, last used `age` seconds ago; its path."""
    torch.manual_seed(seed)
    (key,) = start_keys([nn.Linear(8, 6)], PissaConfig(r=2, seed=seed), "", 2, 1.0)
    cache = start_cache.StartCache(folder, 1 << 30)
    cache.store([key], [Factors(torch.ones(2, 8), torch.ones(6, 2), torch.ones(2))])
    path = folder / key.file_name
    used = path.stat().st_mtime - age
    os.utime(path, (used, used))
    return path


def test_the_least_recently_used_entries_go_first(folder):
    old, new, middle = (entry(folder, seed, age) for seed, age in ((0, 300), (1, 100), (2, 200)))
    size = old.stat().st_size
    assert limit(folder, 3 * size) == (0, 0)
    assert limit(folder, 3 * size - 1) == (1, size)
    assert names(folder) == sorted([new.name, middle.name])
    assert limit(folder, size) == (1, size)
    assert names(folder) == [new.name]
    assert limit(folder, 0) == (1, size)
    assert limit(folder, 0) == (0, 0)


def test_a_hit_is_a_use(folder):
    mlp_start(folder, seed=1)
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    used = set(names(folder))
    mlp_start(folder, seed=2)
    for path in folder.iterdir():
        if path.name not in used:
            os.utime(path, (1.1e9, 1.1e9))
    mlp_start(folder, seed=1)
    limit(folder, sum((folder / name).stat().st_size for name in used))
    assert set(names(folder)) == used


def test_filling_keeps_to_the_limit(folder, monkeypatch):
    monkeypatch.setenv("LLMREG_CACHE_LIMIT", "10kB")
    for seed in range(6):
        mlp_start(folder, seed=seed)
    assert 2 <= len(names(folder)) < 12
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10_000
    assert mlp_start(folder, seed=5)[1] == (2, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 20_000_000_000),
        ("123", 123),
        ("5GB", 5_000_000_000),
        ("1.5 kb", 1500),
        ("2GiB", 2 << 30),
        ("7M", 7_000_000),
    ],
)
def test_the_limit_is_read_with_its_unit(monkeypatch, text, expected):
    monkeypatch.setenv("LLMREG_CACHE_LIMIT", text)
    assert default_limit() == expected


@pytest.mark.parametrize("text", ["a lot", "-5", "5 parsecs", "GB", "3iB", "1e9", "nan"])
def test_a_limit_that_is_no_size_is_refused_before_anything_is_computed(folder, monkeypatch, text):
    monkeypatch.setenv("LLMREG_CACHE_LIMIT", text)
    with pytest.raises(RecipeError, match=r"LLMREG_CACHE_LIMIT.*5GB"), use_starts(folder):
        pytest.fail("entered")


def test_clear_removes_the_entries_and_nothing_else(folder):
    paths = [entry(folder, seed) for seed in range(3)]
    size = sum(path.stat().st_size for path in paths)
    outside = folder.parent / "outside"
    outside.write_text("keep")
    link, inside = folder / f"start-{'0' * 64}.safetensors", folder / f"start-{'1' * 64}.safetensors"
    link.symlink_to(outside)
    inside.mkdir()
    (inside / paths[0].name).write_text("keep")
    (folder / "start-me.safetensors").write_text("keep")
    unfinished = [folder / f".{path.name}.abc" for path in paths[:2]]
    for path in unfinished:
        path.write_text("half")
    os.utime(unfinished[0], (1e9, 1e9))  # its process is long gone
    kept = {link.name, inside.name, "start-me.safetensors", unfinished[1].name}
    assert clear(folder) == (4, size + 4)
    assert set(names(folder)) == kept
    assert (inside / paths[0].name).read_text() == outside.read_text() == "keep"
    assert clear(folder) == (0, 0)


def test_the_contents_name_method_rank_and_layer(folder):
    old = entry(folder, seed=0, age=500)
    new = entry(folder, seed=1)
    (folder / f"start-{'0' * 64}.safetensors").write_bytes(b"damaged")
    (folder / "other.txt").write_text("x")
    first, second = contents(folder)
    assert (first.method, first.rank, first.shape, first.bytes) == ("pissa", 2, (6, 8), new.stat().st_size)
    assert second.last_use == datetime.fromtimestamp(old.stat().st_mtime, UTC)
    assert first.last_use > second.last_use


def test_a_folder_that_is_not_there_is_empty(tmp_path):
    missing = tmp_path / "missing"
    assert (limit(missing, 0), clear(missing), contents(missing)) == ((0, 0), (0, 0), [])
    assert not missing.exists()


def test_the_default_folder_follows_llmreg_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREG_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "starts"
    monkeypatch.delenv("LLMREG_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "llmreg" / "starts"
