"""Training steps that `bench_regularizers` measures: TRL's own, with a regulariser, and with one written straight down.

A row is a name and a function from a shape and a base model to a `Step`: a trainer at one fixed batch. Every row has a
model of its own around the same frozen weights. "dense" rows are what one writes without llmreg: all logits of a second
forward pass, and, as BA-LoRA's authors have it, a second model as the teacher.
"""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import llmreg
from llmreg.regularizers import (
    ConsistencyRegularizer,
    DiversityRegularizer,
    LowProbabilityRegularizer,
    OrthonormalRegularizer,
    SingularValueRegularizer,
)
from llmreg.trainers.model_parts import evaluating, without_adapters

__all__ = ["GRPO_ROWS", "SFT_ROWS", "SORSA_ROWS", "Shape", "Step", "base_model"]

RANK = 16
KAPPA, PERCENTILE, TOP_K, SINGULAR, TEMPERATURE = 0.02, 0.01, 20, 10, 2.0  # the methods' own, for the dense rows
LEARNING_RATE = 1e-5
#: Of logits over a vocabulary of 32,000 this leaves some of the least likely sampled tokens above min-p's cut, and some
#: below it, so that Lp-Reg has something to do.
LOGIT_DEVIATION = 0.64


class Shape(NamedTuple):
    """A Llama with random weights, where it runs, and its batches.

    Attributes:
        rows, columns: of an SFT batch. unscored: tokens of each row that stand before the first scored one.
        prompts, completions: of a generation batch: completions of each prompt. prompt, completion: their tokens.
    """

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 8
    vocabulary: int = 32000
    heads: int = 16
    key_value_heads: int = 16
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rows: int = 2
    columns: int = 256
    unscored: int = 0
    prompts: int = 4
    completions: int = 4
    prompt: int = 16
    completion: int = 64


def base_model(shape: Shape) -> nn.Module:
    """The same for every call."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(shape.device):
        model = LlamaForCausalLM._from_config(config, dtype=shape.dtype)
    nn.init.normal_(model.lm_head.weight, std=LOGIT_DEVIATION / math.sqrt(shape.hidden))
    return model


def _with_same_weights(base: nn.Module) -> nn.Module:
    """Modules of its own, for hooks and adapters of its own, around the same parameters."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def _tokens(shape: Shape, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, shape.vocabulary, size, generator=generator)


def _arguments(kind: Any, shape: Shape, **own: Any) -> Any:
    return kind(
        tempfile.gettempdir(),
        use_cpu=shape.device == "cpu",
        bf16=shape.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=LEARNING_RATE,
        max_steps=1000,
        **own,
    )


def _tokenizer(shape: Shape) -> Any:
    words = {f"<{number}>": number for number in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<2>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", eos_token="<1>", unk_token="<2>")


def _lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")


class Step:
    """A trainer at one batch, halfway through its training, where every schedule's weight is above 0.

    Called, it takes a step as a Trainer does: the callback's events, and the trainer's own forward and backward pass;
    with `update`, the optimizer's step too.
    """

    def __init__(self, trainer: Any, batch: Any, items: Any = None, *, update: bool = False) -> None:
        self.trainer, self.batch, self.items = trainer, batch, items
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.max_steps, trainer.state.global_step = 1000, 500
        self.optimizer = trainer.create_optimizer() if update else None
        callbacks = trainer.callback_handler.callbacks
        self.callback = next((one for one in callbacks if isinstance(one, llmreg.RegularizerCallback)), None)
        self._fire("on_train_begin", model=trainer.model)

    def __call__(self) -> None:
        trainer = self.trainer
        self._fire("on_step_begin")
        half = trainer.args.bf16 and trainer.args.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
            trainer.training_step(trainer.model, copy.copy(self.batch), self.items)
        self._fire("on_pre_optimizer_step")
        if self.optimizer is not None:
            self.optimizer.step()
            self._fire("on_optimizer_step", optimizer=self.optimizer)
        trainer.model.zero_grad()

    def end(self) -> None:
        self._fire("on_train_end")

    def _fire(self, event: str, **given: Any) -> None:
        if self.callback is not None:
            getattr(self.callback, event)(self.trainer.args, self.trainer.state, self.trainer.control, **given)


# -- SFT --------------------------------------------------------------------------------------------------------


class TeacherForwardTrainer(trl.SFTTrainer):
    """TRL's step, and a forward pass of the base through the same weights with log-probabilities: any teacher's least.

    The units of a consistency term that is written with what TRL and PEFT have.
    """

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), without_adapters(model), evaluating(model):
            model(**inputs, fused_lm_head=True)
        return super().compute_loss(model, inputs, *args, **kwargs)


