"""What a recipe may say: exactly the sections and keys of this version, nothing else.

`adapter` and `training` carry the fields of other classes (the method's config, TRL's `SFTConfig`); `fields.py` checks
those by name and type against these classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..sizes import parse_size
from .document import Document
from .tasks import TASKS, TASKS_TO_COME

__all__ = ["Adapter", "Calibration", "Data", "Evaluation", "Model", "Output", "Recipe", "Regularizer", "Reward"]

Dtype = Literal["float32", "bfloat16", "float16"]


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(_Section):
    """The base model.

    Attributes:
        name: `pocket`, a Hub id, or a local folder. revision: branch, tag or commit on the Hub.
        dtype: of the weights in memory; `auto` is float32 on a CPU and for the pocket model, bfloat16 on a GPU.
        quantization: load the base in 4 bits (nf4) or 8 bits (int8) by bitsandbytes.
    """

    name: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4", "int8"] | None = None


class Data(_Section):
    """Training data. For sft rows with `prompt` and `completion`, `text`, or `messages`, or `question` and `answer`
    (GSM8K); for dpo `prompt` (or not), `chosen` and `rejected`; for grpo `prompt` and what its rewards compare with,
    `answer` (or `completion`, or GSM8K's); for classification `text` and `label`.

    Attributes:
        train: a pocket task, a Hub id, a .jsonl, .json, .csv or .parquet file, or a folder of them.
        test: the same, for the held-out loss; may repeat `train` where the splits differ.
        config: the Hub dataset's configuration. split, test_split: which splits to read.
        columns: for each column of TRL's format, the column of the data it comes from, or a template with column
            names in braces: `{prompt: "Question: {question}\\nAnswer:", completion: " {answer}"}`.
    """

    train: str = Field(min_length=1)
    test: str | None = None
    config: str | None = None
    split: str = "train"
    test_split: str = "test"
    columns: dict[str, str] | None = None


class Adapter(BaseModel):
    """The method by its name in `llmreg methods`, and any field of its config class."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = Field(strict=True, min_length=1)

    @property
    def settings(self) -> dict[str, Any]:
        """The config fields as written, without the method."""
        return dict(self.model_extra or {})


class Regularizer(BaseModel):
    """A term of the loss by its name, `weight`, and any other field of its class in `llmreg.regularizers`.

    Attributes:
        name: orthonormal, consistency, diversity, singular_values, low_probability, targeted_entropy, or tuner.
        teacher: for the consistency of a classifier, a checkpoint with a trained head: a Hub id or a folder.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(strict=True, min_length=1)
    teacher: str | None = Field(default=None, strict=True, min_length=1)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of its class as written."""
        return dict(self.model_extra or {})


class Calibration(_Section):
    """Data from which the methods start that need some (corda, eva, eora): the base runs over it once before training.

    Attributes:
        data: a pocket task, a Hub id, or a file, as in `data.train`, with rows of `text`, `prompt` and `completion` (or
            `chosen`), a `prompt` alone, or `messages`; default: the rows that the task trains on, as it sees them.
        split, config: of `data`; a split other than train, the Hub dataset's configuration.
        samples: rows that are read, chosen by the seed; `all` for all.
        batch_size: rows at a time; default: the training's. max_length: tokens of a row of `data`; default: the
            training's.
        max_tokens: stop once so many tokens are counted.
        memory_budget: bytes (or "2GB") for what is gathered; above it inputs are sketched or read in several passes.
        exact: true: never sketch; false: always. sketch: columns of a sketch.
    """

    data: str | None = Field(default=None, min_length=1)
    split: str | None = None
    config: str | None = None
    samples: int | Literal["all"] = 256
    batch_size: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    memory_budget: int | str | None = None
    exact: bool | None = None
    sketch: int | None = Field(default=None, ge=1)

    @field_validator("samples", mode="before")
    @classmethod
    def _rows(cls, value: Any) -> Any:
        if value == "all" or (_is_whole(value) and value >= 1):
            return value
        raise PydanticCustomError("samples", "Input should be a number of rows, at least 1, or all")

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        size: Any = parse_size(value) if isinstance(value, str) else value
        if value is None or (_is_whole(size) and size >= 1):
            return value
        raise PydanticCustomError("size", "Input should be bytes or a size with a unit, such as 2GB")

    @property
    def budget(self) -> int | None:
        """`memory_budget` in bytes."""
        return parse_size(self.memory_budget) if isinstance(self.memory_budget, str) else self.memory_budget

    @property
    def rows(self) -> int | None:
        """`samples` as a number; None: all."""
        return None if self.samples == "all" else self.samples


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Reward(_Section):
    """A reward of grpo.

    Attributes:
        name: `pocket_arithmetic`, `exact_match`, `math`, `format`, or `package.module:function`, a function of yours
            with TRL's signature, `(prompts, completions, **columns) -> list of numbers or None`.
        weight: of it in the sum. pattern: of `format`, a regular expression for the whole completion; default: one part
            in think tags, then one in answer tags.
    """

    name: str = Field(min_length=1)
    weight: float = 1.0
    pattern: str | None = None


class Evaluation(_Section):
    """What is measured before and after training.

    Attributes:
        tasks: data sources; `prompt` and `completion` are scored by exact match of the greedy completion, `chosen` and
            `rejected` by which of them is more probable, `text` and `label` by accuracy and macro F1.
        forgetting: data sources of what the base can do: exact match, or perplexity where the rows have `text`.
        heldout: rows kept back from the training data for a held-out loss.
        limit: rows read of each source; None = all.
        batch_size: rows at a time. max_new_tokens: longest completion; None = the longest expected one.
    """

    tasks: tuple[str, ...] = ()
    forgetting: tuple[str, ...] = ()
    heldout: int = Field(default=0, ge=0)
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)

    @field_validator("tasks", "forgetting", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Output(_Section):
    """Where results go.

    Attributes:
        dir: a folder that is empty or does not exist; gets `adapter/`, `report.json` and `recipe.yaml`.
        export: the form that is published; plain LoRA.
        rank, dtype: also export to `lora/`, recompressed to this rank and in this dtype.
        serve: check before training that this server can load the result.
    """

    dir: str = Field(min_length=1)
    export: Literal["lora"] = "lora"
    rank: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    serve: Literal["vllm"] | None = None


class Recipe(_Section):
    """A whole recipe; `llmreg.recipes.load_recipe` makes one from a file."""

    model: Model
    task: str = "sft"
    data: Data
    adapter: Adapter
    calibration: Calibration | None = None
    regularizers: tuple[Regularizer, ...] = ()
    rewards: tuple[Reward, ...] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    output: Output
    seed: int = Field(default=0, ge=0, lt=2**32)

    _document: Document = PrivateAttr(default_factory=lambda: Document("recipe", {}))

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}

    @field_validator("regularizers", "rewards", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A name alone stands for `{name: ...}`, and one entry for a list of one."""
        listed = [value] if isinstance(value, str | dict) else value
        if not isinstance(listed, list):
            return listed
        return tuple({"name": item} if isinstance(item, str) else item for item in listed)

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: str) -> str:
        if task in TASKS_TO_COME:
            raise PydanticCustomError(
                "to_come", f"the task {task} is not in this version of llmreg; write {_either(TASKS)}"
            )
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]!r}?" if near else f"write {_either(TASKS)}"
            raise PydanticCustomError("unknown_task", f"there is no task {task!r}; {meant}")
        return task

    def error(self, location: tuple[str | int, ...], message: str, *, at_key: bool = False) -> Exception:
        """A `RecipeError` that opens with where `location` was written."""
        return self._document.error(location, message, at_key=at_key)

    def resolved(self) -> dict[str, Any]:
        """The recipe with its defaults, as plain values that load again."""
        return self.model_dump(mode="json", exclude_none=True)
