"""Inputs that several layers share are summed once, recognised by the tensor and never by its contents."""

from __future__ import annotations

import weakref

import language_models as lm
import pytest
import tiny_models
import torch
from language_models import LINEARS, NEEDS, assert_close, relative
from torch import nn

from llmreg.calibration import calibrate
from llmreg.errors import UnsupportedError


def test_q_k_v_and_gate_up_share_one_object_and_others_do_not() -> None:
    statistics = calibrate(tiny_models.llama(), lm.single(lm.documents()), LINEARS)
    groups = {tuple(name.removeprefix("model.layers.") for name in names) for names, _ in statistics.groups()}
    assert groups == {
        *((f"{i}.self_attn.q_proj", f"{i}.self_attn.k_proj", f"{i}.self_attn.v_proj") for i in range(2)),
        *((f"{i}.self_attn.o_proj",) for i in range(2)),
        *((f"{i}.mlp.gate_proj", f"{i}.mlp.up_proj") for i in range(2)),
        *((f"{i}.mlp.down_proj",) for i in range(2)),
    }


def test_sharing_changes_no_number() -> None:
    model, batches = tiny_models.llama(), lm.single(lm.documents())
    alone = calibrate(model, batches, LINEARS, NEEDS[0], share_inputs=False)
    assert len(alone.groups()) == len(LINEARS)
    assert_close(calibrate(model, batches, LINEARS, NEEDS[0]), alone, 1e-12)


class Reused(nn.Module):
    """Overwrites its input in place between two layers, or frees it, so that an address is seen twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x.clone()
        self.first(x)
        if self.kind == "in place":
            x.add_(1)
        elif self.kind == "freed":
            shape = x.shape
            del x
            x = torch.full(shape, 3.0)
        elif self.kind == "view":
            x = x.view(-1, 6)[: x.shape[0] - 1]
        return self.second(x)


@pytest.mark.parametrize("kind", ["in place", "freed", "view"])
def test_another_input_at_the_same_address_is_not_shared(kind: str) -> None:
    x = torch.randn(5, 6)
    statistics = calibrate(Reused(kind), [x], ["first", "second"])
    expected = {"in place": x + 1, "freed": torch.full((5, 6), 3.0), "view": x[:4]}[kind]
    assert relative(statistics["second"].second_moment(), lm.dense_moment([expected])) < 1e-6
    assert relative(statistics["first"].second_moment(), lm.dense_moment([x])) < 1e-6


def test_equal_views_of_one_tensor_are_shared() -> None:
    class Views(Reused):
        def forward(self, x):
            return self.first(x.view(-1, 6)) + self.second(x.view(-1, 6))

    assert len(calibrate(Views(""), [torch.randn(5, 6)], ["first", "second"]).groups()) == 1


class Fickle(nn.Module):
    """Two layers that share their input in even batches only."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.calls, self.skip = nn.Linear(6, 6), nn.Linear(6, 6), 0, skip

    def forward(self, x):
        self.calls += 1
        if self.calls % 2:
            return self.a(x) + self.b(x)
        return self.a(x) if self.skip else self.a(x) + self.b(x * 2)


@pytest.mark.parametrize("skip", [False, True])
def test_layers_that_stop_sharing_are_an_error_with_a_way_out(skip: bool) -> None:
    batches = [torch.randn(5, 6) for _ in range(2)]
    with pytest.raises(UnsupportedError, match="share_inputs=False"):
        calibrate(Fickle(skip), batches, ["a", "b"])
    alone = calibrate(Fickle(skip), batches, ["a", "b"], share_inputs=False)
    assert alone["b"].count == (5 if skip else 10)


def test_a_layer_used_twice_counts_both_inputs() -> None:
    class Twice(Reused):
        def forward(self, x):
            return self.first(self.first(x))

    model, x = Twice(""), torch.randn(5, 6)
    seen = torch.cat([x, model.first(x).detach()])
    assert relative(calibrate(model, [x], ["first"])["first"].second_moment(), lm.dense_moment([seen])) < 1e-6


def test_hooks_keep_no_activation_alive() -> None:
    alive: list[weakref.ref] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            h = x * 2
            alive.append(weakref.ref(h))
            y = self.first(h)
            del h
            assert alive[-1]() is None
            return self.second(y)

    calibrate(Watching(), [torch.randn(5, 6)] * 2, ["first", "second"])
    assert len(alive) == 2
