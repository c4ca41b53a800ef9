"""Several adapters on one model: adding, choosing, deleting, mixed batches, neighbours of other methods."""

from __future__ import annotations

import peft
import pytest
import tiny_models
import torch
from contract_cases import CASES, LOUD, MODELS, Cell, adapter_layers, adapter_tensors, cells, trained
from tiny_models import logits


def chosen(model, name, batch):
    model.set_adapter(name)
    return logits(model, batch)


def trains(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


def test_adding_an_adapter_neither_activates_it_nor_changes_the_model(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    before, trained_before = logits(model, batch), trains(model)
    model.add_adapter("other", float_cell.config(r=float_cell.case.other_r))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, batch), before)
    assert trains(model) == trained_before
    assert torch.equal(chosen(model, "other", batch), logits(float_cell.base(), batch))


def test_the_chosen_adapter_computes_and_trains_and_the_others_do_not(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    float_cell.second(model)
    alone = {name: chosen(model, name, batch) for name in ("default", "other")}
    assert (alone["default"] - alone["other"]).abs().max() > 1e-3
    for name, resting in (("other", "default"), ("default", "other")):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert {key for key in trains(model) if "modules_to_save" not in key} == set(trained(model, name))
        resting_before = {key: value.clone() for key, value in adapter_tensors(model, resting).items()}
        float_cell.train(model, steps=1)
        assert all(torch.equal(value, resting_before[key]) for key, value in adapter_tensors(model, resting).items())
        assert torch.equal(chosen(model, resting, batch), logits(model, batch))
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), logits(float_cell.base(), batch))


def test_an_adapter_on_other_layers_leaves_the_first_alone(float_cell):
    batch = float_cell.batch()
    first, *rest = float_cell.model.targets
    model = float_cell.moved(target_modules=[first])
    alone = logits(model, batch)
    float_cell.second(model, target_modules=rest)
    other = chosen(model, "other", batch)
    assert torch.equal(other, chosen(model, "other", batch))
    assert torch.equal(chosen(model, "default", batch), alone)
    fresh = float_cell.base()
    expected = logits(float_cell.second(float_cell.wrap(fresh, target_modules=[first]), target_modules=rest), batch)
    assert torch.equal(expected, logits(float_cell.base(), batch)), "the second one is not active"
    assert not torch.equal(other, alone)


def test_deleting_a_resting_adapter_changes_nothing_for_the_active_one(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    float_cell.second(model)
    before = logits(model, batch)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert not adapter_tensors(model, "other")
    assert torch.equal(logits(model, batch), before)
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")


def test_deleting_the_active_adapter_activates_the_other(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    float_cell.second(model)
    other = chosen(model, "other", batch)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model, batch), other)
    assert not adapter_tensors(model, "default")


def test_deleting_the_last_adapter_leaves_the_base(float_cell):
    model = float_cell.moved()
    model.delete_adapter("default")
    assert not model.peft_config
    assert not adapter_tensors(model)
    batch = float_cell.batch()
    assert torch.equal(logits(model.base_model.model, batch), logits(float_cell.base(), batch))


def test_unknown_names_are_refused(mlp_cell):
    model = mlp_cell.wrap()
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")


def test_an_adapter_of_a_name_that_was_deleted_starts_anew(float_cell):
    batch = float_cell.batch()
    model = float_cell.moved()
    float_cell.second(model)
    model.delete_adapter("other")
    model.add_adapter("other", float_cell.config(r=float_cell.case.other_r))
    assert torch.equal(chosen(model, "other", batch), logits(float_cell.base(), batch))


def test_modules_to_save_belong_to_their_adapter(float_cell):
    head = [float_cell.model.head]
    batch = float_cell.batch()
    model = float_cell.wrap(modules_to_save=head)
    float_cell.train(model, steps=2)
    first = logits(model, batch)
    model.add_adapter("other", float_cell.config(r=float_cell.case.other_r, modules_to_save=head))
    assert torch.equal(chosen(model, "other", batch), logits(float_cell.base(), batch))
    float_cell.train(model, steps=2)
    assert torch.equal(chosen(model, "default", batch), first)


@pytest.mark.parametrize("cell", cells("llama", "bert") + cells("mlp", "conv1d", storages=("float32",)), ids=str)
def test_a_mixed_batch_gives_each_row_its_own_adapter(cell):
    batch = cell.batch()
    model = cell.moved()
    cell.second(model)
    alone = {name: chosen(model, name, batch) for name in ("default", "other")}
    model.set_adapter("default")
    with model.disable_adapter():
        alone["__base__"] = logits(model, batch)
    names = ["default", "__base__", "other", "default"]
    with cell.case.promised("mixed batch"):
        rows = logits(model, batch, adapter_names=names)
        # A quantised or half-precision product rounds in blocks that depend on how many rows it is given.
        tolerance = {"float32": 1e-5, "nf4": 1e-5}.get(cell.storage, 5e-2)
        for row, name in enumerate(names):
            torch.testing.assert_close(rows[row], alone[name][row], atol=tolerance, rtol=tolerance)
        assert torch.equal(logits(model, batch, adapter_names=["__base__"] * 4), alone["__base__"])
        assert torch.equal(logits(model, batch), alone["default"]), "the active adapter is as before"


