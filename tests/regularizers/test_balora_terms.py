"""BA-LoRA's three terms (arXiv 2408.04556) against their formulas with all logits in memory, in float64."""

from __future__ import annotations

import dataclasses
import gc
import math

import dense
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmreg.errors import LlmregWarning, RecipeError, UnsupportedError
from llmreg.regularizers import (
    ConsistencyRegularizer,
    DiversityRegularizer,
    SingularValueRegularizer,
    singular_values,
    vocabulary,
)
from llmreg.regularizers.base import Context, Head, Regularizer, schedule_factor

TERMS = (ConsistencyRegularizer, DiversityRegularizer, SingularValueRegularizer)
TASKS = ("nlg", "nlu")
VARIANTS = ("iclr", "v1")


@pytest.fixture(autouse=True)
def not_warned_before():
    singular_values._warn_inert.cache_clear()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def language(n=12, d=8, vocabulary=60, *, bias=False, dtype=torch.float64, **head):
    """A context of `n` tokens in three sequences of equal numbers of them, with a teacher that is another model."""
    offset = draw(vocabulary, seed=9, dtype=dtype) if bias else None
    return Context(
        hidden=draw(n, d, seed=1, dtype=dtype).requires_grad_(),
        teacher_hidden=draw(n, d, seed=2, dtype=dtype),
        head=Head(draw(vocabulary, d, seed=3, dtype=dtype), offset, **head),
        rows=torch.arange(3).repeat_interleave(n // 3),
    )


def classifier(rows=9, classes=7):
    return Context(logits=draw(rows, classes, seed=1).requires_grad_(), teacher_logits=draw(rows, classes, seed=2))


def context_of(task):
    return language() if task == "nlg" else classifier()


def of_logits(Z, teacher=None):
    """A context of a language model whose logits are `Z`: its head is the identity."""
    head = Head(torch.eye(Z.shape[1], dtype=Z.dtype))
    return Context(hidden=Z, teacher_hidden=teacher, head=head, rows=torch.zeros(len(Z), dtype=torch.long))


# -- each formula -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_that_is_its_teacher_has_no_consistency_term_and_no_gradient(task, variant):
    context = context_of(task)
    context.teacher_hidden = context.hidden if context.hidden is None else context.hidden.detach()
    context.teacher_logits = context.logits if context.logits is None else context.logits.detach()
    value = ConsistencyRegularizer(task=task, variant=variant).loss(context)
    (gradient,) = torch.autograd.grad(value, context.hidden if task == "nlg" else context.logits)
    assert value.abs() < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_consistency_is_the_tempered_divergence_from_the_teacher(temperature):
    expected = []
    for context in (language(), classifier()):
        Z = context.logits if context.hidden is None else dense.logits(context.hidden, context.head)
        Z_P = context.teacher_logits
        if Z_P is None:
            Z_P = dense.logits(context.teacher_hidden, context.head)
        p, q = (Z_P / temperature).softmax(-1), (Z / temperature).softmax(-1)
        expected.append(temperature**2 * (p * (p / q).log()).sum(-1).mean())
        term = ConsistencyRegularizer(temperature=temperature)
        torch.testing.assert_close(term.loss(context), expected[-1])


def test_the_teacher_has_a_head_of_its_own_where_one_is_given():
    context = language()
    context.teacher_head = Head(2 * context.head.weight)
    context.teacher_hidden = context.hidden.detach() / 2
    assert abs(float(ConsistencyRegularizer().loss(context))) < 1e-14


def test_equal_logits_have_the_entropy_of_twenty_choices():
    value = DiversityRegularizer().loss(of_logits(torch.full((5, 60), 0.3, dtype=torch.float64)))
    assert float(value) == pytest.approx(-math.log(20))
    assert float(value) == pytest.approx(-2.9957, abs=1e-4)


def test_the_first_generation_takes_the_entropy_of_the_whole_vocabulary():
    value = DiversityRegularizer(variant="v1").loss(of_logits(torch.zeros(5, 60, dtype=torch.float64)))
    assert float(value) == pytest.approx(-math.log(60))


def test_a_vocabulary_below_k_is_taken_whole():
    assert float(DiversityRegularizer().loss(of_logits(torch.zeros(5, 7)))) == pytest.approx(-math.log(7))


def test_orthogonal_centred_columns_have_no_covariance():
    centred = torch.linalg.qr(draw(9, 4) - draw(9, 4).mean(0)).Q
    value = DiversityRegularizer(task="nlu").loss(Context(logits=centred + 3))
    assert abs(float(value)) < 1e-25


def test_two_classes_have_the_square_of_their_covariance():
    Z = draw(9, 2)
    b = torch.cov(Z.mT)[0, 1]
    torch.testing.assert_close(DiversityRegularizer(task="nlu").loss(Context(logits=Z)), b**2)


def test_covariances_are_summed_over_pairs_and_divided_by_the_classes():
    Z = draw(9, 5)
    C = torch.cov(Z.mT)
    expected = sum(C[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5
    torch.testing.assert_close(DiversityRegularizer(task="nlu").loss(Context(logits=Z)), expected)


def test_rank_one_is_minus_one_of_either_task():
    Z = torch.outer(draw(9), draw(20, seed=1))
    assert float(SingularValueRegularizer(task="nlu").loss(Context(logits=Z))) == pytest.approx(-1)
    assert float(SingularValueRegularizer(task="nlg").loss(of_logits(Z))) == pytest.approx(-1)


def test_the_identity_has_the_known_values():
    Z = torch.eye(20, dtype=torch.float64)
    assert float(SingularValueRegularizer(task="nlu", k=5).loss(Context(logits=Z))) == pytest.approx(-0.25)
    assert float(SingularValueRegularizer(task="nlg", k=5).loss(of_logits(Z))) == pytest.approx(-1.1180, abs=1e-4)


def test_logits_of_zero_are_worth_zero_and_not_nan():
    for context in (Context(logits=torch.zeros(9, 7)), of_logits(torch.zeros(9, 30))):
        leaf = (context.logits if context.hidden is None else context.hidden).requires_grad_()
        SingularValueRegularizer(k=3).loss(context).backward()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_k_of_all_singular_values_of_a_classifier_it_is_inert_and_says_so_once(variant):
    Z = draw(9, 3).requires_grad_()
    term = SingularValueRegularizer(task="nlu", variant=variant, k=5)
    with pytest.warns(LlmregWarning, match="no effect"):
        value = term.loss(Context(logits=Z))
    assert float(value) == -1
    assert not torch.autograd.grad(value, Z)[0].any()
    term.loss(Context(logits=Z))  # a second warning would be an error here


# -- the first generation of a language model -------------------------------------------------------------------


def test_v1_sums_the_divergence_over_tokens_and_divides_by_sequences():
    context = language()
    divergence = dense.teacher_kl(context.hidden, context.head, context.teacher_hidden, context.head, temperature=1.0)
    torch.testing.assert_close(ConsistencyRegularizer(variant="v1").loss(context), divergence.sum() / 3)


def test_v1_compares_normalised_logits_of_a_classifier():
    context = classifier()
    expected = F.mse_loss(F.normalize(context.logits), F.normalize(context.teacher_logits))
    torch.testing.assert_close(ConsistencyRegularizer(variant="v1").loss(context), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_v1_takes_the_logits_of_a_sequence_as_one_row(bias):
    context = language(bias=bias)
    Z = dense.logits(context.hidden, context.head).reshape(3, -1)
    values = torch.linalg.svdvals(Z)
    expected = -values[:2].sum() / values.sum()
    value = SingularValueRegularizer(variant="v1", k=2).loss(context)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(each, context.hidden, retain_graph=True)[0] for each in (value, expected)]
    torch.testing.assert_close(*gradients)


def test_v1_refuses_sequences_of_unequal_numbers_of_tokens():
    context = language()
    context.rows = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    with pytest.raises(UnsupportedError, match=r"3 to 5 scored tokens.*variant=\"iclr\""):
        SingularValueRegularizer(variant="v1").loss(context)


# -- without the logits -----------------------------------------------------------------------------------------


def share(Z, k=10):
    """The term of a language model, by a full decomposition."""
    values = torch.linalg.svdvals(Z)
    return -values[:k].sum() / values.square().sum().sqrt()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "d", "vocabulary"), [(40, 16, 90), (7, 16, 90), (12, 8, 5)], ids=str)
def test_singular_values_and_gradient_are_those_of_the_logits(n, d, vocabulary, bias):
    """The last head has fewer words than dimensions: its Gram matrix is singular."""
    context = language(n, d, vocabulary, bias=bias, temperature=3.0, scale=0.5)
    context.rows = None
    value = SingularValueRegularizer(k=4).loss(context)
    expected = share(dense.logits(context.hidden, context.head), 4)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    gradients = [torch.autograd.grad(each, context.hidden)[0] for each in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.7], ids=["noise", "decaying"])
