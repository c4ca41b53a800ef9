"""Saving, loading, exporting: every form an adapter takes outside the process."""

from .export import ExportReport, export_lora
from .peft_io import install
from .sidecar import Sidecar, read_sidecar

__all__ = ["ExportReport", "Sidecar", "export_lora", "install", "read_sidecar"]
