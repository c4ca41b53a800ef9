"""Statistics of next-token distributions: dense float64 formulas, known values, memory, and what is refused."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmreg.errors import RecipeError, UnsupportedError
from llmreg.regularizers import logit_blocks
from llmreg.regularizers.base import Head
from llmreg.regularizers.vocabulary import TokenStatistics, teacher_kl, token_statistics

NAMES = TokenStatistics._fields
N, D, V = 9, 6, 23
LABELS = torch.tensor([0, 3, -100, 22, 5, 5, 2, -100, 11])
SETTINGS = {"kappa": 0.1, "top_k": 4}
#: Tokens of a block, logits of a piece, elements of W converted at a time: one block of one piece, and uneven splits.
TILES = [(256, 1 << 18, 1 << 22), (4, 3 * V, 5 * D)]
HEADS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "scale and temperature": {"scale": 0.6, "temperature": 1.7},
    "bias": {"bias": True},
    "all": {"softcap": 2.0, "scale": 1.4, "temperature": 0.7, "bias": True},
}


@pytest.fixture
def tiles(monkeypatch):
    def set_to(tokens, piece, converted):
        monkeypatch.setattr(logit_blocks, "TOKENS", dict.fromkeys(logit_blocks.TOKENS, tokens))
        monkeypatch.setattr(logit_blocks, "PIECE", dict.fromkeys(logit_blocks.PIECE, piece))
        monkeypatch.setattr(logit_blocks, "CONVERTED", converted)

    return set_to


def made(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_head(*, bias=False, dtype=torch.float64, vocabulary=V, seed=1, **rest):
    return Head(
        made(vocabulary, D, seed=seed, dtype=dtype),
        made(vocabulary, seed=seed + 1, dtype=dtype) if bias else None,
        **rest,
    )


def dense_logits(hidden, head):
    z = hidden @ head.weight.mT
    z = head.scale * (z if head.bias is None else z + head.bias)
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)) / head.temperature


def entropy_of(log_p):
    return -(log_p.exp() * log_p).sum(1)


def dense_statistics(hidden, head, labels, *, kappa=None, tau=None, top_k=4):
    z = dense_logits(hidden, head)
    log_p = torch.log_softmax(z, 1)
    threshold = math.log(tau) if kappa is None else log_p.amax(1, keepdim=True) + math.log(kappa)
    return TokenStatistics(
        log_probs=log_p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1) * (labels >= 0),
        entropy=entropy_of(log_p),
        max_log_prob=log_p.amax(1),
        kept_log_mass=log_p.masked_fill(log_p <= threshold, -math.inf).logsumexp(1),
        top_k_entropy=entropy_of(torch.log_softmax(z.topk(top_k, dim=1).values, 1)),
    )


def dense_kl(hidden, head, teacher_hidden, teacher_head, temperature=1.0):
    log_p = torch.log_softmax(dense_logits(hidden, head) / temperature, 1)
    log_q = torch.log_softmax(dense_logits(teacher_hidden, teacher_head) / temperature, 1)
    return (log_q.exp() * (log_q - log_p)).sum(1)


def with_gradients(values, inputs):
    """The values, and the gradients of a fixed weighting of them."""
    values = [one for one in values if one is not None]
    total = sum((made(len(one), seed=10 + at).to(one.device) * one).sum() for at, one in enumerate(values))
    return [*values, *torch.autograd.grad(total, inputs)]


def leaves(head, *, head_trains):
    """Hidden states and a copy of the head, and those of them that train."""
    hidden = made(N, D).requires_grad_()
    weight, bias = head.weight.clone(), None if head.bias is None else head.bias.clone()
    inputs = [hidden]
    if head_trains:
        inputs += [one.requires_grad_() for one in (weight, bias) if one is not None]
    return hidden, replace(head, weight=weight, bias=bias), inputs


def distribution_head(p):
    """A hidden state and a head whose next-token distribution is `p`."""
    return torch.ones(1, 1, dtype=torch.float64), Head(torch.tensor(p, dtype=torch.float64).log()[:, None])


# -- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", TILES, ids=str)
@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen head", "head trains"])
@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("outputs", [*([name] for name in NAMES), NAMES], ids=lambda names: "+".join(names[:2]))
def test_values_and_gradients_are_the_dense_formulas(outputs, settings, head_trains, sizes, tiles):
    tiles(*sizes)
    hidden, head, inputs = leaves(some_head(**settings), head_trains=head_trains)
    ours = token_statistics(hidden, head, LABELS, outputs=outputs, **SETTINGS)
    dense = dense_statistics(hidden, head, LABELS, **SETTINGS)
    dense = [one for name, one in zip(NAMES, dense, strict=True) if name in outputs]
    assert [name for name, one in zip(NAMES, ours, strict=True) if one is not None] == [
        n for n in NAMES if n in outputs
    ]
    torch.testing.assert_close(with_gradients(ours, inputs), with_gradients(dense, inputs), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("outputs", [*([name] for name in NAMES), NAMES], ids=lambda names: "+".join(names[:2]))
@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen head", "head trains"])
def test_gradcheck(outputs, head_trains, tiles):
    tiles(4, 3 * V, 5 * D)
    _, head, inputs = leaves(some_head(**HEADS["all"]), head_trains=head_trains)

    def function(hidden, weight=head.weight, bias=head.bias):
        given = token_statistics(hidden, replace(head, weight=weight, bias=bias), LABELS, outputs=outputs, **SETTINGS)
        return tuple(one for one in given if one is not None)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("outputs", [["kept_log_mass"], NAMES], ids=["alone", "with others"])
def test_a_fixed_threshold_is_the_dense_formula(outputs):
    hidden, head, inputs = leaves(some_head(), head_trains=False)
    ours = token_statistics(hidden, head, LABELS, outputs=outputs, tau=0.03, top_k=4)
    dense = dense_statistics(hidden, head, LABELS, tau=0.03)
    dense = [dense.kept_log_mass] if len(outputs) == 1 else dense
    torch.testing.assert_close(with_gradients(ours, inputs), with_gradients(dense, inputs), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("sizes", TILES, ids=str)
@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen head", "head trains"])
@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_the_teacher_s_divergence_is_the_dense_formula(settings, head_trains, sizes, tiles):
    tiles(*sizes)
    hidden, head, inputs = leaves(some_head(**settings), head_trains=head_trains)
    teacher_hidden, teacher_head = made(N, D, seed=5), some_head(seed=6, softcap=3.0, bias=True)
    given = (hidden, head, teacher_hidden, teacher_head)
    ours, dense = teacher_kl(*given, temperature=2.0), dense_kl(*given, temperature=2.0)
    torch.testing.assert_close(with_gradients([ours], inputs), with_gradients([dense], inputs), atol=1e-11, rtol=1e-11)


def test_gradcheck_of_the_teacher_s_divergence():
    _, head, inputs = leaves(some_head(**HEADS["all"]), head_trains=True)
    teacher = made(N, D, seed=5)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: teacher_kl(hidden, replace(head, weight=weight, bias=bias), teacher, some_head()),
        inputs,
    )


def test_the_values_are_trl_s():
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, head = (
        made(N, D).float(),
        some_head(bias=True, dtype=torch.float32, softcap=2.0, scale=1.4, temperature=0.7),
    )
    labels = LABELS.clamp(min=0)
    theirs = ChunkedLogProbFunction.apply(hidden, head.weight, head.bias, labels, 0.7, 8, 2.0, 1.4, ("entropy",))
    ours = token_statistics(hidden, head, labels, outputs=["log_probs", "entropy"])
    torch.testing.assert_close([*ours[:2]], [*theirs[:2]], atol=2e-6, rtol=2e-6)
    teacher = made(N, D, seed=5).float()
    kl = ChunkedDivergenceFunction.apply(
        hidden, head.weight, head.bias, teacher, head.weight, head.bias, 0.0, 0.7, 1.4, 2.0, 1.4, 2.0
    )[0]
    torch.testing.assert_close(teacher_kl(hidden, head, teacher, head), kl, atol=2e-6, rtol=2e-6)


# -- known values -------------------------------------------------------------------------------------------------


def test_the_kept_mass_of_four_tokens_is_the_paper_s():
    hidden, head = distribution_head([0.6, 0.3, 0.09, 0.01])
    log_mass = token_statistics(hidden, head, outputs=["kept_log_mass"], kappa=0.02).kept_log_mass
    assert float(log_mass.exp()) == pytest.approx(0.99, abs=1e-12)
    assert float(-log_mass) == pytest.approx(0.01005, abs=1e-5)


def test_the_gradient_of_the_exact_kl_is_the_policy_minus_the_proxy():
    p = torch.tensor([0.6, 0.3, 0.09, 0.01], dtype=torch.float64)
    z = p.log()[None].requires_grad_()  # hidden states are the logits, under an identity for a head
    (-token_statistics(z, Head(torch.eye(4, dtype=torch.float64)), outputs=["kept_log_mass"], kappa=0.02)[3]).backward()
    proxy = torch.tensor([0.6, 0.3, 0.09, 0.0], dtype=torch.float64) / 0.99
    torch.testing.assert_close(z.grad[0], p - proxy, atol=1e-14, rtol=1e-12)


def test_equal_logits_have_the_top_k_entropy_ln_20_and_no_gradient():
    hidden = made(N, D).requires_grad_()
    entropy = token_statistics(hidden, Head(torch.ones(50, D).double()), outputs=["top_k_entropy"], top_k=20)[4]
    torch.testing.assert_close(entropy, torch.full((N,), math.log(20), dtype=torch.float64))
    entropy.sum().backward()
    assert float(hidden.grad.abs().max()) < 1e-14


def test_a_teacher_that_is_the_student_gives_exactly_zero_and_no_gradient():
    hidden, head = made(N, D, dtype=torch.float32).requires_grad_(), some_head(dtype=torch.float32)
    value = teacher_kl(hidden, head, hidden.detach(), head)
    value.sum().backward()
    assert not value.any()
    assert not hidden.grad.any()


def test_the_rounding_of_large_normalisers_does_not_reach_a_small_divergence():
    hidden, head = made(N, D, dtype=torch.float32), some_head(dtype=torch.float32)
    head = replace(head, bias=torch.full((V,), 500.0))  # float32 knows normalisers near 500 to 3e-5
    teacher = hidden + 1e-2 * made(N, D, seed=5, dtype=torch.float32)
    doubled = replace(head, weight=head.weight.double(), bias=head.bias.double())
    exact = dense_kl(hidden.double(), doubled, teacher.double(), doubled)
    assert 1e-6 < float(exact.max()) < 1e-3
    # Left are the rounding of a sum of probabilities, 1e-7, and differences of logits times that of logits.
    torch.testing.assert_close(teacher_kl(hidden, head, teacher, head).double(), exact, atol=5e-7, rtol=0)


def test_a_tiny_dropped_mass_keeps_its_digits_in_float32():
    hidden, head = distribution_head([1 - 1e-9, 1e-9])
    head = Head(head.weight.float())
    log_mass = token_statistics(hidden.float(), head, outputs=["kept_log_mass"], kappa=0.5).kept_log_mass
    assert float(-log_mass) == pytest.approx(1e-9, rel=1e-4)


# -- the edges ----------------------------------------------------------------------------------------------------


def test_a_token_at_the_threshold_is_not_kept():
    head = Head(torch.tensor([[0.0], [math.log(0.5)], [-5.0]], dtype=torch.float64))
    log_mass = token_statistics(torch.ones(1, 1).double(), head, outputs=["kept_log_mass"], kappa=0.5).kept_log_mass
    p = torch.softmax(head.weight[:, 0], 0)
    torch.testing.assert_close(log_mass, p[:1].log())


@pytest.mark.parametrize(("p", "mass"), [([0.4, 0.35, 0.25], 0.4), ([0.3, 0.3, 0.25, 0.15], 0.6)], ids=str)
def test_where_tau_keeps_no_token_the_most_probable_are_kept(p, mass):
    hidden, head = distribution_head(p)
    log_mass = token_statistics(hidden.requires_grad_(), head, outputs=["kept_log_mass"], tau=0.5).kept_log_mass
    assert float(log_mass.detach().exp()) == pytest.approx(mass)
    log_mass.backward()
    assert torch.isfinite(hidden.grad).all()


def test_ties_at_the_kth_largest_logit_leave_the_entropy_alone_and_the_gradient_to_k_tokens():
    z = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    head = Head(torch.eye(5, dtype=torch.float64))
    entropy = token_statistics(z, head, outputs=["top_k_entropy"], top_k=2).top_k_entropy
    torch.testing.assert_close(entropy, entropy_of(torch.log_softmax(z[:, :2], 1)))
    entropy.backward()
    assert int((z.grad != 0).sum()) == 2


def test_tied_maxima_have_the_first_s_gradient():
    z = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    token_statistics(z, Head(torch.eye(3, dtype=torch.float64)), outputs=["max_log_prob"]).max_log_prob.backward()
    expected = torch.eye(3, dtype=torch.float64)[1] - torch.softmax(z.detach()[0], 0)
    torch.testing.assert_close(z.grad[0], expected)


@pytest.mark.parametrize("outputs", [["log_probs"], ["log_probs", "entropy"]], ids=["alone", "with entropy"])
def test_an_ignored_label_has_log_prob_zero_and_gives_no_gradient(outputs):
    hidden = made(N, D).requires_grad_()
    log_probs = token_statistics(hidden, some_head(), LABELS, outputs=outputs).log_probs
    log_probs.sum().backward()
    assert torch.equal(log_probs == 0, LABELS < 0)
    assert torch.equal((hidden.grad == 0).all(1), LABELS < 0)


@pytest.mark.parametrize("outputs", [["top_k_entropy"], ["entropy"], NAMES], ids=lambda names: "+".join(names[:2]))
def test_no_tokens_give_no_values_and_no_gradient(outputs):
    hidden, labels = torch.zeros(0, D, requires_grad=True), torch.zeros(0, dtype=torch.long)
    head = some_head(dtype=torch.float32)
    given = token_statistics(hidden, head, labels, outputs=outputs, **SETTINGS)
    values = [*(one for one in given if one is not None), teacher_kl(hidden, head, hidden.detach(), head)]
    assert all(one.shape == (0,) for one in values)
    sum(one.sum() for one in values).backward()
    assert hidden.grad.shape == (0, D)


def test_an_output_that_gets_no_gradient_adds_none():
    hidden, head, inputs = leaves(some_head(), head_trains=True)
    given = token_statistics(hidden, head, LABELS, outputs=NAMES, **SETTINGS)
    alone = token_statistics(hidden, head, outputs=["entropy"])
    torch.testing.assert_close(
        torch.autograd.grad(given.entropy.sum(), inputs), torch.autograd.grad(alone.entropy.sum(), inputs)
    )


# -- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outputs", [["kept_log_mass"], NAMES], ids=lambda names: "+".join(names[:2]))
def test_half_inputs_give_float32_values_and_gradients_rounded_once(dtype, outputs, tiles):
    tiles(4, 3 * V, 5 * D)
    _check_half(dtype, outputs, "cpu", bound=torch.finfo(dtype).eps)


def _check_half(dtype, outputs, device, bound):
    """Half inputs against their exact float64 formulas: values to float32's accuracy, gradients to `bound`."""
    hidden, labels = made(N, D).to(device, dtype).requires_grad_(), LABELS.to(device)
    weight = made(V, D, seed=1).to(device, dtype).requires_grad_(len(outputs) > 1)
    inputs = [one for one in (hidden, weight) if one.requires_grad]
    ours = with_gradients(token_statistics(hidden, Head(weight), labels, outputs=outputs, **SETTINGS), inputs)
    exact = [one.detach().double().requires_grad_(one.requires_grad) for one in (hidden, weight)]
    dense = dense_statistics(exact[0], Head(exact[1]), labels, **SETTINGS)
    dense = [one for name, one in zip(NAMES, dense, strict=True) if name in outputs]
    dense = with_gradients(dense, [one for one in exact if one.requires_grad])
    for mine, one in zip(ours[: len(outputs)], dense, strict=False):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), one, atol=5e-6, rtol=5e-6)
    for mine, one in zip(ours[len(outputs) :], dense[len(outputs) :], strict=True):
        assert mine.dtype == dtype
        assert float((mine.double() - one).norm() / one.norm()) < bound


