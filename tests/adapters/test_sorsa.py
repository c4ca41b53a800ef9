"""SORSA (arXiv 2409.00055) as an adapter: `W x + s (B diag(S) A - B0 diag(S0) A0) x`, held to its acceptance list.

References are the materialised form, training beside the residual written out with torch, and plain PEFT.
"""

from __future__ import annotations

import adapter_files as saved
import peft
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llmreg
from llmreg import SorsaConfig
from llmreg.adapters.difference import add_difference
from llmreg.hub.sidecar import SIDECAR_NAME
from llmreg.regularizers import OrthonormalRegularizer

OUT, IN, RANK, ROWS = 11, 13, 3, 5
TARGETS = ["first", "second"]
LINEAR = ["q_proj", "v_proj", "down_proj"]


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def factors(seed=0, out=OUT, width=IN, rank=RANK):
    """`A`, `B`, `A0`, `B0`, `S`, `S0`, nowhere near orthonormal; `S` has entries of both signs."""
    A, B, A0, B0, S, S0 = draw(*((rank, width), (out, rank)) * 2, (rank,), (rank,), seed=seed)
    S[0], S[1] = S[0].abs(), -S[1].abs()
    return A, B, A0, B0, S, S0.abs()


def materialised(result, x, A, B, A0, B0, scaling, S, S0):
    return result + scaling * x @ (B @ torch.diag(S) @ A - B0 @ torch.diag(S0) @ A0).T


def wrap(base, targets=TARGETS, **settings):
    return peft.get_peft_model(base, SorsaConfig(**{"r": 4, "weights": None, "target_modules": targets, **settings}))


@torch.no_grad()
def turn_values(model):
    """Of every layer's `S`: the first entry crosses zero, the second stops there, the others stay."""
    for layer in saved.additive_layers(model).values():
        S = layer.lora_S["default"].weight
        S[0], S[1] = -0.4 * S[0], 0.0
    return model


# -- the form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
def test_the_factored_forward_is_the_materialised_one(scaling):
    result, x = draw((2, ROWS, OUT), (2, ROWS, IN), seed=1)
    A, B, A0, B0, S, S0 = factors()
    dense = materialised(result, x, A, B, A0, B0, scaling, S, S0)
    torch.testing.assert_close(add_difference(result, x, A, B, A0, B0, scaling, S, S0), dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
def test_its_gradients_are_autograd_s_of_the_materialised_form(scaling):
    grads = []
    (weight,) = draw((ROWS, OUT), seed=9)
    for form in (add_difference, materialised):
        result, x = draw((ROWS, OUT), (ROWS, IN), seed=1)
        A, B, A0, B0, S, S0 = factors()
        leaves = [leaf.requires_grad_() for leaf in (result, x, A, B, S)]
        grads.append(torch.autograd.grad((form(result, x, A, B, A0, B0, scaling, S, S0) * weight).sum(), leaves))
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_first_and_second_derivatives_pass_gradcheck_away_from_orthonormality(check):
    result, x = draw((ROWS, OUT), (ROWS, IN), seed=1)
    A, B, A0, B0, S, S0 = factors()
    leaves = [leaf.requires_grad_() for leaf in (result, x, A, B, S)]
    assert check(lambda result, x, A, B, S: add_difference(result, x, A, B, A0, B0, 0.7, S, S0), leaves, atol=1e-7)


@pytest.mark.parametrize("wanted", [("S",), ("A",), ("B",), ("x",), ("A", "S"), ("B", "S", "x")], ids="".join)
def test_any_subset_may_require_gradients(wanted):
    result, x = draw((ROWS, OUT), (ROWS, IN), seed=1)
    A, B, A0, B0, S, S0 = factors()
    leaves = {"x": x, "A": A, "B": B, "S": S, "A0": A0, "B0": B0, "S0": S0}
    for name in (*wanted, "A0", "B0", "S0"):
        leaves[name].requires_grad_()
    add_difference(result, x, A, B, A0, B0, 1.0, S, S0).square().sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted), "the start gets none"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_difference_is_exactly_zero_at_the_start(dtype):
    result, x = draw((ROWS, OUT), (ROWS, IN), seed=1, dtype=dtype)
    A, B, _, _, S, _ = (factor.to(dtype) for factor in factors())
    at_start = add_difference(result, x, A, B, A.clone(), B.clone(), 2.0, S, S.clone())
    assert torch.equal(at_start, result)