def test_a_sketch_of_large_batches_equals_the_full_decomposition_to_1e_4(decay):
    n, d, vocabulary = 400, 384, 500
    turn = torch.linalg.qr(draw(d, d, seed=5)).Q
    hidden = ((draw(n, d) * torch.arange(1, d + 1) ** -decay) @ turn).float().requires_grad_()
    head = Head(draw(vocabulary, d, seed=3, dtype=torch.float32))
    value = SingularValueRegularizer().loss(Context(hidden=hidden, head=head))
    expected = share(dense.logits(hidden, head))
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    mine, theirs = (torch.autograd.grad(each, hidden)[0].double() for each in (value, expected))
    # The tenth and eleventh value of noise nearly agree, and which of their vectors counts is hardly decided.
    assert (mine - theirs).norm() / theirs.norm() < (0.05 if decay == 0 else 1e-3)


def test_half_precision_is_computed_in_float32_also_under_autocast():
    exact = language(40, 16, 90, dtype=torch.bfloat16)
    expected = float(SingularValueRegularizer(k=4).loss(exact))
    with torch.autocast("cpu", torch.bfloat16):
        value = SingularValueRegularizer(k=4).loss(exact)
    assert value.dtype == torch.float32
    assert float(value) == expected
    assert expected == pytest.approx(float(share(dense.logits(exact.hidden, exact.head), 4)), rel=1e-5)