class DenseBaLoraTrainer(trl.SFTTrainer):
    """BA-LoRA's three terms by their formulas, from the logits of all tokens of a second forward pass.

    Attributes:
        teacher: a second model.
    """

    teacher: Any = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        mask = inputs["labels"][:, 1:] != -100
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        Z = model(**given, use_cache=False).logits[:, :-1][mask].float()
        with torch.no_grad():
            teacher = self.teacher(**given, use_cache=False).logits[:, :-1][mask].float()
        return loss + 0.025 * dense_consistency(Z, teacher) + 0.005 * (dense_diversity(Z) + dense_singular_values(Z))


def dense_consistency(Z: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = (teacher / TEMPERATURE).log_softmax(-1), (Z / TEMPERATURE).log_softmax(-1)
    return TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def dense_diversity(Z: Tensor) -> Tensor:
    log_q = Z.topk(TOP_K).values.log_softmax(-1)
    return (log_q.exp() * log_q).sum(-1).mean()


def dense_singular_values(Z: Tensor) -> Tensor:
    return -torch.svd_lowrank(Z, q=SINGULAR + 5, niter=2)[1][:SINGULAR].sum() / Z.norm()


def _sft(
    shape: Shape,
    base: nn.Module,
    kind: Any = trl.SFTTrainer,
    config: Any = None,
    update: bool = False,
    **own: Any,
) -> Step:
    ids = _tokens(shape, shape.rows, shape.columns)
    labels = ids.clone()
    labels[:, : shape.unscored] = -100
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    trainer = kind(
        _with_same_weights(base),
        args=_arguments(
            trl.SFTConfig,
            shape,
            per_device_train_batch_size=shape.rows,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=rows,
        processing_class=_tokenizer(shape),
        peft_config=config or _lora(),
        **own,
    )
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    return Step(trainer, batch, items, update=update)


def _regularized(*regularizers: Any) -> Callable[[Shape, nn.Module], Step]:
    return lambda shape, base: _sft(shape, base, llmreg.trainers.SFTTrainer, regularizers=list(regularizers))


def _dense_sft(shape: Shape, base: nn.Module) -> Step:
    step = _sft(shape, base, DenseBaLoraTrainer)
    step.trainer.teacher = copy.deepcopy(base).requires_grad_(False).eval()
    return step


_BALORA = (ConsistencyRegularizer(), DiversityRegularizer(), SingularValueRegularizer())
Row = Callable[[Shape, nn.Module], Step]

SFT_ROWS: dict[str, Row] = {
    "TRL": _sft,
    "TRL, teacher forward": lambda shape, base: _sft(shape, base, TeacherForwardTrainer),
    **{one.name: _regularized(one) for one in _BALORA},
    "all three": _regularized(*_BALORA),
    "all three, dense": _dense_sft,
}


# -- SORSA ------------------------------------------------------------------------------------------------------


def _sorsa(**term: Any) -> Row:
    def row(shape: Shape, base: nn.Module) -> Step:
        config = llmreg.SorsaConfig(r=RANK, target_modules="all-linear", weights=None)
        own = {"regularizers": [OrthonormalRegularizer(**term)]} if term else {}
        return _sft(shape, base, llmreg.trainers.SFTTrainer if term else trl.SFTTrainer, config, update=True, **own)

    return row


SORSA_ROWS: dict[str, Row] = {
    "SORSA": _sorsa(),
    "decoupled": _sorsa(decoupled=True),
    "in the loss": _sorsa(decoupled=False),
}


# -- GRPO -------------------------------------------------------------------------------------------------------


class DenseLowProbabilityTrainer(trl.GRPOTrainer):
    """Lp-Reg by its formula, as its authors have it: the proxy from all logits of another forward pass."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        with torch.no_grad():
            output = model(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=logits_to_keep + 1)
            log_p = (output.logits[:, :-1].float() / self.temperature).log_softmax(-1)
            kept = log_p > log_p.amax(-1, keepdim=True) + math.log(KAPPA)
            log_proxy = log_p.masked_fill(~kept, -math.inf).log_softmax(-1)
            labels = input_ids[:, -logits_to_keep:].unsqueeze(-1)
            self._log_probs, self._log_proxy = found[0], log_proxy.gather(-1, labels).squeeze(-1)
        return found

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        threshold = self._log_probs.detach()[mask].float().quantile(PERCENTILE)
        negative = inputs["advantages"].unsqueeze(1) < 0
        selected = mask & negative & (self._log_probs < threshold) & (self._log_proxy > -math.inf)
        distance = (self._log_proxy - self._log_probs)[selected]
        return loss + (distance.exp() - distance - 1).sum() / mask.sum()


def _given_batch(self: Any, inputs: Any) -> dict[str, Any]:
    """In the place of TRL's generation: the batch that the row has made beforehand."""
    return dict(self.generated)


@torch.no_grad()
def _generated(shape: Shape, base: nn.Module, *, old_log_probs: bool) -> dict[str, Any]:
    """A generation batch of the policy that trains, whose adapters start at zero."""
    count = shape.prompts * shape.completions
    prompt = _tokens(shape, count, shape.prompt).to(shape.device)
    torch.manual_seed(0)
    ids = base.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,
        min_new_tokens=shape.completion,
        max_new_tokens=shape.completion,
    )
    completion = ids[:, shape.prompt :]
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": torch.randn(count, generator=torch.Generator().manual_seed(0)).to(shape.device),
        "num_items_in_batch": torch.tensor(completion.numel(), device=shape.device),
    }
    if old_log_probs:
        logits = base(ids, logits_to_keep=shape.completion + 1).logits[:, :-1].float()
        batch["old_per_token_logps"] = logits.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)
    return batch


