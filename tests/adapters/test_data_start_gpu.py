"""Starts from data on a GPU: the same as on the CPU, also where the model stays on the CPU or is in 4 bits."""

from __future__ import annotations

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch

import llmreg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONFIGS = {
    "corda ipm": lambda: llmreg.CordaConfig(r=4, target_modules=TARGETS),
    "corda kpm": lambda: llmreg.CordaConfig(r=4, mode="kpm", target_modules=TARGETS),
    "eva": lambda: llmreg.EvaConfig(r=4, rho=1, target_modules=TARGETS),
}


def batches(device: str):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, tiny_models.VOCABULARY, (4, 16), generator=generator) for _ in range(4)]
    return [{"input_ids": i.to(device), "attention_mask": torch.ones_like(i).to(device)} for i in ids]


def products(model):
    return {
        name: (layer.start("default").B @ layer.start("default").A).double().cpu()
        if model.peft_config["default"].method == "corda"
        else layer.start("default").A.double().cpu().abs()
        for name, layer in saved.additive_layers(model).items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_on_the_gpu_starts_as_on_the_cpu(name):
    found = {}
    for device in ("cpu", "cuda"):
        model = peft.get_peft_model(tiny_models.llama().to(device), CONFIGS[name]())
        llmreg.initialize(model, batches(device))
        assert all(
            layer.lora_A["default"].weight.device.type == device for layer in saved.additive_layers(model).values()
        )
        found[device] = products(model)
    for layer, expected in found["cpu"].items():
        assert saved.relative(found["cuda"][layer], expected) < 2e-2, layer


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_gpu_adds_nothing_at_the_start_and_trains(name, dtype, tokens):
    base = tiny_models.llama().to("cuda", dtype)
    before = tiny_models.logits(base, tokens.cuda())
    model = peft.get_peft_model(base, CONFIGS[name]())
    llmreg.initialize(model, batches("cuda"))
    assert torch.equal(tiny_models.logits(model, tokens.cuda()), before)
    losses = tiny_models.train(model, tokens.cuda(), steps=5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [*CONFIGS, "eora"])
def test_a_4_bit_model_on_the_gpu_starts_and_trains(name, tmp_path, tokens):
    checkpoint = saved.checkpoint(tmp_path / "base")
    base = saved.load_base(checkpoint, "nf4").cuda()
    config = llmreg.EoraConfig(r=4, target_modules=TARGETS) if name == "eora" else CONFIGS[name]()
    model = peft.get_peft_model(base, config)
    llmreg.initialize(model, batches("cuda"))
    losses = tiny_models.train(model, tokens.cuda(), steps=5)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(saved.load_base(checkpoint, "nf4").cuda(), tmp_path / "adapter")
    expected = saved.outputs(model, tokens.cuda())
    assert saved.relative(saved.outputs(loaded, tokens.cuda()), expected) < 1e-3