class Sizes(TorchDispatchMode):
    """Collects how many numbers each new tensor of an operation has."""

    def __init__(self):
        super().__init__()
        self.seen = {0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {value.numel() for value in tree_leaves(out) if isinstance(value, torch.Tensor)}
        return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_of_tokens_times_vocabulary_is_made(variant):
    context = language(42, 16, 900, dtype=torch.float32)
    singular_values.head_root(context.head.weight)
    with Sizes() as sizes:
        SingularValueRegularizer(variant=variant, k=2).loss(context).backward()
    assert max(sizes.seen) <= 42 * 16
    with Sizes() as sizes:
        dense.logits(context.hidden, context.head)
    assert max(sizes.seen) == 42 * 900


@pytest.mark.parametrize(
    "term",
    [*(term(variant=variant) for term in TERMS for variant in VARIANTS), ConsistencyRegularizer(adaptive=True)],
    ids=lambda term: f"{term.name}-{term.variant}" + "-adaptive" * getattr(term, "adaptive", False),
)
def test_a_batch_without_scored_tokens_asks_for_the_head_like_any_other(monkeypatch, term):
    """To gather a head in shards is for all processes or none, and another may have some."""
    asked = []
    for module in (vocabulary, singular_values):
        gathered = module.gathered
        monkeypatch.setattr(module, "gathered", lambda head, gathered=gathered: asked.append(1) or gathered(head))
    counts = []
    for number in (3, 0):
        context = language(n=12)
        context.hidden = context.hidden.detach()[:number].requires_grad_()
        context.teacher_hidden, context.rows = context.teacher_hidden[:number], context.rows[:number]
        asked.clear()
        value = term.loss(context)
        (gradient,) = torch.autograd.grad(value, context.hidden)
        counts.append(len(asked))
        assert torch.isfinite(gradient).all()
    assert counts[0] == counts[1] > 0
    assert float(value) == 0
    assert not any("confidence" in name for name in context.log), "there is none to speak of"


def test_a_partitioned_head_s_vocabulary_is_not_what_it_shows():
    weight = torch.zeros(0)
    weight.ds_shape = (60, 8)  # as ZeRO-3 leaves it
    assert Head(weight).vocabulary == 60
    assert Head(torch.zeros(60, 8)).vocabulary == 60


def test_the_head_is_decomposed_once_and_again_when_it_was_written_to(monkeypatch):
    decomposed = []
    root = singular_values._root
    monkeypatch.setattr(singular_values, "_root", lambda G: decomposed.append(1) or root(G))
    context, term = language(), SingularValueRegularizer(k=4)
    term.loss(context), term.loss(context)
    assert len(decomposed) == 1
    context.head.weight[:30] *= 3
    torch.testing.assert_close(term.loss(context), share(dense.logits(context.hidden, context.head), 4))
    assert len(decomposed) == 2
    held = len(singular_values._ROOTS)
    del context
    gc.collect()
    assert len(singular_values._ROOTS) == held - 1, "a head that is gone is forgotten"


def test_the_decomposition_is_reproducible_and_leaves_the_global_generator_alone():
    context = Context(hidden=draw(400, 384, dtype=torch.float32), head=Head(draw(500, 384, dtype=torch.float32)))
    before = torch.get_rng_state()
    values = [float(SingularValueRegularizer().loss(context)) for _ in range(2)]
    assert values[0] == values[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (Head(torch.ones(30, 8), softcap=30.0), "softcap=30.0"),
        (Head(torch.ones(30, 8, requires_grad=True)), "head is trained"),
        (Head(torch.ones(30, 8), torch.ones(30, requires_grad=True)), "head is trained"),
    ],
)
def test_a_head_that_cannot_be_decomposed_once_is_refused(head, match):
    with pytest.raises(UnsupportedError, match=match):
        SingularValueRegularizer().loss(Context(hidden=torch.ones(5, 8), head=head))


