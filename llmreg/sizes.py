"""Sizes as people write them: bytes, or a number with a unit."""

from __future__ import annotations

import re

__all__ = ["parse_size"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Bytes of "5368709120", "5GB" (10^9) or "5 GiB" (2^30); None where `text` is not a size.

    Example:
        >>> parse_size("2GB"), parse_size("1.5k"), parse_size("1 GiB"), parse_size("much")
        (2000000000, 1500, 1073741824, None)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        return None
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))
