"""torch.compile: no graph break, the same numbers, and adapters that change under a compiled model."""

from __future__ import annotations

import shutil

import pytest
import tiny_models
import torch
from contract_cases import cells, gradients
from tiny_models import logits


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(cell, model, *, backend, fullgraph):
    """Loss, gradients and outputs in evaluation mode are those of the eager model."""
    expected = cell.loss(model)
    expected.backward()
    grads = gradients(model)
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    loss = cell.loss(compiled)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    actual = gradients(model)
    assert actual.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(logits(compiled, cell.batch()), logits(model, cell.batch()), atol=1e-5, rtol=1e-5)
    return compiled


def test_an_mlp_compiles_to_one_graph(mlp_cell):
    check_compiled(mlp_cell, mlp_cell.moved(), backend="aot_eager", fullgraph=True)


@pytest.mark.slow
def test_a_language_model_compiles(llama_cell):
    model = llama_cell.moved(tiny_models.llama(layers=1))
    check_compiled(llama_cell, model, backend="aot_eager", fullgraph=False)


def test_a_fresh_adapter_compiles_to_the_compiled_base(mlp_cell):
    base, model = mlp_cell.base(), mlp_cell.wrap()
    batch = mlp_cell.batch()
    assert torch.equal(
        logits(torch.compile(model, backend="aot_eager"), batch),
        logits(torch.compile(base, backend="aot_eager"), batch),
    )


def test_a_compiled_model_sees_what_is_trained_chosen_disabled_and_merged(mlp_cell):
    batch = mlp_cell.batch()
    model = mlp_cell.moved()
    mlp_cell.second(model)
    compiled = torch.compile(model, backend="aot_eager")

    def check():
        torch.testing.assert_close(logits(compiled, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
        return logits(compiled, batch)

    first = check()
    losses = mlp_cell.train(compiled)
    assert losses[-1] < losses[0]
    trained = check()
    model.set_adapter("other")
    second = check()
    with model.disable_adapter():
        disabled = check()
    torch.testing.assert_close(disabled, logits(mlp_cell.base(), batch), atol=1e-6, rtol=1e-6)
    assert all((one - two).abs().max() > 1e-4 for one, two in ((first, trained), (trained, second), (second, disabled)))
    model.merge_adapter()
    torch.testing.assert_close(check(), second, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(check(), second, atol=1e-4, rtol=1e-4)


def test_one_graph_serves_batches_of_any_size(mlp_cell):
    model = mlp_cell.moved()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (3, 4, 6):
        batch = mlp_cell.batch(rows)
        torch.testing.assert_close(logits(compiled, batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_a_model_compiled_before_it_is_wrapped_is_told_apart_by_its_layers(mlp_cell):
    """PEFT wraps in place, so a compiled base computes with the adapter once it is there."""
    batch = mlp_cell.batch()
    base = mlp_cell.base()
    expected = logits(base, batch)
    compiled = torch.compile(base, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, batch), expected, atol=1e-6, rtol=1e-6)
    model = mlp_cell.moved(base)
    torch.testing.assert_close(logits(compiled, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(compiled, batch), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells("mlp", "llama", storages=("float32",)), ids=str)
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_loss_and_gradients(cell):
    check_compiled(cell, cell.moved(), backend="inductor", fullgraph=False)
