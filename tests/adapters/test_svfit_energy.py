"""SVFit's rank by energy: chosen a layer, recorded, consented to, and found again; and starts from the cache."""

from __future__ import annotations

import copy
import json
import sys

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from torch import nn

import llmreg
from llmreg import SorsaConfig, SvfitConfig
from llmreg.adapters import start
from llmreg.adapters.start_cache import contents, use_starts
from llmreg.errors import UnsupportedError
from llmreg.hub.sidecar import SIDECAR_NAME
from llmreg.hub.vllm import check_vllm
from llmreg.initializers import rank_of_energy
from llmreg.weights import read_weight

TARGETS = ["first", "second"]
#: At 99 % of the squares `first` needs 1 component and `second` 3; of the sum, 2 and 3.
SPECTRA = {"first": [10.0, 1.0, 0.1], "second": [5.0, 5.0, 5.0, 0.01]}
RANKS = {"first": 1, "second": 3}
RECORDED = {f"^{name}": rank for name, rank in RANKS.items()}


@torch.no_grad()
def set_spectrum(layer, values, *, seed=0):
    """Give a linear layer these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(size, len(values), generator=generator, dtype=torch.float64) for size in layer.weight.shape)
    U, V = (torch.linalg.qr(value).Q for value in draw)
    layer.weight.copy_((U * torch.tensor(values, dtype=torch.float64)) @ V.T)


def mlp(spectra=SPECTRA):
    model = tiny_models.mlp()
    for name, values in spectra.items():
        set_spectrum(model.get_submodule(name), values)
    return model


def config(**settings):
    return SvfitConfig(**{"energy": 0.99, "target_modules": TARGETS, **settings})


def ranks(model, adapter="default"):
    layers = saved.additive_layers(model, adapter)
    return {name.removeprefix("base_model.model."): layer.r[adapter] for name, layer in layers.items()}


def scalings(model, adapter="default"):
    return [layer.scaling[adapter] for layer in saved.additive_layers(model, adapter).values()]


@torch.no_grad()
def move(model, adapter="default"):
    for layer in saved.additive_layers(model, adapter).values():
        S = layer.lora_S[adapter].weight
        S.copy_(torch.linspace(-0.5, 0.5, len(S) + 1)[1:])
    return model


@pytest.fixture
def no_decomposition(monkeypatch):
    """A function after whose call every decomposition fails."""

    def fail(*args, **kwargs):
        raise AssertionError("decomposed")

    def forbid():
        monkeypatch.setattr(sys.modules["llmreg.initializers.components"], "truncated_svd", fail)
        monkeypatch.setattr(torch.linalg, "svdvals", fail)

    return forbid


# -- chosen and recorded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measure", "expected"), [("squares", RANKS), ("nuclear", {"first": 2, "second": 3})])
def test_the_known_spectra_give_the_known_ranks(measure, expected):
    assert ranks(peft.get_peft_model(mlp(), config(energy_measure=measure))) == expected


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "nf4", "int8"])
def test_every_layer_s_rank_is_that_of_its_stored_weight(storage):
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "allow_large": True}
    found = []
    for energy in (0.5, 0.8, 0.95):
        model = peft.get_peft_model(tiny_models.llama(storage), config(energy=energy, **settings))
        for name, rank in ranks(model).items():
            W = read_weight(model.get_submodule(f"base_model.model.{name}").get_base_layer())
            assert rank == rank_of_energy(torch.linalg.svdvals(W), energy)
        found.append(list(ranks(model).values()))
    assert all(low < mid < high for low, mid, high in zip(*found, strict=True))


def test_the_ranks_stand_in_the_live_config_and_not_in_the_caller_s():
    mine = config()
    untouched = copy.deepcopy(mine)
    model = peft.get_peft_model(mlp(), mine)
    live = model.peft_config["default"]
    assert live.rank_pattern == live.alpha_pattern == RECORDED
    assert (live.energy, live.svd) == (0.99, "exact")
    assert mine == untouched
    assert mine.rank_pattern == mine.alpha_pattern == {}
    other = {"first": [1.0, 1.0, 1.0], "second": [1.0]}
    assert ranks(peft.get_peft_model(mlp(other), mine)) == {"first": 3, "second": 1}
    assert ranks(model) == RANKS


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [({}, 1.0), ({"use_rslora": True}, 1.0), ({"lora_alpha": 3}, 3.0), ({"lora_alpha": 3, "use_rslora": True}, 3.0)],
    ids=str,
)
def test_the_scaling_does_not_depend_on_the_chosen_rank(settings, scaling, tmp_path):
    model = move(peft.get_peft_model(mlp(), config(**settings)))
    assert scalings(model) == [scaling] * 2
    live = model.peft_config["default"]
    assert (live.r, live.lora_alpha / (3**0.5 if live.use_rslora else 3)) == (3, pytest.approx(scaling))
    model.save_pretrained(tmp_path)
    assert check_vllm(tmp_path) == [], "one scaling for all layers is what it can serve"
    assert scalings(peft.PeftModel.from_pretrained(mlp(), tmp_path)) == pytest.approx([scaling] * 2)
    (tmp_path / SIDECAR_NAME).unlink()
    plain = peft.PeftModel.from_pretrained(mlp(), tmp_path)
    for name in TARGETS:
        layer = plain.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (RANKS[name], pytest.approx(scaling))


def test_slices_have_the_largest_of_their_ranks_each():
    model = tiny_models.gpt2()
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "slices": {"c_attn": 3}, "allow_large": True}
    model = peft.get_peft_model(model, config(energy=0.6, **settings))
    for name, rank in ranks(model).items():
        W = read_weight(model.get_submodule(f"base_model.model.{name}").get_base_layer())
        assert rank == 3 * max(rank_of_energy(torch.linalg.svdvals(part), 0.6) for part in W.chunk(3))


def test_a_rank_that_is_given_for_a_layer_is_kept():
    model = peft.get_peft_model(mlp(), config(rank_pattern={"second": 2}))
    assert ranks(model) == {"first": 1, "second": 2}
    assert scalings(model) == [1.0, 1.0]
    model = peft.get_peft_model(mlp(), config(rank_pattern={"second": 2}, alpha_pattern={"second": 6}))
    assert (ranks(model), scalings(model)) == ({"first": 1, "second": 2}, [1.0, 3.0])


def test_a_rank_that_is_given_by_a_pattern_is_kept(tmp_path):
    settings = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 5}, "allow_large": True}
    model = move(peft.get_peft_model(tiny_models.llama(), config(energy=0.6, **settings)))
    assert {rank for name, rank in ranks(model).items() if "q_proj" in name} == {5}
    assert {rank for name, rank in ranks(model).items() if "down_proj" in name} != {5}
    model.save_pretrained(tmp_path)
    assert ranks(peft.PeftModel.from_pretrained(tiny_models.llama(), tmp_path)) == ranks(model)


class Nested(nn.Module):
    """Two layers, where one's full name ends like the other's: PEFT's patterns match by the end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.first, self.tower = nn.Linear(20, 32), nn.ModuleDict({"first": nn.Linear(32, 32)})
        set_spectrum(self.first, [10.0, 1.0, 0.1])
        set_spectrum(self.tower["first"], [5.0, 5.0, 5.0])

    def forward(self, x):
        return self.tower["first"](self.first(x))


