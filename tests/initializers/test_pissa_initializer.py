"""PiSSA's start (arXiv 2404.02948, section 3): identities against an exact SVD and against PEFT's own init."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmreg.initializers import pissa

SCALINGS = (0.25, 1.0, 2.0, 16 / 8**0.5)  # the last: rsLoRA with alpha 16, r 8


def decaying(out: int, width: int, *, power: float = 0.6, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """`(out, width)` with singular values `k^-power` and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    size = min(out, width)
    U, _ = torch.linalg.qr(torch.randn(out, size, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(width, size, generator=generator, dtype=torch.float64))
    return ((U * torch.arange(1, size + 1, dtype=torch.float64) ** -power) @ V.T).to(dtype)


def truncated(W: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
def test_scaled_product_is_the_principal_part_for_every_scaling(shape, scaling):
    W = decaying(*shape, dtype=torch.float32)
    factors = pissa(W, 8, scaling, svd="exact")
    product = scaling * factors.B.double() @ factors.A.double()
    assert (product - truncated(W, 8)).norm() <= 1e-6 * W.norm()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_both_factors_carry_the_square_root_of_the_singular_values(scaling):
    W = decaying(48, 80)
    factors = pissa(W, 8, scaling, svd="exact")
    expected = torch.diag(torch.linalg.svdvals(W)[:8] / scaling)
    torch.testing.assert_close(factors.A @ factors.A.T, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(factors.B.T @ factors.B, expected, atol=1e-12, rtol=0)


def test_residual_keeps_the_other_singular_values_and_only_those():
    W = decaying(48, 80)
    factors = pissa(W, 8, 1.0, svd="exact")
    residual = torch.linalg.svdvals(W - factors.B @ factors.A)
    torch.testing.assert_close(residual[:40], torch.linalg.svdvals(W)[8:], atol=1e-12, rtol=0)
    assert residual[40:].max() < 1e-12


def test_randomised_start_is_within_a_percent_of_the_best_residual():
    W = decaying(256, 192, dtype=torch.float32)
    best = (W.double() - truncated(W, 16)).norm()
    factors = pissa(W, 16, 1.0)
    assert (W.double() - factors.B.double() @ factors.A.double()).norm() <= 1.0005 * best


@pytest.mark.parametrize("alpha", [2, 8, 16])
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_are_those_of_peft_up_to_the_sign_of_each_component(alpha, rslora):
    W = decaying(40, 56, dtype=torch.float32)
    layer = nn.Sequential(nn.Linear(56, 40, bias=False))
    layer[0].weight.data.copy_(W)
    config = peft.LoraConfig(r=8, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    A, B = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
    scaling = theirs.scaling["default"]
    ours = pissa(W, 8, scaling, svd="exact")
    signs = (ours.A * A).sum(dim=1).sign()
    torch.testing.assert_close(ours.A * signs[:, None], A, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.B * signs, B, atol=1e-5, rtol=0)
    residual = theirs.base_layer.weight.detach()
    torch.testing.assert_close(W - scaling * ours.B @ ours.A, residual, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
def test_any_shape_and_rank_gives_the_principal_part(out, width, data):
    rank = data.draw(st.integers(1, min(out, width)))
    svd = data.draw(st.sampled_from(["exact", "randomized"]))
    scaling = data.draw(st.floats(0.01, 100))
    W = decaying(out, width, power=1.5, seed=out * 41 + width)
    factors = pissa(W, rank, scaling, svd=svd)
    assert factors.A.shape == (rank, width)
    assert factors.B.shape == (out, rank)
    best = (W - truncated(W, rank)).norm()
    assert (W - scaling * factors.B @ factors.A).norm() <= 1.001 * best + 1e-10
    assert (factors.singular_values.diff() <= 0).all()


def test_a_batch_of_equal_shapes_is_decomposed_like_each_of_them():
    W = torch.stack([decaying(32, 24, seed=seed) for seed in range(3)])
    batch = pissa(W, 4, 2.0, svd="exact")
    for index in range(3):
        single = pissa(W[index], 4, 2.0, svd="exact")
        torch.testing.assert_close(batch.B[index] @ batch.A[index], single.B @ single.A, atol=1e-12, rtol=0)


def test_a_zero_weight_has_a_zero_start():
    factors = pissa(torch.zeros(12, 20), 3, 1.0)
    assert not factors.A.any()
    assert not factors.B.any()


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan")])
def test_a_scaling_that_is_not_positive_is_refused(scaling):
    with pytest.raises(ValueError, match="positive scaling"):
        pissa(decaying(12, 20), 3, scaling)


def test_a_rank_larger_than_the_weight_is_refused():
    with pytest.raises(ValueError, match="13"):
        pissa(decaying(12, 20), 13, 1.0)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_global_random_state_is_neither_used_nor_changed(svd):
    W = decaying(64, 48, dtype=torch.float32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pissa(W, 4, 1.0, svd=svd, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = pissa(W, 4, 1.0, svd=svd, seed=7)
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)


def test_signs_do_not_depend_on_the_route():
    W = decaying(64, 48, power=1.0)
    exact, randomised = pissa(W, 4, 1.0, svd="exact"), pissa(W, 4, 1.0)
    torch.testing.assert_close(exact.A, randomised.A, atol=1e-6, rtol=0)