def test_a_half_precision_head_under_float32_hidden_states_is_multiplied_in_float32():
    hidden, head = made(N, D, dtype=torch.float32), some_head(dtype=torch.bfloat16)
    exact = dense_statistics(hidden, Head(head.weight.float()), LABELS, **SETTINGS)
    ours = token_statistics(hidden, head, LABELS, outputs=NAMES, **SETTINGS)
    torch.testing.assert_close([*ours], [*exact], atol=5e-6, rtol=5e-6)


def test_autocast_changes_nothing():
    hidden, head = made(N, D, dtype=torch.float32).requires_grad_(), some_head(dtype=torch.float32)

    def run():
        given = token_statistics(hidden, head, LABELS, outputs=NAMES, **SETTINGS)
        return with_gradients([*given, teacher_kl(hidden, head, hidden.detach().flip(0), head)], [hidden])

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_values_and_gradients_are_the_dense_formulas(dtype, tiles):
    tiles(4, 3 * V, 5 * D)
    if dtype == torch.float64:
        hidden = made(N, D).cuda().requires_grad_()
        head, labels = Head(made(V, D, seed=1).cuda(), softcap=2.0), LABELS.cuda()
        ours = token_statistics(hidden, head, labels, outputs=NAMES, **SETTINGS)
        dense = dense_statistics(hidden, head, labels, **SETTINGS)
        torch.testing.assert_close(with_gradients(ours, [hidden]), with_gradients(dense, [hidden]))
        given = (hidden, head, hidden.detach().flip(0), head)
        ours, dense = [teacher_kl(*given)], [dense_kl(*given)]
        torch.testing.assert_close(with_gradients(ours, [hidden]), with_gradients(dense, [hidden]))
    else:  # tensor cores take the logits' gradient in half precision: one rounding more than on a CPU
        for outputs in ([name] for name in NAMES):
            _check_half(dtype, outputs, "cuda", bound=3 * torch.finfo(dtype).eps)
        _check_half(dtype, NAMES, "cuda", bound=3 * torch.finfo(dtype).eps)


