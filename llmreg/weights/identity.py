"""Which checkpoint a base model comes from (law 4), whatever dtype or quantisation it is loaded in.

identity = sha256 over the sorted sha256 digests of the checkpoint's weight files. A model that was
never loaded from files is identified by its own parameters instead, and says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from llmreg.errors import WeightError
from llmreg.weights.digests import cached_file_digest
from llmreg.weights.hashing import memory_digest, unwrapped
from llmreg.weights.source import weight_files

__all__ = ["Identity", "checkpoint_folder", "identity_hash"]


@dataclass(frozen=True)
class Identity:
    """Which weights a model has. Two are equal where `digest` and `source` are.

    Attributes:
        digest: sha256 (hex).
        source: `checkpoint` (its files), or `memory` (its parameters as they are now, so that another
            dtype or quantisation of the same model is another identity).
        name: Hub id where it is known to be one, else None: a path of somebody's machine is never kept.
        revision: the Hub commit where known, else the revision that was asked for.
    """

    digest: str
    source: Literal["checkpoint", "memory"]
    name: str | None = field(default=None, compare=False)
    revision: str | None = field(default=None, compare=False)


def identity_hash(model_or_path: nn.Module | str | Path, revision: str | None = None) -> Identity:
    """The identity of a model (bare or wrapped by PEFT), of a checkpoint folder or file, or of a Hub id.

    A model's folder is the one its config was loaded from; a Hub id is looked up in the local Hub cache
    only. What happened to the weights since loading is not seen here but by `bytes_hash`.

    Raises:
        WeightError: no such checkpoint, an unreadable file, a missing shard, or (without files) a
            parameter on the meta device.
    """
    if isinstance(model_or_path, nn.Module):
        return _identity_of_model(unwrapped(model_or_path), revision)
    files, name, commit = _locate(str(model_or_path), revision)
    if not files:
        raise WeightError(
            f"no checkpoint files for {str(model_or_path)!r}: expected a folder with model.safetensors, "
            "a weight file, or a Hub id that is in the local cache"
        )
    return Identity(_combined(files), "checkpoint", name, commit)


def checkpoint_folder(model: nn.Module) -> Path | None:
    """The folder on this machine that a model was loaded from; None if there is none with weights."""
    files, _, _ = _files_of(unwrapped(model), None)
    return files[0].parent if files else None


def _identity_of_model(model: nn.Module, revision: str | None) -> Identity:
    files, name, commit = _files_of(model, revision)
    if files:
        return Identity(_combined(files), "checkpoint", name, commit)
    return Identity(memory_digest(model), "memory", name, commit)


def _files_of(model: nn.Module, revision: str | None) -> tuple[list[Path], str | None, str | None]:
    config: Any = getattr(model, "config", None)
    where = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    loaded_commit = getattr(config, "_commit_hash", None)
    if isinstance(where, str) and where:
        return _locate(where, revision or loaded_commit, from_hub=loaded_commit is not None)
    return [], None, revision


def _locate(where: str, revision: str | None, from_hub: bool = False) -> tuple[list[Path], str | None, str | None]:
    """(weight files, Hub id, commit) of a local path or a Hub id; no files if there are none.

    A local folder wins over a Hub id of the same name, as in transformers, unless the model is known
    to have come from the Hub (then a folder that now has its name is something else).
    """
    path = Path(where).expanduser()
    snapshot = _cached_snapshot(where, revision) if from_hub or not path.exists() else None
    if snapshot is not None:
        return weight_files(snapshot), *_hub_place(snapshot, revision)
    if path.is_file():
        return [path], *_hub_place(path.parent, revision)
    if path.is_dir():
        return weight_files(path), *_hub_place(path, revision)
    # transformers sets a commit only for a Hub id; without one this may be a path that is gone.
    return [], where if revision and _looks_like_hub_id(where) else None, revision


def _hub_place(folder: Path, revision: str | None) -> tuple[str | None, str | None]:
    """(Hub id, commit) from a folder `models--org--name/snapshots/<commit>` of a Hub cache."""
    folder = folder.absolute()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return "/".join(repo.split("--")[1:]), folder.name
    return None, revision


def _looks_like_hub_id(where: str) -> bool:
    return not where.startswith((".", "/", "~")) and "\\" not in where and where.count("/") <= 1


def _cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """The folder of a Hub id in the local cache; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for filename in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        try:
            found = try_to_load_from_cache(repo_id, filename, revision=revision)
        except (HFValidationError, ValueError):
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _combined(files: list[Path]) -> str:
    digests = sorted(cached_file_digest(file) for file in files)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
