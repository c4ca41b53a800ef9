"""Law 3 for terms on a model's output: the gradient is task + weight dR, in SFT, DPO and GRPO, or the run stops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import peft
import pytest
import torch
import trl_runs
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

import llmreg.trainers
from llmreg import RegularizerCallback
from llmreg.errors import RecipeError, UnsupportedError

WEIGHT = 0.3


@dataclass
class Squared:
    """The mean squared log-probability of the scored tokens; keeps each micro-batch's own gradient and size."""

    weight: float = WEIGHT
    schedule: str = "constant"
    reduction: str = "tokens"
    needs: frozenset = frozenset({"log_probs", "hidden"})
    seen: list[tuple[int, list[Any]]] = field(default_factory=list)
    parameters: list[torch.nn.Parameter] = field(default_factory=list)

    name: ClassVar[str] = "squared"

    def loss(self, context):
        value = context.log_probs.square().mean()
        if self.parameters:
            gradients = torch.autograd.grad(value, self.parameters, retain_graph=True)
            self.seen.append((len(context.log_probs), [gradient.detach() for gradient in gradients]))
        return value


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(trl_runs.checkpoint(tmp_path_factory.mktemp("base") / "model"))


def settings(batch: int, accumulation: int, **more: Any) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "seed": 1,
        **more,
    }


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=trl_runs.TARGETS, init_lora_weights="gaussian")


def stepped(kind: str, base: str, folder: Any, regularizers: Any, *, stock: bool = False, **arguments: Any):
    """Trained factors before and after; `stock`: TRL's own trainer with the callback."""
    trainer = trl_runs.BUILDERS[kind](
        base,
        folder,
        lora(),
        **({} if stock else {"trainers": llmreg.trainers, "own": {"regularizers": regularizers}}),
        **arguments,
    )
    if stock and regularizers is not None:
        trainer.add_callback(RegularizerCallback(regularizers))
    torch.manual_seed(5)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    for one in regularizers or ():
        one.parameters = parameters
    before = [parameter.detach().clone() for parameter in parameters]
    trainer.train()
    return before, [parameter.detach().clone() for parameter in parameters], trainer


def effect(with_term: Any, without: Any) -> list[torch.Tensor]:
    return [-(a - b) for a, b in zip(with_term[1], without[1], strict=True)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    size = max(float(one.norm()) for one in expected)
    assert size > 0
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5 * size, rtol=1e-3)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_the_gradient_is_the_task_s_and_the_weighted_term_s(tmp_path, base, kind, batch, accumulation):
    """Two runs that differ in the term alone; of tokens, micro-batches count by how many they have."""
    if kind == "grpo" and batch == 1:
        batch, accumulation = 2, 8
    term = Squared()
    arguments = settings(batch, accumulation)
    with_term = stepped(kind, base, tmp_path / "a", [term], **arguments)
    without = stepped(kind, base, tmp_path / "b", None, **arguments)
    total = sum(count for count, _ in term.seen)
    assert len(term.seen) == accumulation
    shares = [count / total for count, _ in term.seen] if kind != "dpo" else [1 / accumulation] * accumulation
    expected = [
        WEIGHT * sum(share * gradients[i] for share, (_, gradients) in zip(shares, term.seen, strict=True))
        for i in range(len(with_term[0]))
    ]
    assert_equal(effect(with_term, without), expected)
    losses = [[log["loss"] for log in run[2].state.log_history if "loss" in log] for run in (with_term, without)]
    assert losses[0] == losses[1], "the loss that is reported stays the task's"


