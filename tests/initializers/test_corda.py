"""CorDA (arXiv 2406.05223): its identities, PEFT's own decomposition, sketches, bad statistics."""

from __future__ import annotations

import pytest
import torch
from anisotropic import damped, inputs, relative, second_moment, truncated, weight

from llmreg.errors import RecipeError, UnsupportedError, WeightError
from llmreg.initializers import Factors, SecondMoment, corda, damp

SHAPES = [(48, 64), (64, 48), (64, 64)]
MODES = ["ipm", "kpm"]


def dense_corda(W, C, rank, mode, *, damping=0.01, power=1.0):
    """`W_r` and the singular values as the paper writes them: full SVD and inverse, float64."""
    M = damped(C, damping)
    M = M if power == 1 else torch.linalg.cholesky(M)
    U, S, Vh = torch.linalg.svd(W @ M, full_matrices=False)
    kept = slice(0, rank) if mode == "ipm" else slice(len(S) - rank, len(S))
    return (U[:, kept] * S[kept]) @ (Vh @ torch.linalg.inv(M))[kept], S[kept]


def change(factors: Factors, scaling: float = 1.0):
    return scaling * factors.B.double() @ factors.A.double()


# -- the formula ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("svd", ["randomized", "exact"])
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_are_those_of_a_full_svd_and_an_inverse(shape, mode, power, svd):
    W, C = weight(*shape), second_moment(inputs(2000, shape[1]))
    factors = corda(W, 6, 2.0, C, mode=mode, power=power, svd=svd)
    expected, values = dense_corda(W, C, 6, mode, power=power)
    assert relative(change(factors, 2.0), expected) < 1e-8
    torch.testing.assert_close(factors.singular_values, values, rtol=1e-8, atol=0)


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("scaling", [0.25, 1.0, 16 / 8**0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_components_together_are_the_weight_for_any_damping_and_scaling(shape, mode, scaling, damping):
    W, C = weight(*shape), second_moment(inputs(2000, shape[1]))
    factors = corda(W, min(shape), scaling, C, mode=mode, damping=damping)
    assert relative(change(factors, scaling), W) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 600), (600, 300)])
def test_a_large_weight_takes_the_iterative_routes_and_stays_close_to_the_dense_formula(shape, dtype):
    W, C = weight(*shape), second_moment(inputs(3000, shape[1], decay=0.6))
    for mode, tolerance in (("ipm", 1e-3), ("kpm", 0.05)):
        factors = corda(W.to(dtype), 8, 1.0, C.to(dtype), mode=mode)
        assert factors.A.dtype == factors.B.dtype == dtype
        assert relative(change(factors), dense_corda(W, C, 8, mode)[0]) < tolerance


def test_in_float32_the_smallest_components_survive_where_the_dense_formula_loses_them():
    W, C = weight(300, 600), second_moment(inputs(3000, 600, decay=1.2))
    expected, _ = dense_corda(W, C, 8, "kpm")
    M = damped(C).float()
    U, S, Vh = torch.linalg.svd(W.float() @ M, full_matrices=False)
    in_float32 = relative((U[:, -8:] * S[-8:]) @ (Vh @ torch.linalg.inv(M))[-8:], expected)
    ours = relative(change(corda(W.float(), 8, 1.0, C.float(), mode="kpm")), expected)
    assert ours < 0.02
    assert ours < 0.2 * in_float32


@pytest.mark.parametrize("mode", MODES)
def test_it_is_peft_s_decomposition(mode):
    pytest.importorskip("attr")
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import collect_eigens_for_layer

    W, C = weight(48, 64), second_moment(inputs(2000, 64, decay=0.5))
    linear = torch.nn.Linear(64, 48, bias=False)
    linear.weight.data = W.float()
    linear.covariance_matrix = C.float()
    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))
    theirs = collect_eigens_for_layer(linear, config)
    kept = slice(0, 6) if mode == "ipm" else slice(48 - 6, 48)
    ours = corda(W.float(), 6, 1.0, C.float(), mode=mode)
    for index, place in enumerate(range(48)[kept]):
        expected = theirs.S_WC[place] * torch.outer(theirs.U_WC[:, place], theirs.V_WC[:, place])
        assert relative(torch.outer(ours.B[:, index], ours.A[index]), expected.double()) < 2e-3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("mode", MODES)
