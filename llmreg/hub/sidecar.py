"""The sidecar of a saved adapter: what plain LoRA cannot hold, so that llmreg resumes as if never interrupted.

adapter_model.safetensors     the difference form, a plain LoRA of rank 2r: what everybody loads
adapter_config.json           a plain LoraConfig
llmreg.json                   method and config, hashes of the files, the start and the base, versions
llmreg_factors.safetensors    the factors and the start of every layer, bit-exact; none for Bone, saved as trained
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapters.config import AdditiveConfig
from ..adapters.forms import FORMS
from ..errors import AdapterFileError, BaseMismatchError, LlmregError
from ..files import file_digest, write_json
from ..versions import library_versions

__all__ = [
    "FACTORS_NAME",
    "SIDECAR_NAME",
    "BaseRecord",
    "Sidecar",
    "read_sidecar",
    "start_hash",
    "write_content",
]

SIDECAR_NAME = "llmreg.json"
FACTORS_NAME = "llmreg_factors.safetensors"
FORMAT = 1
_DECIDED_AT_LOAD = ("peft_type", "auto_mapping", "inference_mode")
#: What the sidecar's config and the plain LoRA's must agree on, or the two would compute different functions.
_SCALING_FIELDS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class BaseRecord:
    """Which base an adapter was trained on (law 4).

    Attributes:
        digest: of the checkpoint's files (`source="checkpoint"`) or of the parameters (`source="memory"`).
        source: where the digest comes from; None if the base was merged into when it was first saved.
        name: Hub id, never a local path. revision: its commit.
        stored_bytes: digest of the targeted layers as they were stored. storage: how, e.g. "nf4" or "float32".
    """

    digest: str | None
    source: str | None
    name: str | None
    revision: str | None
    stored_bytes: str | None
    storage: str


@dataclass(frozen=True)
class Sidecar:
    """A sidecar that was read, its `folder` beside it (files of a Hub repository lie in the cache)."""

    folder: Path
    method: str
    config: dict[str, Any]
    files: dict[str, str]
    base: BaseRecord
    start_hash: str
    versions: dict[str, str]
    layers: dict[str, list[int]] = field(default_factory=dict)
    #: Of an adapter beside a quantised residual: each layer's errors, and the digest of its `residual/`.
    residual: dict[str, Any] = field(default_factory=dict)

    def adapter_config(self) -> AdditiveConfig:
        """The config to mount the adapter with, as the method it was trained by."""
        try:
            config = AdditiveConfig(**self.config)
        except (LlmregError, TypeError) as error:
            raise AdapterFileError(
                f"{self.folder / SIDECAR_NAME} describes a {self.method!r} adapter that this version cannot mount "
                f"({error}); upgrade llmreg, or remove {SIDECAR_NAME} to load it as a plain LoRA for inference."
            ) from error
        self._check_plain_config(config)
        return config

    def _check_plain_config(self, config: AdditiveConfig) -> None:
        """Refuse a folder whose two configs scale the update differently: one of them was edited."""
        path = self.folder / CONFIG_NAME
        saved = config.saved_config()
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            found = {name: plain[name] for name in _SCALING_FIELDS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterFileError(f"{path} is missing or damaged ({error}); copy the adapter again.") from error
        for name, value in found.items():
            if value != getattr(saved, name):
                raise AdapterFileError(
                    f"{path} has {name}={value!r}, but {SIDECAR_NAME} describes {name}={getattr(saved, name)!r}: it "
                    f"was changed after it was saved; restore it, or remove {SIDECAR_NAME} to load it as a plain LoRA."
                )

    def load_factors(self) -> dict[str, Tensor]:
        """The bit-exact factors, after every file's digest was checked.

        Raises:
            AdapterFileError: a file is missing, damaged, or not the one that was saved.
        """
        return self.load_tensors(FACTORS_NAME)

    def check_files(self) -> None:
        """Refuse files that are not those that were saved."""
        for name, digest in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise AdapterFileError(
                    f"{path} is missing; copy the whole adapter folder, or remove {SIDECAR_NAME} to load the adapter "
                    "as a plain LoRA for inference."
                )
            if file_digest(path) != digest:
                raise AdapterFileError(
                    f"{path} is not the file that was saved (its SHA-256 differs from {SIDECAR_NAME}'s): it is "
                    "damaged or was changed; copy the adapter again."
                )

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, after every file's digest was checked; raises as `load_factors`."""
        self.check_files()
        tensors = _read_tensors(self.folder / name)
        for key, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise AdapterFileError(
                    f"{key!r} of {self.folder / name} holds NaN or infinite values: the training diverged; load "
                    "another checkpoint."
                )
        return tensors

    def check_same_bytes(self, base: BaseRecord) -> None:
        """Refuse a base whose targeted layers are not stored as the same bytes.

        Raises:
            BaseMismatchError: they differ, or one of the two could not be hashed.
        """
        if self.base.stored_bytes is None or self.base.stored_bytes != base.stored_bytes:
            raise BaseMismatchError(
                f"The adapter in {self.folder.name!r} keeps its values alone and needs the very base it was trained "
                f"on, stored as {self.base.storage}; these layers are stored otherwise ({base.storage}). Load that "
                "base, or save the adapter with storage='lora' where it was trained."
            )

    def check_base(self, base: BaseRecord) -> str | None:
        """Refuse another base; return a note where the same base is stored differently, else None.

        Raises:
            BaseMismatchError: another identity, or (for bases that never had files) other parameters.
        """
        mine = self.base
        if mine.digest is None:
            return "the adapter's base could not be recorded when it was saved, so it is not compared with this one"
        if mine.source != base.source:  # one of them has no files: the targeted layers themselves decide
            if mine.storage != base.storage or base.stored_bytes is None:
                return f"trained on a base in {mine.storage}, used on one in {base.storage}: not comparable"
            if mine.stored_bytes == base.stored_bytes:
                return None
        elif mine.digest == base.digest:
            if mine.storage == base.storage:
                return None
            return f"trained on a base stored as {mine.storage}, used on the same base stored as {base.storage}"
        elif mine.source == "memory" and mine.storage != base.storage:
            return f"trained on a base in {mine.storage}, used on one in {base.storage}: not comparable"
        trained = f"{mine.name or 'a base'} with digest {mine.digest[:12]}"
        raise BaseMismatchError(
            f"The adapter in {self.folder.name!r} was trained on {trained}, but this base has digest "
            f"{(base.digest or 'unknown')[:12]}; load the base it was trained on."
        )


