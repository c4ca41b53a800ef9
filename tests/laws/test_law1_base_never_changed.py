"""Law 1: the base model is never changed, whatever is done with adapters, in every storage and layer layout."""

from __future__ import annotations

import re

import peft
import pytest
import tiny_models
import torch

from llmreg.weights import bytes_hash

MODELS = {
    "llama": (tiny_models.llama, "all-linear", tiny_models.STORAGES),
    "gpt2-conv1d": (tiny_models.gpt2, ["c_attn", "c_fc", "c_proj"], ("float32", "bfloat16")),
    "bert": (tiny_models.bert_classifier, ["query", "dense"], ("float32", "nf4")),
}
CASES = [
    pytest.param((builder, targets, storage), id=f"{name}-{storage}")
    for name, (builder, targets, storages) in MODELS.items()
    for storage in storages
]


def adapted_layers(model) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A0")]


@pytest.fixture(params=CASES)
def case(request, method, tokens):
    """`(base, targets, tokens, batch for training)`; int8 layers have run once, as bitsandbytes moves their scales."""
    builder, targets, storage = request.param
    base = builder(storage)
    tiny_models.logits(base, tokens)
    return base, targets, tokens


def batch_of(base, tokens):
    if hasattr(base, "classifier"):
        return {"input_ids": tokens, "labels": torch.tensor([0, 1, 2])}
    return {"input_ids": tokens, "labels": tokens}


def train(model, base, tokens):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch_of(base, tokens)).loss.backward()
        optimizer.step()
    model.eval()


def test_wrapping_training_disabling_and_unloading_leave_every_byte_as_it_was(case, method):
    base, targets, tokens = case
    before, bytes_before = tiny_models.logits(base, tokens), tiny_models.state_bytes(base)

    model = peft.get_peft_model(base, method(r=4, target_modules=targets))
    layers = adapted_layers(model)
    hash_before = bytes_hash(model, layers)
    assert torch.equal(tiny_models.logits(model, tokens), before), "step 0 is the base"

    train(model, base, tokens)
    assert not torch.equal(tiny_models.logits(model, tokens), before), "training has an effect"
    assert bytes_hash(model, layers) == hash_before
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, tokens), before), "a disabled adapter is the base"
    assert not torch.equal(tiny_models.logits(model, tokens), before), "and it comes back"

    unloaded = model.unload()
    assert torch.equal(tiny_models.logits(unloaded, tokens), before), "unloading gives the base"
    assert tiny_models.state_bytes(unloaded) == bytes_before
    assert not adapted_layers(unloaded)


def test_deleting_an_adapter_leaves_every_byte_as_it_was(case, method):
    base, targets, tokens = case
    before, bytes_before = tiny_models.logits(base, tokens), tiny_models.state_bytes(base)
    model = peft.get_peft_model(base, method(r=4, target_modules=targets))
    model.add_adapter("other", method(r=2, target_modules=targets))
    tiny_models.perturb(model, "default")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(tiny_models.logits(model, tokens), before)
    assert tiny_models.state_bytes(model.unload()) == bytes_before


def test_two_adapters_of_different_settings_share_one_base(case, method):
    base, targets, tokens = case
    before, bytes_before = tiny_models.logits(base, tokens), tiny_models.state_bytes(base)
    alone = {}
    settings = {"default": {"r": 4, "lora_alpha": 4}, "other": {"r": 2, "lora_alpha": 8, "use_rslora": True}}
    model = peft.get_peft_model(base, method(target_modules=targets, **settings["default"]))
    model.add_adapter("other", method(target_modules=targets, **settings["other"]))
    for name in settings:
        model.set_adapter(name)
        assert torch.equal(tiny_models.logits(model, tokens), before)
        tiny_models.perturb(model, name)
        alone[name] = tiny_models.logits(model, tokens)
        assert not torch.equal(alone[name], before)
    model.set_adapter("default")
    assert torch.equal(tiny_models.logits(model, tokens), alone["default"]), "the other one has no influence"
    assert tiny_models.state_bytes(model.unload()) == bytes_before


@pytest.mark.parametrize(
    ("case", "lora_first"),
    [
        pytest.param(
            *case.values,
            lora_first,
            id=f"{case.id}-{'lora' if lora_first else 'ours'}-first",
            marks=[] if lora_first or case.id.endswith("float32") else [pytest.mark.slow],
        )
        for case in CASES
        for lora_first in (True, False)
    ],
    indirect=["case"],
)
def test_plain_lora_lives_beside_in_both_orders(case, method, lora_first):
    base, targets, tokens = case
    before, bytes_before = tiny_models.logits(base, tokens), tiny_models.state_bytes(base)
    configs = {
        "lora": peft.LoraConfig(r=3, target_modules=targets),
        "ours": method(r=4, target_modules=targets),
    }
    order = ["lora", "ours"] if lora_first else ["ours", "lora"]
    model = peft.get_peft_model(base, configs[order[0]], adapter_name=order[0])
    model.add_adapter(order[1], configs[order[1]])
    outputs = {}
    for name in order:
        model.set_adapter(name)
        assert torch.equal(tiny_models.logits(model, tokens), before)
        train(model, base, tokens)
        tiny_models.perturb(model, name)
        outputs[name] = tiny_models.logits(model, tokens)
    model.set_adapter(order[0])
    assert torch.equal(tiny_models.logits(model, tokens), outputs[order[0]])
    model.delete_adapter(order[1])
    assert torch.equal(tiny_models.logits(model, tokens), outputs[order[0]])
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model, tokens), before)
    assert tiny_models.state_bytes(model.unload()) == bytes_before


def test_tied_embeddings_stay_tied_and_untouched(method, tokens):
    base = tiny_models.llama(tied=True)
    before = tiny_models.state_bytes(base)
    model = peft.get_peft_model(base, method(r=4, target_modules="all-linear"))
    train(model, base, tokens)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert tiny_models.state_bytes(model.unload()) == before
    merged = peft.get_peft_model(base, method(r=4, target_modules="all-linear")).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


def test_a_base_that_trains_its_own_weights_elsewhere_keeps_their_flags(method):
    base = tiny_models.mlp()
    base.head.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    model = peft.get_peft_model(base, method(r=2, target_modules=["first"]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(re.search(r"lora_[ABS]\.default", name) for name in trainable)
    assert flags["first.weight"]