def _grpo(shape: Shape, base: nn.Module, kind: Any = trl.GRPOTrainer, old_log_probs: bool = False, **own: Any) -> Step:
    trl.GRPOTrainer._generate_and_score_completions = _given_batch
    prompts = Dataset.from_dict({"prompt": ["<3>"] * shape.prompts})
    trainer = kind(
        _with_same_weights(base),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=_arguments(
            trl.GRPOConfig,
            shape,
            per_device_train_batch_size=shape.prompts * shape.completions,
            num_generations=shape.completions,
            max_completion_length=shape.completion,
        ),
        train_dataset=prompts,
        processing_class=_tokenizer(shape),
        peft_config=_lora(),
        **own,
    )
    trainer.generated = _generated(shape, base, old_log_probs=old_log_probs)
    return Step(trainer, list(prompts))


def _low_probability(*, old_log_probs: bool = False, **settings: Any) -> Row:
    own = {"regularizers": [LowProbabilityRegularizer(**settings)], "old_log_probs": old_log_probs}
    return lambda shape, base: _grpo(shape, base, llmreg.trainers.GRPOTrainer, **own)


GRPO_ROWS: dict[str, Row] = {
    "TRL": _grpo,
    "threshold of the previous batch": _low_probability(threshold="previous_batch"),
    "exact threshold, old log-probs": _low_probability(old_log_probs=True),
    "exact threshold, no old log-probs": _low_probability(),
    "exact divergence": _low_probability(threshold="previous_batch", divergence="exact"),
    "dense": lambda shape, base: _grpo(shape, base, DenseLowProbabilityTrainer),
}
