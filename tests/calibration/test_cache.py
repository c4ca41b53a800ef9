"""Statistics on disk: found again by base, data and settings; damaged or foreign ones never used."""

from __future__ import annotations

import json
import logging
import os

import language_models as lm
import pytest
import tiny_models
import torch
from language_models import LINEARS
from safetensors import safe_open
from torch import nn

from llmreg.calibration import CalibrationCache, Need, Statistics, calibrate, load_statistics, save_statistics
from llmreg.errors import BaseMismatchError, LlmregWarning

NEED = Need(sample_scale="signed_max", mean=True)


class Counting(list):
    """Batches that know how often they were read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


@pytest.fixture
def batches():
    return Counting(lm.single(lm.documents()))


@pytest.fixture
def cache(tmp_path):
    return CalibrationCache(tmp_path / "cache", base="base-1", data="data-1")


def entry(cache: CalibrationCache):
    (path,) = cache.folder.iterdir()
    return path


def assert_same_bits(a: Statistics, b: Statistics) -> None:
    assert list(a) == list(b)
    assert [names for names, _ in a.groups()] == [names for names, _ in b.groups()]
    for (_, mine), (_, theirs) in zip(a.groups(), b.groups(), strict=True):
        assert mine.form() == theirs.form()
        assert (mine.count, mine.samples) == (theirs.count, theirs.samples)
        assert all(torch.equal(x, y) for x, y in zip(mine.parts(), theirs.parts(), strict=True))


@pytest.mark.parametrize("sketch", [None, 8])
def test_a_second_calibration_reads_the_first_bit_for_bit(cache, batches, sketch: int | None) -> None:
    model = tiny_models.llama()
    first = calibrate(model, batches, LINEARS, NEED, cache=cache, sketch=sketch)
    second = calibrate(model, batches, LINEARS, NEED, cache=cache, sketch=sketch)
    assert batches.reads == 1
    assert_same_bits(second, first)
    assert (first.report.cached, second.report.cached) == (False, True)
    assert second.report.tokens == 33


@pytest.mark.parametrize(
    "change",
    [
        {"need": Need()},
        {"layers": LINEARS[:3]},
        {"sketch": 8},
        {"seed": 1},
        {"max_tokens": 20},
        {"exact": True},
        {"base": "base-2"},
        {"data": "data-2"},
    ],
    ids=str,
)
def test_another_base_data_or_setting_is_gathered_anew(cache, batches, change: dict) -> None:
    model = tiny_models.llama()
    calibrate(model, batches, LINEARS, NEED, cache=cache)
    arguments = {"layers": LINEARS, "need": NEED, **change}
    names = {key: arguments.pop(key, getattr(cache, key)) for key in ("base", "data")}
    calibrate(model, batches, **arguments, cache=CalibrationCache(cache.folder, **names))
    assert batches.reads == 2
    assert len(list(cache.folder.iterdir())) == 2


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: b"x" * 100, lambda data: data + b"x"])
def test_a_damaged_file_is_noted_and_replaced(cache, batches, damage, caplog) -> None:
    model = tiny_models.llama()
    first = calibrate(model, batches, LINEARS, NEED, cache=cache)
    path = entry(cache)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.INFO, "llmreg"):
        again = calibrate(model, batches, LINEARS, NEED, cache=cache)
    assert "damaged" in caplog.text
    assert not again.report.cached
    assert_same_bits(again, first)
    assert calibrate(model, batches, LINEARS, NEED, cache=cache).report.cached


def test_an_interrupted_write_leaves_no_file(cache, batches, monkeypatch) -> None:
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_models.llama(), batches, LINEARS, NEED, cache=cache)
    assert list(cache.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_only_the_caching(tmp_path, batches) -> None:
    (tmp_path / "file").write_text("")
    cache = CalibrationCache(tmp_path / "file" / "cache", base="b", data="d")
    with pytest.warns(LlmregWarning, match="goes on without"):
        assert calibrate(tiny_models.llama(), batches, LINEARS, NEED, cache=cache).report.tokens == 33


def test_a_hit_beyond_the_memory_budget_is_gathered_within_it(cache, batches) -> None:
    model = tiny_models.llama()
    whole = calibrate(model, batches, LINEARS, cache=cache, memory_budget=10**9)
    small = calibrate(model, batches, LINEARS, cache=cache, memory_budget=whole.bytes // 2, exact=None, sketch=None)
    assert small.report.passes > 1 or not small[LINEARS[0]].exact


def test_the_same_hash_on_a_model_of_another_width_is_refused(cache, batches) -> None:
    model = tiny_models.llama()
    calibrate(model, batches, LINEARS[:1], cache=cache)
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 64)
    with pytest.raises(BaseMismatchError, match="width 32 here, they are of width 64"):
        calibrate(model, batches, LINEARS[:1], cache=cache)


def test_check_names_a_layer_that_the_model_does_not_have(batches) -> None:
    statistics = calibrate(tiny_models.llama(), batches, LINEARS)
    statistics.check(tiny_models.llama("nf4"))
    with pytest.raises(BaseMismatchError, match="has no layer"):
        statistics.check(tiny_models.mlp())


def test_a_file_of_its_own_loads_for_its_base_only(tmp_path, batches) -> None:
    statistics, path = calibrate(tiny_models.llama(), batches, LINEARS, NEED), tmp_path / "statistics.safetensors"
    save_statistics(path, statistics, base="base-1")
    assert_same_bits(load_statistics(path, base="base-1"), statistics)
    with pytest.raises(BaseMismatchError, match="of the base model base-1, not of base-2"):
        load_statistics(path, base="base-2")
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(BaseMismatchError, match="damaged"):
        load_statistics(path, base="base-1")
    with pytest.raises(BaseMismatchError, match="no calibration statistics"):
        load_statistics(tmp_path / "absent", base="base-1")


def test_the_file_is_plain_safetensors_with_json(cache, batches) -> None:
    calibrate(tiny_models.llama(), batches, LINEARS, NEED, cache=cache)
    with safe_open(entry(cache), "pt") as file:
        header = json.loads(file.metadata()["llmreg_calibration"])
        assert len(header["groups"]) == 8
        assert len(list(file.keys())) == 24
    assert header["report"]["tokens"] == 33