def test_ranks_of_layers_whose_names_end_alike_are_kept_apart(tmp_path):
    x = tiny_models.inputs()
    model = move(peft.get_peft_model(Nested(), config(target_modules=["first"])))
    assert ranks(model) == {"first": 1, "tower.first": 3}
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    assert ranks(again) == ranks(model)
    assert torch.equal(again(x), model(x))
    (tmp_path / SIDECAR_NAME).unlink()
    plain = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-5)


def test_so_are_they_in_an_export_that_recompresses(tmp_path):
    x = tiny_models.inputs()
    model = move(peft.get_peft_model(Nested(), config(target_modules=["first"])))
    model.save_pretrained(tmp_path / "adapter")
    llmreg.export_lora(tmp_path / "adapter", tmp_path / "export", rank=8)
    plain = peft.PeftModel.from_pretrained(Nested(), tmp_path / "export")
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 0}, "energy"),
        ({"energy": 99}, r"share in \(0, 1\]"),
        ({"energy": "most"}, "energy"),
        ({"energy_measure": "entropy"}, "energy_measure"),
        ({"r": 8}, r"energy=0.99 chooses .* leave r=8 out"),
        ({"alpha_pattern": {"second": 3}}, "leave 'second' out of alpha_pattern, or give its rank"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UnsupportedError, match=message):
        config(**settings)


