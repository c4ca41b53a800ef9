"""Calibration of every kind of model: stored anyhow, mapped to devices, checkpointed, wrapped, with experts."""

from __future__ import annotations

import copy

import language_models as lm
import peft
import pytest
import tiny_models
import torch
from accelerate import cpu_offload, dispatch_model
from language_models import LINEARS, relative
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from llmreg.calibration import Need, calibrate
from llmreg.errors import LlmregWarning

NEED = Need(sample_scale="signed_max", mean=True)


def same(a, b, tolerance: float = 1e-6) -> bool:
    return list(a) == list(b) and all(relative(a[n].second_moment(), b[n].second_moment()) <= tolerance for n in a)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_any_storage_gives_the_moments_of_its_own_inputs(storage: str) -> None:
    model, batches = tiny_models.llama(storage), lm.single(lm.documents())
    statistics = calibrate(model, batches, LINEARS)
    assert len(statistics.groups()) == 8
    for name in LINEARS:
        assert relative(statistics[name].second_moment(), lm.dense_moment(lm.inputs_of(model, name, batches))) < 1e-6


def test_gradient_checkpointing_in_training_mode_changes_nothing() -> None:
    model, batches = tiny_models.llama(), lm.single(lm.documents())
    plain = calibrate(model, batches, LINEARS, NEED)
    model.gradient_checkpointing_enable()
    model.train()
    model.enable_input_require_grads()
    assert same(calibrate(model, batches, LINEARS, NEED), plain, 0)
    assert model.training
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["mapped", "disk", "offloaded"])
def test_device_mapped_models_are_summed_alike(kind: str, tmp_path) -> None:
    model, batches = tiny_models.llama(), lm.single(lm.documents())
    plain = calibrate(model, batches, LINEARS, NEED)
    mapped = copy.deepcopy(model)
    if kind == "offloaded":
        mapped = cpu_offload(mapped, execution_device=torch.device("cpu"))
        assert mapped.model.layers[0].mlp.up_proj.weight.is_meta
    else:
        last = "disk" if kind == "disk" else "cpu"
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": last}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        mapped = dispatch_model(mapped, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    hooks = [module._hf_hook for module in mapped.modules() if hasattr(module, "_hf_hook")]
    statistics = calibrate(mapped, batches, LINEARS, NEED)
    assert same(statistics, plain, 0)
    assert len(statistics.groups()) == 8
    assert hooks == [module._hf_hook for module in mapped.modules() if hasattr(module, "_hf_hook")]
    assert mapped.model.layers[1].mlp.up_proj.weight.is_meta == (kind != "mapped")


def test_an_adapted_model_is_summed_by_its_wrapped_names() -> None:
    model, batches = tiny_models.llama(), lm.single(lm.documents())
    plain = calibrate(model, batches, LINEARS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    names = [f"base_model.model.{name}" for name in LINEARS]
    statistics = calibrate(wrapped, batches, names, memory_budget=plain.bytes)
    assert list(statistics) == names
    assert all(
        relative(statistics[f"base_model.model.{n}"].second_moment(), plain[n].second_moment()) < 1e-6 for n in plain
    )


def test_conv1d_layers_and_models_without_a_head_are_reached() -> None:
    gpt2, bert = tiny_models.gpt2(), tiny_models.bert_classifier()
    batches = lm.single(lm.documents())
    names = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
    found = calibrate(gpt2, batches, names, memory_budget=10**7)
    assert [found[name].dim for name in names] == [48, 192]
    names = ["bert.encoder.layer.0.attention.self.query", "classifier"]
    found = calibrate(bert, [lm.padded(lm.documents(), "right")], names, unreached="report")
    assert found[names[0]].count == 33
    assert found["classifier"].count == 4  # one pooled vector a row: not the batch's tokens


def test_inputs_of_two_and_three_dimensions_count_alike() -> None:
    model, x = tiny_models.mlp(), torch.randn(3, 4, 20)
    assert same(calibrate(model, [x], ["first"]), calibrate(model, [x.view(12, 20)], ["first"]))
    assert calibrate(model, [x], ["first"])["first"].samples == 3
    assert calibrate(model, [x.view(12, 20)], ["first"])["first"].samples == 1


def test_an_encoder_and_its_decoder_are_both_reached() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.ones(2, 7).long(), "decoder_input_ids": torch.ones(2, 3).long()}
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    found = calibrate(model, [batch], names)
    assert [(found[name].count, found[name].samples) for name in names] == [(14, 2), (6, 2)]


# -- experts --------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Each token goes to expert 0 or 1 by its sign; expert 2 is called with no token, expert 3 is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(20, 20)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(20, 8), "up": nn.Linear(20, 8)}) for _ in range(4)
        )

    def forward(self, x):
        self.dense(x)
        flat = x.reshape(-1, 20)
        for number in (0, 1, 2):
            chosen = flat[(flat[:, 0] > 0).long() == number]
            self.experts[number]["gate"](chosen) * self.experts[number]["up"](chosen)


NAMES = ["dense", *(f"experts.{i}.{p}" for i in range(4) for p in ("gate", "up"))]


def test_experts_count_what_they_get_and_idle_ones_are_reported() -> None:
    x = torch.randn(2, 9, 20)
    found = calibrate(Experts(), [x], NAMES)
    positive = x.reshape(-1, 20)[x.reshape(-1, 20)[:, 0] > 0]
    assert found["experts.1.up"] is found["experts.1.gate"]
    assert relative(found["experts.1.up"].second_moment(), lm.dense_moment([positive])) < 1e-6
    assert found["dense"].count == found["experts.0.up"].count + found["experts.1.up"].count == 18
    assert found.report.unreached == tuple(NAMES[5:])
    assert found.report.unaligned == tuple(NAMES[1:5])
    assert found.report.masks_missed == ()


def test_experts_that_may_have_seen_padding_are_warned_of() -> None:
    batch = {"inputs_embeds": torch.randn(2, 9, 20), "attention_mask": torch.ones(2, 9)}
    batch["attention_mask"][0, 5:] = 0
    with pytest.warns(LlmregWarning, match="batches without padding"):
        found = calibrate(Experts(), [batch], NAMES, forward=lambda model, batch: model(batch["inputs_embeds"]))
    assert found["dense"].count == 14
    assert found.report.masks_missed == tuple(NAMES[1:5])


def test_a_cap_is_no_padding() -> None:
    assert calibrate(Experts(), [torch.randn(2, 9, 20)], NAMES, max_tokens=5)["dense"].count == 5
