"""EVA (arXiv 2410.07170): principal components from merged moments, against exact PCA and PEFT's incremental one."""

from __future__ import annotations

import pytest
import torch
from anisotropic import inputs, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from llmreg.errors import RecipeError, UnsupportedError, WeightError
from llmreg.initializers import (
    EvaComponents,
    SecondMoment,
    component_cosines,
    eva,
    eva_components,
    has_converged,
    most_components,
    redistribute,
    scaled_alpha,
    whiten,
)


def activations(count=2000, width=48, *, decay=0.5, mean=3.0, seed=0):
    """Anisotropic inputs around a strong mean, as those of language models are."""
    generator = torch.Generator().manual_seed(50 + seed)
    return inputs(count, width, decay=decay, seed=seed) + mean * torch.randn(
        width, generator=generator, dtype=torch.float64
    )


def moments(X, kind="matrix", dtype=None):
    dtype = dtype or X.dtype
    common = {"mean": X.double().mean(0), "count": len(X), "trace": X.double().square().sum().item() / len(X)}
    if kind == "factor":
        return SecondMoment(factor=(X.T / len(X) ** 0.5).to(dtype), **common)
    return SecondMoment(matrix=(X.T @ X / len(X)).to(dtype), **common)


def exact_pca(X, centered):
    """Right singular vectors, singular values and ratios of the (centred) activations themselves."""
    data = X.double() - X.double().mean(0) if centered else X.double()
    _, S, Vh = torch.linalg.svd(data, full_matrices=False)
    return Vh, S, S**2 / (S**2).sum()


# -- the components ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["randomized", "exact"])
@pytest.mark.parametrize(("width", "count"), [(48, 2000), (300, 2000), (300, 60)])
@pytest.mark.parametrize("kind", ["matrix", "factor"])
@pytest.mark.parametrize("centered", [True, False])
def test_they_are_those_of_an_exact_pca_of_all_activations(centered, kind, width, count, method):
    X = activations(count, width)
    found = eva_components(moments(X, kind), 6, centered=centered, method=method)
    V, S, ratios = exact_pca(X, centered)
    assert component_cosines(V[:6], found.V).abs().min() > 0.9999
    torch.testing.assert_close(found.S, S[:6], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.ratios, ratios[:6], rtol=1e-5, atol=0)


def test_centred_and_uncentred_are_different_things_where_the_mean_is_strong():
    X = activations()
    centred, uncentred = (eva_components(moments(X), 1, centered=centered).V[0] for centered in (True, False))
    assert (centred @ uncentred).abs() < 0.5
    assert torch.nn.functional.cosine_similarity(uncentred, X.mean(0), dim=0).abs() > 0.99


