"""Resuming: the same numbers as without an interruption, a changed recipe refused, a checkpoint on SIGTERM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmreg.errors import RecipeError, TrainingStopped
from llmreg.recipes import load_recipe, run
from llmreg.recipes import resuming as resuming_module
from llmreg.recipes import running as running_module

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SETTINGS = [
    "data.split=validation",
    "training.max_steps=6",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "training.logging_steps=1",
    "training.warmup_steps=2",
    "adapter.r=4",
    "evaluation={tasks: [pocket/word-problems], limit: 4, heldout: 4}",
]


def recipe(folder, *overrides):
    return load_recipe(QUICKSTART, [*SETTINGS, f"output.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted, with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return run(recipe(folder)), folder


def interrupted(whole_folder, folder):
    """What that run would have left had it been killed after step 4, while writing a later checkpoint."""
    shutil.copytree(whole_folder / "checkpoints", folder / "checkpoints")
    (folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    return folder


@pytest.mark.parametrize("name", [True, "checkpoint-2"])
def test_a_resumed_run_ends_with_the_same_bits_and_the_same_report(whole, name, tmp_path):
    report, whole_folder = whole
    folder = interrupted(whole_folder, tmp_path / "out")
    again = run(recipe(folder), resume=name)
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (whole_folder / weights).read_bytes()
    assert again.losses == report.losses
    assert again.train_loss == report.train_loss
    assert again.measurements == report.measurements
    assert again.heldout_loss == report.heldout_loss
    assert (report.changed_on_resume, again.changed_on_resume) == (None, ())


def test_a_run_killed_after_its_last_step_is_finished_without_another_step(whole, tmp_path):
    report, whole_folder = whole
    folder = tmp_path / "out"
    shutil.copytree(whole_folder / "checkpoints", folder / "checkpoints")
    (folder / "adapter").mkdir()  # what an interrupted save leaves
    again = run(recipe(folder), resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (whole_folder / weights).read_bytes()
    assert (again.steps, again.losses, again.measurements) == (6, report.losses, report.measurements)
    assert again.heldout_loss == report.heldout_loss


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_checkpoint_that_lacks_a_state_is_not_taken(whole, name, tmp_path):
    folder = interrupted(whole[1], tmp_path / "out")
    (folder / "checkpoints" / "checkpoint-4" / name).unlink()
    with pytest.raises(RecipeError, match="no whole checkpoint 'checkpoint-4'; whole ones: checkpoint-2"):
        run(recipe(folder), resume="checkpoint-4")


def test_sigterm_while_the_scores_are_measured_keeps_the_training(whole, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    measure, calls = running_module.measure_suites, []

    def terminated(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(running_module, "measure_suites", terminated)
        with pytest.raises(TrainingStopped, match="checkpoint-6; continue with --resume"):
            run(recipe(folder, "training.save_strategy=no"))
    run(recipe(folder, "training.save_strategy=no"), resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (whole[1] / weights).read_bytes()


def test_a_training_that_diverged_is_one_message_and_saves_nothing(tmp_path):
    with pytest.raises(RecipeError, match="the training diverged"):
        run(recipe(tmp_path / "out", "training.learning_rate=1e30", "training.save_strategy=no", "evaluation={}"))
    assert not (tmp_path / "out").exists()


def test_a_finished_run_and_one_without_checkpoints_are_not_resumed(whole, tmp_path):
    _, folder = whole
    with pytest.raises(RecipeError, match="is finished; nothing is left to resume"):
        run(recipe(folder), resume=True)
    with pytest.raises(RecipeError, match="no whole checkpoint to resume from"):
        run(recipe(tmp_path / "out"), resume=True)
    with pytest.raises(RecipeError, match="no whole checkpoint 'checkpoint-6'; whole ones: checkpoint-2, checkpoint-4"):
        run(recipe(interrupted(folder, tmp_path / "half")), resume="checkpoint-6")
    assert not (tmp_path / "out").exists()


def test_a_changed_recipe_is_refused_with_the_difference_unless_allowed(whole, tmp_path):
    folder = interrupted(whole[1], tmp_path / "out")
    changed = recipe(folder, "training.learning_rate=3e-4", "training.logging_steps=2", "evaluation.limit=5")
    with pytest.raises(RecipeError) as caught:
        run(changed, resume=True)
    assert "training.learning_rate 0.0015 there, 0.0003 here." in str(caught.value)
    assert "logging_steps" not in str(caught.value)
    report = run(changed, resume=True, allow_changes=True)
    assert report.steps == 6
    assert report.changed_on_resume == ("training.learning_rate 0.0015 there, 0.0003 here",)


def test_sigterm_while_training_writes_a_checkpoint_and_the_run_goes_on_from_it(whole, tmp_path, monkeypatch):
    _, whole_folder = whole
    folder = tmp_path / "out"
    build = running_module.build_trainer

    def with_a_signal(*arguments):
        from transformers import TrainerCallback

        class Terminate(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        trainer = build(*arguments)
        trainer.add_callback(Terminate())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(running_module, "build_trainer", with_a_signal)
        measured = []
        measure = running_module.measure_suites
        patch.setattr(running_module, "measure_suites", lambda *given: measured.append(given) or measure(*given))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(TrainingStopped) as caught:
            run(recipe(folder, "training.save_strategy=no"))
        assert signal.getsignal(signal.SIGTERM) is before
    assert caught.value.code == 143
    assert len(measured) == 1  # before training; who sends SIGTERM does not wait for scores
    assert "checkpoint-3; continue with --resume" in str(caught.value)
    assert not (folder / "adapter").exists()
    run(recipe(folder, "training.save_strategy=no"), resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (whole_folder / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_from_the_command_line_sigterm_is_143_and_one_line(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "llmreg", "train", str(QUICKSTART), f"output.dir={folder}", "evaluation={}"]
    command += ["training.save_strategy=steps", "training.save_steps=1", "adapter.r=2"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/*/recipe.yaml")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 143, stderr
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert "after writing" in stderr
    last = max(folder.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (last / "recipe.yaml").is_file()
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == int(last.name.split("-")[1])


@pytest.mark.parametrize(
    "task",
    [
        ["task=dpo", "data.train=pocket/preferences", "evaluation={tasks: [pocket/preferences], limit: 4}"],
        [
            "task=classification",
            "data.train=pocket/classification",
            "evaluation={tasks: [pocket/classification], limit: 4}",
        ],
        pytest.param(["model.quantization=nf4"], marks=pytest.mark.slow),
        pytest.param(["adapter.method=lora"], marks=pytest.mark.slow),
    ],
    ids=["dpo", "classification", "nf4", "lora"],
)
def test_every_task_and_base_resumes_to_the_same_bits(task, tmp_path):
    if "model.quantization=nf4" in task:
        pytest.importorskip("bitsandbytes")
    short = [*task, "training.max_steps=4", "training.per_device_train_batch_size=4"]
    report = run(recipe(tmp_path / "whole", *short))
    folder = tmp_path / "out"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-2", folder / "checkpoints" / "checkpoint-2")
    again = run(recipe(folder, *short), resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert (again.losses, again.measurements) == (report.losses, report.measurements)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(whole, tmp_path):
    """SIGKILL, up to four times, the first as a checkpoint is written: what lies there is resumed from or not taken."""
    import random

    folder, dice = tmp_path / "out", random.Random(0)
    command = [sys.executable, "-m", "llmreg", "train", str(QUICKSTART), *SETTINGS, f"output.dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = 0
    while not (folder / "report.json").exists():
        resumable = [path for path in folder.glob("checkpoints/checkpoint-*") if resuming_module.is_whole(path)]
        if not resumable:
            shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            [*command, *(["--resume"] if resumable else [])], env=environment, stdout=subprocess.DEVNULL, stderr=-1
        )
        while not killed and process.poll() is None and not (folder / "checkpoints").exists():
            time.sleep(0.01)
        try:
            moments = (0.02, dice.uniform(2, 8), dice.uniform(4, 12), dice.uniform(4, 25))  # the first is never late
            _, stderr = process.communicate(timeout=moments[killed] if killed < len(moments) else None)
            assert process.returncode == 0, stderr
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
        adapter = folder / "adapter"
        if (adapter / "adapter_config.json").exists():
            from safetensors.torch import load_file

            load_file(adapter / "adapter_model.safetensors")
    assert killed
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (whole[1] / weights).read_bytes()