def test_isotropic_inputs_give_the_principal_or_the_minor_part_of_the_weight(mode, scale):
    W = weight(48, 64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = slice(0, 6) if mode == "ipm" else slice(42, 48)
    factors = corda(W, 6, 1.0, scale * torch.eye(64, dtype=torch.float64), mode=mode)
    assert relative(change(factors), (U[:, kept] * S[kept]) @ Vh[kept]) < 1e-8


@pytest.mark.parametrize("mode", MODES)
def test_the_unit_of_the_inputs_changes_nothing_but_the_balance_between_the_factors(mode):
    W, C = weight(48, 64), second_moment(inputs(2000, 64))
    one, other = (corda(W, 6, 1.0, scale * C, mode=mode) for scale in (1.0, 9.0))
    torch.testing.assert_close(other.B, 3 * one.B, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(other.A, one.A / 3, rtol=1e-7, atol=1e-9)
    one, other = (corda(W, 6, 1.0, scale * C, mode=mode, balance=True) for scale in (1.0, 9.0))
    torch.testing.assert_close(other.B, one.B, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(other.A, one.A, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_balancing_makes_both_factors_of_a_component_equally_long_and_keeps_their_product(mode):
    W, C = weight(48, 64), second_moment(inputs(2000, 64))
    plain, even = (corda(W, 6, 0.5, C, mode=mode, balance=balance) for balance in (False, True))
    torch.testing.assert_close(even.A.norm(dim=1), even.B.norm(dim=0))
    assert (plain.A.norm(dim=1) / plain.B.norm(dim=0)).log().abs().min() > 0.2, "the paper's are not balanced"
    assert relative(change(even), change(plain)) < 1e-12


# -- what the modes and the powers mean -------------------------------------------------------------------------


def test_ipm_holds_most_of_the_output_on_the_inputs_and_kpm_next_to_nothing():
    X = inputs(2000, 64)
    W, C = weight(48, 64), second_moment(X)
    energy = {mode: (X @ change(corda(W, 8, 1.0, C, mode=mode)).T).norm() ** 2 for mode in MODES}
    total = (X @ W.T).norm() ** 2
    assert energy["ipm"] > 0.5 * total
    assert energy["kpm"] < 0.05 * total


def test_power_one_half_is_optimal_for_the_outputs_and_beats_the_paper_s_and_the_plain_svd():
    X = inputs(2000, 64, decay=0.8)
    W, C = weight(48, 64), second_moment(X)

    def error(Wr):
        return ((W - Wr) @ X.T).norm().item()

    half = change(corda(W, 8, 1.0, C, power=0.5, damping=1e-9))
    assert error(half) < error(change(corda(W, 8, 1.0, C, damping=1e-9))) < error(truncated(W, 8))
    best = torch.linalg.svdvals(W @ X.T)[8:].norm().item()  # Eckart-Young, for W X itself
    assert error(half) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_any_root_of_the_second_moment_gives_the_same_components(mode):
    W, C = weight(48, 64), second_moment(inputs(2000, 64))
    values, vectors = torch.linalg.eigh(damped(C))
    root = (vectors * values.sqrt()) @ vectors.T
    U, S, Vh = torch.linalg.svd(W @ root, full_matrices=False)
    kept = slice(0, 6) if mode == "ipm" else slice(42, 48)
    expected = (U[:, kept] * S[kept]) @ (Vh @ torch.linalg.inv(root))[kept]
    assert relative(change(corda(W, 6, 1.0, C, mode=mode, power=0.5)), expected) < 1e-8


# -- sketches, sharing, batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [5, 20, 40, 90])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_factor_gives_what_its_product_gives(shape, columns, mode, power):
    F = inputs(columns, shape[1], decay=0.3).T / columns**0.5
    W = weight(*shape)
    sketched = corda(W, 6, 1.0, SecondMoment(factor=F), mode=mode, power=power)
    exact = corda(W, 6, 1.0, F @ F.T, mode=mode, power=power)
    assert relative(change(sketched), change(exact)) < 1e-6
    torch.testing.assert_close(sketched.singular_values, exact.singular_values, rtol=1e-7, atol=0)


def test_a_sketched_moment_is_never_multiplied_out_for_the_largest_components(monkeypatch):
    largest = 0
    real = torch.matmul

    def watched(X, Y, **options):
        nonlocal largest
        product = real(X, Y, **options)
        largest = max(largest, min(product.shape[-2:]))
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    F = inputs(30, 900, decay=0.3).float().T
    corda(weight(800, 900).float(), 4, 1.0, SecondMoment(factor=F))
    assert 30 <= largest < 200


def test_the_damping_of_a_sketch_is_relative_to_the_exact_trace():
    F = inputs(8, 64).T
    shift = damp(SecondMoment(factor=F, trace=640.0), 0.01).shift
    assert shift.item() == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["matrix", "factor"])
@pytest.mark.parametrize("mode", MODES)
def test_layers_that_share_an_input_share_the_damped_moment(mode, kind):
    F = inputs(20, 64).T
    moment = SecondMoment(factor=F) if kind == "factor" else SecondMoment(matrix=F @ F.T)
    shared = damp(moment)
    for seed in range(2):
        W = weight(48, 64, seed=seed)
        one, other = corda(W, 6, 1.0, shared, mode=mode), corda(W, 6, 1.0, moment, mode=mode)
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_weights_is_decomposed_like_each_of_them(mode, sketched):
    W = torch.stack([weight(48, 64, seed=seed) for seed in range(3)])
    F = torch.stack([inputs(20, 64, seed=seed).T for seed in range(3)])
    each = [SecondMoment(factor=f) if sketched else SecondMoment(matrix=f @ f.T) for f in F]
    batch = SecondMoment(factor=F) if sketched else SecondMoment(matrix=F @ F.mT)
    together, shared = corda(W, 6, 1.0, batch, mode=mode), corda(W, 6, 1.0, each[0], mode=mode)
    assert (together.A.shape, together.B.shape, together.singular_values.shape) == ((3, 6, 64), (3, 48, 6), (3, 6))
    for index in range(3):
        alone = corda(W[index], 6, 1.0, each[index], mode=mode)
        assert relative(together.B[index] @ together.A[index], alone.B @ alone.A) < 1e-7
        alone = corda(W[index], 6, 1.0, each[0], mode=mode)
        assert relative(shared.B[index] @ shared.A[index], alone.B @ alone.A) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_weights_and_any_moment_are_computed_in_float32(mode, dtype):
    W, C = weight(48, 64).to(dtype), second_moment(inputs(2000, 64))
    factors = corda(W, 6, 1.0, C, mode=mode)
    assert factors.A.dtype == factors.B.dtype == factors.singular_values.dtype == torch.float32
    assert relative(change(factors), dense_corda(W.double(), C, 6, mode)[0]) < 1e-3


def test_the_seed_decides_and_the_global_random_state_does_not():
    W, C = weight(600, 320).float(), second_moment(inputs(2000, 320)).float()
    before = torch.get_rng_state()
    first = corda(W, 4, 1.0, C, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first.A, corda(W, 4, 1.0, C, seed=7).A)


# -- bad statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_a_second_moment_of_rank_4_is_damped_until_it_can_be_inverted_and_the_identity_holds(mode, dtype):
    X, W = inputs(4, 64), weight(48, 64)
    factors = corda(W.to(dtype), 48, 1.0, second_moment(X).to(dtype), mode=mode)
    assert relative(change(factors), W) < (1e-10 if dtype == torch.float64 else 1e-3)


def test_the_damping_doubles_only_as_far_as_the_inverse_needs_it():
    X = inputs(4, 512).float()
    C = 1e3 * second_moment(X)

    def inverse_error(shift):
        C_f = C + shift * torch.eye(512)
        return torch.dist(C_f @ torch.linalg.inv(C_f), torch.eye(512)).item()

    damping = 1e-9
    moment = damp(C, damping)
    shift = (moment.matrix - C).diagonal().mean().item()
    doublings = round(torch.tensor(shift / (damping * C.diagonal().mean().item())).log2().item())
    assert 3 < doublings < 30
    assert inverse_error(4 * shift) < 0.05
    assert inverse_error(shift / 8) > 0.05
    assert damp(C.double(), damping).matrix.diagonal().mean() < moment.matrix.diagonal().mean(), "float64 needs less"


@pytest.mark.parametrize("rank", [8, 384])
@pytest.mark.parametrize("massive", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_whatever_the_spectrum_the_damped_moment_passes_the_reference_s_test(decay, massive, rank):
    values = torch.arange(1, 385, dtype=torch.float64) ** (-2 * decay)
    values[0] *= massive**2
    values[rank:] = 0
    directions, _ = torch.linalg.qr(weight(384, 384))
    C = ((directions * values) @ directions.T).float()
    moment = damp(C)
    assert torch.dist(moment.matrix @ torch.linalg.inv(moment.matrix), torch.eye(384)) < 0.06
    assert relative(moment.cholesky @ moment.cholesky.T, moment.matrix.double()) < 1e-5
    easy = 0.01 * C.diagonal().mean() > 1e-4 * C.norm()
    if easy:
        torch.testing.assert_close(moment.matrix.double(), damped(C.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["matrix", "factor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(kind, value):
    values = inputs(64, 64) if kind == "matrix" else inputs(8, 64).T
    values = values.clone()
    values[3, 5] = value
    with pytest.raises(WeightError, match="NaN or Inf"):
        corda(weight(48, 64), 6, 1.0, SecondMoment(**{kind: values}))


def test_an_indefinite_matrix_ends_the_doubling_with_an_error():
    C = torch.eye(64, dtype=torch.float64)
    C[0, 1] = C[1, 0] = 1e12
    with pytest.raises(WeightError, match="doubled 30 times"):
        damp(C)


def test_a_layer_that_no_token_reached_is_named_as_such():
    for moment in (torch.zeros(64, 64), SecondMoment(factor=torch.zeros(64, 4))):
        with pytest.raises(WeightError, match="no token reached"):
            corda(weight(48, 64), 6, 1.0, moment)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scaling": 0.0}, UnsupportedError, "positive scaling"),
        ({"mode": "ipa"}, UnsupportedError, "'ipm'"),
        ({"power": 0.7}, UnsupportedError, "1.0"),
        ({"svd": "full"}, UnsupportedError, "'exact'"),
        ({"damping": 0.0}, RecipeError, "0.01"),
        ({"rank": 49}, WeightError, "49"),
        ({"second_moment": torch.eye(63)}, WeightError, "another layer"),
        ({"second_moment": torch.ones(64).diag().roll(1, 0)}, WeightError, "zero"),
        ({"second_moment": torch.eye(64) + torch.ones(64, 64).triu(1)}, WeightError, "not symmetric"),
        ({"second_moment": torch.ones(64, 3)}, WeightError, "(in, in)"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_write_instead(changed, error, message):
    options = {"rank": 6, "scaling": 1.0, "second_moment": torch.eye(64)} | changed
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        corda(weight(48, 64), **options)


def test_a_second_moment_is_either_a_matrix_or_a_factor():
    for given in ({}, {"matrix": torch.eye(4), "factor": torch.eye(4)}):
        with pytest.raises(WeightError, match="exactly one"):
            SecondMoment(**given)