# -- consent ----------------------------------------------------------------------------------------------------


def test_vectors_above_a_quarter_of_a_layer_need_consent_and_without_it_nothing_is_changed():
    """`first` is accepted before `second` is refused: 4 components of 24 x 32 are 29 %, 3 are 22 %."""
    base, mine = mlp({"first": [1.0, 1.0, 1.0], "second": [1.0, 1.0, 1.0, 1.0]}), config()
    before = tiny_models.structure(base), tiny_models.state_bytes(base), copy.deepcopy(mine)
    with pytest.raises(UnsupportedError, match=r"rank 4 of 24 for layer 'second'.* 29%.*allow_large=True"):
        peft.get_peft_model(base, mine)
    assert (tiny_models.structure(base), tiny_models.state_bytes(base), mine) == before
    assert ranks(peft.get_peft_model(base, config(allow_large=True))) == {"first": 3, "second": 4}


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model = move(peft.get_peft_model(mlp({"first": [1.0] * 3, "second": [1.0] * 4}), SvfitConfig(r=2, **TO_BOTH)))
    x = tiny_models.inputs()
    before, out = (tiny_models.structure(model), tiny_models.state_bytes(model)), model(x)
    with pytest.raises(UnsupportedError, match="'second'"):
        model.add_adapter("greedy", config())
    assert (tiny_models.structure(model), tiny_models.state_bytes(model)) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x), out)


TO_BOTH = {"target_modules": TARGETS}


def test_a_rank_that_was_asked_for_needs_no_consent():
    assert ranks(peft.get_peft_model(mlp(), SvfitConfig(r=16, **TO_BOTH))) == {"first": 16, "second": 16}


# -- found again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
def test_reloading_takes_the_ranks_from_the_sidecar_and_decomposes_nothing(tmp_path, no_decomposition, trainable):
    x = tiny_models.inputs()
    model = move(peft.get_peft_model(mlp(), config()))
    model.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (plain["peft_type"], plain["rank_pattern"]) == ("LORA", RECORDED)
    no_decomposition()
    again = peft.PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=trainable)
    assert ranks(again) == RANKS
    assert saved.factor_bytes(again) == saved.factor_bytes(model)
    assert torch.equal(again(x), model(x))
    model.load_adapter(tmp_path, "second", is_trainable=trainable)
    assert ranks(model, "second") == RANKS
    model.load_adapter(tmp_path, "default", is_trainable=trainable)  # what resuming does
    assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("given", ["live config", "copy of the live config", "caller's config", "equal config"])
def test_a_reference_copy_takes_ranks_and_vectors_of_its_sibling(given, no_decomposition):
    mine = config()
    model = move(peft.get_peft_model(mlp(), mine))
    live = model.peft_config["default"]
    no_decomposition()
    configs = (live, copy.deepcopy(live), mine, config())
    names = ("live config", "copy of the live config", "caller's config", "equal config")
    model.add_adapter("ref", dict(zip(names, configs, strict=True))[given])
    assert ranks(model, "ref") == RANKS
    assert model.peft_config["ref"].rank_pattern == RECORDED
    for layer in saved.additive_layers(model).values():
        for name in ("lora_A0", "lora_B0", "lora_S0"):
            assert torch.equal(getattr(layer, name)["ref"].weight, getattr(layer, name)["default"].weight)
        assert not layer.lora_S["ref"].weight.any()


