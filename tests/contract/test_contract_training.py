"""Training: the loss falls, only what is meant to be trained changes, and the gradients are the true ones."""

from __future__ import annotations

import peft
import pytest
import tiny_models
import torch
from contract_cases import adapter_tensors, cells, gradients, tensor_bytes, trained
from tiny_models import logits


def test_training_lowers_the_loss_and_changes_only_what_is_trained(cell):
    base = cell.base()
    before = tiny_models.state_bytes(base)
    base_logits = logits(base, cell.batch())
    model = cell.wrap(base)
    meant = {name for name, value in model.named_parameters() if value.requires_grad}
    values = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    losses = cell.train(model)
    assert losses[-1] < losses[0], losses
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert now.keys() == values.keys()
    changed = {name for name in now if not torch.equal(now[name], values[name])}
    assert changed == meant
    with model.disable_adapter():
        assert torch.equal(logits(model, cell.batch()), base_logits)
    assert tiny_models.state_bytes(model.unload()) == before


def test_only_the_adapter_and_the_modules_to_save_are_trained(float_cell):
    model = float_cell.wrap(modules_to_save=[float_cell.model.head])
    meant = {name for name, value in model.named_parameters() if value.requires_grad}
    head = {name for name in meant if ".modules_to_save.default." in name}
    assert head
    assert meant - head == set(trained(model))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(model.get_parameter(name).numel() for name in meant)
    assert total > trainable


def test_every_trained_parameter_gets_a_gradient_and_nothing_else_does(cell):
    model = cell.moved().train()
    cell.loss(model).backward()
    found = gradients(model)
    assert set(found) == {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(grad.isfinite().all() and grad.any() for grad in found.values())


@pytest.mark.parametrize("cell", cells("mlp", "conv1d", storages=("float32",)), ids=str)
@pytest.mark.parametrize("start", [True, False])
def test_the_gradient_is_the_finite_difference(cell, start):
    model = (cell.wrap() if start else cell.moved()).double()
    batch = cell.batch().double()
    cell.loss(model, batch).backward()
    parameters = trained(model)
    generator = torch.Generator().manual_seed(1)
    for name, grad in gradients(model).items():
        parameter = parameters[name]
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter.add_(direction, alpha=step)
                ends.append(cell.loss(model, batch))
            parameter.add_(direction, alpha=1e-5)
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((grad * direction).sum(), slope, atol=1e-8, rtol=1e-5)


def test_the_gradient_reaches_the_input_through_the_adapter(mlp_cell):
    x = mlp_cell.batch().double().requires_grad_()
    assert torch.autograd.gradcheck(mlp_cell.moved().double(), (x,), nondet_tol=1e-12)


def test_gradients_of_several_backward_passes_add_up(float_cell):
    model = float_cell.moved().train()
    float_cell.loss(model).backward()
    once = gradients(model)
    for _ in range(2):
        float_cell.loss(model).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * once[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cell", cells("llama", "gpt2", "bert", storages=("float32", "nf4")), ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(cell, reentrant):
    model = cell.moved().train()
    expected_loss = cell.loss(model)
    expected_loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.base_model.model.is_gradient_checkpointing
    loss = cell.loss(model)
    loss.backward()
    actual = gradients(model)
    assert torch.equal(loss, expected_loss)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("cell", cells("llama", "bert", storages=("nf4", "int8")), ids=str)
def test_a_base_prepared_for_quantised_training_trains(cell):
    base = peft.prepare_model_for_kbit_training(cell.base(), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = cell.wrap(base)
    losses = cell.train(model)
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("cell", cells("mlp", "llama", storages=("float32", "bfloat16", "nf4")), ids=str)
def test_training_under_autocast_lowers_the_loss(cell):
    model = cell.wrap()
    losses = cell.train(model, steps=6, autocast=True)
    assert losses[-1] < losses[0], losses
    assert {value.dtype for value in trained(model).values()} == {torch.float32}


def test_modules_to_save_train_a_copy_and_the_original_stays(float_cell):
    head = float_cell.model.head
    batch = float_cell.batch()
    base = float_cell.base()
    expected = logits(base, batch)
    original = {name: value.clone() for name, value in base.named_parameters() if f"{head}." in name}
    model = float_cell.wrap(base, modules_to_save=[head])
    assert torch.equal(logits(model, batch), expected)
    losses = float_cell.train(model)
    assert losses[-1] < losses[0]
    copies = {name: value for name, value in model.named_parameters() if f"{head}.modules_to_save.default" in name}
    kept = {name: value for name, value in model.named_parameters() if f"{head}.original_module" in name}
    assert len(copies) == len(kept) == len(original)
    for copy, stayed, before in zip(copies.values(), kept.values(), original.values(), strict=True):
        assert not torch.equal(copy, before)
        assert torch.equal(stayed, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)


def test_an_adapter_for_inference_trains_nothing(float_cell):
    model = float_cell.wrap(inference_mode=True)
    assert not any(value.requires_grad for value in model.parameters())


def test_set_requires_grad_freezes_and_releases_one_adapter(mlp_cell):
    model = mlp_cell.wrap()
    mlp_cell.second(model)
    meant = set(trained(model))
    model.set_requires_grad("default", requires_grad=False)
    assert not any(value.requires_grad for value in model.parameters())
    model.set_requires_grad("default", requires_grad=True)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == meant
    model.set_requires_grad(["default", "other"], requires_grad=True)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == meant | set(
        trained(model, "other")
    )


def test_a_step_with_no_learning_rate_changes_no_bit(float_cell):
    model = float_cell.moved().train()
    before = tensor_bytes(adapter_tensors(model))
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.0)
    float_cell.loss(model).backward()
    optimizer.step()
    assert tensor_bytes(adapter_tensors(model)) == before


def test_the_same_recipe_trains_to_the_same_bits(float_cell):
    """And neither the start nor the training draws from the global generator."""
    state = torch.get_rng_state()
    runs = []
    for _ in range(2):
        base = float_cell.base()
        torch.manual_seed(11 + len(runs))
        before = torch.get_rng_state()
        model = float_cell.wrap(base)
        float_cell.train(model)
        if float_cell.model.task_type != "SEQ_CLS":  # PEFT draws there for the copied head
            assert torch.equal(torch.get_rng_state(), before)
        runs.append(tensor_bytes(adapter_tensors(model)))
    torch.set_rng_state(state)
    assert runs[0] == runs[1]
