"""A full disk and a read-only folder: one sentence, exit code 2, and nothing that could be taken for an adapter."""

from __future__ import annotations

import subprocess
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


@pytest.fixture
def refused(capsys):
    """A function (words, *arguments): the command line refuses the arguments in one sentence that holds the words."""
    from llmreg.cli import _run

    def check(words: str, *arguments) -> None:
        capsys.readouterr()
        code = _run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert words in err
        assert err.count("\n") == 1

    return check


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_disk_that_fills_up_leaves_no_adapter(disk, strategy, refused):
    folder = disk("size=1m")  # the adapter takes 1.3 MB, an optimizer state as much
    overrides = [
        "training.max_steps=2",
        "training.save_steps=1",
        f"training.save_strategy={strategy}",
        "evaluation={}",
        "data.split=validation",
    ]
    train = ["train", QUICKSTART, *overrides, f"output.dir={folder / 'out'}"]
    refused("No space left on device", *train)
    assert not list(folder.rglob("adapter_config.json")) or strategy == "steps"
    assert not (folder / "out" / "adapter").exists()
    if strategy == "steps":
        from llmreg.recipes.resuming import is_whole

        assert not any(map(is_whole, folder.rglob("checkpoint-*")))
        refused("no whole checkpoint to resume from", *train, "--resume")


def test_a_read_only_folder_is_one_sentence_for_every_command_that_writes(disk, tmp_path, refused):
    import peft

    import llmreg as package
    from llmreg import pocket

    model = peft.get_peft_model(pocket.load_model(), package.PissaConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    folder = disk("ro")
    for arguments in (
        ["train", QUICKSTART, f"output.dir={folder / 'out'}"],
        ["export", tmp_path / "adapter", folder / "out"],
        ["merge", tmp_path / "adapter", folder / "out"],
        ["init", QUICKSTART, "--output", folder / "cache"],
    ):
        refused("Read-only file system", *arguments)
    assert list(folder.iterdir()) == []
