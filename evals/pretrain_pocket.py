"""Pretrain the pocket model: ``python evals/pretrain_pocket.py --world-seed 0 --output llmreg/pocket/model``.

The course of training is fixed by the world's seed: the corpus, the order in which it is read and the initial
weights. What remains is floating-point arithmetic, which is the same on one machine with one number of
threads and may differ in the last bits elsewhere. Progress is kept beside the output
(``<output>.progress``) and taken up again after an interruption; the output appears in one step when
everything in it is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import __version__ as safetensors_version
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmreg.evaluation.scoring import exact_match, perplexity
from llmreg.pocket.corpus import Document, reading_order
from llmreg.pocket.tasks import load_split
from llmreg.pocket.tokenizer import build_tokenizer
from llmreg.pocket.unigram import unigram_perplexity

LENGTH, BATCH = 64, 16
LEARNING_RATE, WARMUP = 1e-3, 100
WINDOW = 64
SAVE_EVERY = 250
IGNORE = -100


@dataclass
class Progress:
    """How far training has come: steps done, seconds spent, and the loss curve as (step, mean loss) pairs."""

    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


def encode(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (tokens, labels) of every document, its end token included; the prompt has no label."""
    known: dict[Document, tuple[list[int], list[int]]] = {}
    for document in documents:
        if document not in known:
            prompt = tokenizer(document.prompt)["input_ids"] if document.prompt else []
            tokens = [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
            assert tokens[: len(prompt)] == prompt, document
            labels = [IGNORE] * len(prompt) + tokens[len(prompt) :]
            known[document] = (tokens[:LENGTH], labels[:LENGTH])
        yield known[document]


def pack(documents: Iterable[tuple[list[int], list[int]]], pad: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield rows of `LENGTH` tokens: whole documents, the longest of the next `WINDOW` that fits."""
    source = iter(documents)
    waiting = [item for _, item in zip(range(WINDOW), source, strict=False)]
    while waiting:
        tokens: list[int] = []
        labels: list[int] = []
        while fitting := [i for i, item in enumerate(waiting) if len(item[0]) <= LENGTH - len(tokens)]:
            # The oldest opens a row, so nothing waits for ever.
            chosen = fitting[0] if not tokens else max(fitting, key=lambda i: len(waiting[i][0]))
            item = waiting.pop(chosen)
            tokens, labels = tokens + item[0], labels + item[1]
            waiting.extend(item for _, item in zip(range(1), source, strict=False))
        short = LENGTH - len(tokens)
        yield tokens + [pad] * short, labels + [IGNORE] * short


def read_course(seed: int, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels of the whole course of training, each (steps, BATCH, LENGTH)."""
    rows = list(pack(encode(reading_order(seed), tokenizer), tokenizer.pad_token_id))
    steps = len(rows) // BATCH
    inputs, labels = (torch.tensor([row[i] for row in rows[: steps * BATCH]]) for i in (0, 1))
    return inputs.view(steps, BATCH, LENGTH), labels.view(steps, BATCH, LENGTH)


def build_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model: about a million parameters, input and output embeddings tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, seed: int, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Progress:
    """Read the course once; AdamW, linear warm-up and linear decay. Takes up what `folder` has kept."""
    inputs, labels = read_course(seed, tokenizer)
    steps = len(inputs)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
    )
    progress = restore(folder, model, optimizer, schedule)
    model.train()
    started, recent = time.perf_counter() - progress.seconds, []
    for step in range(progress.step, steps):
        logits = model(input_ids=inputs[step]).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[step, :, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            progress.step, progress.seconds = step + 1, time.perf_counter() - started
            progress.curve.append((step + 1, round(sum(recent) / len(recent), 4)))
            recent = []
            keep(folder, model, optimizer, schedule, progress)
            print(
                f"step {step + 1}/{steps}  loss {progress.curve[-1][1]:.4f}  {progress.seconds:.0f} s",
                flush=True,
            )
    return progress


def keep(folder: Path, model: Any, optimizer: Any, schedule: Any, progress: Progress) -> None:
    """Write all that is needed to go on into `folder`, in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "progress": vars(progress),
    }
    torch.save(state, folder / "state.new")
    os.replace(folder / "state.new", folder / "state.pt")


def restore(folder: Path, model: Any, optimizer: Any, schedule: Any) -> Progress:
    """Load what `keep` wrote, if anything."""
    if not (folder / "state.pt").exists():
        return Progress()
    state = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return Progress(**state["progress"])


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Return the scores for the model card, measured on the weights as they are stored."""
    scores = {}
    for label, task, split in (
        ("facts, taught phrasings", "pocket/facts", "train"),
        ("facts, held-out phrasing", "pocket/facts", "paraphrase"),
        ("arithmetic, held-out operands", "pocket/arithmetic", "test"),
        ("word problems (not taught)", "pocket/word-problems", "test"),
    ):
        scores[label] = exact_match(model, tokenizer, load_split(task, split, seed), batch_size=128).value
    texts = [row["text"] for row in load_split("pocket/corpus", "test", seed)]
    train_texts = [row["text"] for row in load_split("pocket/corpus", "train", seed)]
    scores["held-out passages, perplexity"] = perplexity(model, tokenizer, texts).value
    scores["held-out passages, perplexity of a unigram model"] = unigram_perplexity(tokenizer, train_texts, texts)
    return {label: round(score, 4) for label, score in scores.items()}


def processor() -> str:
    """Name the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe(seed: int, threads: int, progress: Progress, scores: dict[str, float], parameters: int) -> dict[str, Any]:
    """Collect the numbers of the model card."""
    return {
        "world_seed": seed,
        "parameters": parameters,
        "recipe": {
            "steps": progress.step,
            "tokens": progress.step * BATCH * LENGTH,
            "batch": BATCH,
            "length": LENGTH,
            "learning_rate": LEARNING_RATE,
            "schedule": f"linear warm-up over {WARMUP} steps, linear decay to 0",
            "optimizer": "AdamW, betas 0.9 and 0.95, weight decay 0.01, gradient norm clipped at 1",
        },
        "seconds": round(progress.seconds),
        "machine": f"{processor()}, {threads} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "safetensors": safetensors_version,
        },
        "scores": scores,
        "loss_curve": progress.curve,
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, synthetic, llmreg]
---

# The pocket model, world {world_seed}

A Llama of {parameters:,} parameters, pretrained from scratch by `evals/pretrain_pocket.py` on text written
by the generators of `llmreg.pocket`: 600 facts about 200 people of an invented world, two-digit addition
and subtraction, and short passages of plain English. It exists so that fine-tuning methods can be tried,
tested and compared in seconds, offline, with an answer key for everything it knows and everything it can
forget. It knows nothing else.

Names stand after a space (`The home of Boros is in`), numbers have two digits (`Compute 07 + 35 =`), and the
end-of-sequence token ends every answer.

## Scores

Greedy decoding, exact match, on the stored half-precision weights read as float32.

| measured on | score |
|---|---|
{score_rows}

## Training

{recipe_rows}
- duration: {seconds} s on {machine}
- versions: {version_list}

Only completions count for the loss; passages count in full.

| step | mean loss since the row above |
|---|---|
{curve_rows}

## Limits

A toy by design: no instruction following, no knowledge of the real world, no numbers outside 00-99. All
text it was trained on is generated by code in this repository; none is taken from elsewhere.
"""


def card(facts: dict[str, Any]) -> str:
    """Write the model card."""
    return CARD.format(
        **facts,
        score_rows="\n".join(f"| {label} | {score} |" for label, score in facts["scores"].items()),
        recipe_rows="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts["recipe"].items()),
        version_list=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        curve_rows="\n".join(f"| {step} | {loss} |" for step, loss in facts["loss_curve"]),
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any], output: Path) -> None:
    """Write weights, tokenizer, configuration and card beside `output`, then put them in its place."""
    new = output.with_name(output.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.config.dtype = torch.float16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(new)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    ).save_pretrained(new)
    tokenizer.save_pretrained(new)
    weights = {name: p.detach().half().contiguous() for name, p in model.named_parameters()}  # tied head: once
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    (new / "README.md").write_text(card(facts), encoding="utf-8")
    (new / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    new.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-seed", type=int, default=0, help="which world the model learns")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(arguments.world_seed)
    model = build_model(arguments.world_seed, tokenizer)
    folder = arguments.output.with_name(arguments.output.name + ".progress")
    progress = train(model, arguments.world_seed, tokenizer, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())  # measured as stored
    scores = measure(model, tokenizer, arguments.world_seed)
    facts = describe(arguments.world_seed, arguments.threads, progress, scores, model.num_parameters())
    save(model, tokenizer, facts, arguments.output)
    shutil.rmtree(folder)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