@pytest.mark.parametrize(("rows", "accumulation"), [(8, 4), (64, 64)])
def test_sft_s_term_is_one_mean_of_all_tokens_at_any_accumulation(tmp_path, base, monkeypatch, rows, accumulation):
    """Rows differ in length, so a mean of micro-batches' means would not be it."""
    texts = [text[: 3 + (5 * i) % 11] for i, text in enumerate(list(trl_runs.TEXT["text"]) * (rows // 8))]
    monkeypatch.setattr(trl_runs, "TEXT", Dataset.from_dict({"text": texts}))
    runs = {}
    for windows in (1, accumulation):
        folder = tmp_path / str(windows)
        arguments = settings(rows // windows, windows)
        with_term = stepped("sft", base, folder / "a", [Squared()], **arguments)
        without = stepped("sft", base, folder / "b", None, **arguments)
        runs[windows] = effect(with_term, without)
        logs = [next(log for log in run[2].state.log_history if "loss" in log) for run in (with_term, without)]
        assert logs[0]["num_tokens"] == logs[1]["num_tokens"]
        assert logs[0]["loss"] == logs[1]["loss"]
    assert_equal(runs[accumulation], runs[1])


@pytest.mark.parametrize(
    "more", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=["packed", "padding-free"]
)
def test_packed_batches_too(tmp_path, base, more):
    term = Squared()
    arguments = settings(2, 2, **more)
    with_term = stepped("sft", base, tmp_path / "a", [term], **arguments)
    without = stepped("sft", base, tmp_path / "b", None, **arguments)
    total = sum(count for count, _ in term.seen)
    expected = [
        WEIGHT * sum(count / total * gradients[i] for count, gradients in term.seen) for i in range(len(with_term[0]))
    ]
    assert_equal(effect(with_term, without), expected)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_in_unmodified_trl_trainers_it_is_the_mean_of_micro_batches(tmp_path, base, kind):
    term = Squared()
    arguments = settings(2, 4)
    with_term = stepped(kind, base, tmp_path / "a", [term], stock=True, **arguments)
    without = stepped(kind, base, tmp_path / "b", None, stock=True, **arguments)
    expected = [WEIGHT * sum(gradients[i] for _, gradients in term.seen) / 4 for i in range(len(with_term[0]))]
    assert_equal(effect(with_term, without), expected)


class Recording(TrainerCallback):
    """The gradients that each optimizer step starts from."""

    def __init__(self):
        self.gradients: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "llmreg"])
def test_a_last_shorter_window_counts_whole(tmp_path, base, stock):
    """Eight rows, two at a time, windows of three: the second window has one micro-batch."""
    term, recordings = Squared(reduction="batch"), []
    for given in ([term], None):
        arguments = settings(2, 3, max_steps=2, learning_rate=0.0)
        own = {} if stock else {"trainers": llmreg.trainers, "own": {"regularizers": given}}
        trainer = trl_runs.sft(base, tmp_path / str(given is None), lora(), **own, **arguments)
        if stock and given:
            trainer.add_callback(RegularizerCallback(given))
        term.parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        recordings.append(Recording())
        trainer.add_callback(recordings[-1])
        trainer.train()
    found = [a - b for a, b in zip(recordings[0].gradients[1], recordings[1].gradients[1], strict=True)]
    assert_equal(found, [WEIGHT * gradient for gradient in term.seen[3][1]])


def test_weight_zero_is_trl_bit_for_bit(tmp_path, base):
    arguments = settings(2, 2, optim="adamw_torch", learning_rate=1e-2, max_steps=2)
    for kind in ("sft", "dpo", "grpo"):
        zero = stepped(kind, base, tmp_path / kind / "a", [Squared(weight=0.0)], **arguments)
        stock = stepped(kind, base, tmp_path / kind / "b", None, stock=True, **arguments)
        assert all(torch.equal(a, b) for a, b in zip(zero[1], stock[1], strict=True)), kind


def test_schedules_and_logs(tmp_path, base):
    term = Squared(schedule="cosine")
    trainer = stepped("sft", base, tmp_path, [term], **settings(2, 1, max_steps=4))[2]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["regularizer/squared_weight"] == pytest.approx(WEIGHT)
    assert logs[2]["regularizer/squared_weight"] == pytest.approx(WEIGHT * 0.55)
    assert all(log["regularizer/squared"] > 0 for log in logs)


def test_evaluation_s_loss_stays_the_task_s(tmp_path, base):
    trainers = [
        trl_runs.sft(base, tmp_path / str(i), lora(), trainers=llmreg.trainers, own={"regularizers": given})
        for i, given in enumerate(([Squared(weight=5.0)], None))
    ]
    trainers[0].callback_handler.on_train_begin(trainers[0].args, trainers[0].state, trainers[0].control)
    losses = []
    for trainer in trainers:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


@dataclass
class Detached(Squared):
    def loss(self, context):
        return context.log_probs.detach().square().mean()


@dataclass
class Constant(Squared):
    def loss(self, context):
        return torch.ones((), requires_grad=True) * 2


@pytest.mark.parametrize("term", [Detached(), Constant()])
def test_a_term_that_reaches_no_trainable_parameter_stops_the_run(tmp_path, base, term):
    with pytest.raises(UnsupportedError, match="reaches no trainable parameter"):
        stepped("sft", base, tmp_path, [term])


def test_the_teacher_is_the_base_and_costs_no_second_model(tmp_path, base):
    found = []

    @dataclass
    class Teacher(Squared):
        needs: frozenset = frozenset({"hidden", "teacher"})

        def loss(self, context):
            with torch.no_grad(), context.model.disable_adapter():
                found.append((context.teacher_hidden, context.hidden.detach()))
            return (context.hidden - context.teacher_hidden).square().mean()

    trainer = stepped("sft", base, tmp_path, [Teacher()], **settings(8, 1))[2]
    teacher, student = found[0]
    assert teacher.shape == student.shape
    assert not torch.equal(teacher, student)
    assert not teacher.requires_grad
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.model.eval()
    with torch.no_grad(), trainer.model.disable_adapter():
        hidden = trainer.model.get_base_model().model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
    whole = hidden.last_hidden_state[:, :-1][batch["labels"][:, 1:] != -100]
    assert torch.allclose(teacher.sum(0), whole.sum(0), atol=1e-4)  # the batch came in another order
    assert all(p.requires_grad == ("lora_" in name) for name, p in trainer.model.named_parameters())


@dataclass
class Advantages(Squared):
    needs: frozenset = frozenset({"log_probs", "advantages"})
    kept: list[Any] = field(default_factory=list)

    def loss(self, context):
        self.kept.append((context.advantages, context.rows))
        return context.log_probs.square().mean()


def test_advantages_reach_each_token_in_grpo_and_are_refused_elsewhere(tmp_path, base):
    term = Advantages()
    stepped("grpo", base, tmp_path / "a", [term], **settings(4, 1))
    advantages, rows = term.kept[0]
    for row in rows.unique():
        assert len(advantages[rows == row].unique()) == 1
    assert len(advantages.unique()) > 1
    for kind, stock in (("sft", False), ("dpo", False), ("grpo", True)):
        with pytest.raises(UnsupportedError, match=r"need advantages.*llmreg\.trainers\.GRPOTrainer"):
            stepped(kind, base, tmp_path / f"{kind}{stock}", [Advantages()], stock=stock)


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ([Squared(), Squared()], {}, "'squared' is there twice"),
        ([Squared(needs=frozenset({"rows", "log_probs"}))], {"packing": True}, "packing=False"),
    ],
)
def test_what_cannot_act_is_refused(tmp_path, base, given, arguments, message):
    with pytest.raises(UnsupportedError, match=message):
        stepped("sft", base, tmp_path, given, **arguments)


