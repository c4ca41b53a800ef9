"""Adapters that start from data: they wait for it, take the start that their papers define, and keep ranks in order."""

from __future__ import annotations

import copy

import adapter_files as saved
import made_up
import peft
import pytest
import tiny_models
import torch

import llmreg
from llmreg import CordaConfig, EvaConfig
from llmreg.adapters.loading import use_statistics
from llmreg.calibration import CalibrationReport, InputStatistics, Need, Statistics, calibrate
from llmreg.errors import LlmregWarning, RecipeError, UnsupportedError
from llmreg.initializers import corda, pissa
from llmreg.weights import read_weight

METHODS = [EvaConfig, CordaConfig]
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


def batches(number=4, rows=3, columns=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    return [
        {
            "input_ids": torch.randint(1, tiny_models.VOCABULARY, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        for _ in range(number)
    ]


def started(config, data=None, storage="float32", **arguments):
    """(model, report) of a tiny Llama whose adapter was started on `data`."""
    model = peft.get_peft_model(tiny_models.llama(storage), config)
    return model, llmreg.initialize(model, batches() if data is None else data, **arguments)


def spiky(number, rows=64):
    """Batches for an `MLP` whose inputs lie mostly in a few directions."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(0, -2, 20)
    return [torch.randn(rows, 20, generator=generator) * scales for _ in range(number)]


def layers(model, name="default"):
    """The layers of an adapter by their names in the base."""
    found = saved.additive_layers(model, name)
    return {key.removeprefix("base_model.model."): layer for key, layer in found.items()}


def moments(need=None, data=None, targets=("q_proj", "v_proj", "up_proj", "down_proj")):
    base = tiny_models.llama()
    names = [name for name, _ in base.named_modules() if name.split(".")[-1] in targets]
    return base, calibrate(base, batches() if data is None else data, names, need or Need())


# -- waiting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", METHODS)
def test_a_waiting_adapter_adds_nothing_and_is_refused_in_training_and_saving(config_class, tokens, tmp_path):
    base = tiny_models.llama()
    before = tiny_models.logits(base, tokens)
    model = peft.get_peft_model(base, config_class(r=4, target_modules=LINEAR))
    assert torch.equal(tiny_models.logits(model, tokens), before)
    with pytest.raises(UnsupportedError, match=r"has seen none; call llmreg\.initialize\(trainer\)"):
        tiny_models.train(model, tokens)
    with pytest.raises(UnsupportedError, match=r"nothing to save; call llmreg\.initialize first"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    llmreg.initialize(model, batches())
    assert torch.equal(tiny_models.logits(model, tokens), before)
    losses = tiny_models.train(model, tokens)
    assert losses[-1] < losses[0]


def test_initialize_needs_an_adapter_that_waits():
    plain = peft.get_peft_model(tiny_models.llama(), peft.LoraConfig(target_modules=LINEAR))
    with pytest.raises(UnsupportedError, match="No adapter of this model starts from data"):
        llmreg.initialize(plain, batches())
    with pytest.raises(UnsupportedError, match="wrap it first"):
        llmreg.initialize(tiny_models.llama(), batches())
    model, _ = started(EvaConfig(r=4, target_modules=LINEAR))
    with pytest.raises(UnsupportedError, match="has its start already"):
        llmreg.initialize(model, batches())


def test_pefts_namesakes_are_explained():
    with pytest.raises(AttributeError, match=r"belongs in peft\.LoraConfig\(init_lora_weights='eva', eva_config="):
        peft.get_peft_model(tiny_models.llama(), peft.EvaConfig(rho=1.0))
    with pytest.raises(UnsupportedError, match=r"rho, tau, whiten"):
        EvaConfig(r=4, eva_config=peft.EvaConfig())
    with pytest.raises(UnsupportedError, match=r"PEFT's own EvaConfig; llmreg\.EvaConfig takes adjust_scaling"):
        EvaConfig(r=4, adjust_scaling_factors=False)
    with pytest.raises(UnsupportedError, match=r"llmreg\.CordaConfig takes mode="):
        CordaConfig(r=4, corda_method="kpm")
    theirs = peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    with pytest.raises(UnsupportedError, match=r"PEFT's own .* started by peft\.initialize_lora_eva_weights"):
        llmreg.initialize(peft.get_peft_model(tiny_models.llama(), theirs), batches())
    assert copy.deepcopy(peft.EvaConfig(rho=1.5)).rho == 1.5


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (EvaConfig, {"rho": 0.5}, "rho must be a number >= 1"),
        (EvaConfig, {"rho": float("nan")}, "rho must be"),
        (EvaConfig, {"tau": 1.5}, "tau is a cosine"),
        (EvaConfig, {"lora_dropout": 1.0}, "lora_dropout is a share"),
        (CordaConfig, {"mode": "ipa"}, "mode must be 'ipm'"),
        (CordaConfig, {"damping": 0}, "damping must be a positive number"),
        (CordaConfig, {"power": 2}, "power must be 1"),
        (CordaConfig, {"sample_scale": "max"}, "sample_scale must be"),
        (CordaConfig, {"covariances": 0}, "covariances must be a positive integer"),
        (llmreg.EoraConfig, {"ridge": -1}, "ridge is a small positive number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config_class, settings, message):
    with pytest.raises(UnsupportedError, match=message):
        config_class(r=4, target_modules=LINEAR, **settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the calibration data is empty"),
        ([{**batches(1)[0], "attention_mask": torch.zeros(3, 12, dtype=torch.long)}], "no token that counts"),
        (None, r"starts from data: call llmreg\.initialize\(model, dataloader\)"),
    ],
)
def test_bad_data_is_refused_and_the_adapter_goes_on_waiting(data, message):
    model = peft.get_peft_model(tiny_models.llama(), EvaConfig(r=4, target_modules=LINEAR))
    with pytest.raises(RecipeError, match=message):
        llmreg.initialize(model, data)
    llmreg.initialize(model, batches())


def test_a_model_that_computes_nan_is_named_by_its_first_layer():
    base = tiny_models.llama()
    with torch.no_grad():
        base.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    model = peft.get_peft_model(base, EvaConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj'.*NaN"):
        llmreg.initialize(model, batches())


def test_statistics_of_other_layers_or_widths_are_refused():
    model = peft.get_peft_model(tiny_models.llama(), EvaConfig(r=4, target_modules=LINEAR))
    need = Need(mean=True)
    names = {name: layer.in_features for name, layer in layers(model).items()}
    with pytest.raises(RecipeError, match=r"statistics lack layer 'model\.layers\.0\.self_attn\.q_proj'"):
        llmreg.initialize(model, statistics=made_up.statistics_for({"other": 64}, need))
    wrong = made_up.statistics_for(dict.fromkeys(names, 7), need)
    with pytest.raises(RecipeError, match="are of 7 inputs, and it has 64"):
        llmreg.initialize(model, statistics=wrong)


# -- CorDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("storage", ["float32", "nf4", "int8"])
def test_corda_starts_at_the_components_of_its_initialiser(mode, storage):
    model, _ = started(CordaConfig(r=4, lora_alpha=8, mode=mode, target_modules=LINEAR), storage=storage)
    base = tiny_models.llama(storage)
    names = list(layers(model))
    statistics = calibrate(base, batches(), names, Need(sample_scale="signed_max"))
    for name, layer in layers(model).items():
        W = read_weight(base.get_submodule(name))
        expected = corda(W, 4, 2.0, statistics[name].second_moment(), mode=mode)
        start = layer.start("default")
        torch.testing.assert_close(start.B @ start.A, expected.B @ expected.A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "low", "high"), [("ipm", 0.5, 1.0), ("kpm", 0.0, 0.05)])
def test_ipm_holds_most_of_the_output_and_kpm_hardly_any(mode, low, high):
    """The first MLP layer's inputs are made anisotropic, as those of language models are."""
    base = tiny_models.mlp()
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 20, generator=generator) * torch.logspace(0, -2, 20)
    model = peft.get_peft_model(base, CordaConfig(r=4, mode=mode, target_modules=["first"]))
    llmreg.initialize(model, [X])
    layer = model.base_model.model.first
    start = layer.start("default")
    share = (X @ (start.B @ start.A).T).norm() ** 2 / (X @ layer.base_layer.weight.T).norm() ** 2
    assert low <= float(share) <= high


def test_white_inputs_make_pissa_of_corda():
    model = peft.get_peft_model(tiny_models.mlp(), CordaConfig(r=4, target_modules=["first"], sample_scale=None))
    llmreg.initialize(model, [torch.linalg.qr(torch.randn(200, 20, dtype=torch.float64))[0].float() * 10])
    layer = model.base_model.model.first
    expected = pissa(layer.base_layer.weight, 4, 1.0)
    start = layer.start("default")
    torch.testing.assert_close(start.B @ start.A, expected.B @ expected.A, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [CordaConfig(r=2, target_modules=["second"]), EvaConfig(r=2, rho=1, target_modules=["second"])]
)
def test_exact_and_sketched_statistics_find_the_same_directions(config):
    spans = []
    for options in ({"exact": True}, {"sketch": 8}):
        model = peft.get_peft_model(tiny_models.mlp(), config)
        report = llmreg.initialize(model, spiky(4), **options)
        assert ("sketch" in report.calibration[0]["groups"][0]["form"]) == ("sketch" in options)
        spans.append(torch.linalg.qr(model.base_model.model.second.start("default").A.T)[0])
    assert torch.linalg.svdvals(spans[0].T @ spans[1]).min() > 0.99


def test_corda_plus_chooses_covariances_and_ranks_within_the_parameters():
    config = CordaConfig(r=4, target_modules="all-linear", covariances=2, dynamic_ranks=True)
    model, report = started(config)
    ranks = report.ranks["default"]
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers(model).items()}
    spent = sum(ranks[name] * sum(shape) for name, shape in shapes.items())
    assert spent <= 4 * sum(sum(shape) for shape in shapes.values())
    assert len(set(ranks.values())) > 1
    assert len(report.calibration) == 2
    with pytest.raises(RecipeError, match="covariances=5 sub-sets cannot be made of 4 batches"):
        started(CordaConfig(r=4, target_modules=LINEAR, covariances=5))


# -- EVA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [True, False])
def test_eva_starts_at_the_principal_components_of_its_inputs(centered):
    model, _ = started(EvaConfig(r=4, rho=1, centered=centered, target_modules=LINEAR))
    base, statistics = moments(Need(mean=True))
    for name, layer in layers(model).items():
        C = statistics[name].second_moment(centred=centered).double()
        best = torch.linalg.eigvalsh(C).flip(0)[:4].sum()
        A = layer.lora_A["default"].weight.detach().double()
        torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0)
        assert torch.trace(A @ C @ A.T) > 0.9999 * best
        assert not layer.lora_B["default"].weight.any()
    assert base is not None