def start_hash(factors: dict[str, Tensor], frozen: tuple[str, ...]) -> str:
    """SHA-256 over the frozen start of all layers: equal recipes on equal bases give equal hashes."""
    digest = hashlib.sha256()
    for key in sorted(factors):
        if key.split(".")[-2] in frozen:
            value = factors[key].detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def write_sidecar(
    folder: Path, config: AdditiveConfig, factors: dict[str, Tensor], base: BaseRecord, **more: Any
) -> None:
    """Write both sidecar files beside the adapter that lies in `folder` already."""
    contiguous = {key: value.detach().contiguous() for key, value in factors.items()}
    save_file(contiguous, folder / FACTORS_NAME, metadata={"format": "pt"})
    start = start_hash(factors, FORMS[config.form()].frozen)
    write_content(folder, config, [SAFETENSORS_WEIGHTS_NAME, FACTORS_NAME], base, start=start, **more)


def write_content(folder: Path, config: Any, files: list[str], base: BaseRecord, start: str = "", **more: Any) -> None:
    """Write `llmreg.json` for `files` of `folder`; `start` is the hash of the start, empty where that is zero."""
    settings = {key: _plain(value) for key, value in config.to_dict().items() if key not in _DECIDED_AT_LOAD}
    settings["base_model_name_or_path"] = base.name  # never a local path
    content = {
        "format": FORMAT,
        "method": config.method,
        "config": settings,
        "start_hash": start,
        "base": asdict(base),
        "files": {name: file_digest(folder / name) for name in files},
        "versions": library_versions(),
        **more,
    }
    write_json(folder / SIDECAR_NAME, {**content, "digest": _content_digest(content)})


def read_sidecar(folder: Path) -> Sidecar | None:
    """The sidecar in `folder`, or None if there is none.

    Raises:
        AdapterFileError: it is not one that this version wrote.
    """
    path = folder / SIDECAR_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise AdapterFileError(
                f"{path} has format {content['format']}, this llmreg reads {FORMAT}; upgrade llmreg, or remove the "
                "file to load the adapter as a plain LoRA for inference."
            )
        if content["digest"] != _content_digest(content):
            raise AdapterFileError(
                f"{path} was changed after it was saved (its content does not match its digest); copy the adapter "
                "again, or remove the file to load it as a plain LoRA for inference."
            )
        fields = {key: content[key] for key in ("method", "config", "files", "start_hash", "versions")}
        if not isinstance(fields["config"], dict):
            raise TypeError("config is no mapping")
        factors = set() if fields["method"] == "bone" else {FACTORS_NAME}
        if set(fields["files"]) != {SAFETENSORS_WEIGHTS_NAME, *factors}:
            raise KeyError("files")
        more = {name: content.get(name, {}) for name in ("layers", "residual")}
        return Sidecar(folder=folder, base=BaseRecord(**content["base"]), **more, **fields)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(
            f"{path} is damaged ({type(error).__name__}: {error}); copy the adapter again, or remove the file to load "
            "it as a plain LoRA for inference."
        ) from error


def _content_digest(content: dict[str, Any]) -> str:
    """SHA-256 of the sidecar's content besides its own digest."""
    text = json.dumps({key: value for key, value in content.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file ({error}); copy the adapter again.") from error


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
