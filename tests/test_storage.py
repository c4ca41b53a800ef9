"""A full disk and a read-only folder: one sentence, exit code 2, and nothing that could be taken for an adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


@pytest.fixture
def disk(tmp_path):
    """A function (options) -> a small file system of its own, unmounted afterwards; skips where none can be mounted."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
            )
        except OSError as error:
            pytest.skip(f"no mount command: {error}")
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def llmreg(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llmreg", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess, words: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_disk_that_fills_up_leaves_no_adapter(disk, strategy):
    folder = disk("size=1m")  # the adapter takes 1.3 MB, an optimizer state as much
    overrides = ["training.max_steps=2", "training.save_steps=1", f"training.save_strategy={strategy}", "evaluation={}"]
    refused(llmreg("train", QUICKSTART, *overrides, f"output.dir={folder / 'out'}"), "No space left on device")
    assert not list(folder.rglob("adapter_config.json")) or strategy == "steps"
    assert not (folder / "out" / "adapter").exists()
    if strategy == "steps":
        from llmreg.recipes.resuming import is_whole

        assert not any(map(is_whole, folder.rglob("checkpoint-*")))
        done = llmreg("train", QUICKSTART, *overrides, f"output.dir={folder / 'out'}", "--resume")
        refused(done, "no whole checkpoint to resume from")


def test_a_read_only_folder_is_one_sentence_for_every_command_that_writes(disk, tmp_path):
    import peft

    import llmreg as package
    from llmreg import pocket

    model = peft.get_peft_model(pocket.load_model(), package.PissaConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    folder = disk("ro")
    refused(llmreg("train", QUICKSTART, f"output.dir={folder / 'out'}"), "Read-only file system")
    refused(llmreg("export", tmp_path / "adapter", folder / "out"), "Read-only file system")
    refused(llmreg("merge", tmp_path / "adapter", folder / "out"), "Read-only file system")
    refused(llmreg("init", QUICKSTART, "--output", folder / "cache"), "Read-only file system")
    assert list(folder.iterdir()) == []
