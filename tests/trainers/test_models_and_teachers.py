"""Law 3 by model: a term on its outputs is about what it says, with the teacher that it says, or is refused."""

from __future__ import annotations

import peft
import pytest
import tiny_models
import torch
import transformers
import trl_runs
from transformers import Trainer, TrainingArguments

import llmreg.trainers
from llmreg import BaLoraConfig, PissaConfig, RegularizerCallback
from llmreg.errors import UnsupportedError
from llmreg.regularizers import ConsistencyRegularizer, DiversityRegularizer
from llmreg.trainers import output_terms
from llmreg.trainers.model_parts import check_teacher

ROWS = [{"input_ids": [1 + i % 5, 7, 9 + i % 3, 4], "labels": [1 + i % 5, 7, 9 + i % 3, 4]} for i in range(8)]
CLASSES = [{"input_ids": [1, 2, 3, 4], "labels": i % 2} for i in range(8)]
DIVERSITY = DiversityRegularizer(schedule="constant")
CONSISTENCY = ConsistencyRegularizer(schedule="constant")


def lora(**settings):
    settings = {"r": 4, "target_modules": trl_runs.TARGETS, "init_lora_weights": "gaussian", **settings}
    return peft.LoraConfig(**settings)


def trainer_of(model, folder, callback, rows=ROWS, kind=Trainer):
    args = TrainingArguments(
        str(folder), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=2, logging_steps=1,
    )  # fmt: skip
    return kind(model, args, train_dataset=rows, callbacks=[callback])


def refused(model, folder, term, message, rows=ROWS, kind=Trainer):
    trainer = trainer_of(model, folder, RegularizerCallback(term and [term]), rows, kind)
    with pytest.raises(UnsupportedError, match=message):
        trainer.train()


# -- the teacher ------------------------------------------------------------------------------------------------


def test_the_teacher_s_head_is_the_base_s_where_the_head_is_trained():
    model = peft.get_peft_model(tiny_models.llama(), lora(modules_to_save=["lm_head"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in ROWS[:2]])}
    batch["labels"] = batch["input_ids"]
    with torch.no_grad():
        student = model(batch["input_ids"]).logits[:, :-1]
        with model.disable_adapter():
            teacher = model(batch["input_ids"]).logits[:, :-1]
    log_p, log_q = (teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1)
    dense = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    model.train()
    terms = output_terms.OutputTerms(model, [CONSISTENCY])
    model(**batch)
    assert terms.values()["regularizer/consistency"] == pytest.approx(float(dense), rel=1e-4)
    assert dense > 0.1
    assert all(p.requires_grad == ("lora_" in n or "modules_to_save" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: (tiny_models.llama(), lora(init_lora_weights="pissa")), "has changed the base.*PissaConfig"),
        (
            lambda: (tiny_models.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
            "prompt stays in the inputs",
        ),
        (
            lambda: (tiny_models.gpt2(), lora(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
            "parameters of the base are trained",
        ),
    ],
    ids=["PEFT's PiSSA", "prompt", "biases"],
)
def test_what_is_not_the_base_when_switched_off_is_no_teacher(tmp_path, build, message):
    refused(peft.get_peft_model(*build()), tmp_path, CONSISTENCY, message)


def test_nor_is_a_quantised_residual_or_a_base_that_was_unfrozen():
    model = peft.get_peft_model(tiny_models.llama(), PissaConfig(r=4, target_modules=["q_proj"]))
    check_teacher(model)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="1 parameters of the base are trained"):
        check_teacher(model)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.peft_config["default"].residual = "quantized"
    with pytest.raises(UnsupportedError, match="residual='difference'"):
        check_teacher(model)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    model = peft.get_peft_model(tiny_models.bert_classifier(labels=2), lora(target_modules=["query"]))
    callback = RegularizerCallback([CONSISTENCY], teacher=tiny_models.bert_classifier(labels=3))
    trainer = trainer_of(model, tmp_path, callback, CLASSES)
    with pytest.raises(UnsupportedError, match="3 classes and the model 2"):
        trainer.train()


# -- the model --------------------------------------------------------------------------------------------------


def small(kind, **settings):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(**sizes, vocab_size=96, pad_token_id=0, **settings)


def masked():
    return transformers.BertForMaskedLM(small(transformers.BertConfig)), ["query"]


def encoder_decoder():
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        d_model=32, vocab_size=96, pad_token_id=0, eos_token_id=2, decoder_start_token_id=2, **sizes, **heads
    )
    return transformers.BartForConditionalGeneration(config), ["q_proj"]


