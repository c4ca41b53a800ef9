"""Merging an adapter into its base, on disk: a checkpoint of the base's own layout, for whatever runs plain models.

    W' = round(W + s B A)      formed in fp32 (fp64 where W is), rounded once, to the dtype W is stored in

The base's files are streamed shard by shard and tensor by tensor: same files, names, order, dtypes and metadata, what
the adapter does not touch byte for byte. Memory holds one layer's factors and a block of rows, whatever the model's
size. This is the one place where llmreg changes a base weight, and it changes a copy.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..errors import AdapterFileError, BaseMismatchError, LlmregError, RecipeError, UnsupportedError, WeightError
from ..files import commit_folder, file_digest, staged_folder, write_json, write_text
from ..progress import track
from .base_checkpoint import DOWNLOADED, BaseCheckpoint, locate_base
from .layers_on_disk import LayersOnDisk
from .lora_files import check_new_folder, float_dtype
from .parity import parity
from .plain_lora import Change, PlainLora, read_plain_lora
from .sidecar import Sidecar, read_sidecar
from .streaming import SafetensorsFile, SafetensorsWriter, TensorEntry, converted_header

__all__ = ["MergeReport", "merge"]

logger = logging.getLogger("llmreg")
_MARKER = "config.json"
#: Suffixes of weights (copied only as what they become) and of pickles (never copied).
_WEIGHTS = tuple(
    ".safetensors .safetensors.index.json .bin .bin.index.json .pt .pth .ckpt .pkl .pickle .msgpack .h5 .gguf .onnx "
    ".onnx_data .npz .npy .joblib .tflite .ot .data".split()
)
_SMALL = 1 << 27  # bytes; the largest tokenizer files have a quarter of this


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `dataclasses.asdict` gives plain JSON.

    Attributes:
        path: the merged checkpoint. base: the Hub id of its base where known, else its folder's name.
        merged: tensors that got an update. replaced: those that the adapter brought whole. copied: the others.
        bytes: of the weights written. dtypes: tensors of each dtype, by the dtype's name.
        note: what is to know about the base, e.g. that training had it in another storage.
        parity: error of the logits of each form of the adapter, see `llmreg.hub.parity`; None where not measured,
            and `parity_skipped` then says why.
        seconds: the whole call took.
    """

    path: str
    base: str
    merged: int
    replaced: int
    copied: int
    bytes: int
    dtypes: dict[str, int]
    note: str | None
    parity: dict[str, Any] | None
    parity_skipped: str | None
    seconds: float


def merge(
    src: str | Path,
    dst: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    check: bool = True,
) -> MergeReport:
    """Write the base of the adapter in `src`, with the adapter merged in, to `dst`.

    Args:
        src: a saved adapter (plain LoRA, or what llmreg saves). dst: a folder that is empty or does not exist.
        base: its base: `pocket`, a checkpoint folder or a Hub id; by default the one that the adapter names.
        dtype: "float32", "bfloat16" or "float16" for all float tensors; by default each as the base has it.
        check: afterwards compare the logits of adapter, plain LoRA and merged model, if the model fits in memory.

    Returns:
        `MergeReport`.

    Raises:
        RecipeError: an argument that makes no sense, a `dst` that is not empty, a base that cannot be had.
        AdapterFileError: `src` is not a whole plain-LoRA adapter, or (BaseMismatchError) belongs to another base.
        UnsupportedError: an adapter or a base that cannot be merged on disk, named.
        WeightError: a damaged base, or merged values that the dtype cannot hold.
    """
    started = time.monotonic()
    src, dst = Path(src), Path(dst)
    target = float_dtype(dtype)
    check_new_folder(dst)
    adapter = read_plain_lora(src)
    sidecar = _checked_sidecar(src)
    checkpoint = BaseCheckpoint(locate_base(base, adapter.config, sidecar))
    if dst.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise RecipeError(f"{dst} lies in the folder of the base, which is never changed; choose another output.")
    plan = _planned(adapter, checkpoint)
    note = _check_base(sidecar, adapter, checkpoint) if sidecar else None
    _check_room(checkpoint, dst, target)
    if note:
        logger.info("%s: %s", src, note)
    with staged_folder(dst) as staging:
        written, dtypes = _write(adapter, checkpoint, plan, staging, target)
        _write_small_files(adapter, checkpoint, staging, target)
        _commit(staging, dst)
    measured, skipped = parity(src, dst, checkpoint, sidecar is not None) if check else (None, "it was not asked for")
    kinds = Counter(change.kind == "replace" for change in plan.values())
    return MergeReport(
        path=str(dst),
        base=checkpoint.name,
        merged=kinds[False],
        replaced=kinds[True],
        copied=sum(len(file.entries) for file in checkpoint.files) - len(plan),
        bytes=written,
        dtypes=dtypes,
        note=note,
        parity=measured,
        parity_skipped=skipped,
        seconds=time.monotonic() - started,
    )