def test_in_bfloat16_the_update_survives_that_the_naive_form_loses():
    """A 1 % update: `[B diag(S) | -B0 diag(S0)] [A ; A0]` cancels it away, the difference form keeps it."""
    out, width, rank, rows = 96, 128, 16, 64
    A0, B0 = (torch.linalg.qr(value).Q.T for value in draw((width, rank), (out, rank)))
    A0, B0, S0 = A0.bfloat16(), B0.T.bfloat16(), torch.linspace(4, 1, rank).bfloat16()
    dA, dB, dS, x = draw((rank, width), (out, rank), (rank,), (rows, width), seed=1)
    A, B = (A0 + 0.01 * width**-0.5 * dA).bfloat16(), (B0 + 0.01 * out**-0.5 * dB).bfloat16()
    S, x = (S0 + 0.01 * S0 * dS).bfloat16(), x.bfloat16()
    wide = [value.double() for value in (A, B, A0, B0)]
    update = (wide[1] * S.double()) @ wide[0] - (wide[3] * S0.double()) @ wide[2]
    assert 0.003 < update.norm() / S0.double().norm() < 0.03
    exact = x.double() @ update.T
    naive = (x @ torch.cat([A, A0]).T) @ torch.cat([B * S, -(B0 * S0)], dim=1).T
    ours = add_difference(torch.zeros(rows, out, dtype=torch.bfloat16), x, A, B, A0, B0, 1.0, S, S0)
    assert saved.relative(ours, exact) < 0.01
    assert saved.relative(naive, exact) > 0.10


class Shapes(TorchDispatchMode):
    """Collects the shapes of all new tensors that operations give; what shares memory with `known` is not new."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.seen = set()

    def note(self, value):
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.known:
            self.seen.add(tuple(value.shape))
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            self.note(value)
        return out


@pytest.mark.parametrize("form", ["ours", "materialised"])
def test_no_tensor_of_the_weight_s_size_is_made_or_saved(form):
    """The authors' code forms `B diag(S) A` in every forward; the spy must see that, and in ours nothing."""
    model = wrap(tiny_models.mlp(), ["first"])
    layer = turn_values(tiny_models.perturb(model)).base_model.model.first.train()
    x = torch.randn(11, 20, requires_grad=True)
    spy = Shapes(layer.base_layer.weight)
    with spy, torch.autograd.graph.saved_tensors_hooks(spy.note, lambda value: value):
        if form == "ours":
            out = layer(x)
        else:
            A, B, S, A0, B0, S0 = layer.factors("default").values()
            out = materialised(layer.base_layer(x), x, A, B, A0, B0, 1.0, S, S0)
        out.square().sum().backward()
    large = {shape for shape in spy.seen if torch.Size(shape).numel() >= 20 * 32}
    assert large == (set() if form == "ours" else {(32, 20), (20, 32)})
    assert layer.lora_S["default"].weight.grad is not None


# -- the start --------------------------------------------------------------------------------------------------

SCALINGS = [
    {},
    {"lora_alpha": 2},
    {"lora_alpha": 16},
    {"lora_alpha": 4, "use_rslora": True},
    {"use_rslora": True, "rank_pattern": {"second": 7}},
    {"alpha_pattern": {"first": 3}},
]


@pytest.mark.parametrize("settings", SCALINGS, ids=str)
def test_the_start_is_the_base_bit_for_bit_at_every_scaling(settings, storage):
    x = tiny_models.inputs(dtype=tiny_models.FLOATS.get(storage, torch.float32))
    expected = tiny_models.mlp(storage)(x)
    assert torch.equal(wrap(tiny_models.mlp(storage), **settings)(x), expected)


@pytest.mark.parametrize("settings", SCALINGS, ids=str)
def test_the_singular_values_do_not_depend_on_the_scaling(settings):
    for layer in saved.additive_layers(wrap(tiny_models.mlp(), svd="exact", **settings)).values():
        spectrum = torch.linalg.svdvals(layer.base_layer.weight)[: layer.r["default"]]
        torch.testing.assert_close(layer.lora_S["default"].weight.detach(), spectrum, atol=1e-6, rtol=0)


