"""Decompositions side by side: the same starts, and torch's threads as they were."""

from __future__ import annotations

import threading

import peft
import pytest
import tiny_models
import torch
from torch import nn

import llmreg
from llmreg.adapters import start
from llmreg.adapters.side_by_side import at_once, side_by_side


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_results_come_in_order_from_threads_of_one_thread_each():
    def work(item: int) -> tuple[int, int, bool, bool]:
        return item, torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name == "MainThread"

    with side_by_side() as run:
        assert run(work, range(6)) == [(item, 1, False, False) for item in range(6)]
        assert run(work, [7]) == [(7, 2, True, True)]  # too few for two threads: all threads work on it
    assert torch.get_num_threads() == 2
    assert [at_once(count) for count in (0, 1, 2, 9)] == [1, 1, 2, 2]


def test_an_exception_reaches_the_caller_and_the_threads_are_restored():
    def fail(item: int) -> None:
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"), side_by_side() as run:
        run(fail, range(4))
    assert torch.get_num_threads() == 2


def _factors(threads: int) -> dict[str, torch.Tensor]:
    torch.set_num_threads(threads)
    model = peft.get_peft_model(tiny_models.llama(), llmreg.PissaConfig(r=4, target_modules="all-linear"))
    return {name: value.clone() for name, value in model.state_dict().items() if "_A0." in name or "_B0." in name}


def test_the_start_has_the_same_bits_on_one_thread_and_on_two(monkeypatch):
    monkeypatch.setitem(start._BATCH_BYTES, "cpu", 1)  # one layer a batch
    one, two = _factors(1), _factors(2)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_bad_weight_is_named_from_another_thread(monkeypatch):
    monkeypatch.setitem(start._BATCH_BYTES, "cpu", 1)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    net.config = {"model_type": "custom"}
    with torch.no_grad():
        net[2].weight[1, 1] = float("nan")
    with pytest.raises(llmreg.errors.WeightError, match=r"2"):
        peft.get_peft_model(net, llmreg.PissaConfig(r=2, target_modules=["0", "1", "2", "3"]))