def test_something_that_is_no_regulariser_is_refused():
    with pytest.raises(RecipeError, match="is no regulariser"):
        RegularizerCallback(["consistency"])


@pytest.mark.parametrize(
    "config",
    [
        peft.AdaLoraConfig(
            r=4, init_r=6, target_r=4, total_step=10, tinit=1, tfinal=1, target_modules=["q_proj"], orth_reg_weight=0.7
        ),
        LoraConfig(r=4, target_modules=["q_proj"], kasa_config=peft.KasaConfig(beta=0.1, gamma=0.2)),
        LoraConfig(r=4, target_modules=["q_proj"], monteclora_config=peft.MontecloraConfig(num_samples=2)),
    ],
    ids=["AdaLoRA", "KaSA", "MonteCLoRA"],
)
def test_peft_s_auxiliary_losses_that_trl_drops_act(tmp_path, base, config):
    logged = {}
    for given in ([llmreg.trainers.TunerRegularizer()], None):
        trainer = trl_runs.sft(
            base, tmp_path / str(given is None), config, trainers=llmreg.trainers, own={"regularizers": given}
        )
        trainer.train()
        norm = sum(float(p.detach().square().sum()) for p in trainer.model.parameters() if p.requires_grad)
        logged[given is None] = (norm, next(log for log in trainer.state.log_history if "loss" in log))
    assert logged[False][1]["regularizer/tuner"] > 0
    assert logged[False][1]["loss"] == logged[True][1]["loss"]
    assert logged[False][0] != logged[True][0]


def test_an_adapter_without_auxiliary_loss_is_named(tmp_path, base):
    own = {"regularizers": [llmreg.trainers.TunerRegularizer()]}
    trainer = trl_runs.sft(base, tmp_path, lora(), trainers=llmreg.trainers, own=own)
    with pytest.raises(UnsupportedError, match="No active adapter has an auxiliary loss"):
        trainer.train()