@pytest.mark.parametrize("components", [16, 32])
@pytest.mark.parametrize("outlier", [1.0, 1e3])
@pytest.mark.parametrize("decay", [0.3, 0.6, 1.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_randomised_route_captures_all_but_a_ten_thousandth_of_the_best_variance(dtype, decay, outlier, components):
    X = activations(1500, 600, decay=decay, mean=1.0)
    X[:, 7] *= outlier  # one massive direction, as in language models
    given = moments(X.float() if dtype == torch.float32 else X)
    C = X.T @ X / len(X) - torch.outer(X.mean(0), X.mean(0))
    rows = eva_components(given, components).V.double()
    assert (rows @ rows.T - torch.eye(components)).abs().max() < 2e-7, "orthonormal to the rounding of their entries"
    V, _ = torch.linalg.qr(rows.T)
    values = torch.linalg.eigvalsh(C)[-components:]
    captured = (V.T @ C @ V).trace()
    assert captured > 0.9999 * values.sum()
    # Beside the massive direction as well; there float32 moments know the others to about a thousandth.
    share = 0.99 if dtype == torch.float32 and outlier > 1 else 0.9999
    assert captured - values[-1] > share * values[:-1].sum()


@pytest.mark.parametrize("kind", ["matrix", "factor"])
@pytest.mark.parametrize("method", ["randomized", "exact"])
@pytest.mark.parametrize("components", [4, 40])
def test_the_rows_are_orthonormal_and_their_largest_entry_is_positive(kind, method, components):
    X = activations(30, 160).float()  # 40 components of 29 dimensions
    V, S, ratios = eva_components(moments(X, kind), components, method=method)
    assert V.dtype == torch.float32
    assert (V @ V.T - torch.eye(components)).norm() < 1e-4
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()
    assert (ratios >= 0).all()
    assert ratios.sum() <= 1 + 1e-4
    assert (S.diff() <= 0).all()
    if components > 30:
        assert ratios[30:].max() < 1e-5


def test_they_agree_with_peft_s_incremental_pca():
    from peft.utils.incremental_pca import IncrementalPCA

    X = activations(2000, 64, decay=0.9, mean=1.0).float()
    pca = IncrementalPCA(n_components=8, lowrank=True, lowrank_seed=42)
    for batch in X.split(100):
        pca.partial_fit(batch)
    found = eva_components(moments(X), 8)
    assert component_cosines(pca.components_[:4], found.V[:4]).min() > 0.99  # signed: the same sign rule
    torch.testing.assert_close(found.S[:4], pca.singular_values_[:4].double(), rtol=0.02, atol=0)
    torch.testing.assert_close(found.ratios[:4], pca.explained_variance_ratio_[:4].double(), rtol=0.02, atol=0)


def test_the_order_of_the_batches_changes_nothing():
    X = activations(2000, 300).float()
    batches = X.split(125)

    def merged(order):
        C, total = torch.zeros(300, 300), torch.zeros(300, dtype=torch.float64)
        for index in order:
            C += batches[index].T @ batches[index] / len(X)
            total += batches[index].double().sum(0)
        return eva_components(SecondMoment(matrix=C, mean=total / len(X), count=len(X)), 8, seed=3)

    forward, shuffled = merged(range(16)), merged(torch.randperm(16, generator=torch.Generator().manual_seed(1)))
    assert (component_cosines(forward.V, shuffled.V) > 1 - 1e-6).all()
    torch.testing.assert_close(forward.ratios, shuffled.ratios, rtol=1e-5, atol=1e-7)


def test_the_variance_that_a_sketch_has_lost_still_counts_in_the_ratios():
    X = activations(2000, 96, mean=0.0)
    exact = moments(X)
    values, vectors = torch.linalg.eigh(exact.matrix)
    sketch = vectors[:, -20:] * values[-20:].sqrt()
    found = eva_components(SecondMoment(factor=sketch, trace=exact.trace, mean=exact.mean), 6)
    torch.testing.assert_close(found.ratios, eva_components(exact, 6).ratios, rtol=1e-3, atol=0)
    assert (eva_components(SecondMoment(factor=sketch, mean=exact.mean), 6).ratios > found.ratios).all()


def test_the_first_gradient_of_b_is_larger_than_from_any_random_orthonormal_start():
    X = activations(2000, 48, mean=0.2)
    found = eva_components(moments(X), 6, centered=False)
    C = X.T @ X / len(X)
    best = torch.linalg.eigvalsh(C)[-6:].sum()
    torch.testing.assert_close((found.V @ C @ found.V.T).trace(), best)

    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(len(X), 32, generator=generator, dtype=torch.float64)  # of the loss by each output

    def squared_gradient(A):
        return torch.einsum("ni,no->n", (X @ A.T) ** 2, gradient**2).mean()

    for _ in range(20):
        random, _ = torch.linalg.qr(torch.randn(48, 6, generator=generator, dtype=torch.float64))
        assert squared_gradient(found.V) > squared_gradient(random.T)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"components": 49}, WeightError, "49"),
        ({"components": 0}, WeightError, "0"),
        ({"method": "lanczos"}, UnsupportedError, "'exact'"),
        ({"moments": SecondMoment(matrix=torch.eye(48))}, WeightError, "centered=False"),
        ({"moments": SecondMoment(matrix=torch.zeros(48, 48), mean=torch.zeros(48))}, WeightError, "no variance"),
        ({"moments": SecondMoment(matrix=torch.eye(48).expand(2, 48, 48))}, WeightError, "one layer's"),
    ],
)
def test_what_is_wrong_is_said(changed, error, message):
    with pytest.raises(error, match=message):
        eva_components(**({"moments": moments(activations()), "components": 6} | changed))