# -- before anything is written ------------------------------------------------------------------------------------


def _checked_sidecar(src: Path) -> Sidecar | None:
    """The sidecar, if there is one, after its config and the adapter's weights were compared with it."""
    sidecar = read_sidecar(src)
    if sidecar is None:
        return None
    sidecar.adapter_config()
    if file_digest(src / SAFETENSORS_WEIGHTS_NAME) != sidecar.files[SAFETENSORS_WEIGHTS_NAME]:
        raise AdapterFileError(
            f"{src / SAFETENSORS_WEIGHTS_NAME} is not the file that was saved (its SHA-256 differs from the "
            "sidecar's): it is damaged or was changed; copy the adapter again."
        )
    return sidecar


def _planned(adapter: PlainLora, checkpoint: BaseCheckpoint) -> dict[str, Change]:
    """The changes by checkpoint key, every one with a tensor of the shape it needs."""
    plan: dict[str, Change] = {}
    for change in adapter.changes:
        if change.kind == "replace" and adapter.config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
            raise UnsupportedError(
                f"The adapter brings {change.parameter!r}, a head for {adapter.config.task_type}; a checkpoint of the "
                "base's layout cannot hold it: use the adapter unmerged, or merge it with PEFT's merge_and_unload."
            )
        _, entry = checkpoint.find(change.parameter)
        shapes = [adapter.file.entries[key].shape for key in change.keys]
        expected = shapes[0]
        if change.kind == "lora":
            (_, width), (height, _) = shapes
            expected = (width, height) if _transposed(change, adapter, checkpoint) else (height, width)
        if entry.shape != expected or (change.origin and adapter.file.entries[change.origin].shape != expected):
            raise BaseMismatchError(
                f"The adapter changes {change.parameter!r} of shape {expected}, and {entry.name!r} of the base has "
                f"{entry.shape}; give the base it was trained on as base=."
            )
        if entry.name in plan:
            raise AdapterFileError(f"{adapter.file.path} changes {entry.name!r} twice; copy the adapter again.")
        plan[entry.name] = change
    return plan


def _transposed(change: Change, adapter: PlainLora, checkpoint: BaseCheckpoint) -> bool:
    name, _ = checkpoint.find(change.parameter)
    return checkpoint.is_transposed(name, default=adapter.config.fan_in_fan_out)


def _check_base(sidecar: Sidecar, adapter: PlainLora, checkpoint: BaseCheckpoint) -> str | None:
    """Refuse another base than the adapter's (law 4), as loading does; the note where its storage differs."""
    names = [change.parameter.removesuffix(".weight") for change in adapter.changes if change.kind == "lora"]
    layers = LayersOnDisk(checkpoint, names, adapter.config.fan_in_fan_out)
    return sidecar.check_base(layers.record(hashed=checkpoint.identity.source != sidecar.base.source))


