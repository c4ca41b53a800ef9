"""Calibration of whole models: which tokens count, what is shared, what comes back as it was."""

from __future__ import annotations

import random

import language_models as lm
import numpy as np
import pytest
import tiny_models
import torch
from language_models import LINEARS, relative
from torch import nn

from llmreg.calibration import Need, Statistics, calibrate
from llmreg.errors import RecipeError, UnsupportedError, WeightError

NEEDS = [Need(mean=True), Need(sample_scale="signed_max"), Need(sample_scale="abs_max", mean=True)]


def assert_close(a: Statistics, b: Statistics, tolerance: float = 1e-5) -> None:
    assert list(a) == list(b)
    for name in a:
        assert (a[name].count, a[name].samples) == (b[name].count, b[name].samples)
        assert relative(a[name].second_moment(), b[name].second_moment()) < tolerance
        assert a[name].trace == pytest.approx(b[name].trace, rel=tolerance)
        if a[name].need.mean:
            assert relative(a[name].mean(), b[name].mean()) < tolerance


# -- which tokens count ---------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs_that_the_layers_get() -> None:
    model, batches = tiny_models.llama(), lm.single(lm.documents())
    statistics = calibrate(model, batches, LINEARS)
    for name in LINEARS:
        assert relative(statistics[name].second_moment(), lm.dense_moment(lm.inputs_of(model, name, batches))) < 1e-6
    assert statistics[LINEARS[0]].count == statistics.report.tokens == 9 + 5 + 12 + 7
    assert statistics[LINEARS[0]].samples == statistics.report.batches == 4


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_four_is_four_single_runs(side: str, need: Need) -> None:
    model, texts = tiny_models.llama(), lm.documents()
    assert_close(
        calibrate(model, [lm.padded(texts, side)], LINEARS, need), calibrate(model, lm.single(texts), LINEARS, need)
    )


@pytest.mark.parametrize("need", NEEDS)
def test_packed_documents_are_single_runs(need: Need) -> None:
    model, texts = tiny_models.llama(), lm.documents()
    assert_close(calibrate(model, [lm.packed(texts)], LINEARS, need), calibrate(model, lm.single(texts), LINEARS, need))


def test_what_stands_in_the_padding_changes_nothing() -> None:
    model, batch = tiny_models.llama(), lm.padded(lm.documents(), "right")
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    assert_close(calibrate(model, [batch], LINEARS), calibrate(model, [other], LINEARS), 1e-7)


def test_only_labelled_tokens_count_where_asked_for() -> None:
    model, texts = tiny_models.llama(), lm.documents((8, 8))
    labels = torch.stack(texts)
    labels[:, :5] = -100
    batch = {"input_ids": torch.stack(texts), "labels": labels}
    name = LINEARS[-1]
    seen = lm.inputs_of(model, name, [batch])[0]
    chosen = calibrate(model, [batch], [name], Need(use_label_mask=True))[name]
    assert chosen.count == 6
    assert relative(chosen.second_moment(), lm.dense_moment([seen[:, 5:]])) < 1e-6
    assert calibrate(model, [batch], [name])[name].count == 16


def test_the_order_and_the_split_of_batches_change_nothing() -> None:
    model, batches = tiny_models.llama(), lm.single(lm.documents())
    whole = calibrate(model, batches, LINEARS, NEEDS[2])
    halves = [calibrate(model, part, LINEARS, NEEDS[2]) for part in (batches[3:], batches[:3])]
    assert_close(calibrate(model, batches[::-1], LINEARS, NEEDS[2]), whole, 1e-6)
    merged = halves[0].merge(halves[1])
    assert_close(merged, whole, 1e-6)
    assert len(merged.groups()) == len(whole.groups())
    assert (merged.report.tokens, merged.report.batches) == (33, 4)


@pytest.mark.parametrize("cap", [1, 9, 11, 33])
def test_the_cap_counts_exactly_the_first_tokens(cap: int) -> None:
    model, texts = tiny_models.llama(), lm.documents()
    rest, name = cap, LINEARS[5]
    seen = []
    for part in lm.inputs_of(model, name, lm.single(texts)):
        seen.append(part[:, :rest])
        rest -= seen[-1].shape[1]
    capped = calibrate(model, [lm.padded(texts[:2], "left"), *lm.single(texts[2:])], [name], max_tokens=cap)
    assert capped[name].count == capped.report.tokens == cap
    assert relative(capped[name].second_moment(), lm.dense_moment(seen)) < 1e-5


def test_the_cap_stops_reading_the_data() -> None:
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"input_ids": torch.ones(1, 4, dtype=torch.long)}

    calibrate(tiny_models.llama(), endless(), LINEARS[:1], max_tokens=10)
    assert len(read) == 3


# -- sharing --------------------------------------------------------------------------------------------------------


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
    import weakref

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


# -- the model comes back as it was ---------------------------------------------------------------------------------