def test_a_sibling_whose_rank_was_given_lends_nothing_to_one_that_chooses():
    model = peft.get_peft_model(mlp(), config(rank_pattern={"second": 2}))
    model.add_adapter("other", config())
    assert ranks(model, "other") == RANKS
    model.add_adapter("less", config(energy=0.6))
    assert ranks(model, "less") == {"first": 1, "second": 2}


# -- starts from the cache --------------------------------------------------------------------------------------

CACHED = {
    "sorsa": lambda: SorsaConfig(r=3, weights=None, **TO_BOTH),
    "svfit": lambda: SvfitConfig(r=3, **TO_BOTH),
    "svfit by energy": config,
    "svfit in slices": lambda: SvfitConfig(r=4, slices={"first": 2}, **TO_BOTH),
    "svfit in slices by energy": lambda: config(slices={"second": 2}, allow_large=True),
}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("storage", ["float32", "nf4"])
def test_a_start_from_the_cache_is_the_start_bit_for_bit_and_decomposes_nothing(
    tmp_path, no_decomposition, name, storage
):
    def begin():
        with use_starts(tmp_path) as cache:
            base = tiny_models.stored(mlp(), storage, skip=("head",))
            return peft.get_peft_model(base, CACHED[name]()), (cache.hits, cache.layers)

    model, found = begin()
    assert found == (0, 2)
    assert sorted(entry.rank for entry in contents(tmp_path)) == sorted(ranks(model).values())
    no_decomposition()
    again, found = begin()
    assert found == (2, 2)
    assert ranks(again) == ranks(model)
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    assert saved.factor_bytes(again) == saved.factor_bytes(model)


@pytest.mark.parametrize(
    "other",
    [
        {"energy": 0.95},
        {"energy_measure": "nuclear"},
        {"slices": {"first": 2, "second": 2}},
        {"energy": None, "r": 1},
        {"seed": 1},
    ],
    ids=str,
)
def test_other_settings_are_another_entry(tmp_path, other):
    with use_starts(tmp_path) as cache:
        peft.get_peft_model(mlp(), config(allow_large=True))
        peft.get_peft_model(mlp(), config(**{"allow_large": True, **other}))
    assert (cache.hits, cache.layers) == (0, 4)
    assert len(contents(tmp_path)) == 4


def test_svfit_and_sorsa_and_pissa_share_no_entry(tmp_path):
    with use_starts(tmp_path) as cache:
        for name in ("sorsa", "svfit"):
            peft.get_peft_model(mlp(), CACHED[name]())
    assert (cache.hits, len(contents(tmp_path))) == (0, 4)


def test_a_cached_start_still_needs_consent(tmp_path):
    spectra = {"first": [1.0] * 3, "second": [1.0] * 4}
    with use_starts(tmp_path) as cache:
        peft.get_peft_model(mlp(spectra), config(allow_large=True))
        with pytest.raises(UnsupportedError, match=r"rank 4 of 24 for layer 'second'"):
            peft.get_peft_model(mlp(spectra), config())
    assert cache.hits == 2


def test_layers_of_equal_shape_choose_each_its_own_rank(monkeypatch):
    """They would be decomposed together, and one rank would serve them all."""
    groups = []
    original = start._start_group
    monkeypatch.setattr(start, "_start_group", lambda group, *rest: (groups.append(len(group)), original(group, *rest)))
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model.config = {"model_type": "custom"}
    for layer, values in zip(model, ([1.0], [1.0, 1.0]), strict=True):
        set_spectrum(layer, values)
    assert ranks(peft.get_peft_model(model, config(target_modules=["0", "1"]))) == {"0": 1, "1": 2}
    assert groups == [1, 1]
