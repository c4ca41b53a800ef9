"""What a calibration says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["CalibrationReport"]


@dataclass(frozen=True)
class CalibrationReport:
    """How the statistics came about.

    Attributes:
        tokens, batches: counted tokens of the data and its batches, in one pass, over all processes.
        passes: over the data, without the probing forward of the first batch that a memory budget may take.
        seconds: of the whole calibration; of the slowest process.
        reason: why exact, sketched, or several passes.
        unreached: layers that saw no token (experts that no token was sent to).
        unaligned: layers whose inputs are not the batch's tokens (experts): all tokens they got count.
        masks_missed: those of them where tokens that the masks leave out may have been counted.
        cached: read from disk.
    """

    tokens: int
    batches: int
    passes: int
    seconds: float
    reason: str
    unreached: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    masks_missed: tuple[str, ...] = ()
    cached: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Counted tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def merge(self, other: CalibrationReport) -> CalibrationReport:
        """Of both data sets together, gathered one after the other."""
        unreached = tuple(name for name in self.unreached if name in other.unreached)
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            batches=self.batches + other.batches,
            passes=max(self.passes, other.passes),
            seconds=self.seconds + other.seconds,
            unreached=unreached,
            unaligned=tuple(sorted({*self.unaligned, *other.unaligned})),
            masks_missed=tuple(sorted({*self.masks_missed, *other.masks_missed})),
            cached=self.cached and other.cached,
        )
