"""SVFit (arXiv 2409.05926) as an adapter: `W x + s U diag(S) V^T x` with `S` alone trained; its acceptance list.

References are the exact SVD, autograd through the dense weight, plain PEFT LoRA and SORSA with frozen vectors.
"""

from __future__ import annotations

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from torch.autograd import gradcheck
from transformers import RobertaConfig, RobertaModel

import llmreg
from llmreg import SorsaConfig, SvfitConfig
from llmreg.adapters.spectral import add_spectral
from llmreg.errors import UnsupportedError, WeightError
from llmreg.hub.sidecar import SIDECAR_NAME
from llmreg.weights import read_weight

TARGETS = ["first", "second"]
LINEAR = ["q_proj", "v_proj", "down_proj"]
FORMS = [{"r": 4}, {"r": 4, "lora_alpha": 2}, {"energy": 0.9, "allow_large": True}, {"r": 6, "slices": {"q_proj": 2}}]


def wrap(base, targets=TARGETS, **settings):
    return peft.get_peft_model(base, SvfitConfig(**{"target_modules": targets, **settings}))


def layers(model, adapter="default"):
    return saved.additive_layers(model, adapter)


@torch.no_grad()
def set_values(model, adapter="default", *, size=0.3, seed=0):
    """Draw every layer's `S`: negative, positive, and zero in the second place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model, adapter).values():
        S = layer.lora_S[adapter].weight
        S.copy_(size * torch.randn(S.shape, generator=generator))
        S[1:2] = 0.0
    return model


def exact_update(layer, adapter="default"):
    """`s U diag(S) V^T` in fp64."""
    Vh, U, S = (getattr(layer, name)[adapter].weight.double() for name in ("lora_A0", "lora_B0", "lora_S"))
    return layer.scaling[adapter] * U @ torch.diag(S) @ Vh


# -- identity and gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_the_start_is_the_base_bit_for_bit_in_every_storage(storage, settings, tokens):
    expected = tiny_models.logits(tiny_models.llama(storage), tokens)
    assert torch.equal(tiny_models.logits(wrap(tiny_models.llama(storage), LINEAR, **settings), tokens), expected)


def test_moving_the_values_moves_the_singular_values_and_leaves_the_vectors():
    model = set_values(wrap(tiny_models.mlp(), svd="exact", r=5), size=0.05)
    for layer in layers(model).values():
        W, S = layer.base_layer.weight.detach().double(), layer.lora_S["default"].weight.detach().double()
        merged, spectrum = W + exact_update(layer), torch.linalg.svdvals(W)
        expected = torch.cat([spectrum[:5] + S, spectrum[5:]]).sort(descending=True).values
        torch.testing.assert_close(torch.linalg.svdvals(merged), expected, atol=1e-5, rtol=0)
        U, Vh = (layer.start("default").B.double(), layer.start("default").A.double())
        torch.testing.assert_close(U.T @ merged @ Vh.T, torch.diag(spectrum[:5] + S), atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.lora_S0["default"].weight.double(), spectrum[:5], atol=1e-6, rtol=0)


@pytest.mark.parametrize("at", ["start", "elsewhere"])
@pytest.mark.parametrize("alpha", [None, 8])
def test_the_gradient_is_u_g_v_of_the_dense_weight_s(at, alpha):
    x = tiny_models.inputs(dtype=torch.float64)
    model = wrap(tiny_models.mlp(), r=4, lora_alpha=alpha).double()
    if at == "elsewhere":
        set_values(model)
    model(x).square().sum().backward()
    dense = tiny_models.mlp().double()
    with torch.no_grad():
        for name, layer in layers(model).items():
            dense.get_submodule(name.removeprefix("base_model.model.")).weight.add_(exact_update(layer))
    dense(x).square().sum().backward()
    for name, layer in layers(model).items():
        G = dense.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        U, Vh = layer.start("default").B, layer.start("default").A
        expected = layer.scaling["default"] * torch.einsum("oi,on,ni->i", U, G, Vh.T)
        torch.testing.assert_close(layer.lora_S["default"].weight.grad, expected, atol=1e-10, rtol=1e-10)


def test_gradients_pass_gradcheck():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 11), (5, 13), (3, 13), (11, 3), (3,))
    result, x, Vh, U, S = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    leaves = [leaf.requires_grad_() for leaf in (result, x, S)]
    assert gradcheck(lambda result, x, S: add_spectral(result, x, Vh, U, S, 0.7), leaves)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("input_needs_gradient", [False, True])
def test_nothing_of_the_size_of_the_activations_is_kept_for_the_backward_pass(input_needs_gradient, dtype):
    """Of `x (N, in)`, `y (N, out)` and `V^T x (N, r)` only the last; plain LoRA, as a control, keeps `x`."""
    kept = {}
    for name, config in {
        "svfit": SvfitConfig(r=3, target_modules=["first"]),
        "lora": peft.LoraConfig(r=3, target_modules=["first"]),
    }.items():
        layer = peft.get_peft_model(tiny_models.mlp(dtype), config).base_model.model.first.train()
        shapes = kept[name] = set()
        x = torch.randn(2, 23, 20, dtype=tiny_models.FLOATS[dtype], requires_grad=input_needs_gradient)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=shapes: seen.add(t.numel()) or t, lambda t: t):
            layer(x).sum().backward()
    assert 46 * 20 in kept["lora"]
    assert 46 * 3 in kept["svfit"]
    assert not kept["svfit"] & {46 * 20, 46 * 32}


# -- how many, how exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 4, "rank_pattern": {"second": 7}}, {"energy": 0.95}], ids=str)
def test_what_trains_is_one_number_a_component(settings):
    model = wrap(tiny_models.mlp(), allow_large=True, **settings)
    ranks = [layer.r["default"] for layer in layers(model).values()]
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert set(trained) == {f"{name}.lora_S.default.weight" for name in layers(model)}
    assert model.get_nb_trainable_parameters()[0] == sum(ranks)
    before = {name: tiny_models.twin(value) for name, value in model.named_parameters()}
    tiny_models.train(model, tiny_models.inputs())
    assert {name for name, v in model.named_parameters() if not torch.equal(v, before[name])} == set(trained)


def test_all_components_of_roberta_base_are_a_sixteenth_of_lora_of_rank_8():
    counts = {}
    for name, config in {
        "svfit": SvfitConfig(r=768, target_modules=["query", "value"]),
        "lora": peft.LoraConfig(r=8, target_modules=["query", "value"]),
    }.items():
        with torch.device("meta"):
            base = RobertaModel(RobertaConfig(vocab_size=8))
        counts[name] = peft.get_peft_model(base, config, low_cpu_mem_usage=True).get_nb_trainable_parameters()[0]
    assert counts == {"svfit": 24 * 768, "lora": 16 * 24 * 768}


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "nf4"])
def test_the_vectors_stay_in_the_base_s_dtype_and_the_rounding_costs_less_than_a_percent(storage):
    model = set_values(wrap(tiny_models.llama(storage), "all-linear", r=8, svd="exact"))
    for layer in layers(model).values():
        dtypes = {name: factor.dtype for name, factor in layer.factors("default").items()}
        kept = tiny_models.FLOATS.get(storage, torch.float32)  # NF4's compute dtype here
        assert dtypes == {"lora_S": torch.float32, "lora_A0": kept, "lora_B0": kept, "lora_S0": torch.float32}
        W, S = read_weight(layer.get_base_layer()).double(), layer.lora_S["default"].weight.double()
        U, spectrum, Vh = torch.linalg.svd(W, full_matrices=False)
        exact = U[:, :8] @ torch.diag(S) @ Vh[:8]
        principal = U[:, :8] @ torch.diag(spectrum[:8]) @ Vh[:8]
        begun = layer.start("default")
        assert saved.relative(exact_update(layer).detach(), exact.detach()) < 0.01
        start_product = begun.B.double() @ torch.diag(begun.singular_values.double()) @ begun.A.double()
        assert saved.relative(start_product.detach(), principal) < 0.01


# -- equals ... -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_it_is_plain_lora_with_a_set_to_v_and_b_to_u_s(settings, tokens):
    model = set_values(wrap(tiny_models.llama(), LINEAR, **settings))
    lora = peft.get_peft_model(tiny_models.llama(), model.peft_config["default"].to_lora_config())
    for name, layer in layers(model).items():
        other = lora.get_submodule(name)
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(layer.lora_A0["default"].weight)
            other.lora_B["default"].weight.copy_(layer.lora_B0["default"].weight * layer.lora_S["default"].weight)
        assert other.scaling["default"] == pytest.approx(layer.scaling["default"])
    expected = tiny_models.logits(lora, tokens)
    assert (expected - tiny_models.logits(tiny_models.llama(), tokens)).abs().max() > 1e-2
    torch.testing.assert_close(tiny_models.logits(model, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_sorsa_with_frozen_vectors_trains_along_the_same_trajectory(optimizer):
    x = tiny_models.inputs(dtype=torch.float64)
    settings = {"r": 4, "svd": "exact", "target_modules": TARGETS}
    ours = peft.get_peft_model(tiny_models.mlp(), SvfitConfig(**settings)).double()
    sorsa = peft.get_peft_model(tiny_models.mlp(), SorsaConfig(weights=None, **settings)).double()
    for name, parameter in sorsa.named_parameters():
        if "lora_A." in name or "lora_B." in name:
            parameter.requires_grad_(False)
    rows = []
    for model in (ours, sorsa):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps = optimizer(trained, lr=0.05, weight_decay=0.0)
        rows.append([])
        for _ in range(15):
            steps.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            steps.step()
            rows[-1].append(loss.item())
    assert rows[0][-1] < rows[0][0]
    assert rows[0] == pytest.approx(rows[1], abs=1e-9)
    torch.testing.assert_close(ours(x), sorsa(x), atol=1e-8, rtol=0)
    for name, layer in layers(ours).items():
        other = layers(sorsa)[name]
        moved = other.lora_S["default"].weight - other.lora_S0["default"].weight
        torch.testing.assert_close(layer.lora_S["default"].weight, moved, atol=1e-8, rtol=0)


# -- saved, exported --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_reloaded_and_exported_it_is_the_same_function_with_and_without_the_sidecar(base, tmp_path, settings, tokens):
    model = set_values(wrap(saved.load_base(base), LINEAR, **settings))
    expected = tiny_models.logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter", is_trainable=True)
    assert saved.factor_bytes(again) == saved.factor_bytes(model)
    assert torch.equal(tiny_models.logits(again, tokens), expected)
    report = llmreg.export_lora(tmp_path / "adapter", tmp_path / "export")
    assert (report.relative_error, report.rank) == (0.0, max(layer.r["default"] for layer in layers(model).values()))
    (tmp_path / "adapter" / SIDECAR_NAME).unlink()
    for folder in ("adapter", "export"):
        plain = peft.PeftModel.from_pretrained(saved.load_base(base), tmp_path / folder)
        assert type(plain.peft_config["default"]) is peft.LoraConfig
        torch.testing.assert_close(tiny_models.logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_a_live_adapter_reads_the_values_off_the_saved_tensors(base):
    model = set_values(wrap(saved.load_base(base), LINEAR, r=4))
    fresh = wrap(saved.load_base(base), LINEAR, r=4)
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(model))
    for name, layer in layers(fresh).items():
        given = layers(model)[name].lora_S["default"].weight
        torch.testing.assert_close(layer.lora_S["default"].weight, given, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_merged_is_unmerged(tokens):
    model = set_values(wrap(tiny_models.llama(), LINEAR, r=6, slices={"q_proj": 2}))
    expected = tiny_models.logits(model, tokens)
    torch.testing.assert_close(tiny_models.logits(model.merge_and_unload(), tokens), expected, atol=1e-5, rtol=1e-5)


# -- slices, ranks (that `energy` chooses one: test_svfit_energy.py) ----------------------------------------------


def test_slices_of_a_fused_projection_are_decomposed_apart():
    model = wrap(tiny_models.gpt2(), ["c_attn"], r=12, slices={"c_attn": 3}, svd="exact", fan_in_fan_out=True)
    whole = wrap(tiny_models.gpt2(), ["c_attn"], r=12, svd="exact", fan_in_fan_out=True)
    for name, layer in layers(model).items():
        W = read_weight(layer.get_base_layer())
        A, B, S = vars(layer.start("default")).values()
        assert not torch.block_diag(*[torch.ones(48, 4)] * 3).logical_not().logical_and(B != 0).any(), "block-diagonal"
        for index in range(3):
            rows, own = slice(48 * index, 48 * (index + 1)), slice(4 * index, 4 * (index + 1))
            U, spectrum, Vh = torch.linalg.svd(W[rows].double(), full_matrices=False)
            torch.testing.assert_close(S[own].double(), spectrum[:4], atol=1e-5, rtol=0)
            product = B[rows, own].double() @ torch.diag(S[own].double()) @ A[own].double()
            torch.testing.assert_close(product, (U[:, :4] * spectrum[:4]) @ Vh[:4], atol=1e-5, rtol=0)
        assert not torch.allclose(S, layers(whole)[name].start("default").singular_values, atol=1e-3)


def test_a_value_of_one_slice_leaves_the_outputs_of_the_others_alone():
    model = wrap(tiny_models.gpt2(), ["c_attn"], r=12, slices={"c_attn": 3}, fan_in_fan_out=True)
    layer = next(iter(layers(model).values()))
    with torch.no_grad():
        layer.lora_S["default"].weight[4:8] = 1.0  # the second slice's
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    change = layer(x) - layer.base_layer(x)
    assert (change.reshape(7, 3, 48).abs().amax(dim=(0, 2)) > 1e-3).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 10, "slices": {"c_attn": 3}}, r"Rank 10 does not fit layer 'transformer\.h\.0\.attn\.c_attn'"),
        ({"r": 5, "slices": {"c_attn": 5}}, r"'transformer\.h\.0\.attn\.c_attn' has 144 outputs"),
        ({"r": 48, "slices": {"c_attn": 12}, "rank_pattern": {"c_attn": 156}}, "at most 144"),
        ({"r": 4, "slices": {"c_attn": 1}}, "slices"),
        ({"r": 4, "slices": {"c_attn": 2.5}}, "slices"),
    ],
    ids=str,
)
def test_slices_that_do_not_fit_are_refused_and_nothing_is_changed(settings, message):
    base = tiny_models.gpt2()
    before = tiny_models.structure(base), tiny_models.state_bytes(base)
    with pytest.raises(UnsupportedError, match=message):
        wrap(base, ["c_attn"], fan_in_fan_out=True, **settings)
    assert (tiny_models.structure(base), tiny_models.state_bytes(base)) == before


def test_a_rank_above_the_layer_s_is_refused_by_name():
    with pytest.raises(WeightError, match=r"Rank 21 .*'first'.* at most 20"):
        wrap(tiny_models.mlp(), r=21)
    with pytest.raises(WeightError, match=r"Rank 64 .*'first'"):
        wrap(tiny_models.mlp())  # the default


@pytest.mark.parametrize(("storage", "least", "most"), [("float32", 0, 0), ("bfloat16", 5e-4, 4e-3)])
def test_the_rounding_of_its_frozen_vectors_is_known(storage, least, most):
    model = peft.get_peft_model(tiny_models.llama(storage), SvfitConfig(r=6, target_modules=["q_proj", "down_proj"]))
    errors = [layer.vector_error["default"] for layer in model.modules() if hasattr(layer, "vector_error")]
    assert len(errors) == 4
    assert all(least <= error <= most for error in errors)
