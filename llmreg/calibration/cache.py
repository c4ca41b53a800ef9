"""Statistics that were gathered before: one safetensors file, found by base, data and settings.

The file's name is the hash of what decides its content; the same text stands in its header, with a digest of its
tensors. It appears by rename, so an interruption leaves the old one or none. A damaged file is gathered anew and
replaced; a folder that cannot be written to costs only the caching.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmreg.calibration.report import CalibrationReport
from llmreg.calibration.results import Statistics
from llmreg.calibration.statistics import InputStatistics, Need
from llmreg.errors import BaseMismatchError, LlmregWarning
from llmreg.weights.hashing import update

__all__ = ["CalibrationCache", "load_statistics", "save_statistics"]

logger = logging.getLogger("llmreg")

_HEADER = "llmreg_calibration"
_FORMAT = 2  # 2: the test matrices of sketches are bfloat16


@dataclass(frozen=True)
class CalibrationCache:
    """Where statistics are kept, and of what they are.

    Attributes:
        folder: created with the first entry.
        base: hash of the base model (identity, or stored bytes of its layers).
        data: fingerprint of the calibration data: its texts, tokeniser, order and batch size.
    """

    folder: str | os.PathLike
    base: str
    data: str

    def path(self, settings: dict[str, Any]) -> Path:
        """The file of these statistics under `settings`, whether or not it is there."""
        name = hashlib.sha256(self.key(settings).encode()).hexdigest()
        return Path(self.folder) / f"calibration-{name}.safetensors"

    def key(self, settings: dict[str, Any]) -> str:
        """What decides the content of a file."""
        return _key(self.base, self.data, settings)

    def load(self, settings: dict[str, Any]) -> Statistics | None:
        """The statistics gathered before; None if there are none, or damaged ones (said in a log note)."""
        path = self.path(settings)
        try:
            return _load(path, self.key(settings))
        except FileNotFoundError:
            return None
        except Exception as error:  # safetensors and JSON raise many kinds over bytes that make no sense
            logger.info("The damaged calibration statistics %s are gathered again: %s", path, error)
            return None

    def store(self, statistics: Statistics, settings: dict[str, Any]) -> None:
        """Keep `statistics`; a folder that cannot be written to is a warning."""
        try:
            _save(self.path(settings), statistics, self.key(settings))
        except OSError as error:
            warnings.warn(
                f"The calibration statistics cannot be kept in {self.folder} ({error.strerror or error}); the run goes "
                "on without. Free space, or give a folder that you may write to.",
                LlmregWarning,
                stacklevel=3,
            )


def save_statistics(path: str | os.PathLike, statistics: Statistics, *, base: str, data: str = "") -> None:
    """Write statistics to a file of their own, by atomic rename.

    Args:
        base, data: what they are of, as in `CalibrationCache`.
    """
    _save(Path(path), statistics, _key(base, data, {}))


def load_statistics(path: str | os.PathLike, *, base: str) -> Statistics:
    """Statistics from `save_statistics`, on the CPU.

    Raises:
        BaseMismatchError: they are of another base model, or the file is damaged or none of ours.
    """
    path = Path(path)
    try:
        header = _header(path)
        found = json.loads(header["key"])["base"]
    except Exception as error:
        raise BaseMismatchError(f"{path} holds no calibration statistics that can be read: {error}") from error
    if found != base:
        raise BaseMismatchError(
            f"{path} holds statistics of the base model {found}, not of {base}; calibrate this model"
        )
    try:
        return _load(path, header["key"])
    except Exception as error:
        raise BaseMismatchError(f"{path} is damaged: {error}; calibrate again") from error


# -- one file -------------------------------------------------------------------------------------------------------


def _key(base: str, data: str, settings: dict[str, Any]) -> str:
    return json.dumps({"base": base, "data": data, "format": _FORMAT, "settings": settings}, sort_keys=True)


def _save(path: Path, statistics: Statistics, key: str) -> None:
    tensors: dict[str, Tensor] = {}
    groups = []
    for number, (names, part) in enumerate(statistics.groups()):
        labels = ("moment", "squares", "sum")
        tensors |= {f"{number}.{label}": t.cpu() for label, t in zip(labels, part.parts(), strict=False)}
        dim, need, *sketch = part.form()
        groups.append([names, dim, asdict(need), sketch, part.count, part.samples])
    report = asdict(statistics.report)
    header = {"key": key, "order": list(statistics), "groups": groups, "report": report, "digest": _digest(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(tensors, temporary, {_HEADER: json.dumps(header)})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, Exception) and not isinstance(error, OSError):  # safetensors' own, such as a full disk
            raise OSError(str(error)) from error
        raise


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb"), safe_open(path, "pt") as file:  # open() tells an absent file from a damaged one
        return json.loads(file.metadata()[_HEADER])


def _load(path: Path, key: str) -> Statistics:
    """Raises whatever fits if the file is not intact or not that of `key`."""
    header = _header(path)
    if header["key"] != key:
        raise ValueError("it was gathered from another model or data, or under other settings")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if header["digest"] != _digest(tensors):
        raise ValueError("its bytes were altered")
    of_layer: dict[str, InputStatistics] = {}
    for number, (names, dim, need, sketch, count, samples) in enumerate(header["groups"]):
        size, seed = sketch or (None, 0)
        part = InputStatistics(dim, Need(**need), sketch=size, seed=seed)
        part.restore([tensors[f"{number}.{label}"] for label in ("moment", "squares", "sum")[: len(part.parts())]])
        part.count, part.samples = count, samples
        of_layer |= dict.fromkeys(names, part)
    report: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in header["report"].items()}
    ordered = {name: of_layer[name] for name in header["order"]}
    return Statistics(ordered, CalibrationReport(**{**report, "cached": True}))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        update(digest, name, tensors[name])
    return digest.hexdigest()