# -- factors, whitening, convergence ----------------------------------------------------------------------------


def test_the_adapter_starts_with_the_first_components_and_a_zero_b():
    found = eva_components(moments(activations()), 8)
    factors = eva(found, 5, 32)
    assert torch.equal(factors.A, found.V[:5])
    assert factors.B.shape == (32, 5)
    assert not factors.B.any()
    assert torch.equal(weight(32, 48) + factors.B @ factors.A, weight(32, 48))


def test_layers_that_share_an_input_differ_in_rank_only_and_each_is_whitened_once():
    found = eva_components(moments(activations()), 8)
    before = found.V.clone()
    starts = [eva(found, rank, 32, whiten_components=True) for rank in (8, 5, 3)]
    assert torch.equal(found.V, before)
    for start in starts:
        rank = len(start.A)
        torch.testing.assert_close(start.A, found.V[:rank] / found.S[:rank, None].sqrt())
    eva(found, 8, 32).A.zero_()
    assert torch.equal(found.V, before), "a start is a copy"


def test_a_component_without_variance_cannot_be_whitened():
    with pytest.raises(WeightError, match="rank to 2"):
        whiten(torch.eye(3), torch.tensor([2.0, 1.0, 0.0]))


def test_more_ranks_than_components_are_refused():
    found = EvaComponents(torch.eye(3, 8), torch.ones(3), torch.ones(3) / 8)
    for rank in (0, 4):
        with pytest.raises(WeightError, match="3 components"):
            eva(found, rank, 4)


def test_a_layer_has_converged_when_the_components_within_its_rank_have():
    previous = torch.eye(3, 8)
    current = previous.clone()
    current[2] = -current[2]  # a flipped sign is a change
    assert has_converged(previous, current, 2)
    assert not has_converged(previous, current, 3)
    assert has_converged(previous, current, 0)
    assert not has_converged(None, current, 2)
    assert has_converged(None, current, 0)
    turned = torch.eye(3, 8)
    turned[0, 7] = 0.2  # cosine 0.981
    assert not has_converged(previous, turned, 1)
    assert has_converged(previous, turned, 1, tau=0.98)


# -- ranks and scaling ------------------------------------------------------------------------------------------


def spectra(layers, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer{i}": torch.rand(width, generator=generator, dtype=torch.float64).pow(1 + i).sort(descending=True).values
        for i in range(layers)
    }


