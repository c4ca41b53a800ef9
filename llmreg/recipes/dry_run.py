"""What a recipe would do, before anything is downloaded or written: targets, parameters, memory, the start's cost."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..adapters.layer import AdditiveLayer
from ..hub.serving import served_rank
from ..quiet import quiet
from ..trainers.calibration_data import batches_of_rows, choose_rows
from .base_model import base_dtype, name_or_path
from .building import located_in_adapter
from .chosen_ranks import choose_ranks
from .conflicts import exported_rank
from .data import load_training_data, located
from .data_start_cost import DataStartCost, data_start_cost
from .load import dump_recipe
from .memory import MemoryEstimate, estimate, libraries_memory
from .outline import Parameters, count, outline, targets, with_adapter
from .planning import Plan, plan
from .schema import Calibration, Recipe
from .sources import is_local, is_pocket

__all__ = ["Preview", "preview"]

#: Labels that are assumed where the data cannot be read without the network.
_LABELS = 2
#: Tokens of a row that are assumed where nothing limits them.
_LENGTH = 512
#: Prompts whose length is taken, at most.
_PROMPTS = 2000


@dataclass(frozen=True)
class Preview:
    """What `preview` found out.

    Attributes:
        recipe: resolved, as YAML. method, model, task: of the recipe.
        targets: adapted layers by the pattern that names them. layers: how many different ones.
        parameters: of the base, trained, and kept frozen beside it.
        memory: bytes by purpose. available: what this machine has free, or None.
        start_seconds: expected for the decompositions, from one timed here for each shape; 0 without any.
        exported_rank, form: of what is published. vllm_rank: the `--max-lora-rank` that serves it, or None.
        notes: what is not known, not counted, or worth a second look.
    """

    recipe: str
    method: str
    model: str
    task: str
    targets: dict[str, list[str]]
    layers: int
    parameters: Parameters
    memory: MemoryEstimate
    available: int | None
    start_seconds: float
    exported_rank: int
    vllm_rank: int | None
    notes: tuple[str, ...]
    form: str

    def as_dict(self) -> dict[str, Any]:
        """The preview as plain values."""
        return {**asdict(self), "parameters": self.parameters._asdict(), "peak": self.memory.peak}

    def renderables(self) -> list[Any]:
        """What `rich` prints: the recipe, targets, memory and the rest."""
        from rich.markup import escape
        from rich.table import Table

        layers = Table(
            "target", "layers", "first and last", title=f"{self.layers} adapted layers", title_justify="left"
        )
        for pattern, names in self.targets.items():
            ends = "nothing" if not names else names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            layers.add_row(escape(pattern), str(len(names)), escape(ends))
        memory = Table("memory", "MiB", title="expected at the peak", title_justify="left")
        for name, value in asdict(self.memory).items():
            if name != "notes":
                memory.add_row(name, "not known" if value is None else f"{value / 2**20:,.0f}")
        available = "" if self.available is None else f" of {self.available / 2**20:,.0f} available"
        memory.add_row("[bold]peak[/]", f"[bold]{self.memory.peak / 2**20:,.0f}[/]{available}")
        base, trained, frozen = self.parameters
        served = f"vLLM: --max-lora-rank {self.vllm_rank}" if self.vllm_rank else "not one that vLLM serves"
        if self.form != "plain LoRA":
            served = "vLLM serves LoRA only"
        lines = [
            f"[bold]Parameters[/]  {trained:,} trained ({trained / (base + trained + frozen):.2%}), {frozen:,} frozen "
            f"beside them, {base:,} of the base",
            f"[bold]Start[/]       about {self.start_seconds:.1f} s",
            f"[bold]Published[/]   {self.form} of rank {self.exported_rank} ({served})",
            *(f"[bold]Note[/]        {escape(note)}" for note in self.notes),
            "Nothing was downloaded or written.",
        ]
        return [escape(self.recipe), layers, memory, *lines]


def preview(recipe: Recipe) -> Preview:
    """Settle a recipe and say what it would do; reads the model's config, local data, and nothing else.

    Raises:
        RecipeError: what `plan` refuses, a target that matches nothing, or a config that is not on this machine.
    """
    task: Any = recipe.task  # one of the literals that `memory` takes; the schema has seen to it
    with quiet():
        settled = plan(recipe)
        gpu = not settled.training.use_cpu
        libraries = None if gpu else libraries_memory(task)
        labels, notes = _labels(recipe)
        with located(recipe, "model", "name"):
            model = outline(name_or_path(recipe), revision=recipe.model.revision, task=task, num_labels=labels)
        with located_in_adapter(recipe, model):
            found = targets(model, settled.adapter)
            adapted_layers = sorted({name for names in found.values() for name in names})
            adapter, about_ranks = choose_ranks(
                name_or_path(recipe), recipe.model.revision, model, settled.adapter, adapted_layers
            )
            settled = replace(settled, adapter=adapter)
            cost = _data_start(settled, model, adapted_layers, gpu)
            tokens, about_prompts = _tokens(settled)
            memory = estimate(
                model,
                settled.adapter,
                settled.training,
                task=task,
                dtype=base_dtype(recipe, gpu),
                quantization=recipe.model.quantization,
                gpu=gpu,
                tokens=tokens,
                libraries=libraries,
                start=None if cost is None else cost.statistics + cost.workspace,
            )
            adapted = with_adapter(model, settled.adapter)
        notes += [
            *about_ranks,
            *about_prompts,
            *_about_data(settled, cost),
            *(f"{pattern} matches no layer." for pattern, names in found.items() if not names),
        ]
        available = _available(gpu)
        if available is not None and memory.peak > available:
            notes.append("The peak is more than is free: lower the batch size or max_length, or quantise the base.")
    published = exported_rank(recipe, settled.method, settled.adapter)
    exports = recipe.output.rank or recipe.output.dtype
    form = "plain LoRA" if exports else settled.method.form_of(settled.adapter)
    return Preview(
        recipe=dump_recipe(recipe),
        method=settled.method.name,
        model=recipe.model.name,
        task=recipe.task,
        targets=found,
        layers=len(adapted_layers),
        parameters=count(adapted),
        memory=memory,
        available=available,
        start_seconds=_start_seconds(settled, adapted) if cost is None else cost.seconds + cost.forward_seconds,
        exported_rank=published,
        vllm_rank=served_rank(published) if form == "plain LoRA" and (settled.ranks_known or exports) else None,
        notes=(*notes, *memory.notes),
        form=form,
    )


def _labels(recipe: Recipe) -> tuple[int | None, list[str]]:
    """The number of classes, where the data lies on this machine."""
    if recipe.task != "classification":
        return None, []
    if is_pocket(recipe.data.train) or is_local(recipe.data.train):
        classes = load_training_data(recipe).classes
        assert classes is not None
        return len(classes.names), []
    return _LABELS, [f"The number of classes is not known before the data is downloaded; {_LABELS} are assumed."]


def _tokens(settled: Plan) -> tuple[int | None, list[str]]:
    """Of grpo the longest prompt with its completion, where the data lies on this machine."""
    recipe = settled.recipe
    if recipe.task != "grpo":
        return None, []
    completion = settled.training.max_completion_length
    known = is_pocket(recipe.data.train) or is_local(recipe.data.train)
    tokenizer = _tokenizer(recipe) if known else None
    if tokenizer is None:
        return _LENGTH + completion, [
            f"The length of the prompts is not known before data and tokenizer are downloaded; {_LENGTH} tokens are "
            "assumed."
        ]
    prompts = choose_rows(load_training_data(recipe).train.select_columns("prompt"), _PROMPTS, recipe.seed)
    longest = max(len(ids) for batch in batches_of_rows(prompts, tokenizer) for ids in batch["input_ids"])
    return longest + completion, []


def _tokenizer(recipe: Recipe) -> Any:
    """The model's, or None where it is not on this machine or cannot read conversations."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            name_or_path(recipe), revision=recipe.model.revision, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None


