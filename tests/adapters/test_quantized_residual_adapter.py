"""QPiSSA on a live model: the base holds what the adapter does not carry, and comes back bit for bit."""

from __future__ import annotations

import warnings

import adapter_files as saved
import peft
import pytest
import residual_models as residuals
import tiny_models
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from llmreg import CordaConfig, EvaConfig, PissaConfig, SorsaConfig, SvfitConfig
from llmreg.adapters import residual_errors, residual_table
from llmreg.errors import UnsupportedError, WeightError
from llmreg.initializers import pissa
from llmreg.pocket import path as pocket_path
from llmreg.weights import OriginalWeights, original_checkpoint, read_weight

QUANTIZATIONS = pytest.mark.parametrize("quantization", residuals.QUANTIZATIONS)
METHODS = pytest.mark.parametrize("method", residuals.METHODS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


def originals(model, wrapped):
    """`W` (out, in) of every adapted layer, from the checkpoint."""
    weights = OriginalWeights(model)
    return {
        name: weights.reread(layer.get_base_layer(), name.removeprefix("base_model.model."))
        for name, layer in saved.additive_layers(wrapped).items()
    }


def carried(layer, adapter="default"):
    """`s B A` (or with S) of the adapter as it computes it, fp32."""
    return saved.delta(layer, adapter).float()


# -- the start ----------------------------------------------------------------------------------------------------


@QUANTIZATIONS
@METHODS
def test_base_and_adapter_together_are_off_by_the_recorded_error(base, method, quantization):
    model = residuals.load(base, quantization)
    before = residuals.load(base, quantization)
    wrapped = residuals.wrap(model, method, lora_alpha=3)
    errors = residual_errors(wrapped)
    assert len(errors) == 6
    for name, W in originals(model, wrapped).items():
        layer = saved.additive_layers(wrapped)[name]
        error = errors[name.removeprefix("base_model.model.")]
        R = read_weight(layer.get_base_layer())
        quantized = read_weight(before.get_submodule(name.removeprefix("base_model.model.")))
        assert float((W - R - carried(layer)).norm()) == pytest.approx(error.kept, rel=1e-4)
        assert float((W - quantized).norm()) == pytest.approx(error.qlora, rel=1e-5)
        assert float(W.norm()) == pytest.approx(error.weight, rel=1e-5)
        assert error.kept <= error.qlora
        assert error.iteration > 0 or torch.equal(R, quantized)


@pytest.mark.parametrize("settings", [{"lora_alpha": 24}, {"lora_alpha": 2, "use_rslora": True}, {"r": 1}])
@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_the_scaling_is_part_of_the_decomposition(base, method, settings):
    wrapped = residuals.wrap(residuals.load(base), method, svd="exact", **settings)
    one = residuals.wrap(residuals.load(base), method, svd="exact", r=settings.get("r", 6))
    for (name, error), other in zip(residual_errors(wrapped).items(), residual_errors(one).values(), strict=True):
        assert error.kept == pytest.approx(other.kept, rel=0.1), name
        assert error.kept < 0.97 * error.qlora, name


@QUANTIZATIONS
def test_the_outputs_are_closer_to_full_precision_than_qlora_s(base, tokens, quantization):
    expected = saved.outputs(saved.load_base(base), tokens)
    model = residuals.load(base, quantization)
    qlora = saved.relative(saved.outputs(model, tokens), expected)
    wrapped = residuals.wrap(model, target_modules="all-linear", r=8)
    assert saved.relative(saved.outputs(wrapped, tokens), expected) < 0.85 * qlora


def test_five_iterations_beat_one_which_beats_qlora_on_every_layer_of_the_pocket_model():
    errors = {}
    for T in (1, 5):
        wrapped = residuals.wrap(residuals.load(pocket_path()), target_modules="all-linear", residual_iterations=T)
        errors[T] = residual_errors(wrapped)
    assert len(errors[1]) == 28
    for name, one in errors[1].items():
        assert errors[5][name].kept <= one.kept <= one.qlora, name
    total = {T: sum(error.kept for error in errors[T].values()) for T in errors}
    assert total[5] < 0.95 * total[1] < 0.95 * sum(error.qlora for error in errors[1].values())


@pytest.mark.parametrize(
    "targets", [["0.attention.self.query", "0.output.dense"], pytest.param("all-linear", marks=pytest.mark.slow)]
)
def test_five_iterations_beat_one_which_beats_qlora_on_minilm(targets):
    folder, _ = saved.minilm()
    errors = {}
    for T in (1, 5):
        model = residuals.load(folder, encoder=True)
        settings = {"target_modules": targets, "residual_iterations": T, "r": 16, "task_type": None}
        errors[T] = residual_errors(residuals.wrap(model, **settings))
    assert len(errors[1]) >= 2
    for name, one in errors[1].items():
        assert errors[5][name].kept <= one.kept <= one.qlora, name


def test_the_factors_are_what_bfloat16_holds_so_that_trl_s_cast_changes_nothing(base):
    wrapped = residuals.wrap(residuals.load(base), "sorsa")
    for layer in saved.additive_layers(wrapped).values():
        for factor in layer.factors("default").values():
            assert factor.dtype == torch.float32
            assert torch.equal(factor, factor.bfloat16().float())


def test_a_layer_whose_residual_gains_nothing_keeps_its_quantised_weight_and_learns(base, monkeypatch):
    monkeypatch.setattr(PissaConfig, "start", lambda self, W, r, s, layer="": pissa(-3 * W, r, s))  # worse than nothing
    model = residuals.load(base)
    before = tiny_models.state_bytes(model)
    wrapped = residuals.wrap(model)
    assert {error.iteration for error in residual_errors(wrapped).values()} == {0}
    layers = saved.additive_layers(wrapped)
    assert not any(layer.factors("default")["lora_B"].any() for layer in layers.values())
    assert all(layer.factors("default")["lora_A"].any() for layer in layers.values())
    tiny_models.train(wrapped, torch.randint(1, 96, (2, 9)))
    assert all(layer.factors("default")["lora_B"].any() for layer in layers.values())
    assert tiny_models.state_bytes(wrapped.unload()) == before


@METHODS
def test_training_moves_the_factors_and_nothing_else(base, method):
    wrapped = residuals.wrap(residuals.load(base), method)
    trained = residuals.METHODS[method](r=2, residual="quantized").form()
    names = {"product": {"lora_A", "lora_B"}, "scaled product": {"lora_A", "lora_B", "lora_S"}}[trained]
    before, bytes_before = saved.factor_bytes(wrapped), residuals.bases(wrapped)
    losses = tiny_models.train(wrapped, torch.randint(1, 96, (2, 9)))
    assert losses[-1] < losses[0]
    moved = {key.rsplit(".", 1)[1] for key, value in saved.factor_bytes(wrapped).items() if value != before[key]}
    assert moved == names
    assert residuals.bases(wrapped) == bytes_before
    assert sum(parameter.requires_grad for parameter in wrapped.parameters()) == 6 * len(names)


def test_the_same_recipe_gives_the_same_bytes(base):
    one, two = (residuals.wrap(residuals.load(base), "corda") for _ in range(2))
    assert residuals.bases(one) == residuals.bases(two)
    assert saved.factor_bytes(one) == saved.factor_bytes(two)


def test_weights_are_read_from_where_the_context_says(base, tmp_path):
    moved = saved.checkpoint(tmp_path / "moved")
    model = residuals.load(base)
    model.config._name_or_path = "nowhere"
    with pytest.raises(WeightError, match="full-precision"):
        residuals.wrap(model)
    with original_checkpoint(moved):
        wrapped = residuals.wrap(model)
    before = tiny_models.state_bytes(residuals.load(base))
    assert tiny_models.state_bytes(wrapped.unload()) == before  # outside of the context


def test_the_table_has_every_layer_and_the_whole(base, capsys):
    from rich.console import Console

    Console(width=120).print(residual_table(residuals.wrap(residuals.load(base))))
    printed = capsys.readouterr().out
    assert printed.count("proj") == 6
    assert "all" in printed
    assert residual_errors(residuals.load(base)) == {}


# -- and back -----------------------------------------------------------------------------------------------------


@QUANTIZATIONS
@pytest.mark.parametrize("way", ["unload", "delete", "delete after a forward"])
def test_the_base_comes_back_bit_for_bit(base, tokens, quantization, way):
    model = residuals.load(base, quantization)
    before, expected = tiny_models.state_bytes(model), saved.outputs(residuals.load(base, quantization), tokens)
    wrapped = residuals.wrap(model, "sorsa")
    changed = tiny_models.state_bytes(residuals.load(base, quantization))
    assert changed == before
    if way != "delete":
        saved.outputs(wrapped, tokens)  # int8 scales move at the first forward
    if way != "unload":
        wrapped.delete_adapter("default")
        assert not residual_errors(wrapped)
    unloaded = wrapped.unload()
    assert tiny_models.state_bytes(unloaded) == before
    assert torch.equal(saved.outputs(unloaded, tokens), expected)


def test_a_base_that_was_loaded_in_half_precision_comes_back(base):
    for quantization in ("nf4 double", "int8"):
        model = residuals.load(base, quantization, dtype=torch.bfloat16)
        before = tiny_models.state_bytes(model)
        assert tiny_models.state_bytes(residuals.wrap(model).unload()) == before


def test_a_base_that_its_checkpoint_does_not_give_is_kept(base):
    model = residuals.load(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.data[:3] = 7  # quantised by somebody else's library
    before = tiny_models.state_bytes(model)
    assert tiny_models.state_bytes(residuals.wrap(model).unload()) == before


def test_a_checkpoint_that_changed_meanwhile_is_noticed_and_the_residual_stays(tmp_path):
    base = saved.checkpoint(tmp_path / "base")
    wrapped = residuals.wrap(residuals.load(base))
    weights = {key: value.clone() for key, value in load_file(base / "model.safetensors").items()}
    weights["model.layers.1.self_attn.v_proj.weight"] *= 1.1
    (base / "model.safetensors").unlink()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    before = residuals.bases(wrapped)
    with pytest.raises(WeightError, match=r"layers.1.self_attn.v_proj.*no longer"):
        wrapped.unload()
    assert residuals.bases(wrapped) == before


def test_another_adapter_may_follow_once_the_base_is_back(base, tokens):
    wrapped = residuals.wrap(residuals.load(base))
    wrapped.delete_adapter("default")
    wrapped.add_adapter("next", PissaConfig(r=4, target_modules=residuals.TARGETS))
    wrapped.set_adapter("next")
    assert torch.equal(saved.outputs(wrapped, tokens), saved.outputs(residuals.load(base), tokens))


# -- what it rules out --------------------------------------------------------------------------------------------


@METHODS
def test_a_disabled_adapter_is_refused(base, tokens, method):
    wrapped = residuals.wrap(residuals.load(base), method)
    expected = saved.outputs(wrapped, tokens)
    with pytest.raises(UnsupportedError, match="neither the base nor a reference"), wrapped.disable_adapter():
        pass
    with pytest.raises(UnsupportedError, match="neither the base nor a reference"):
        wrapped.base_model.disable_adapter_layers()
    with pytest.raises(UnsupportedError, match="neither the base nor a reference"):
        wrapped(tokens, adapter_names=["default", "__base__", "default"])
    assert torch.equal(saved.outputs(wrapped, tokens), expected)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(base, merge):
    wrapped = residuals.wrap(residuals.load(base))
    before = residuals.bases(wrapped)
    with pytest.raises(UnsupportedError, match="--approximate"):
        getattr(wrapped, merge)()
    assert residuals.bases(wrapped) == before


OTHERS = {
    "plain LoRA": lambda: LoraConfig(r=2, target_modules=["q_proj"]),
    "a difference": lambda: PissaConfig(r=2, target_modules=["q_proj"]),
    "another residual": lambda: residuals.config(r=3),
    "another method's": lambda: residuals.config("sorsa"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_second_adapter_is_refused_and_the_model_stays(base, other):
    wrapped = residuals.wrap(residuals.load(base))
    before = tiny_models.structure(wrapped)
    with pytest.raises(UnsupportedError, match="cannot share a model"):
        wrapped.add_adapter("other", other())
    assert tiny_models.structure(wrapped) == before
    assert list(wrapped.peft_config) == ["default"]


@pytest.mark.parametrize("first", list(OTHERS.values())[:2], ids=list(OTHERS)[:2])
def test_it_is_refused_as_a_second_adapter(base, first):
    model = residuals.load(base)
    wrapped = peft.get_peft_model(model, first())
    before, weights = tiny_models.structure(wrapped), tiny_models.state_bytes(residuals.load(base))
    with pytest.raises(UnsupportedError, match="cannot share a model"):
        wrapped.add_adapter("other", residuals.config())
    assert tiny_models.structure(wrapped) == before
    assert tiny_models.state_bytes(wrapped.unload()) == weights


@METHODS
def test_a_copy_of_the_same_config_shares_the_residual(base, tokens, method):
    wrapped = residuals.wrap(residuals.load(base), method)
    before, expected = residuals.bases(wrapped), saved.outputs(wrapped, tokens)
    wrapped.add_adapter("ref", wrapped.peft_config["default"])
    wrapped.set_adapter("ref")
    assert torch.equal(saved.outputs(wrapped, tokens), expected)
    assert residual_errors(wrapped, "ref") == residual_errors(wrapped)
    wrapped.delete_adapter("default")
    assert torch.equal(saved.outputs(wrapped, tokens), expected)
    assert set(before.values()) == {
        residuals.module_bytes_hash(layer.get_base_layer()) for layer in saved.additive_layers(wrapped, "ref").values()
    }
    bare = tiny_models.state_bytes(residuals.load(base))
    assert tiny_models.state_bytes(wrapped.unload()) == bare


def test_a_layer_that_is_not_quantised_is_refused_by_name_and_the_model_left_alone(base):
    model = residuals.load(base)
    before = tiny_models.structure(model)
    with pytest.raises(UnsupportedError, match=r"layer 'lm_head' is not quantised; load.*nf4"):
        peft.get_peft_model(model, residuals.config(target_modules=["q_proj", "lm_head"]))
    assert tiny_models.structure(model) == before


def test_a_model_that_transformers_did_not_quantise_is_refused():
    for model in (tiny_models.llama("nf4"), tiny_models.llama(), tiny_models.mlp()):
        config = residuals.config(target_modules="all-linear", task_type=None)
        with pytest.raises(UnsupportedError, match="BitsAndBytesConfig"):
            peft.get_peft_model(model, config)


def test_a_sharded_layer_is_refused_by_name(base, monkeypatch):
    monkeypatch.setattr("llmreg.adapters.quantized_start.is_sharded", lambda module: True)
    with pytest.raises(UnsupportedError, match=r"q_proj' is sharded \(DeepSpeed ZeRO-3 or FSDP\)"):
        residuals.wrap(residuals.load(base))


def test_factors_without_values_are_refused(base):
    model = residuals.load(base)
    before = tiny_models.structure(model)
    with pytest.raises(UnsupportedError, match="low_cpu_mem_usage"):
        peft.get_peft_model(model, residuals.config(), low_cpu_mem_usage=True)
    assert tiny_models.structure(model) == before


def test_an_adapter_called_residual_is_refused(base):
    with pytest.raises(UnsupportedError, match="folder"):
        peft.get_peft_model(residuals.load(base), residuals.config(), adapter_name="residual")


@pytest.mark.parametrize("config", [PissaConfig, SorsaConfig, CordaConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual": "quantised"}, "'difference' or 'quantized'"),
        ({"residual_iterations": 0}, "at least 1"),
        ({"residual_iterations": True}, "at least 1"),
        ({"residual_iterations": 2.0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, settings, message):
    with pytest.raises(UnsupportedError, match=message):
        config(r=2, **settings)


@pytest.mark.parametrize("config", [SvfitConfig, EvaConfig])
def test_methods_without_a_decomposition_of_the_weight_do_not_know_the_field(config):
    with pytest.raises(TypeError, match="residual"):
        config(r=2, residual="quantized")


# -- all or nothing -----------------------------------------------------------------------------------------------


@QUANTIZATIONS
@METHODS
def test_a_start_that_fails_leaves_the_model_as_it_was(base, tokens, monkeypatch, quantization, method):
    model = residuals.load(base, quantization)
    expected = saved.outputs(model, tokens)
    before, structure = tiny_models.state_bytes(model), tiny_models.structure(model)
    calls = []
    original = OriginalWeights.read

    def fail_at_last(self, base, name, **kwargs):
        calls.append(name)
        if name == "model.layers.1.mlp.down_proj":
            raise KeyboardInterrupt
        return original(self, base, name, **kwargs)

    monkeypatch.setattr(OriginalWeights, "read", fail_at_last)
    if method == "corda":
        wrapped = peft.get_peft_model(model, residuals.config(method))
        with pytest.raises(KeyboardInterrupt):
            residuals.start(wrapped)
        assert not residual_errors(wrapped)
        model = wrapped.unload()
    else:
        with pytest.raises(KeyboardInterrupt):
            residuals.wrap(model, method)
        assert tiny_models.structure(model) == structure
    assert len(calls) > 3
    assert tiny_models.state_bytes(model) == before
    assert torch.equal(saved.outputs(model, tokens), expected)


def test_nan_in_the_checkpoint_is_refused_by_the_layer_s_name(tmp_path):
    model = tiny_models.llama()
    good = saved.checkpoint(tmp_path / "good", model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    bad = saved.checkpoint(tmp_path / "bad", model)
    loaded = residuals.load(good)
    before = tiny_models.state_bytes(loaded)
    with original_checkpoint(bad), pytest.raises(WeightError, match=r"layers.1.mlp.down_proj"):
        residuals.wrap(loaded)
    assert tiny_models.state_bytes(loaded) == before


def test_another_model_s_checkpoint_is_refused(base, tmp_path):
    other = saved.checkpoint(tmp_path / "other", seed=1)
    with original_checkpoint(other), pytest.raises(WeightError, match="was not quantised from"):
        residuals.wrap(residuals.load(base))


# -- CorDA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"mode": "kpm"}, {"power": 0.5}, {"dynamic_ranks": True}, {"covariances": 1}])
def test_corda_decomposes_the_full_precision_weight_by_its_statistics(base, settings):
    model = residuals.load(base)
    wrapped = residuals.wrap(model, "corda", residual_iterations=1, **settings)
    for error in residual_errors(wrapped).values():
        assert error.kept <= error.qlora
    assert tiny_models.state_bytes(wrapped.unload()) == tiny_models.state_bytes(residuals.load(base))


def test_corda_waits_on_an_unchanged_base(base, tokens):
    model = residuals.load(base)
    expected = saved.outputs(model, tokens)
    wrapped = peft.get_peft_model(model, residuals.config("corda"))
    with wrapped.disable_adapter():  # as calibration does
        assert torch.equal(saved.outputs(wrapped, tokens), expected)
    assert torch.equal(saved.outputs(wrapped, tokens), expected)
    with pytest.raises(UnsupportedError, match=r"llmreg\.initialize"):
        tiny_models.train(wrapped, tokens)
    residuals.start(wrapped)
    assert residual_errors(wrapped)


def test_corda_ranks_that_were_chosen_are_taken_back_when_the_start_fails(base, monkeypatch):
    wrapped = peft.get_peft_model(residuals.load(base), residuals.config("corda", dynamic_ranks=True))
    config = wrapped.peft_config["default"]
    before = (config.r, dict(config.rank_pattern), config.target_modules)

    def fail(*args, **kwargs):
        raise WeightError("no")

    monkeypatch.setattr("llmreg.adapters.data_start.set_residual", fail)
    with pytest.raises(WeightError):
        residuals.start(wrapped)
    assert (config.r, config.rank_pattern, config.target_modules) == before
    monkeypatch.undo()
    residuals.start(wrapped)
    assert residual_errors(wrapped)


def test_nothing_of_the_above_warns(base):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*MatMul.*")
        wrapped = residuals.wrap(residuals.load(base))
        wrapped.unload()
