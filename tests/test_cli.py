"""The command line: exit codes, one message for a mistake, JSON alone on stdout, no warning in the quickstart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
SHORT = ["training.max_steps=2", "evaluation.limit=8"]
FEW = "data.split=validation"  # rows to prepare


def llmreg(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, with Python's default warning filters."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "llmreg", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def cli(capsys):
    """A function (*arguments) -> (exit code, stdout, stderr), in this process."""
    from llmreg.cli import _run

    def call(*arguments: str) -> tuple[int, str, str]:
        code = _run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_the_quickstart_runs_and_prints_its_report_and_no_warning(tmp_path):
    out = tmp_path / "out"
    done = llmreg("train", QUICKSTART, *SHORT, f"output.dir={out}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("pissa on pocket")
    for words in ("pocket/word-problems", "pocket/facts", "Adapter", "peft.PeftModel.from_pretrained"):
        assert words in done.stdout
    assert "warn" not in done.stdout.lower()
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert (out / "report.json").is_file()


def test_json_is_alone_on_stdout(cli, tmp_path):
    code, out, err = cli("train", QUICKSTART, *SHORT, f"output.dir={tmp_path / 'out'}", "evaluation={}", FEW, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_stops_it_cleanly(number, code, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llmreg", "train", QUICKSTART, f"output.dir={out}", "evaluation={}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:  # the folder is claimed before anything is loaded
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert "stopped by" in stderr
    assert not out.exists()


def test_a_mistake_is_one_message_and_exit_code_2_without_a_traceback(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: pocket}\ntraning: {}\n")
    done = llmreg("train", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"llmreg: {path}:2:1: unknown key 'traning'; did you mean 'training'?\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "Missing argument 'RECIPE'"),
        (["trian", "x"], "No such command 'trian'"),
        (["train", QUICKSTART, "--jsno"], "No such option"),
        (["train", "nothing.yaml"], "nothing.yaml does not exist"),
        (["validate", QUICKSTART, "max_steps"], "an override is written key=value"),
        (["validate", QUICKSTART, "adapter.method=pisa"], "did you mean 'pissa'?"),
        (["methods", "pisa"], "there is no method 'pisa'; did you mean 'pissa'?"),
        (["export", "no-such-folder", "out"], "no-such-folder holds no adapter"),
        (["export", "a", "b", "--rank", "x"], "Invalid value for '--rank'"),
        (["export", "a"], "Missing argument 'DIR'"),
    ],
)
def test_wrong_arguments_are_one_message_and_exit_code_2(cli, arguments, said):
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert err.startswith("llmreg: ")
    assert err.count("\n") == 1


def test_validate_prints_the_recipe_with_its_defaults(cli, tmp_path):
    code, out, err = cli("validate", QUICKSTART, f"output.dir={tmp_path / 'out'}")
    assert (code, err) == (0, "")
    assert "is valid" in out
    (tmp_path / "again.yaml").write_text(out)
    assert cli("validate", tmp_path / "again.yaml")[0] == 0
    code, out, _ = cli("validate", QUICKSTART, f"output.dir={tmp_path / 'out'}", "--json")
    assert json.loads(out)["exported_rank"] == 32


def test_methods_are_listed_and_shown(cli):
    code, out, _ = cli("methods")
    assert code == 0
    assert "pissa" in out
    assert "lora" in out
    code, out, _ = cli("methods", "--json")
    assert {row["name"] for row in json.loads(out)} >= {"pissa", "lora"}
    code, out, _ = cli("methods", "pissa")
    for words in ("when not", "2404.02948", "recipes/quickstart.yaml", "plain LoRA of rank 2 r"):
        assert words in out
    assert json.loads(cli("methods", "pissa", "--json")[1])["saved_rank"] == 2


def test_export_writes_a_lora_of_the_rank_asked_for(cli, tmp_path):
    import peft
    import tiny_models

    from llmreg import PissaConfig

    model = peft.get_peft_model(tiny_models.llama(), PissaConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    code, out, _ = cli(
        "export", tmp_path / "adapter", tmp_path / "small", "--rank", "2", "--dtype", "float16", "--json"
    )
    assert code == 0
    assert json.loads(out)["rank"] == 2
    code, _, err = cli("export", tmp_path / "adapter", tmp_path / "small")
    assert code == 2
    assert "is not an empty folder" in err


def test_a_dry_run_prints_the_plan_and_writes_nothing(cli, tmp_path):
    code, out, err = cli("train", QUICKSTART, f"output.dir={tmp_path / 'out'}", "--dry-run")
    assert (code, err) == (0, "")
    for words in ("max_steps: 1000", "28 adapted layers", "all-linear", "activations", "peak", "--max-lora-rank 32"):
        assert words in out
    assert list(tmp_path.iterdir()) == []
    code, out, _ = cli("train", QUICKSTART, f"output.dir={tmp_path / 'out'}", "--dry-run", "--json")
    assert json.loads(out)["parameters"]["trainable"] == 163840


def test_the_schema_is_json(cli):
    code, out, err = cli("schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["title"] == "llmreg recipe"


def test_init_of_a_method_that_starts_from_data_keeps_its_statistics(cli, tmp_path):
    recipe = str(Path(QUICKSTART).with_name("pocket-eva.yaml"))
    cache = str(tmp_path / "cache")
    words = ("init", recipe, "adapter.r=2", "calibration.samples=8", "data.split=validation", "--output", cache)
    code, out, _ = cli(*words)
    assert code == 0
    assert "statistics of pocket for eva on pocket/word-problems gathered in" in out
    assert "16 inputs of 28 layers; it holds 1 calibration, " in out
    assert json.loads(cli(*words, "--json")[1])["found"] is True
    assert "ranks up to 4." in cli("validate", recipe, "adapter.r=2")[1]
    assert "kpm must say" in " ".join(cli("methods", "corda")[1].split())


def test_init_fills_lists_and_clears_a_cache(cli, tmp_path):
    cache = tmp_path / "cache"
    code, out, _ = cli("init", QUICKSTART, "adapter.r=2", "--output", cache)
    assert code == 0
    assert "28 layers of pocket by pissa" in out
    assert "28 starts" in cli("init", "--output", cache)[1]
    assert json.loads(cli("init", "--output", cache, "--clear", "--json")[1])["removed"] == 28
    assert json.loads(cli("init", "--output", cache, "--json")[1]) == []


def test_a_run_is_measured_merged_and_shown_as_it_would_be_pushed(cli, tmp_path):
    out = tmp_path / "out"
    assert cli("train", QUICKSTART, *SHORT, FEW, f"output.dir={out}", "adapter.r=2")[0] == 0
    code, printed, err = cli("eval", out, "evaluation.limit=4", "--no-merged", "--json")
    assert (code, err) == (0, "")
    assert {row["name"] for row in json.loads(printed)["scores"]} >= {"pocket/facts"}
    code, printed, err = cli("merge", out / "adapter", tmp_path / "merged")
    assert (code, err) == (0, "")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    code, printed, err = cli("push", out, "somebody/pissa-pocket", "--dry-run")
    assert (code, err) == (0, "")
    for name in ("adapter_model.safetensors", "README.md", "llmreg.json", "would be uploaded to private"):
        assert name in printed
    assert cli("export", out / "adapter", tmp_path / "served", "--check", "vllm")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "gone/er/x"], "is neither a recipe, a folder nor a Hub id"),
        (["merge", "gone", "out"], "gone holds no adapter"),
        (["push", "gone", "me/x", "--dry-run"], "gone"),
        (["push", "gone"], "Missing argument 'REPO'"),
        (["export", "gone", "out", "--check", "tgi"], "check 'tgi' is not known; write vllm"),
        (["export", "gone", "out", "--rank", "0"], "rank must be a positive integer"),
        (["init", "gone.yaml"], "gone.yaml does not exist"),
        (["train", QUICKSTART, "--dry-run", "--resume"], "--dry-run and --resume exclude each other"),
        (["train", QUICKSTART, "output.dir=gone-too", "--resume"], "no whole checkpoint to resume from"),
        (["schema", "extra"], "unexpected extra argument"),
    ],
)
def test_what_makes_no_sense_is_one_message_and_nothing_is_written(cli, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_mistake_of_the_users_is_exit_code_1(cli, monkeypatch, tmp_path):
    from llmreg.hub import push as pushing

    def down(*arguments, **options):
        raise pushing.PushError("the Hub cannot be reached; try again later.")

    monkeypatch.setattr(pushing, "push", down)
    code, out, err = cli("push", tmp_path, "me/x")
    assert (code, out, err) == (1, "", "llmreg: the Hub cannot be reached; try again later.\n")


def test_numbers_that_json_lacks_are_null(cli, capsys):
    from llmreg.cli import _print_json

    _print_json({"loss": float("nan"), "perplexity": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "perplexity": [None, 1.5]}


def test_help_names_every_command(cli):
    _, out, _ = cli("--help")
    for command in ("train", "validate", "methods", "schema", "init", "eval", "export", "merge", "push"):
        assert command in out
