"""The forward pass: at the start the base bit for bit, then another finite function of the same dtype and shape."""

from __future__ import annotations

import contextlib

import peft
import pytest
import tiny_models
import torch
from contract_cases import adapter_layers, adapter_tensors, cells, trained
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import LoraLayer
from tiny_models import logits


def test_a_fresh_adapter_is_the_base_and_a_moved_one_is_not(cell):
    batch = cell.batch()
    base = logits(cell.base(), batch)
    model = cell.wrap()
    assert torch.equal(logits(model, batch), base)
    out = logits(cell.move(model), batch)
    assert (out.float() - base.float()).abs().max() > 1e-3
    assert (out.dtype, out.shape) == (base.dtype, base.shape)
    assert out.isfinite().all()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), out)


def test_a_fresh_adapter_is_the_base_in_training_mode_too(float_cell):
    model = float_cell.wrap().train()
    base = float_cell.base().train()
    assert torch.equal(float_cell.loss(model), float_cell.loss(base))


@pytest.mark.parametrize("cell", cells(storages=("bfloat16", "float16")), ids=str)
@pytest.mark.parametrize("raised", [True, False])
def test_in_half_precision_the_adapter_is_fp32_unless_asked_otherwise(cell, raised):
    model = peft.get_peft_model(cell.base(), cell.config(), autocast_adapter_dtype=raised)
    expected = torch.float32 if raised or cell.case.always_float32 else tiny_models.FLOATS[cell.storage]
    assert {value.dtype for value in trained(model).values()} == {expected}
    batch = cell.batch()
    base = logits(cell.base(), batch)
    assert torch.equal(logits(model, batch), base)
    out = logits(cell.move(model), batch)
    assert out.dtype == base.dtype
    assert not torch.equal(out, base)


@pytest.mark.parametrize("cell", cells("mlp", "llama", "bert", storages=("float32", "bfloat16", "nf4")), ids=str)
def test_under_autocast_the_start_is_the_base(cell):
    def rounded(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # its cache of weights must not outlive `move`
            return logits(model, batch)

    batch = cell.batch()
    base = rounded(cell.base())
    model = cell.wrap()
    assert torch.equal(rounded(model), base)
    moved = rounded(cell.move(model))
    assert moved.isfinite().all()
    assert (moved.float() - base.float()).abs().max() > 1e-3
    torch.testing.assert_close(moved.float(), logits(model, batch).float(), atol=0.2, rtol=0.2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casting_the_whole_model_keeps_the_start_and_the_function(mlp_cell, dtype):
    base = mlp_cell.base().to(dtype)
    batch = mlp_cell.batch().to(dtype)
    assert torch.equal(logits(mlp_cell.wrap().to(dtype), batch), logits(base, batch))
    model = mlp_cell.moved()
    expected = logits(model, mlp_cell.batch())
    torch.testing.assert_close(logits(model.to(dtype), batch).float(), expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,)])
def test_any_leading_shape_of_the_input_is_kept(mlp_cell, leading):
    model = mlp_cell.moved()
    x = torch.randn(*leading, 20, generator=torch.Generator().manual_seed(0))
    out = logits(model, x)
    assert out.shape == (*leading, 5)
    torch.testing.assert_close(out.reshape(-1, 5), logits(model, x.reshape(-1, 20)), atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_the_others_nor_on_memory_layout(mlp_cell):
    model = mlp_cell.moved()
    batch = mlp_cell.batch()
    whole = logits(model, batch)
    for row in range(len(batch)):
        torch.testing.assert_close(logits(model, batch[row : row + 1])[0], whole[row], atol=1e-5, rtol=1e-5)
    strided = batch.t().contiguous().t()
    assert not strided.is_contiguous()
    torch.testing.assert_close(logits(model, strided), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cell", cells("llama", "gpt2", storages=("float32",)), ids=str)
def test_generation_follows_the_adapter_and_disabling_it_the_base(cell):
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    base = cell.base()
    batch = cell.batch()
    expected = base.generate(batch, **settings)
    model = cell.wrap(base)
    assert torch.equal(model.generate(input_ids=batch, **settings), expected)
    for seed in range(4):
        cell.move(model, seed=seed)
    cached = model.generate(input_ids=batch, **settings)
    assert not torch.equal(cached, expected)
    assert torch.equal(model.generate(input_ids=batch, use_cache=False, **settings), cached)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=batch, **settings), expected)


def test_leaving_the_context_of_disable_adapter_restores_what_was_before_it(float_cell):
    batch = float_cell.batch()
    base = logits(float_cell.base(), batch)
    model = float_cell.moved()
    moved = logits(model, batch)
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    with contextlib.suppress(InterruptedError), model.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
        raise InterruptedError
    assert torch.equal(logits(model, batch), moved)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), base), "it was disabled before the context"
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, batch), moved)


def test_injected_without_a_peft_model_it_works_the_same(float_cell):
    batch = float_cell.batch()
    base = float_cell.base()
    expected = logits(base, batch)
    injected = peft.inject_adapter_in_model(float_cell.config(task_type=None), base)
    assert injected is base
    assert torch.equal(logits(injected, batch), expected)
    assert len(adapter_layers(injected)) == len(adapter_layers(float_cell.wrap()))
    moved = logits(float_cell.move(injected), batch)
    assert torch.equal(moved, logits(float_cell.moved(), batch))


def test_a_scale_of_zero_is_the_base_and_of_one_changes_nothing(mlp_cell):
    """PEFT refuses to rescale what has no scale."""
    batch = mlp_cell.batch()
    base = logits(mlp_cell.base(), batch)
    model = mlp_cell.moved()
    moved = logits(model, batch)
    if not all(isinstance(layer, LoraLayer) for layer in adapter_layers(model).values()):
        with pytest.raises(ValueError, match="scaling"), rescale_adapter_scale(model, 0.0):
            pass
    else:
        with rescale_adapter_scale(model, 1.0):
            assert torch.equal(logits(model, batch), moved)
        with rescale_adapter_scale(model, 0.0):
            assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), moved)


def test_the_frozen_part_of_the_adapter_is_never_changed_by_a_forward_pass(float_cell):
    model = float_cell.moved()
    before = {name: value.clone() for name, value in adapter_tensors(model).items()}
    float_cell.loss(model).backward()
    after = adapter_tensors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