# -- gradients, and too few rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", TASKS)
def test_gradients_pass_gradcheck(term, variant, task):
    context = context_of(task)
    leaf = "hidden" if task == "nlg" else "logits"
    settings = {"k": 2} if term is SingularValueRegularizer else {}
    regularizer = term(variant=variant, task=task, **settings)
    given = getattr(context, leaf)
    assert gradcheck(lambda value: regularizer.loss(dataclasses.replace(context, **{leaf: value})), [given])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_are_worth_nothing_and_keep_a_way_for_the_gradient(term, rows, variant):
    full = language()
    context = dataclasses.replace(
        full, hidden=full.hidden[:rows], teacher_hidden=full.teacher_hidden[:rows], rows=full.rows[:rows]
    )
    value = term(variant=variant).loss(context)
    (gradient,) = torch.autograd.grad(value, full.hidden)
    if rows == 0 or term is SingularValueRegularizer:
        assert value == 0
        assert not gradient.any()
    else:
        assert gradient.isfinite().all()


@pytest.mark.parametrize("term", [DiversityRegularizer, SingularValueRegularizer])
def test_one_row_of_a_classifier_is_worth_nothing(term):
    Z = draw(1, 7).requires_grad_()
    value = term(task="nlu").loss(Context(logits=Z))
    assert value == 0
    assert not torch.autograd.grad(value, Z)[0].any()


# -- an adaptive weight -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_an_adaptive_weight_goes_from_a_tenth_with_the_teacher_s_confidence(task):
    context = context_of(task)
    plain = ConsistencyRegularizer(task=task).loss(context)
    adaptive = ConsistencyRegularizer(task=task, adaptive=True)
    Z_P = context.teacher_logits if task == "nlu" else dense.logits(context.teacher_hidden, context.head)
    confidence = 1 - dense.entropy(Z_P).mean() / math.log(Z_P.shape[-1])
    torch.testing.assert_close(adaptive.loss(context), (0.1 + 0.9 * confidence) * plain)
    torch.testing.assert_close(context.log["regularizer/consistency_confidence"], confidence)
    assert adaptive.schedule == "constant", "it replaces the cosine"
    assert adaptive.reduction == "batch"


def test_a_teacher_that_knows_nothing_leaves_a_tenth():
    Z = draw(6, 40)
    unsure = of_logits(Z, torch.zeros_like(Z))
    ratio = ConsistencyRegularizer(adaptive=True).loss(unsure) / ConsistencyRegularizer().loss(unsure)
    assert float(ratio) == pytest.approx(0.1)


