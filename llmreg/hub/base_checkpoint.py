"""The base checkpoint an adapter belongs to: where it is, and which of its tensors a parameter of the model is.

Checkpoints and models do not always use the same names (a checkpoint saved from the model without its head lacks the
prefix; transformers 5 renames older keys while it loads). The names come from transformers itself, by way of the
model built without data; where it cannot be built (code from a repository), only prefixes are tried.
"""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BaseMismatchError, RecipeError, UnsupportedError, WeightError
from ..weights import Identity, identity_hash
from ..weights.source import INDEX, safetensors_files
from ..weights.storage import is_conv1d
from .sidecar import Sidecar
from .streaming import SafetensorsFile, TensorEntry

__all__ = ["DOWNLOADED", "BaseCheckpoint", "locate_base"]

_PREFIXES = ("model", "transformer")
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"]
_NOT_DOWNLOADED = ["*/*", "consolidated*", "adapter_*"]


def locate_base(base: str | Path | None, config: Any, sidecar: Sidecar | None) -> Path:
    """The folder of the base.

    Args:
        base: `pocket`, a folder or a Hub id; None for what the adapter names.
        config: the adapter's PEFT config. sidecar: its sidecar, if it has one.

    Raises:
        RecipeError: nothing is named, or it cannot be had.
    """
    if base is not None:
        return _resolve(str(base), None)
    named, revision = config.base_model_name_or_path, config.revision
    record = sidecar.base if sidecar else None
    if named and Path(named).expanduser().is_dir():
        return Path(named).expanduser()
    if record is not None and record.digest is not None:
        from .. import pocket

        if identity_hash(pocket.path()).digest == record.digest:
            return pocket.path()  # wherever the package was when the adapter was trained
        if record.name:
            return _resolve(record.name, record.revision or revision)
    if not named:
        raise RecipeError("The adapter does not say which base it belongs to; give base=, a folder or a Hub id.")
    return _resolve(named, revision)


