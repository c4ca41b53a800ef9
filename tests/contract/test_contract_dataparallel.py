"""torch.nn.DataParallel: replicas compute what the model computes; what cannot be split over them is refused.

PEFT neither supports nor refuses DataParallel as a whole. What must not happen is a silently wrong result: a replica
shares the containers of its original, its parameters are plain tensors, and a list such as `adapter_names` is handed
whole to each replica. Replicas are made here by torch's own `replicate`, with copies on the CPU in place of the
broadcast to GPUs.
"""

from __future__ import annotations

import pytest
import torch
from contract_cases import LOUD, adapter_tensors, cells, gradients, tensor_bytes
from tiny_models import logits
from torch.nn.parallel import replicate


@pytest.fixture
def replicas(monkeypatch):
    """A function model -> its two replicas, as DataParallel makes them at each forward pass."""

    def copies(tensors, devices, detach=False):
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    def make(model):
        monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", copies)
        monkeypatch.setitem(replicate.__globals__, "_get_device_index", lambda device, optional: device)
        return replicate(model, [0, 1])

    return make


def test_without_gpus_it_passes_through(float_cell):
    if torch.cuda.is_available():
        pytest.skip("about a machine without GPUs")
    batch = float_cell.batch()
    model = float_cell.moved()
    assert torch.equal(logits(torch.nn.DataParallel(model), batch), logits(model, batch))


@pytest.mark.parametrize("cell", cells(storages=("float32", "bfloat16")), ids=str)
def test_replicas_compute_what_the_model_computes(cell, replicas):
    batch = cell.batch()
    model = cell.moved()
    expected = logits(model, batch)
    before = tensor_bytes(adapter_tensors(model))
    assert not [value for replica in replicas(model) for value in replica.parameters()], "replicas have none"
    tolerance = 1e-5 if cell.storage == "float32" else 2e-2
    halves = [logits(replica, rows) for replica, rows in zip(replicas(model), batch.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(halves), expected, atol=tolerance, rtol=tolerance)
    assert tensor_bytes(adapter_tensors(model)) == before


def test_the_gradients_of_the_replicas_arrive_at_the_model(float_cell, replicas):
    model = float_cell.moved().train()
    batch = float_cell.batch()
    halves = batch.split(2)
    for half in halves:
        float_cell.loss(model, half).backward()
    expected = gradients(model)
    for replica, half in zip(replicas(model), halves, strict=True):
        float_cell.loss(replica, half).backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-4)


def test_replicas_follow_a_disabled_adapter(mlp_cell, replicas):
    batch = mlp_cell.batch()
    model = mlp_cell.moved()
    with model.disable_adapter():
        halves = [logits(replica, rows) for replica, rows in zip(replicas(model), batch.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(halves), logits(mlp_cell.base(), batch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("model_name", ["mlp", "bert"])
def test_a_mixed_batch_is_refused_because_the_names_cannot_be_split(case, replicas, model_name):
    """DataParallel hands all names to each replica, which has only a part of the rows."""
    (cell,) = (cell for cell in cells(model_name, storages=("float32",)) if cell.case is case)
    batch = cell.batch()
    model = cell.moved()
    cell.second(model)
    names = ["default", "other", "default", "other"]
    for replica, rows in zip(replicas(model), batch.split(2), strict=True):
        with pytest.raises(LOUD):
            logits(replica, rows, adapter_names=names)
