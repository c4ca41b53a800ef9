"""Versions of the libraries that decide a run's numbers, as reports, sidecars and model cards record them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["library_versions"]

_LIBRARIES = (
    "llmreg torch transformers peft trl accelerate datasets tokenizers safetensors bitsandbytes numpy pydantic".split()
)


def library_versions() -> dict[str, str]:
    """Python's version and those of the libraries that are installed."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
