"""The pocket model: a small Llama, the invented world it was pretrained on, and tasks with an answer key.

It makes every method of this package runnable offline, on a CPU, in a minute. ``path()`` is the model's
folder, ``load_split`` makes the rows of a task, ``World`` answers what is true in the world of a seed::

    model, tokenizer = load_model(), load_tokenizer()
    rows = load_split("pocket/word-problems", split="train")

Everything is generated from seeds; ``frozen_hashes`` has the digests that the generators must reproduce.
Nothing else in the package depends on this one, and importing it loads neither torch nor transformers.
"""

from __future__ import annotations

from .frozen import frozen_hashes
from .model import load_model, load_tokenizer, path
from .preferences import is_preferred
from .solving import solve
from .tasks import TASKS, Task, load_split
from .world import Fact, World

__all__ = [
    "TASKS",
    "Fact",
    "Task",
    "World",
    "frozen_hashes",
    "is_preferred",
    "load_model",
    "load_split",
    "load_tokenizer",
    "path",
    "solve",
]
