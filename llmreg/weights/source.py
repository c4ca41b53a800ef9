"""Tensors of a checkpoint on disk, opened one by one by name.

Only safetensors: a pickle can run code while it is read. Headers are read on opening, tensors only
when asked for, so a checkpoint larger than the memory is no problem.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch

from llmreg.errors import WeightError

__all__ = ["SafetensorsSource", "weight_files"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class SafetensorsSource:
    """A safetensors checkpoint: a folder (single file or sharded) or one file.

    Args:
        path: the folder or file.

    Raises:
        WeightError: nothing there, a pickle, a damaged file or index, a missing shard.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        for file in safetensors_files(self.path):
            for name in self._open(file).keys():  # noqa: SIM118 (not a mapping)
                self._files[name] = file

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, as stored, on the CPU.

        Raises:
            WeightError: there is none of this name (the nearest ones are listed), or it is damaged.
        """
        if name not in self._files:
            near = difflib.get_close_matches(name, self._files, n=3)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise WeightError(f"no tensor {name!r} in {self.path} ({len(self._files)} tensors){hint}")
        file = self._files[name]
        try:
            return self._open(file).get_tensor(name)
        except Exception as error:
            raise _damaged(file, error) from error

    def read_weight_of(self, module_name: str) -> torch.Tensor:
        """The tensor `<module>.weight`, as stored.

        PEFT's wrapping (`base_model.model.`, `.base_layer`) is taken off the name, and the model's
        own outermost prefix where the checkpoint was saved without it (`transformer.h.0` -> `h.0`).
        """
        name = module_name.removeprefix("base_model.model.").removesuffix(".base_layer")
        for candidate in (f"{name}.weight", f"{name.partition('.')[2]}.weight"):
            if candidate in self._files:
                return self.read(candidate)
        return self.read(f"{name}.weight")

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            from safetensors import safe_open

            try:
                self._handles[file] = safe_open(str(file), framework="pt", device="cpu")
            except Exception as error:
                raise _damaged(file, error) from error
        return self._handles[file]


def safetensors_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder or file. See `SafetensorsSource` for what is raised."""
    if path.is_file():
        if path.suffix in PICKLES:
            raise _pickle(path)
        return _shards(path) if path.name.endswith(".index.json") else [path]
    if not path.is_dir():
        raise WeightError(f"no checkpoint at {path}: give a folder with {SINGLE}, or a .safetensors file")
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        return _shards(path / INDEX)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if pickles and not files:
        raise _pickle(pickles[0])
    found = f"{len(files)} safetensors files and no {INDEX}" if files else "no safetensors file"
    raise WeightError(f"{path} has {found}; give the file itself")


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that hold its weights, for hashing (never unpickled); may be empty.

    The order of preference is that of `from_pretrained`: single safetensors, sharded, then pickles.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    if (folder / "pytorch_model.bin.index.json").is_file():
        return _shards(folder / "pytorch_model.bin.index.json")
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))


def _shards(index: Path) -> list[Path]:
    """The shard files an index names: plain file names beside it, all of them present."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        plain = all(isinstance(shard, str) and Path(shard).name == shard for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightError(f"{index} is not a checkpoint index (JSON with a weight_map): {error}") from error
    if not shards or not plain:
        raise WeightError(f"{index} must name files beside it in its weight_map")
    missing = sorted(shard for shard in shards if not (index.parent / shard).is_file())
    if missing:
        raise WeightError(f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(shards)} missing)")
    return [index.parent / shard for shard in sorted(shards)]


def _damaged(file: Path, error: Exception) -> WeightError:
    return WeightError(f"{file} is not a readable safetensors file (truncated or damaged: {error}); fetch it again")


def _pickle(path: Path) -> WeightError:
    return WeightError(
        f"{path} is a pickle, which can run any code while it is read, so it is refused; "
        "convert it to safetensors (load it once and call save_pretrained)"
    )