def _data_start(settled: Plan, model: Any, layers: list[str], gpu: bool) -> DataStartCost | None:
    """The cost of a start from calibration data; None for methods that need none."""
    if not settled.method.takes_data():
        return None
    recipe = settled.recipe
    settings, training = recipe.calibration or Calibration(), settled.training
    with located(recipe, "calibration", "memory_budget"):
        return data_start_cost(
            model,
            settled.adapter,
            layers,
            settings,
            batch_size=settings.batch_size or training.per_device_train_batch_size,
            length=settings.max_length or getattr(training, "max_length", None) or _LENGTH,
            dtype=base_dtype(recipe, gpu),
            device="cuda" if gpu and torch.cuda.is_available() else "cpu",
        )


def _about_data(settled: Plan, cost: DataStartCost | None) -> list[str]:
    """What is read to start from, what is kept of it, and what it decides."""
    if cost is None:
        return []
    recipe, settings = settled.recipe, settled.recipe.calibration or Calibration()
    rows = "all rows" if settings.rows is None else f"up to {settings.rows} rows"
    source = settings.data or f"{recipe.data.train}, what it trains on"
    notes = [
        f"The start reads {rows} of {source}: {cost.inputs} distinct layer inputs, {cost.statistics / 2**20:,.1f} MiB "
        f"of sums ({cost.reason}), about {cost.forward_seconds:.1f} s for the base to run over rows of full length."
    ]
    if not settled.ranks_known:
        notes.append(
            "Ranks are chosen from the calibration data, and vLLM wants output.rank: parameters, memory and time are "
            f"those of rank {settled.adapter.r} everywhere, and the published rank is the largest possible."
        )
    if settled.method.name == "eora":
        notes.append("The adapter does not start at zero: it makes up for the quantisation before the first step.")
    return notes


def _start_seconds(settled: Plan, adapted: Any) -> float:
    """One decomposition of each shape and rank, timed on a matrix with a falling spectrum, times their number."""
    if settled.method.kind != "additive":
        return 0.0
    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, AdditiveLayer)]
    starts = Counter((layer.out_features, layer.in_features, layer.r["default"]) for layer in layers)
    generator = torch.Generator().manual_seed(0)
    device = "cpu" if settled.training.use_cpu else "cuda"
    seconds = 0.0
    for (height, width, rank), number in starts.items():
        falling = torch.arange(1, width + 1, dtype=torch.float32) ** -0.6
        matrix = (torch.randn(height, width, generator=generator) * falling).to(device)
        settled.adapter.start(matrix[:64, :64], min(rank, 8), 1.0)  # libraries load outside the measurement
        started = time.perf_counter()
        settled.adapter.start(matrix, min(rank, height, width), 1.0).A.sum().item()
        seconds += number * (time.perf_counter() - started)
    return seconds


def _available(gpu: bool) -> int | None:
    """Bytes free on the GPU, or the process's present memory and what the system can still give it."""
    if gpu:
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return free + libraries_memory()
