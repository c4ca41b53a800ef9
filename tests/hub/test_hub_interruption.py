"""An interruption while saving, at any file operation: the old adapter, or none, never half of one that loads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import adapter_files as saved
import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel

import llmreg
from llmreg import files
from llmreg.hub import peft_io, sidecar

TARGETS = ["q_proj", "v_proj"]


class Interrupted(BaseException):
    """Like KeyboardInterrupt: not an Exception, so that nothing can swallow it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(method, base):
    model = peft.get_peft_model(saved.load_base(base), method(r=2, target_modules=TARGETS))
    model.add_adapter("second", method(r=3, target_modules=["up_proj"]))
    saved.drift(model, "second")
    return saved.drift(model)


def _operations(monkeypatch, stop_at):
    """Raise `Interrupted` at the `stop_at`-th file operation of a save; returns the list of operations done."""
    done = []

    def interrupt(name, original):
        def wrapped(*args, **kwargs):
            done.append(name)
            if len(done) - 1 == stop_at:
                raise Interrupted(name)
            return original(*args, **kwargs)

        return wrapped

    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (files.tempfile, "mkdtemp"),
        (peft.peft_model, "safe_save_file"),
        (sidecar, "save_file"),
        (sidecar, "file_digest"),
        (peft_io, "write_json"),
        (peft_io, "commit_folder"),
        (sidecar, "write_json"),
        (PeftModel, "create_or_update_model_card"),
        (LoraConfig, "save_pretrained"),
        (Path, "unlink"),
        (Path, "mkdir"),
    ):
        monkeypatch.setattr(owner, name, interrupt(name, getattr(owner, name)))
    return done


def _content(folder):
    """The files of a folder that loads as an adapter, or None where plain PEFT finds none."""
    names = ("adapter_config.json", "adapter_model.safetensors", "llmreg.json", "llmreg_factors.safetensors")
    if not (folder / names[0]).exists():
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            PeftConfig.from_pretrained(folder)
        return None
    return {name: (folder / name).read_bytes() for name in names}


def _outputs(base, folder, tokens):
    """Outputs of the adapter in `folder`, which plain PEFT and llmreg must agree on."""
    ours = PeftModel.from_pretrained(saved.load_base(base), folder)
    plain = PeftModel.from_pretrained(saved.load_base(base), folder, config=LoraConfig.from_pretrained(folder))
    assert saved.relative(saved.outputs(plain, tokens), saved.outputs(ours, tokens)) <= 1e-6
    return saved.outputs(ours, tokens)


@pytest.mark.parametrize("occupied", [False, True], ids=["new-folder", "over-an-older-adapter"])
def test_every_file_operation_may_fail(model, tmp_path, occupied):
    model.save_pretrained(tmp_path / "old")
    saved.drift(model, size=0.1, seed=7)
    saved.drift(model, "second", size=0.1, seed=8)
    model.save_pretrained(tmp_path / "new")
    (tmp_path / "trials").mkdir()
    for stop_at in range(1000):
        folder = tmp_path / "trials" / str(stop_at)
        if occupied:
            shutil.copytree(tmp_path / "old", folder)
        with pytest.MonkeyPatch.context() as patch:
            done = _operations(patch, stop_at)
            try:
                model.save_pretrained(folder)
            except Interrupted:
                pass
            else:
                break
        for name in (".", "second"):
            found = _content(folder / name)
            assert found is None or found in [_content(tmp_path / of / name) for of in ("new", "old")], (done[-1], name)
        left = [name for name in os.listdir(tmp_path / "trials") if name.startswith(".")]
        assert left == [], f"{done[-1]} left {left} behind"
        shutil.rmtree(folder, ignore_errors=True)
    assert stop_at > 20, "every operation was interrupted once"


def test_a_failed_save_can_be_repeated(model, base, tmp_path, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sidecar, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(_outputs(base, tmp_path / "adapter", tokens), saved.outputs(model, tokens))


@pytest.mark.parametrize("operation", ["replace", "save_file", "write_text"])
def test_an_interrupted_export_leaves_no_adapter(model, tmp_path, monkeypatch, operation):
    model.save_pretrained(tmp_path / "adapter")
    from llmreg.hub import export

    owner = os if operation == "replace" else export

    def fail(*args, **kwargs):
        raise Interrupted

    monkeypatch.setattr(owner, operation, fail)
    with pytest.raises(Interrupted):
        llmreg.export_lora(tmp_path / "adapter", tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_target_on_another_file_system_is_written_whole(model, base, tmp_path, tokens):
    """A mounted output folder: files cannot be renamed into it from beside it."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to write to")
    with tempfile.TemporaryDirectory(dir=shared) as other:
        (tmp_path / "link").symlink_to(other)
        model.save_pretrained(tmp_path / "link")
        assert torch.equal(_outputs(base, tmp_path / "link", tokens), saved.outputs(model, tokens))
        assert not [name for name in os.listdir(other) if name.startswith(".")]
        llmreg.export_lora(tmp_path / "link", tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs Unix permissions")
def test_a_read_only_target_is_one_clear_error(model):
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "adapter"
        target.mkdir()
        os.chmod(target, 0o555)
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="adapter"):
                model.save_pretrained(target)
            assert list(target.iterdir()) == []
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)
            os.chmod(target, 0o755)


def test_a_file_in_the_targets_place_is_refused(model, tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


_SAVE_FOREVER = """
import sys, torch, peft, llmreg
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(base)
model = peft.get_peft_model(base, llmreg.PissaConfig(r=16, target_modules="all-linear"))
print("ready", flush=True)
step = 0
while True:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(folder)
    step += 1
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.multiprocess
def test_a_killed_process_never_leaves_half_an_adapter(base, tmp_path, tokens):
    kept = 0
    for trial in range(8):
        folder = tmp_path / "adapter"
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOREVER, str(base), str(folder)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(0.05 + 0.053 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if _content(folder) is not None:
            kept += 1
            _outputs(base, folder, tokens)  # raises where it is half an adapter, or where the two forms differ
    assert kept > 0, "no kill found a whole adapter: the test killed too early to mean anything"