def test_layers_that_share_an_input_share_their_components_and_whiten_once():
    plain, _ = started(EvaConfig(r=4, rho=1, target_modules=["q_proj", "k_proj", "v_proj"]))
    white, _ = started(EvaConfig(r=4, rho=1, whiten=True, target_modules=["q_proj", "k_proj", "v_proj"]))
    for model in (plain, white):
        factors = [layer.lora_A["default"].weight for layer in layers(model).values()][:3]
        assert all(torch.equal(factor, factors[0]) for factor in factors)
    norms = [next(iter(layers(model).values())).lora_A["default"].weight.norm(dim=1) for model in (plain, white)]
    torch.testing.assert_close(norms[0], torch.ones(4))
    assert (norms[1] < 1).all()


@pytest.mark.parametrize("settings", [{"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True}], ids=str)
def test_redistribution_keeps_the_sum_the_cap_and_the_scaling(settings):
    model, report = started(EvaConfig(r=4, rho=2.0, target_modules="all-linear", **settings))
    ranks = report.ranks["default"]
    assert sum(ranks.values()) == 4 * 14
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    expected = 4.0 if settings.get("use_rslora") else 2.0
    for name, layer in layers(model).items():
        assert layer.r["default"] == ranks[name]
        assert layer.scaling["default"] == pytest.approx(expected, rel=1e-12)
        assert layer.lora_A["default"].weight.shape == (ranks[name], layer.in_features)


def test_unadjusted_scaling_keeps_alpha_as_the_authors_code_does():
    model, report = started(EvaConfig(r=4, lora_alpha=8, adjust_scaling=False, target_modules="all-linear"))
    for name, layer in layers(model).items():
        assert layer.scaling["default"] == pytest.approx(8 / report.ranks["default"][name])


@pytest.fixture
def uneven(tmp_path):
    """(model, report, checkpoint): the inputs of one layer spread evenly over all directions, the others' do not."""
    checkpoint = saved.checkpoint(tmp_path / "base")
    config = EvaConfig(r=4, rho=4.0, target_modules="all-linear")
    model = peft.get_peft_model(saved.load_base(checkpoint), config)
    widths = {name: layer.in_features for name, layer in layers(model).items()}
    of_layer = dict(made_up.statistics_for(widths, config.need()))
    of_layer["model.layers.1.mlp.down_proj"] = InputStatistics(96, config.need())
    of_layer["model.layers.1.mlp.down_proj"].add(torch.eye(96).repeat(3, 1))
    report = CalibrationReport(200, 1, 1, 0.0, "made up")
    return model, llmreg.initialize(model, statistics=Statistics(of_layer, report)), checkpoint


def test_a_layer_of_rank_0_loses_its_adapter_and_everything_reloads(uneven, tokens, tmp_path):
    model, report, checkpoint = uneven
    ranks = report.ranks["default"]
    removed = {name for name, rank in ranks.items() if rank == 0}
    assert removed, ranks
    assert sum(ranks.values()) == 4 * 14
    assert set(layers(model)) == set(ranks) - removed
    assert all(type(model.base_model.model.get_submodule(name)) is torch.nn.Linear for name in removed)
    tiny_models.train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(saved.load_base(checkpoint), tmp_path / "adapter")
    assert saved.factor_bytes(loaded) == saved.factor_bytes(model)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))
    plain, warnings = saved.PlainPeft.ask(checkpoint, tmp_path / "adapter", tokens)
    assert warnings == []
    assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6
    unloaded = model.unload()
    assert tiny_models.state_bytes(unloaded) == tiny_models.state_bytes(saved.load_base(checkpoint))


def test_a_second_adapter_of_the_same_settings_asks_for_no_data_and_has_the_same_layers(uneven):
    model, _, _ = uneven
    model.add_adapter("ref", EvaConfig(r=4, rho=4.0, target_modules="all-linear"))
    assert set(layers(model, "ref")) == set(layers(model))
    for layer in layers(model).values():
        assert layer.r["ref"] == layer.r["default"]
        assert torch.equal(layer.lora_A0["ref"].weight, layer.lora_A0["default"].weight)
        assert "ref" not in layer.waiting


def test_padding_and_batch_size_change_nothing():
    data = batches(2)
    data[0]["attention_mask"][:, 8:] = 0
    alone = [
        {key: value[row : row + 1, : 8 if number == 0 else 12] for key, value in batch.items()}
        for number, batch in enumerate(data)
        for row in range(3)
    ]
    for config in (EvaConfig(r=4, rho=1, target_modules=LINEAR), CordaConfig(r=4, target_modules=LINEAR)):
        one, _ = started(config, data)
        other, _ = started(config, alone)
        for mine, theirs in zip(layers(one).values(), layers(other).values(), strict=True):
            a, b = mine.start("default"), theirs.start("default")
            torch.testing.assert_close(a.B @ a.A, b.B @ b.A, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(a.A.abs(), b.A.abs(), atol=2e-3, rtol=1e-2)


def test_the_order_of_batches_changes_captured_variance_by_less_than_1e_6():
    data = batches(6)
    one, _ = started(EvaConfig(r=4, rho=1, target_modules=LINEAR), data)
    other, _ = started(EvaConfig(r=4, rho=1, target_modules=LINEAR), data[::-1])
    _, statistics = moments(Need(mean=True), data)
    for (name, mine), theirs in zip(layers(one).items(), layers(other).values(), strict=True):
        C = statistics[name].second_moment(centred=True)
        values = [torch.trace(m.lora_A0["default"].weight @ C @ m.lora_A0["default"].weight.T) for m in (mine, theirs)]
        assert abs(values[0] / values[1] - 1) < 1e-6


def test_tau_only_decides_how_much_data_is_read():
    read = {}
    for tau in (None, 0.99, 1.0):
        model = peft.get_peft_model(tiny_models.mlp(), EvaConfig(r=2, tau=tau, rho=1, target_modules=["first"]))
        read[tau] = llmreg.initialize(model, spiky(30)).calibration[0]["batches"]
    assert read[None] == read[1.0] == 30
    assert 2 <= read[0.99] < 30


def test_labels_decide_which_tokens_count():
    data = batches(2)
    for batch in data:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :6] = -100
    _, masked = started(EvaConfig(r=2, target_modules=LINEAR), data)
    _, whole = started(EvaConfig(r=2, target_modules=LINEAR, use_label_mask=False), data)
    assert (masked.calibration[0]["tokens"], whole.calibration[0]["tokens"]) == (36, 72)


def test_statistics_that_were_gathered_before_start_an_adapter_as_it_is_put_on(tokens):
    config = EvaConfig(r=4, target_modules=LINEAR)
    _, statistics = moments(config.need())
    base = tiny_models.llama()
    with use_statistics(statistics):
        model = peft.get_peft_model(base, config)
    expected, _ = started(config)
    assert saved.factor_bytes(model) == saved.factor_bytes(expected)
    assert config.r == 4, "the caller's config stays"
    tiny_models.train(model, tokens)


def test_flags_modes_and_random_states_come_back():
    model = peft.get_peft_model(tiny_models.llama(), EvaConfig(r=4, rho=1, target_modules=LINEAR))
    model.add_adapter("lora", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    llmreg.initialize(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.active_adapters == ["default"]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("config_class", METHODS)
def test_factors_keep_the_dtype_and_place_that_the_trainer_gave_them(config_class):
    model = peft.get_peft_model(tiny_models.llama("nf4"), config_class(r=4, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does on a quantised base
    llmreg.initialize(model, batches())
    for layer in layers(model).values():
        assert {factor.dtype for factor in layer.factors("default").values()} == {torch.bfloat16}
        assert layer.lora_A["default"].weight.requires_grad


def test_a_sibling_of_another_method_lives_beside():
    base = tiny_models.llama()
    tokens = batches(1)[0]["input_ids"]
    before = tiny_models.logits(base, tokens)
    model = peft.get_peft_model(base, EvaConfig(r=4, target_modules=LINEAR), adapter_name="eva")
    model.add_adapter("corda", CordaConfig(r=2, target_modules=LINEAR))
    model.add_adapter("pissa", llmreg.PissaConfig(r=2, target_modules=LINEAR))
    report = llmreg.initialize(model, batches())
    assert report.adapters == {"corda": "corda", "eva": "eva"}
    for name in ("eva", "corda", "pissa"):
        model.set_adapter(name)
        assert torch.equal(tiny_models.logits(model, tokens), before)


def test_a_layer_that_loses_one_adapter_does_not_activate_another(uneven):
    model, report, _ = uneven
    removed = next(name for name, rank in report.ranks["default"].items() if rank == 0)
    base = tiny_models.llama()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"), adapter_name="lora")
    tiny_models.perturb(model, "lora")
    model.add_adapter("eva", EvaConfig(r=4, rho=4.0, target_modules="all-linear"))
    model.set_adapter("eva")
    tokens = batches(1)[0]["input_ids"]
    before = tiny_models.logits(tiny_models.llama(), tokens)
    widths = {name: layer.in_features for name, layer in layers(model, "eva").items()}
    need = EvaConfig(r=4).need()
    of_layer = dict(made_up.statistics_for(widths, need))
    of_layer[removed] = InputStatistics(widths[removed], need)
    of_layer[removed].add(torch.eye(widths[removed]).repeat(3, 1))
    llmreg.initialize(model, statistics=Statistics(of_layer, CalibrationReport(200, 1, 1, 0.0, "made up")))
    assert "eva" not in model.base_model.model.get_submodule(removed).lora_A
    assert torch.equal(tiny_models.logits(model, tokens), before)


def test_a_sibling_on_other_layers_lends_nothing():
    model, _ = started(EvaConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("wider", EvaConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert all("wider" in layer.waiting for layer in layers(model, "wider").values())
    llmreg.initialize(model, batches())
    assert {name.split(".")[-1] for name in layers(model, "wider")} == {"q_proj", "v_proj"}


def test_a_start_that_fails_half_way_leaves_the_adapter_waiting_as_a_whole(tokens):
    base = tiny_models.llama()
    model = peft.get_peft_model(base, CordaConfig(r=4, target_modules=LINEAR, dynamic_ranks=True))
    before = dict(vars(model.peft_config["default"]))
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.base_layer.weight[0, 0] = float("nan")
    widths = {name: layer.in_features for name, layer in layers(model).items()}
    statistics = made_up.statistics_for(widths, CordaConfig(r=4).need())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj"):
        llmreg.initialize(model, statistics=statistics)
    plain = peft.get_peft_model(tiny_models.llama(), CordaConfig(r=4, target_modules=LINEAR))
    with torch.no_grad():
        plain.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj"):
        llmreg.initialize(plain, statistics=statistics)
    for one in (model, plain):
        for layer in layers(one).values():
            assert layer.waiting == {"default"}
            assert layer.r["default"] == 4
            assert not any(factor.any() for factor in layer.factors("default").values())
    assert vars(model.peft_config["default"]) == before


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {r".*\.q_proj": 16}},
        {"rank_pattern": {"(q|v)_proj": 6}},
        {"rank_pattern": {r"[a-z]_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        lambda **settings: EvaConfig(r=4, lora_alpha=4, target_modules=LINEAR, **settings),
        lambda rank_pattern=None, **settings: CordaConfig(
            r=4, lora_alpha=4, dynamic_ranks=True, target_modules=LINEAR, **settings
        ),
    ],
    ids=["eva", "corda"],
)
def test_patterns_of_the_user_do_not_win_over_the_ranks_that_were_chosen(make, patterns, tokens, tmp_path):
    checkpoint = saved.checkpoint(tmp_path / "base")
    model = peft.get_peft_model(saved.load_base(checkpoint), make(**patterns))
    llmreg.initialize(model, batches())
    tiny_models.train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(saved.load_base(checkpoint), tmp_path / "adapter")
    assert saved.factor_bytes(loaded) == saved.factor_bytes(model)
    assert torch.equal(saved.outputs(loaded, tokens), saved.outputs(model, tokens))
    plain, _ = saved.PlainPeft.ask(checkpoint, tmp_path / "adapter", tokens)
    assert saved.relative(plain, saved.outputs(model, tokens)) <= 1e-6


def test_another_rank_or_other_targets_ask_for_data_of_their_own():
    model, _ = started(EvaConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("larger", EvaConfig(r=8, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("everywhere", EvaConfig(r=4, target_modules="all-linear"))
    for name in ("larger", "everywhere"):
        assert all(name in layer.waiting for layer in layers(model, name).values())
    report = llmreg.initialize(model, batches())
    assert sum(report.ranks["larger"].values()) == 8 * 4
    assert sum(report.ranks["everywhere"].values()) == 4 * 14


def test_removing_layers_never_widens_the_targets(tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"model_type": "custom"}
            self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(3))
            self.decoder = torch.nn.Module()
            self.decoder.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(3))

        def forward(self, x):
            for layer in [*self.layers, *self.decoder.layers]:
                x = torch.tanh(layer(x))
            return x

    torch.manual_seed(0)
    base = Twice()
    config = EvaConfig(r=2, rho=6.0, target_modules=["0", "1", "2"], exclude_modules=r"decoder\..*")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    need = config.need()
    of_layer = dict(made_up.statistics_for({f"layers.{i}": 12 for i in range(3)}, need))
    of_layer["layers.1"] = InputStatistics(12, need)
    of_layer["layers.1"].add(torch.eye(12).repeat(3, 1))
    llmreg.initialize(model, statistics=Statistics(of_layer, CalibrationReport(200, 1, 1, 0.0, "made up")))
    kept = set(layers(model))
    assert kept < {"layers.0", "layers.1", "layers.2"}
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert set(layers(loaded)) == kept


def test_statistics_that_do_not_serve_are_refused(tokens):
    model = peft.get_peft_model(tiny_models.llama(), CordaConfig(r=4, target_modules=LINEAR))
    _, other = moments(Need(mean=True))
    with pytest.raises(RecipeError, match=r"were gathered as Need\(.*needs Need\(sample_scale='signed_max'"):
        llmreg.initialize(model, statistics=other)
    _, right = moments(CordaConfig(r=4).need())
    with pytest.raises(RecipeError, match="2 sets of statistics were given and corda takes 1 here"):
        llmreg.initialize(model, statistics=[right, right])
    meta = peft.get_peft_model(tiny_models.llama(), CordaConfig(r=4, target_modules=LINEAR), low_cpu_mem_usage=True)
    with pytest.raises(UnsupportedError, match="leave low_cpu_mem_usage=True out"):
        llmreg.initialize(meta, statistics=right)


def test_a_sketch_or_data_too_small_for_the_components_is_said():
    model = peft.get_peft_model(tiny_models.mlp(), EvaConfig(r=4, target_modules=["first"]))
    with pytest.raises(RecipeError, match="a sketch of 2 columns cannot tell the 8 components"):
        llmreg.initialize(model, spiky(4), sketch=2)
    with pytest.warns(LlmregWarning, match="4 tokens cannot tell the 8 components"):
        llmreg.initialize(model, spiky(1, rows=4))


def test_several_requested_ranks_cannot_be_allocated_as_one():
    with pytest.raises(UnsupportedError, match="allocates the parameters of a uniform rank"):
        started(CordaConfig(r=4, rank_pattern={"q_proj": 2}, dynamic_ranks=True, target_modules=LINEAR))


def test_flags_are_flags():
    with pytest.raises(UnsupportedError, match="centered must be True or False, got 'no'"):
        EvaConfig(r=4, centered="no")
    with pytest.raises(UnsupportedError, match="covariances must be a positive integer, got True"):
        CordaConfig(r=4, covariances=True)