@pytest.mark.parametrize("names", [["default"] * 3, ["default"] * 5, ["default", "nobody", "default", "default"]])
def test_a_mixed_batch_of_wrong_names_is_refused(mlp_cell, names):
    model = mlp_cell.moved()
    with pytest.raises(LOUD):
        logits(model, mlp_cell.batch(), adapter_names=names)


def test_a_mixed_batch_is_refused_in_training_and_while_merged(mlp_cell):
    model = mlp_cell.moved().train()
    with pytest.raises(LOUD):
        model(mlp_cell.batch(), adapter_names=["default"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(LOUD):
        model(mlp_cell.batch(), adapter_names=["default"] * 4)


def test_a_mixed_batch_takes_each_adapters_own_modules_to_save(mlp_cell):
    batch = mlp_cell.batch()
    model = mlp_cell.wrap(modules_to_save=["head"])
    model.add_adapter("other", mlp_cell.config(r=mlp_cell.case.other_r, modules_to_save=["head"]))
    for name in ("default", "other"):
        model.set_adapter(name)
        mlp_cell.train(model, steps=3)
        if name == "default":
            mlp_cell.move(model)
    alone = {name: chosen(model, name, batch) for name in ("default", "other")}
    with mlp_cell.case.promised("mixed batch"):
        rows = logits(model, batch, adapter_names=["other", "default", "default", "other"])
        for row, name in enumerate(["other", "default", "default", "other"]):
            torch.testing.assert_close(rows[row], alone[name][row], atol=1e-5, rtol=1e-5)


def test_adapters_active_together_differ_from_each_alone_and_disable_to_the_base(mlp_cell):
    batch = mlp_cell.batch()
    base = logits(mlp_cell.base(), batch)
    model = mlp_cell.moved()
    mlp_cell.second(model)
    alone = {name: chosen(model, name, batch) for name in ("other", "default")}
    with mlp_cell.case.promised("several active"):
        model.base_model.set_adapter(["default", "other"])
        together = logits(model, batch)
        assert all((together - value).abs().max() > 1e-4 for value in (*alone.values(), base))
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), base)
        trained_together = trains(model)
        assert trained_together == set(trained(model)) | set(trained(model, "other"))


PAIRS = [(first, second) for first in CASES for second in CASES]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{first}-{second}" for first, second in PAIRS])
@pytest.mark.parametrize("storage", ["float32", "nf4"])
def test_two_methods_share_one_base_or_the_second_is_refused_and_changes_nothing(first, second, storage):
    one, two = (Cell(case, MODELS["mlp"], storage) for case in (first, second))
    if {storage} & (first.refuses | second.refuses):
        pytest.skip(f"not on {storage}")
    batch = one.batch()
    base = one.base()
    bytes_before, expected = tiny_models.state_bytes(base), logits(base, batch)
    model = one.moved(base)
    alone = logits(model, batch)
    before = tiny_models.structure(model)
    try:
        model.add_adapter("other", two.config(r=second.other_r))
    except ValueError:
        assert first.family != second.family
        assert tiny_models.structure(model) == before
        assert torch.equal(logits(model, batch), alone)
        return
    assert torch.equal(chosen(model, "other", batch), expected)
    two.move(model, "other", seed=9)
    assert not torch.equal(logits(model, batch), expected)
    assert torch.equal(chosen(model, "default", batch), alone)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    assert tiny_models.state_bytes(model.unload()) == bytes_before


@pytest.mark.parametrize("lora_first", [True, False])
def test_plain_lora_lives_beside_it_or_is_refused_and_changes_nothing(mlp_cell, lora_first):
    batch = mlp_cell.batch()
    expected = logits(mlp_cell.base(), batch)
    lora = peft.LoraConfig(r=2, target_modules=["first"])
    first, second = (lora, mlp_cell.config()) if lora_first else (mlp_cell.config(), lora)
    model = peft.get_peft_model(mlp_cell.base(), first)
    mlp_cell.move(model)
    alone = logits(model, batch)
    before = tiny_models.structure(model)
    try:
        model.add_adapter("other", second)
    except ValueError:
        assert mlp_cell.case.family != "lora"
        assert tiny_models.structure(model) == before
        assert torch.equal(logits(model, batch), alone)
        return
    assert torch.equal(chosen(model, "other", batch), expected)
    mlp_cell.move(model, "other")
    assert not torch.equal(logits(model, batch), expected)
    assert torch.equal(chosen(model, "default", batch), alone)
    model.delete_adapter("other")
    assert torch.equal(logits(model, batch), alone)
    assert all(layer.active_adapters == ["default"] for layer in adapter_layers(model).values())