# -- weights, schedules and what they need ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "weights", "k"),
    [
        ({}, (0.025, 0.005, 0.005), 10),
        ({"task": "nlg"}, (0.025, 0.005, 0.005), 10),
        ({"task": "nlu"}, (0.15, 0.03, 0.03), 5),
        ({"variant": "v1"}, (1e-4, 3e-4, 1e-4), 3),
        ({"variant": "v1", "task": "nlu"}, (1e-4, 3e-4, 1e-4), 3),
    ],
    ids=str,
)
def test_what_is_left_out_is_the_paper_s(settings, weights, k):
    terms = [term(**settings) for term in TERMS]
    assert tuple(term.weight for term in terms) == weights
    assert terms[2].k == k
    constant = settings.get("variant") == "v1"
    assert [term.schedule for term in terms] == (["constant"] * 3 if constant else ["cosine", "two_phase", "two_phase"])


def test_a_term_without_a_task_takes_that_of_its_trainer_and_keeps_what_was_given():
    assert ConsistencyRegularizer().for_task("nlu") == ConsistencyRegularizer(task="nlu")
    assert SingularValueRegularizer(weight=0.5).for_task("nlu") == SingularValueRegularizer(weight=0.5, task="nlu")
    assert SingularValueRegularizer(k=4).for_task("nlu").k == 4
    assert DiversityRegularizer(task="nlg").for_task("nlu").task == "nlg"


def test_the_weights_over_training():
    consistency_, diversity_ = ConsistencyRegularizer(), DiversityRegularizer()
    points = (0, 0.2, 0.225, 0.25, 1)
    ramp = [schedule_factor(diversity_.schedule, progress) for progress in points]
    assert ramp == pytest.approx([0, 0, 0.5, 1, 1])
    assert schedule_factor(consistency_.schedule, 0) == 1
    assert schedule_factor(consistency_.schedule, 1) == pytest.approx(0.1)


@pytest.mark.parametrize("term", TERMS)
def test_each_says_what_it_needs(term):
    teacher = {"teacher"} if term is ConsistencyRegularizer else set()
    assert term().needs == term(task="nlg").needs == {"hidden", *teacher}
    assert term(task="nlu").needs == {"logits", *teacher}
    rows = {"rows"} if term is not DiversityRegularizer else set()  # of whole sequences, so that packing is refused
    assert term(variant="v1").needs == {"hidden", *teacher, *rows}
    assert term(variant="v1", task="nlu").needs == {"logits", *teacher}
    assert isinstance(term(), Regularizer)


def test_means_over_tokens_and_statistics_of_a_batch_are_told_apart():
    tokens = [ConsistencyRegularizer(), DiversityRegularizer(), DiversityRegularizer(variant="v1")]
    assert {term.reduction for term in tokens} == {"tokens"}
    batch = [ConsistencyRegularizer(variant="v1"), SingularValueRegularizer(), *(term(task="nlu") for term in TERMS)]
    assert {term.reduction for term in batch} == {"batch"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ConsistencyRegularizer(weight=-1), "weight must be a number >= 0, got -1"),
        (lambda: DiversityRegularizer(schedule="cosin"), "did you mean 'cosine'"),
        (lambda: DiversityRegularizer(task="sft"), "task is 'sft'; choose one of 'nlg', 'nlu', None"),
        (lambda: SingularValueRegularizer(variant="v2"), "choose one of 'iclr', 'v1'"),
        (lambda: ConsistencyRegularizer(temperature=0), "temperature must be a number above 0"),
        (lambda: ConsistencyRegularizer(adaptive=True, variant="v1"), "adaptive belongs to"),
        (lambda: DiversityRegularizer(top_k=1), "top_k must be an integer of at least 2"),
        (lambda: SingularValueRegularizer(k=2.5), "k must be an integer of at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, match):
    with pytest.raises(RecipeError, match=match):
        make()


@pytest.mark.parametrize("term", TERMS)
def test_a_context_without_what_a_term_needs_is_refused_by_name(term):
    with pytest.raises(UnsupportedError, match=r"was given no logits.*task=\"nlg\""):
        term(task="nlu").loss(language())
    with pytest.raises(UnsupportedError, match="was given no hidden"):
        term(task="nlg").loss(classifier())