def traces(model: nn.Module) -> dict:
    return {
        "modes": [module.training for module in model.modules()],
        "grads": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "bytes": tiny_models.state_bytes(model),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_hooks_and_random_states_come_back_even_after_a_failure(fails: bool) -> None:
    model = tiny_models.llama().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = traces(model)

    def forward(model, batch):
        assert not model.training
        assert not torch.is_grad_enabled()
        _ = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        model(**batch)
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, lm.single(lm.documents()), LINEARS, forward=forward)
    else:
        calibrate(model, lm.single(lm.documents()), LINEARS, forward=forward)
    assert traces(model) == before
    assert torch.is_grad_enabled()


def test_a_shuffled_loader_leaves_the_random_state_alone() -> None:
    rows = [{"input_ids": text} for text in lm.documents((6,) * 8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=3, shuffle=True)
    before = torch.get_rng_state()
    statistics = calibrate(tiny_models.llama(), loader, LINEARS)
    assert torch.equal(torch.get_rng_state(), before)
    assert statistics.report.tokens == 48


def test_the_head_is_spared_unless_it_is_a_target() -> None:
    model, logits = tiny_models.llama(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: logits.append(args[0].shape[1]))
    batches = lm.single(lm.documents((9,)))
    calibrate(model, batches, LINEARS)
    assert calibrate(model, batches, ["lm_head"])["lm_head"].count == 9
    assert logits == [1, 9]


def test_labels_and_unknown_columns_are_not_passed_to_the_model() -> None:
    model = tiny_models.llama()
    batch = {**lm.single(lm.documents((9,)))[0], "completion_mask": torch.ones(1, 9)}
    batch["labels"] = batch["input_ids"] + 10_000  # would fail in a loss
    assert calibrate(model, [batch], LINEARS).report.tokens == 9


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "need", "message"),
    [
        ([], None, "empty"),
        (iter(()), None, "empty"),
        ([{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)}], None, "attention masks"),
        (
            [{"input_ids": torch.ones(1, 4).long(), "labels": torch.full((1, 4), -100)}],
            Need(use_label_mask=True),
            "-100",
        ),
    ],
    ids=["no batches", "used up", "masked", "unlabelled"],
)
@pytest.mark.parametrize("budget", [None, 10**9])
def test_data_without_a_token_is_refused(batches, need, message: str, budget: int | None) -> None:
    with pytest.raises(RecipeError, match=message):
        calibrate(tiny_models.llama(), batches, LINEARS, need, memory_budget=budget)


def test_a_masked_batch_among_others_is_fine() -> None:
    model, batch = tiny_models.llama(), lm.padded(lm.documents((5,)), "right")
    empty = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    statistics = calibrate(model, [empty, batch], LINEARS, NEEDS[1])
    assert (statistics.report.tokens, statistics[LINEARS[0]].samples) == (5, 1)


def test_an_unreached_layer_is_an_error_unless_reported() -> None:
    model = tiny_models.llama()
    model.spare = nn.Linear(4, 4)
    batches = lm.single(lm.documents())
    with pytest.raises(RecipeError, match=r"1 of 2 layers.*'spare'.*unreached='report'"):
        calibrate(model, batches, ["spare", LINEARS[0]])
    statistics = calibrate(model, batches, ["spare", LINEARS[0]], unreached="report")
    assert statistics.report.unreached == ("spare",)
    assert "spare" not in statistics


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("need", [None, *NEEDS])
@pytest.mark.parametrize("sketch", [None, 8])
def test_a_nonfinite_input_is_named_with_its_layer(value: float, need: Need | None, sketch: int | None) -> None:
    model = tiny_models.mlp()
    with torch.no_grad():
        model.first.bias[3] = value
    model.forward = lambda x: model.second(model.first(x))
    with pytest.raises(WeightError, match=r"'second'.*NaN or infinite"):
        calibrate(model, [tiny_models.inputs()], ["first", "second"], need, sketch=sketch)


def test_nonfinite_values_in_padding_do_not_matter() -> None:
    x = torch.randn(1, 4, 20)
    x[0, 3] = float("nan")
    batch = {"inputs_embeds": x, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    model = tiny_models.mlp()
    statistics = calibrate(model, [batch], ["first"], NEEDS[2], forward=lambda m, b: m(b["inputs_embeds"]))
    assert statistics["first"].count == 3
    assert bool(statistics["first"].second_moment().isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["model.layers.0.mlp.gate_prj"]}, "did you mean 'model.layers.0.mlp.gate_proj'"),
        ({"layers": []}, "at least one layer"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"sketch": -1}, "sketch is -1"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"exact": True, "sketch": 8}, "contradict"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    arguments = {"layers": LINEARS, **arguments}
    with pytest.raises(RecipeError, match=message):
        calibrate(tiny_models.llama(), lm.single(lm.documents()), **arguments)


def test_the_description_lists_every_distinct_input() -> None:
    found = calibrate(tiny_models.llama(), lm.single(lm.documents()), LINEARS, sketch=8).describe()
    assert [len(group["layers"]) for group in found["groups"]] == [3, 1, 3, 1, 2, 1, 2, 1]
    assert found["groups"][0]["form"] == "sketch of 8"
    assert found["bytes"] == sum(group["bytes"] for group in found["groups"])
    assert found["tokens"] == 33
    assert found["seconds"] > 0
