"""Safetensors files read and written as streams, so that a checkpoint larger than the memory can be rewritten.

A file is `[8 bytes: N, little endian][N bytes: JSON header][bytes of the tensors, back to back]`. The library's own
`save_file` wants every tensor of a file at once, and its memory map counts what was read as resident; here a tensor
is read in blocks of at most `BLOCK_BYTES` (or one row), and written as it comes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WeightError

__all__ = ["BLOCK_BYTES", "FLOAT_CODES", "SafetensorsFile", "SafetensorsWriter", "TensorEntry", "converted_header"]

BLOCK_BYTES = 1 << 20
#: The float types that are computed with, by their name in a header; all others are copied as bytes.
FLOAT_CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in FLOAT_CODES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `code` is its dtype's name in the header, `start` and `end` are offsets in the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of a float tensor; None for anything else."""
        return FLOAT_CODES.get(self.code)

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


class SafetensorsFile:
    """The header of a safetensors file, and its tensors in blocks.

    Attributes:
        header: the file's first bytes as they are, up to the first tensor. fields: the same, parsed.
        entries: the tensors by name, in the order of their bytes.

    Raises:
        WeightError: not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="pt"):
                pass  # checks lengths, offsets and types of the whole header
            with open(path, "rb") as file:
                length = file.read(8)
                self.header = length + file.read(int.from_bytes(length, "little"))
            self.fields: dict[str, Any] = json.loads(self.header[8:])
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise WeightError(f"{path} is not a whole safetensors file ({error}); copy it again.") from error
        entries = [
            TensorEntry(
                name, field["dtype"], tuple(field["shape"]), *(len(self.header) + o for o in field["data_offsets"])
            )
            for name, field in self.fields.items()
            if name != "__metadata__"
        ]
        self.entries = {entry.name: entry for entry in sorted(entries, key=lambda entry: (entry.start, entry.end))}

    def read(self, name: str) -> Tensor:
        """A whole float tensor, in memory of its own."""
        entry = self.entries[name]
        return torch.cat([torch.empty(0, dtype=entry.dtype), *self.blocks(entry)]).view(entry.shape)

    def blocks(self, entry: TensorEntry, *, row: int = 1) -> Iterator[Tensor]:
        """A float tensor as flat blocks of whole rows of `row` elements, in order."""
        dtype = entry.dtype
        assert dtype is not None, entry.name
        for buffer in self.chunks(entry, multiple=max(1, row) * dtype.itemsize):
            yield torch.frombuffer(buffer, dtype=dtype)

    def chunks(self, entry: TensorEntry, *, multiple: int = 1) -> Iterator[bytearray]:
        """The bytes of any tensor, in pieces that are multiples of `multiple` bytes.

        Raises:
            WeightError: the file has become shorter since its header was read.
        """
        size = max(1, BLOCK_BYTES // multiple) * multiple
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            for start in range(entry.start, entry.end, size):
                buffer = bytearray(min(size, entry.end - start))
                if file.readinto(buffer) != len(buffer):
                    raise WeightError(f"{self.path} changed while it was read; wait until it is written.")
                yield buffer


def converted_header(source: SafetensorsFile, dtype: torch.dtype | None) -> tuple[bytes, list[TensorEntry]]:
    """Header of `source` with its float tensors in `dtype`, and the tensors in the order they must be written in.

    Where nothing changes it is the header of `source`, byte for byte. Else wider types come first, since readers
    want every tensor at a multiple of its element's size.
    """
    entries = list(source.entries.values())
    if dtype is None or all(entry.dtype in (None, dtype) for entry in entries):
        return source.header, entries
    converted = {entry.name: (_CODES[dtype], dtype.itemsize) for entry in entries if entry.dtype is not None}
    for entry in entries:
        if entry.dtype is None:
            converted[entry.name] = (entry.code, (entry.end - entry.start) // max(1, entry.elements))
    order = sorted(entries, key=lambda entry: -converted[entry.name][1])
    fields, start = dict(source.fields), 0
    for entry in order:
        code = converted[entry.name][0]
        size = entry.end - entry.start if entry.dtype is None else entry.elements * dtype.itemsize
        fields[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


class SafetensorsWriter:
    """Writes one file: the header first, then tensors in the header's order; on a clean exit synced and read back.

    Raises:
        WeightError: what was written is not what the header says.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self.path, self.header = path, header
        self.written = 0

    def __enter__(self) -> SafetensorsWriter:
        self._file: BinaryIO = open(self.path, "wb")
        self._file.write(self.header)
        return self

    def write(self, pieces: Iterable[Tensor | bytearray]) -> None:
        for piece in pieces:
            data = piece.contiguous().view(torch.uint8).numpy().data if isinstance(piece, Tensor) else piece
            self._file.write(data)
            self.written += len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None and SafetensorsFile(self.path).header != self.header:
            raise WeightError(f"{self.path} does not read back as it was written; check the disk and try again.")