ranks_strategy = st.lists(st.integers(1, 16), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(ranks=ranks_strategy, rho=st.floats(1.0, 3.0), seed=st.integers(0, 99))
def test_the_total_is_exact_no_cap_is_passed_and_every_winner_beats_every_loser(ranks, rho, seed):
    ratios = spectra(len(ranks), width=48, seed=seed)
    asked = dict(zip(ratios, ranks, strict=True))
    found = redistribute(ratios, asked, rho)
    assert sum(found.values()) == sum(ranks)
    assert list(found) == list(ratios)
    assert all(0 <= found[name] <= round(rho * asked[name]) for name in asked)
    winners = [ratios[name][found[name] - 1].item() for name in asked if found[name]]
    losers = [ratios[name][found[name]].item() for name in asked if found[name] < round(rho * asked[name])]
    assert min(winners) >= max(losers, default=0.0)


@settings(max_examples=30, deadline=None)
@given(ranks=ranks_strategy, seed=st.integers(0, 99))
def test_rho_1_leaves_every_rank_as_it_was(ranks, seed):
    ratios = spectra(len(ranks), seed=seed)
    asked = dict(zip(ratios, ranks, strict=True))
    assert redistribute(ratios, asked, 1.0) == asked


def test_a_layer_that_explains_little_gets_nothing():
    ratios = {"sharp": torch.tensor([0.4, 0.3, 0.2, 0.05]), "flat": torch.full((4,), 0.01)}
    assert redistribute(ratios, {"sharp": 2, "flat": 2}) == {"sharp": 4, "flat": 0}


def test_a_layer_with_fewer_components_than_its_cap_leaves_them_to_others():
    ratios = {"narrow": torch.tensor([0.5]), "wide": torch.full((8,), 0.1)}
    assert redistribute(ratios, {"narrow": 4, "wide": 4}) == {"narrow": 1, "wide": 7}


def test_equal_ratios_are_shared_in_the_order_of_the_layers():
    shared = torch.tensor([0.3, 0.2, 0.1, 0.05])
    names = ["q", "k", "v"]
    assert redistribute(dict.fromkeys(names, shared), dict.fromkeys(names, 2)) == {"q": 2, "k": 2, "v": 2}
    others = dict.fromkeys(names, shared) | {"down": torch.tensor([0.15, 0.15, 0.0, 0.0])}
    asked = dict.fromkeys(others, 2)
    assert redistribute(others, asked) == {"q": 2, "k": 2, "v": 2, "down": 2}
    others["down"] = torch.tensor([0.3, 0.25, 0.22, 0.0])
    assert redistribute(others, asked) == {"q": 2, "k": 2, "v": 1, "down": 3}


def test_among_equal_ratios_the_lower_component_comes_first():
    flat = torch.full((4,), 0.1)
    assert redistribute({"a": flat, "b": flat}, {"a": 2, "b": 2}) == {"a": 2, "b": 2}


def test_layers_that_share_an_input_share_the_largest_cap():
    asked = {"q": 2, "k": 1, "down": 4}
    assert most_components(asked, 2.0, [("q", "k")]) == {"q": 4, "k": 4, "down": 8}
    shared = torch.tensor([0.5, 0.4, 0.3, 0.2])
    found = redistribute({"q": shared, "k": shared, "down": torch.full((8,), 0.01)}, asked, groups=[("q", "k")])
    assert found == {"q": 4, "k": 3, "down": 0}


@settings(max_examples=50, deadline=None)
@given(alpha=st.floats(0.5, 64), rank=st.integers(1, 64), new=st.integers(1, 128))
def test_the_scaling_of_a_layer_stays_with_and_without_rslora(alpha, rank, new):
    assert scaled_alpha(alpha, rank, new) / new == pytest.approx(alpha / rank)
    assert scaled_alpha(alpha, rank, new, use_rslora=True) / new**0.5 == pytest.approx(alpha / rank**0.5)


def test_the_known_case_under_rslora_keeps_its_scaling_of_4():
    assert scaled_alpha(16, 16, 32, use_rslora=True) / 32**0.5 == pytest.approx(4.0)


def test_ranks_that_cannot_be_redistributed_are_refused():
    ratios = {"q": torch.tensor([0.5, 0.2])}
    for rho in (0.5, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="rho"):
            redistribute(ratios, {"q": 1}, rho)
    with pytest.raises(RecipeError, match="'k'"):
        redistribute(ratios, {"q": 1, "k": 1})
    with pytest.raises(RecipeError, match="below 1"):
        redistribute(ratios, {"q": 0})
    with pytest.raises(RecipeError, match="'k'"):
        redistribute(ratios, {"q": 1}, groups=[("q", "k")])
    with pytest.raises(WeightError, match="'q'"):
        redistribute({"q": torch.tensor([float("nan"), 0.1])}, {"q": 1})
    with pytest.raises(RecipeError, match="rank 0"):
        scaled_alpha(16, 8, 0)