# -- memory -------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The largest number of elements that an operation gave back, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return result


@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen head", "head trains"])
@pytest.mark.parametrize("outputs", [*([name] for name in NAMES), NAMES], ids=lambda names: "+".join(names[:2]))
def test_nothing_of_tokens_by_vocabulary_is_made(outputs, head_trains, tiles):
    tokens, vocabulary = 64, 500
    tiles(4, 2 * vocabulary, 5 * D)
    hidden, labels = made(tokens, D).requires_grad_(), torch.arange(tokens)
    head = some_head(vocabulary=vocabulary)
    head.weight.requires_grad_(head_trains)
    with Watch() as watch:
        given = token_statistics(hidden, head, labels, outputs=outputs, **SETTINGS)
        kl = teacher_kl(hidden, head, hidden.detach(), some_head(vocabulary=vocabulary))
        sum(one.sum() for one in (*given, kl) if one is not None).backward()
    largest_of_its_own = max(4 * vocabulary, tokens * D)
    assert watch.largest <= max(largest_of_its_own, head.weight.numel())  # the head itself, and its gradient


@pytest.mark.parametrize(
    ("outputs", "products"),
    [(["log_probs"], 2), (["entropy"], 2), (["kept_log_mass"], 2), (["top_k_entropy"], 1), (NAMES, 3), ("kl", 3)],
    ids=str,
)
def test_forward_and_backward_take_so_many_products_with_the_head(outputs, products):
    hidden, head = made(N, D).requires_grad_(), some_head()
    with Watch() as watch:
        if outputs == "kl":
            teacher_kl(hidden, head, made(N, D, seed=5), head).sum().backward()
        else:
            given = token_statistics(hidden, head, LABELS, outputs=outputs, **SETTINGS)
            sum(one.sum() for one in given if one is not None).backward()
    assert watch.products == products


