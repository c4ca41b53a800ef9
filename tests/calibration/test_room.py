"""The room keeps to itself, and its progress bar to terminals."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest

import llmreg.calibration
from llmreg.progress import meter

ALLOWED = {"calibration", "errors", "files", "linalg", "progress", "weights"}


def test_calibration_imports_only_the_rooms_below_it() -> None:
    for path in Path(llmreg.calibration.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                package, _, room = name.partition(".")
                assert package not in ("peft", "trl", "transformers", "accelerate"), (path, name)
                assert package != "llmreg" or room.split(".")[0] in ALLOWED, (path, name)
                assert not (isinstance(node, ast.ImportFrom) and node.level), (path, name)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("total", [3, None])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_meter_shows_its_note_on_a_terminal_only(monkeypatch, terminal: bool, total: int | None) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("llmreg.progress._DELAY_SECONDS", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with meter("calibration", total) as advance:
        for _ in range(3):
            advance("12 tokens/s")
    assert ("12 tokens/s" in stream.getvalue()) == terminal