def _check_room(checkpoint: BaseCheckpoint, dst: Path, target: torch.dtype | None) -> None:
    """Refuse a disk that is too small before hours are spent on filling it."""
    needed = sum(
        entry.elements * target.itemsize if target and entry.dtype else entry.end - entry.start
        for file in checkpoint.files
        for entry in file.entries.values()
    )
    place = next(folder for folder in (dst.absolute(), *dst.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RecipeError(
            f"The merged checkpoint takes {needed / 2**30:.1f} GiB, and {place} has {free / 2**30:.1f} GiB free; "
            "choose another output, or a smaller dtype."
        )


# -- the weights ---------------------------------------------------------------------------------------------------


def _write(
    adapter: PlainLora,
    checkpoint: BaseCheckpoint,
    plan: dict[str, Change],
    staging: Path,
    target: torch.dtype | None,
) -> tuple[int, dict[str, int]]:
    """Every shard; bytes of tensors written, and how many tensors have which dtype."""
    written, dtypes = 0, Counter[str]()
    for file in checkpoint.files:
        header, order = converted_header(file, target)
        with SafetensorsWriter(staging / file.path.name, header) as writer:
            for entry in track(order, f"Merging {file.path.name}", unit="tensors"):
                dtype = target if entry.dtype is not None and target is not None else entry.dtype
                dtypes[str(dtype).removeprefix("torch.") if dtype is not None else entry.code] += 1
                change = plan.get(entry.name)
                if change is not None:
                    writer.write(_rounded(entry, dtype, _changed(file, entry, change, adapter, checkpoint)))
                elif dtype == entry.dtype:
                    writer.write(file.chunks(entry))
                else:
                    writer.write(_rounded(entry, dtype, file.blocks(entry)))
        written += writer.written
    _write_index(checkpoint, staging, written, target)
    return written, dict(dtypes)


def _changed(
    file: SafetensorsFile, entry: TensorEntry, change: Change, adapter: PlainLora, checkpoint: BaseCheckpoint
) -> Iterator[Tensor]:
    """The new values of a tensor as flat blocks, in the precision they are formed in."""
    if change.kind == "replace":
        yield from adapter.file.blocks(adapter.file.entries[change.keys[0]])
        return
    exact = torch.float64 if entry.dtype == torch.float64 else torch.float32
    factors = [adapter.file.read(key).to(exact) for key in change.keys]
    if change.origin is not None:
        file, entry = adapter.file, adapter.file.entries[change.origin]
    if change.kind == "bias":
        yield from _added(file, entry, entry.elements, lambda rows: change.scaling * factors[0], exact)
        return
    A, B = factors
    left, right = (A.t(), B.t()) if _transposed(change, adapter, checkpoint) else (B, A)
    yield from _added(file, entry, right.shape[1], lambda rows: change.scaling * (left[rows] @ right), exact)


def _added(
    file: SafetensorsFile, entry: TensorEntry, width: int, update: Callable[[slice], Tensor], exact: torch.dtype
) -> Iterator[Tensor]:
    """Blocks of whole rows, each with its part of the update added; `update(rows)` gives it for these rows."""
    first = 0
    for block in file.blocks(entry, row=width):
        values = block.to(exact).view(-1, width)
        last = first + values.shape[0]
        yield values.add_(update(slice(first, last))).view(-1)  # in place: the block is nobody else's
        first = last


def _rounded(entry: TensorEntry, dtype: torch.dtype | None, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Blocks in the dtype they are stored in; what does not fit it is refused."""
    for block in blocks:
        rounded = block.to(dtype)
        if not torch.equal(torch.isfinite(rounded), torch.isfinite(block)) or (
            entry.dtype == dtype and not torch.isfinite(rounded).all()
        ):
            raise WeightError(
                f"{entry.name!r} would hold NaN or infinite values in {str(dtype).removeprefix('torch.')}; "
                'merge with dtype="float32", or check the adapter and the base.'
            )
        yield rounded


# -- the other files -----------------------------------------------------------------------------------------------


def _write_index(checkpoint: BaseCheckpoint, staging: Path, written: int, target: torch.dtype | None) -> None:
    """The index as it is, or with the total size that another dtype gives it."""
    for source in checkpoint.folder.glob("*.safetensors.index.json"):
        if target is None:
            shutil.copyfile(source, staging / source.name)
            continue
        index = json.loads(source.read_text(encoding="utf-8"))
        if "total_size" in (index.get("metadata") or {}):
            index["metadata"]["total_size"] = written
        write_json(staging / source.name, index)


def _write_small_files(
    adapter: PlainLora, checkpoint: BaseCheckpoint, staging: Path, target: torch.dtype | None
) -> None:
    """Config, tokenizer and the like, copied; a card of its own instead of the base's."""
    for source in sorted(path for pattern in DOWNLOADED for path in checkpoint.folder.rglob(pattern)):
        place = source.relative_to(checkpoint.folder)
        left_out = any(part.startswith((".", "adapter", "checkpoint-")) for part in place.parts)
        if left_out or not source.is_file() or source.name.endswith(_WEIGHTS) or source.stat().st_size > _SMALL:
            continue
        (staging / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, staging / place)
    if target is not None:
        config = json.loads((staging / _MARKER).read_text(encoding="utf-8"))
        _set_dtype(config, str(target).removeprefix("torch."))
        write_json(staging / _MARKER, config)
    write_text(staging / "README.md", _card(checkpoint, adapter, target))


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Write the dtype wherever a config (or one of its parts) names one."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict):
            _set_dtype(value, name)


def _card(checkpoint: BaseCheckpoint, adapter: PlainLora, target: torch.dtype | None) -> str:
    identity = checkpoint.identity
    header = f"base_model: {identity.name}\nbase_model_relation: merge\n" if identity.name else ""
    rank = max(adapter.config.r, *(adapter.config.rank_pattern or {"": 0}).values())
    stored = f"all float tensors in {str(target).removeprefix('torch.')}" if target else "each tensor in its dtype"
    return (
        f"---\n{header}tags:\n- merged\n---\n\nA checkpoint with a LoRA adapter of rank {rank} merged in by llmreg: "
        f"`W + s B A`, formed in fp32 and rounded once, {stored}.\n\n"
        f"Identity of the base (SHA-256 over its weight files): `{identity.digest}`.\n"
    )


def _commit(staging: Path, dst: Path) -> None:
    """All at once by renaming the folder; file by file, the config last, where `dst` is a mount or a link."""
    if staging.parent != dst.absolute().parent or dst.is_symlink():
        commit_folder(staging, dst, marker=_MARKER)
        return
    try:
        os.rename(staging, dst)  # over a folder only if that is still empty
    except OSError as error:
        if dst.is_dir() and any(dst.iterdir()):
            raise RecipeError(f"{dst} is not an empty folder any more; choose another output or empty it.") from error
        raise LlmregError(f"{dst} cannot be created ({error.strerror}); choose another output.") from error