def _resolve(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name == "pocket":
        from .. import pocket

        return pocket.path()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise RecipeError(f"The base {name} is a file; give the folder of the checkpoint.")
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise RecipeError(
            f"The base {name!r} is no folder here and cannot be had from the Hub ({type(error).__name__}); give base=, "
            "a folder, a Hub id, or pocket."
        ) from error


class BaseCheckpoint:
    """A base checkpoint on disk; nothing but headers is read on opening.

    Attributes:
        folder: of the checkpoint. files: its shards, as streams. config: its `config.json`.
        shifted: whether a parameter was found only with its outermost prefix put on or taken off.

    Raises:
        WeightError: no whole safetensors checkpoint. UnsupportedError: a quantised one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.files = [SafetensorsFile(path) for path in safetensors_files(folder)]
        self._place: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for key in file.entries:
                if key in self._place:
                    raise WeightError(f"{key!r} is in two files of {folder}; copy the checkpoint again.")
                self._place[key] = file
        _check_index(folder, self._place)
        self.skeleton = _skeleton(folder)
        self._keys, self._built = _names(self._place, self.skeleton)
        self._tied = _tied(self.skeleton, self.config)
        self.shifted = False

    @functools.cached_property
    def identity(self) -> Identity:
        return identity_hash(self.folder)

    @property
    def name(self) -> str:
        """Its Hub id where known, `pocket`, or the name of its folder."""
        from .. import pocket

        return "pocket" if self.folder == pocket.path() else self.identity.name or self.folder.name

    def find(self, parameter: str) -> tuple[str, TensorEntry]:
        """Name in the model and tensor in the checkpoint of a parameter that an adapter changes.

        Raises:
            UnsupportedError: it is tied to another, or made from several tensors, or not a float.
            BaseMismatchError: there is none of this name.
        """
        prefixes = (self.skeleton.base_model_prefix,) if self.skeleton is not None else _PREFIXES
        names = [parameter]
        for prefix in filter(None, prefixes):
            names.append(
                parameter.removeprefix(f"{prefix}.") if parameter.startswith(f"{prefix}.") else f"{prefix}.{parameter}"
            )
        for name in names:
            if name in self._tied:
                raise UnsupportedError(
                    f"The adapter changes {parameter!r}, which this base shares between the embedding and the head, so "
                    "a checkpoint of the same layout cannot hold it; use the adapter unmerged, or retrain without it."
                )
            if name in self._built:
                raise UnsupportedError(
                    f"{parameter!r} is not one tensor of the checkpoint (the model fuses or splits several as it "
                    "loads); merge it with PEFT's merge_and_unload on the loaded model instead."
                )
            if name in self._keys:
                self.shifted = self.shifted or name != parameter
                return name, self._entry(parameter, self._keys[name])
        near = difflib.get_close_matches(parameter, self._keys, n=1)
        raise BaseMismatchError(
            f"The adapter changes {parameter!r}, which the checkpoint in {self.folder} does not have"
            f"{f' (the nearest is {near[0]!r})' if near else ''}; give the base it was trained on as base=."
        )

    def _entry(self, parameter: str, key: str) -> TensorEntry:
        entry = self._place[key].entries[key]
        if entry.dtype is None:
            raise UnsupportedError(
                f"{key!r} of the base is stored as {entry.code}, and only floats can be merged into; "
                "give the 16-bit base as base=."
            )
        return entry

    def file_of(self, entry: TensorEntry) -> SafetensorsFile:
        return self._place[entry.name]

    def is_transposed(self, parameter: str, default: bool) -> bool:
        """Whether a layer keeps its weight as (in, out), by the class of its module where that is known."""
        if self.skeleton is None:
            return default
        try:
            return is_conv1d(self.skeleton.get_submodule(parameter.rpartition(".")[0]))
        except AttributeError:
            return default


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        quantization = config.get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise WeightError(f"{path} is missing or damaged ({error}); give the folder of a whole checkpoint.") from error
    if quantization:
        kind = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedError(
            f"The base in {folder} is stored quantised ({kind}), and a merge would round every layer again; "
            "give the 16-bit base it was made from as base=."
        )
    return config


def _check_index(folder: Path, place: dict[str, SafetensorsFile]) -> None:
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return
    for key, name in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
        if key not in place or place[key].path.name != name:
            raise WeightError(f"{folder / INDEX} has {key!r} in {name}, which is not so; copy the checkpoint again.")


def _skeleton(folder: Path) -> Any:
    """The model on the meta device, or None where transformers itself does not know its class."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cls = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        if cls is None or not issubclass(cls, transformers.PreTrainedModel):
            return None
        with torch.device("meta"):
            return cls(config)
    except Exception:  # whatever a model's constructor raises: names are then matched by prefix
        return None


def _names(place: dict[str, SafetensorsFile], skeleton: Any) -> tuple[dict[str, str], set[str]]:
    """Checkpoint key of every parameter that is one tensor of it, and the names of those made from several."""
    keys, built = {key: key for key in place}, set[str]()
    if skeleton is None:
        return keys, built
    try:  # private to transformers, though PEFT uses the same; without them only prefixes are tried
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return keys, built
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    keys, state = {}, skeleton.state_dict()
    for key in sorted(place):
        name, converter = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, state)
        if converter is None:
            keys[name] = key
        else:
            built.add(name)
    return keys, built


def _tied(skeleton: Any, config: dict[str, Any]) -> set[str]:
    """Names of the parameters that share their data with another."""
    if skeleton is None:
        tied = config.get("tie_word_embeddings", False)
        return {"lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"} if tied else set()
    pairs: dict[str, str] = getattr(skeleton, "all_tied_weights_keys", None) or {}
    names = {*pairs, *pairs.values()}
    text = skeleton.config.get_text_config()
    if getattr(text, "tie_word_embeddings", False):
        embedding: nn.Module | None = skeleton.get_input_embeddings()
        names |= {f"{name}.weight" for name, module in skeleton.named_modules() if module is embedding}
    return names