def test_without_gradients_one_product_is_made_and_nothing_is_saved():
    hidden, head = made(N, D).requires_grad_(), some_head()
    with torch.no_grad(), Watch() as watch:
        given = token_statistics(hidden, head, LABELS, outputs=["kept_log_mass"], **SETTINGS)
    assert watch.products == 1
    assert given.kept_log_mass.grad_fn is None


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"outputs": ["entropi"]}, "did you mean 'entropy'"),
        ({"outputs": []}, "outputs is empty"),
        ({"outputs": ["kept_log_mass"]}, "exactly one of kappa and tau"),
        ({"outputs": ["kept_log_mass"], "kappa": 0.1, "tau": 0.1}, "exactly one of kappa and tau"),
        ({"outputs": ["kept_log_mass"], "kappa": 1.5}, "kappa must be between 0 and 1"),
        ({"outputs": ["kept_log_mass"], "tau": 0}, "tau must be between 0 and 1"),
        ({"outputs": ["top_k_entropy"]}, "top_k of 1 to 23"),
        ({"outputs": ["top_k_entropy"], "top_k": 0}, "top_k of 1 to 23"),
        ({"outputs": ["top_k_entropy"], "top_k": 24}, "top_k of 1 to 23"),
        ({"outputs": ["log_probs"]}, r"labels of shape \(9,\), got none"),
        ({"outputs": ["log_probs"], "labels": LABELS[:4]}, r"labels of shape \(9,\), got \(4,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        token_statistics(made(N, D), some_head(), **given)


def test_shapes_that_do_not_fit_are_refused():
    head = some_head()
    with pytest.raises(RecipeError, match=r"got \(2, 9, 6\) and \(23, 6\); of a batch give hidden\[mask\]"):
        token_statistics(made(2, N, D), head, outputs=["entropy"])
    with pytest.raises(RecipeError, match=r"got \(9, 7\) and \(23, 6\)"):
        token_statistics(made(N, D + 1), head, outputs=["entropy"])
    with pytest.raises(RecipeError, match=r"bias must be \(23,\), got \(3,\)"):
        token_statistics(made(N, D), replace(head, bias=made(3)), outputs=["entropy"])
    with pytest.raises(RecipeError, match="hidden has 9 tokens and teacher_hidden 4"):
        teacher_kl(made(N, D), head, made(4, D), head)
    with pytest.raises(RecipeError, match="a divergence needs one vocabulary"):
        teacher_kl(made(N, D), head, made(N, D), some_head(vocabulary=8))
    with pytest.raises(RecipeError, match="temperature must be > 0, got 0"):
        teacher_kl(made(N, D), head, made(N, D), head, temperature=0)


# -- sharded heads ------------------------------------------------------------------------------------------------


def partitioned(weight, *, trains=False):
    """What DeepSpeed ZeRO-3 leaves of a parameter outside of its module's forward."""
    parameter = torch.nn.Parameter(weight.new_empty(0), requires_grad=trains)
    parameter.ds_id, parameter.ds_shape = 0, weight.shape
    parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    return parameter


@pytest.fixture
def deepspeed(monkeypatch):
    """Stands in for DeepSpeed: fills a parameter within `GatheredParameters`, and counts."""
    zero = SimpleNamespace(weight=None, gathered=0)

    @contextmanager
    def gather(parameters, modifier_rank):
        (parameter,) = parameters
        parameter.data, zero.gathered = zero.weight, zero.gathered + 1
        parameter.ds_status.name = "AVAILABLE"
        yield
        parameter.data = zero.weight.new_empty(0)
        parameter.ds_status.name = "NOT_AVAILABLE"

    zero.GatheredParameters = gather
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    return zero


@pytest.mark.parametrize(("outputs", "times"), [(["entropy"], 1), (NAMES, 2)], ids=["alone", "with others"])
def test_a_zero3_head_is_whole_only_while_it_is_used(outputs, times, deepspeed):
    deepspeed.weight = made(V, D, seed=1)
    hidden, parameter = made(N, D).requires_grad_(), partitioned(deepspeed.weight)

    def run(weight):
        return with_gradients(token_statistics(hidden, Head(weight), LABELS, outputs=outputs, **SETTINGS), [hidden])

    torch.testing.assert_close(run(parameter), run(deepspeed.weight), rtol=0, atol=0)
    assert deepspeed.gathered == times
    assert parameter.numel() == 0


def test_a_zero3_head_is_gathered_once_for_student_and_teacher(deepspeed):
    deepspeed.weight = made(V, D, seed=1)
    head = Head(partitioned(deepspeed.weight))
    whole = Head(deepspeed.weight)
    hidden, teacher = made(N, D), made(N, D, seed=5)
    assert torch.equal(teacher_kl(hidden, head, teacher, head), teacher_kl(hidden, whole, teacher, whole))
    assert deepspeed.gathered == 1


def test_an_fsdp2_head_gives_the_same(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        head, hidden = some_head(), made(N, D).requires_grad_()
        sharded = replace(head, weight=distribute_tensor(head.weight, mesh, [Shard(0)]))
        teacher = hidden.detach().flip(0)
        results = []
        for one in (head, sharded):
            values = [*token_statistics(hidden, one, LABELS, outputs=NAMES, **SETTINGS)]
            results.append(with_gradients([*values, teacher_kl(hidden, one, teacher, one)], [hidden]))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    finally:
        distributed.destroy_process_group()


def test_a_sharded_head_that_trains_is_refused():
    head = Head(partitioned(made(V, D), trains=True))
    hidden = made(N, D).requires_grad_()
    with pytest.raises(UnsupportedError, match=r"sharded .* and trains"):
        token_statistics(hidden, head, outputs=["entropy"])
    with pytest.raises(UnsupportedError, match=r"sharded .* and trains"):
        teacher_kl(hidden, head, hidden.detach(), head)