def test_a_rank_pattern_without_an_alpha_keeps_the_scaling_at_one_in_every_layer():
    model = wrap(tiny_models.llama(), LINEAR, r=4, rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 7})
    layers = saved.additive_layers(model)
    assert {layer.r["default"] for layer in layers.values()} == {2, 4, 7}
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}


def test_the_factors_start_orthonormal_and_the_regulariser_at_rounding_noise():
    layers = saved.additive_layers(wrap(tiny_models.llama(), "all-linear", r=16)).values()
    matrices = [m for layer in layers for m in (layer.lora_A["default"].weight, layer.lora_B["default"].weight.T)]
    for matrix in matrices:
        assert (matrix @ matrix.T - torch.eye(16)).norm() < 1e-5
    assert OrthonormalRegularizer().loss(matrices) < 1e-5
    assert OrthonormalRegularizer(reduction="sum").loss(matrices) < 1e-5 * len(matrices)


def test_a_s_and_b_train_and_their_starts_do_not():
    model = wrap(tiny_models.mlp())
    layers = saved.additive_layers(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {f"{layer}.lora_{name}.default.weight" for layer in layers for name in "ABS"}
    assert model.get_nb_trainable_parameters()[0] == 4 * (20 + 32 + 1) + 4 * (32 + 24 + 1)
    before = {name: tiny_models.twin(value) for name, value in model.named_parameters()}
    tiny_models.train(model, tiny_models.inputs())
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == trained


# -- training ---------------------------------------------------------------------------------------------------


class BesideResidual(torch.nn.Module):
    """The method as it is published: `W_r x + c B diag(S) A x`, the principal part taken out of the weight."""

    def __init__(self, layer):
        super().__init__()
        A, B, S, *_ = (factor.detach().clone() for factor in layer.factors("default").values())
        self.A, self.B, self.S = map(torch.nn.Parameter, (A, B, S))
        self.c, self.bias = layer.scaling["default"], layer.base_layer.bias.detach().clone()
        W = layer.base_layer.weight.detach()
        self.residual = W - self.c * (B * S) @ A

    def forward(self, x):
        return F.linear(x, self.residual, self.bias) + self.c * (x @ self.A.T * self.S) @ self.B.T


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 1}, {"use_rslora": True}, {"rank_pattern": {"second": 7}}])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_that_of_the_published_form_beside_the_residual(settings, optimizer):
    x = tiny_models.inputs(dtype=torch.float64)
    ours = wrap(tiny_models.mlp(), svd="exact", **settings).double()
    theirs = tiny_models.mlp().double().requires_grad_(False)
    for name in TARGETS:
        setattr(theirs, name, BesideResidual(ours.base_model.model.get_submodule(name)))
    losses, start = [], ours(x).detach()
    torch.testing.assert_close(theirs(x), start, atol=1e-10, rtol=0)
    for model in (ours, theirs):
        trained = [value for value in model.parameters() if value.requires_grad]
        assert len(trained) == 6
        steps = optimizer(trained, lr=0.02)
        losses.append([])
        for _ in range(20):
            loss = (model(x) - 1).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert (ours(x) - start).abs().max() > 1e-3
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-7, rtol=0)


def test_values_that_cross_zero_train_on_without_nan():
    model = turn_values(wrap(tiny_models.mlp()))
    losses = tiny_models.train(model, tiny_models.inputs(), steps=30, lr=0.1)
    assert losses[-1] < losses[0]
    assert all(value.isfinite().all() for value in model.parameters())