@pytest.mark.parametrize("build", [masked, encoder_decoder])
def test_models_that_do_not_predict_the_next_token_are_refused(tmp_path, build):
    model, targets = build()
    refused(peft.get_peft_model(model, lora(target_modules=targets)), tmp_path, DIVERSITY, "does not predict the token")


def test_a_classifier_whose_adapter_does_not_say_so_is_refused(tmp_path):
    model = peft.get_peft_model(tiny_models.bert_classifier(), BaLoraConfig(r=4, target_modules=["query"]))
    refused(model, tmp_path, None, "task_type='SEQ_CLS'", CLASSES)


def test_classifiers_of_tokens_or_of_one_class_are_refused(tmp_path):
    tokens = transformers.LlamaForTokenClassification(small(transformers.LlamaConfig, num_labels=3))
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [0, 1, 2, 0]}] * 4
    refused(peft.get_peft_model(tokens, lora(target_modules=["q_proj"])), tmp_path, DIVERSITY, "batch, classes", rows)
    one = peft.get_peft_model(tiny_models.bert_classifier(labels=1), lora(target_modules=["query"]))
    rows = [{**row, "labels": float(row["labels"])} for row in CLASSES]
    refused(one, tmp_path, DIVERSITY, "at least two classes", rows)


def test_adalora_s_own_loss_is_not_added_twice(tmp_path):
    config = peft.AdaLoraConfig(
        r=4, init_r=6, target_r=4, total_step=10, tinit=1, tfinal=1, target_modules=["q_proj"], orth_reg_weight=0.7
    )
    model = peft.get_peft_model(tiny_models.llama(), config)
    refused(model, tmp_path, llmreg.trainers.TunerRegularizer(), "would add it again")


# -- the passes -------------------------------------------------------------------------------------------------


class Twice(Trainer):
    """A consistency training of its own: two passes with dropout for each micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss + model(**inputs).loss


def test_a_trainer_that_runs_the_model_twice_would_count_a_term_twice(tmp_path):
    model = peft.get_peft_model(tiny_models.llama(), lora())
    refused(model, tmp_path, DIVERSITY, "count 2 times", kind=Twice)


def test_reentrant_checkpoints_change_nothing(tmp_path):
    base, moved = str(trl_runs.checkpoint(tmp_path / "base")), []
    for reentrant in (False, True):
        trainer = trl_runs.sft(
            base, tmp_path, lora(), llmreg.trainers, {"regularizers": [CONSISTENCY, DIVERSITY]}, optim="sgd",
            learning_rate=1.0, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        torch.manual_seed(0)
        tiny_models.perturb(trainer.model, size=0.05)
        trainer.train()
        moved.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other)


def test_what_not_every_process_logged_is_averaged_over_those_that_did(monkeypatch):
    model = peft.get_peft_model(tiny_models.llama(), lora())
    terms = output_terms.OutputTerms(model, [DIVERSITY])
    terms._add("regularizer/diversity", -2.0)

    def gathered(of_all, mine):
        of_all[:] = [mine, {"regularizer/diversity": -1.0, "regularizer/only_there": 3.0}]

    monkeypatch.setattr(output_terms.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(output_terms.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(output_terms.dist, "all_gather_object", gathered)
    values = terms.values()
    assert (values["regularizer/diversity"], values["regularizer/only_there"]) == (-1.5, 3.0)