# -- merged, saved, exported ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=["plain", "crossed"])
def trained(request, base, tmp_path):
    """A model with a saved adapter at `tmp_path / "adapter"`; "crossed": `S` has negative and zero entries."""
    settings = {"lora_alpha": 6, "rank_pattern": {"v_proj": 3}}
    model = saved.drift(wrap(saved.load_base(base), LINEAR, **settings), size=0.05)
    if request.param == "crossed":
        turn_values(model)
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.filterwarnings("ignore:Merge lora module")
@pytest.mark.parametrize("safe", [False, True])
def test_merged_is_unmerged(trained, safe, tokens):
    expected = tiny_models.logits(trained, tokens)
    weights = {
        name: layer.base_layer.weight.double() + saved.delta(layer)
        for name, layer in saved.additive_layers(trained).items()
    }
    merged = trained.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(tiny_models.logits(merged, tokens), expected, atol=2e-5, rtol=1e-5)
    for name, weight in weights.items():
        merged_weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        torch.testing.assert_close(merged_weight.double(), weight, atol=1e-6, rtol=0)


def test_the_sidecar_brings_back_every_bit_and_without_it_a_lora_computes_the_same(trained, base, tmp_path, tokens):
    expected = tiny_models.logits(trained, tokens)
    with_sidecar = peft.PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter", is_trainable=True)
    assert isinstance(with_sidecar.peft_config["default"], SorsaConfig)
    assert saved.factor_bytes(with_sidecar) == saved.factor_bytes(trained)
    assert torch.equal(tiny_models.logits(with_sidecar, tokens), expected)
    (tmp_path / "adapter" / SIDECAR_NAME).unlink()
    without = peft.PeftModel.from_pretrained(saved.load_base(base), tmp_path / "adapter")
    assert type(without.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(tiny_models.logits(without, tokens), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [None, 8, 3])
def test_the_exported_lora_is_the_unmerged_model(trained, base, tmp_path, tokens, rank):
    """Rank 8 = 2r is exact; rank 3 is the best of its rank, off by what the report says."""
    report = llmreg.export_lora(tmp_path / "adapter", tmp_path / "export", rank=rank)
    exported = peft.PeftModel.from_pretrained(saved.load_base(base), tmp_path / "export")
    assert type(exported.peft_config["default"]) is peft.LoraConfig
    assert report.rank == (rank or 8)
    dropped = whole = 0.0
    for name, layer in saved.additive_layers(trained).items():
        update, other = saved.delta(layer), exported.get_submodule(name).get_delta_weight("default").double()
        assert other.isfinite().all()
        spectrum = torch.linalg.svdvals(update)
        best = float(spectrum[rank or 8 :].square().sum())
        assert float((other - update).norm() ** 2) == pytest.approx(best, rel=1e-3, abs=1e-10)
        dropped, whole = dropped + best, whole + float(update.norm() ** 2)
    assert report.relative_error == pytest.approx((dropped / whole) ** 0.5, rel=1e-3, abs=1e-6)
    if rank != 3:
        out = tiny_models.logits(exported, tokens)
        torch.testing.assert_close(out, tiny_models.logits(trained, tokens), atol=2e-5, rtol=1e-5)


def test_a_live_adapter_takes_the_saved_tensors_alone_as_the_same_function(trained, base, tokens):
    """Without a sidecar the six factors are not told, but the function is, signs and zeros included."""
    stored = peft.get_peft_model_state_dict(trained)
    fresh = wrap(saved.load_base(base), LINEAR, lora_alpha=6, rank_pattern={"v_proj": 3})
    peft.set_peft_model_state_dict(fresh, stored)
    for name, layer in saved.additive_layers(fresh).items():
        start = saved.additive_layers(trained)[name].lora_S0["default"].weight
        torch.testing.assert_close(layer.lora_S0["default"].weight, start, atol=1e-5, rtol=0)
    expected = tiny_models.logits(trained, tokens)
    torch.testing.assert_close(tiny_models.logits(fresh, tokens), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("crossed", [False, True])
def test_in_half_precision_what_is_saved_is_within_a_percent_of_a_one_percent_update(tmp_path, dtype, crossed):
    config = SorsaConfig(r=4, weights=None, target_modules=LINEAR)
    model = peft.get_peft_model(tiny_models.llama(dtype), config, autocast_adapter_dtype=False)
    saved.drift(model, size=0.01)
    if crossed:
        turn_values(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {tiny_models.FLOATS[dtype]}
    for name, layer in saved.additive_layers(model).items():
        down, up = (stored[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        assert saved.relative(up @ down, saved.delta(layer)) < 0.01
