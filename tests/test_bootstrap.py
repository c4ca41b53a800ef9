"""bootstrap.py decides rightly which PyTorch to install and when, without touching network or GPU."""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The script as a module that believes it lives in an empty checkout, on a machine without a GPU."""
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    paths = {"ROOT": tmp_path, "VENV": venv, "BIN": venv / "bin", "PYTHON": venv / "bin" / "python"}
    for name, path in {**paths, "LOCK": venv / "setup.lock", "STAMP": venv / "setup.json"}.items():
        monkeypatch.setattr(module, name, path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "bootstrap.py").write_text("")
    monkeypatch.delenv("LLMREG_TORCH", raising=False)
    monkeypatch.delenv("LLMREG_TORCH_INDEX", raising=False)
    monkeypatch.setattr(module, "cuda_driver", lambda: 0)
    return module


@pytest.fixture
def steps(bootstrap, monkeypatch):
    """The steps that a set-up took, none of them real; a name put into `steps.fail` makes that step fail."""

    class Steps(list):
        fail = None
        error: BaseException = bootstrap.SetupError("no network")

        def take(self, name):
            self.append(name)
            if name == self.fail:
                raise self.error

    taken = Steps()

    def create():
        taken.take("environment")
        bootstrap.BIN.mkdir(parents=True, exist_ok=True)
        bootstrap.PYTHON.touch()

    def check(step, *command):
        taken.take("check")
        return "some warning\n- False\n"

    monkeypatch.setattr(bootstrap, "create_environment", create)
    monkeypatch.setattr(bootstrap, "install_torch", lambda wanted, driver: taken.take("torch"))
    monkeypatch.setattr(bootstrap, "install_project", lambda extras: taken.take(",".join(["llmreg", *extras])))
    monkeypatch.setattr(bootstrap, "run", check)
    return taken


EVERYTHING = ["environment", "torch", "llmreg", "check"]


# Which build of PyTorch.


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_without_a_gpu_only_a_cpu_build_can_be_installed(bootstrap, platform):
    offered = ["2.15.0", "2.13.0", "2.12.0+cpu"]
    arguments = bootstrap.torch_arguments("2.13.0", "", 0, offered, platform)
    assert arguments == ["torch==2.13.0+cpu", "--index-url", "https://download.pytorch.org/whl/cpu"]


def test_without_a_gpu_a_cpu_build_that_pip_already_sees_is_taken(bootstrap):
    assert bootstrap.torch_arguments("2.13.0", "", 0, ["2.13.0+cpu", "2.13.0"], "linux") == ["torch==2.13.0+cpu"]


@pytest.mark.parametrize(
    ("driver", "platform", "index"),
    [(13000, "linux", None), (12040, "linux", "cu126"), (13010, "win32", "cu130"), (12080, "win32", "cu126")],
)
def test_with_a_gpu_the_build_is_one_that_its_driver_can_run(bootstrap, driver, platform, index):
    arguments = bootstrap.torch_arguments("2.13.0", "", driver, ["2.13.0+cpu"], platform)
    assert arguments[0] != "torch==2.13.0+cpu"
    assert arguments[1:] == (["--index-url", f"https://download.pytorch.org/whl/{index}"] if index else [])


def test_with_a_gpu_a_cpu_build_that_pip_sees_is_passed_over(bootstrap):
    from packaging.specifiers import SpecifierSet

    (requirement,) = bootstrap.torch_arguments("2.13.0", "", 13000, ["2.13.0+cpu"], "linux")
    versions = SpecifierSet(requirement.removeprefix("torch"))
    assert "2.13.0+cpu" not in versions
    assert "2.13.0" in versions
    assert "2.13.0+cu130" in versions


def test_a_mac_gets_the_plain_build(bootstrap):
    assert bootstrap.torch_arguments("2.13.0", "", 0, [], "darwin") == ["torch==2.13.0"]


def test_a_chosen_index_wins_over_what_the_machine_has(bootstrap):
    def index(name, driver):
        return bootstrap.torch_arguments("2.13.0", name, driver, [], "linux")[-1]

    assert index("cpu", 13000) == "https://download.pytorch.org/whl/cpu"
    assert index("cu128", 0) == "https://download.pytorch.org/whl/cu128"
    assert index("https://wheels.example/simple", 0) == "https://wheels.example/simple"


@pytest.mark.parametrize(
    ("cuda", "available", "driver", "words"),
    [
        ("13.0", False, 0, "no NVIDIA GPU"),
        ("13.0", False, 12080, "driver for CUDA 12.8"),
        ("", False, 13000, "LLMREG_TORCH_INDEX"),
    ],
)
def test_a_build_that_does_not_fit_the_machine_is_refused(bootstrap, cuda, available, driver, words):
    wanted = {"index": "", "gpu": bool(driver), "torch": "2.13.0"}
    with pytest.raises(bootstrap.SetupError, match=words):
        bootstrap.check_torch(cuda, available, driver, wanted)
    bootstrap.check_torch(cuda, available, driver, {**wanted, "index": "cu126"})  # the user's own choice


def test_a_build_that_fits_the_machine_is_accepted(bootstrap):
    bootstrap.check_torch("", False, 0, {"index": "", "gpu": False, "torch": "2.13.0"})
    bootstrap.check_torch("13.0", True, 13000, {"index": "", "gpu": True, "torch": "2.13.0"})
    bootstrap.check_torch("13.0", False, 0, {"index": "", "gpu": True, "torch": "2.13.0"})  # the GPU has gone


class Driver:
    """Stands in for the driver's library: `devices` GPUs, CUDA `version`."""

    def __init__(self, devices, version=13000, fails=0):
        self.nvmlInitWithFlags = lambda flags: fails
        self.nvmlDeviceGetCount_v2 = lambda pointer: self.give(pointer, devices)
        self.nvmlSystemGetCudaDriverVersion = lambda pointer: self.give(pointer, version)

    @staticmethod
    def give(pointer, value):
        pointer._obj.value = value
        return 0


@pytest.mark.parametrize(
    ("driver", "expected"),
    [(Driver(2, 12040), 12040), (Driver(0), 0), (Driver(1, fails=9), 0), (OSError("no such library"), 0)],
)
def test_a_gpu_counts_only_if_its_driver_answers(monkeypatch, driver, expected):
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def load(name):
        if isinstance(driver, OSError) or "nvidia-ml" not in name:
            raise OSError(name)
        return driver

    monkeypatch.setattr(module.ctypes, "CDLL", load)
    assert module.cuda_driver() == expected


# What is done again, and what is not.


def test_the_second_command_installs_nothing(bootstrap, steps):
    bootstrap.set_up([])
    assert steps == EVERYTHING
    bootstrap.set_up([])
    assert steps == EVERYTHING


def test_the_tests_add_their_tools_and_the_main_job_keeps_them(bootstrap, steps):
    bootstrap.set_up([])
    bootstrap.set_up(["dev"])
    assert steps == [*EVERYTHING, "llmreg,dev", "check"]
    bootstrap.set_up([])
    bootstrap.set_up(["dev"])
    assert len(steps) == 6


@pytest.mark.parametrize("file", ["pyproject.toml", "bootstrap.py"])
def test_changed_requirements_are_installed_on_top(bootstrap, steps, file):
    bootstrap.set_up([])
    (bootstrap.ROOT / file).write_text("# changed\n")
    bootstrap.set_up([])
    assert steps == [*EVERYTHING, "llmreg", "check"]


def test_another_torch_is_a_new_environment_and_is_remembered(bootstrap, steps, monkeypatch):
    bootstrap.set_up([])
    monkeypatch.setenv("LLMREG_TORCH", "2.12.1")
    bootstrap.set_up([])
    assert steps == EVERYTHING * 2
    monkeypatch.delenv("LLMREG_TORCH")
    bootstrap.set_up([])
    assert steps == EVERYTHING * 2


def test_a_gpu_that_appears_is_used_and_one_that_goes_costs_nothing(bootstrap, steps, monkeypatch):
    bootstrap.set_up([])
    monkeypatch.setattr(bootstrap, "run", lambda *_: "13.0 True")
    monkeypatch.setattr(bootstrap, "cuda_driver", lambda: 13000)
    bootstrap.set_up([])
    assert steps.count("torch") == 2
    monkeypatch.setattr(bootstrap, "cuda_driver", lambda: 0)
    bootstrap.set_up([])
    assert steps.count("torch") == 2


def test_a_moved_checkout_or_a_lost_python_is_a_new_environment(bootstrap, steps):
    bootstrap.set_up([])
    stamp = json.loads(bootstrap.STAMP.read_text())
    bootstrap.write_stamp({**stamp, "root": "/elsewhere"})
    bootstrap.set_up([])
    assert steps == EVERYTHING * 2
    bootstrap.PYTHON.unlink()
    bootstrap.set_up([])
    assert steps == EVERYTHING * 3


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", '{"root": 3}'])
def test_a_damaged_stamp_is_a_new_environment(bootstrap, steps, content):
    bootstrap.set_up([])
    bootstrap.STAMP.write_text(content)
    bootstrap.set_up([])
    assert steps == EVERYTHING * 2


# Interruptions and failures.


@pytest.mark.parametrize("step", EVERYTHING)
def test_an_interrupted_set_up_starts_over(bootstrap, steps, step):
    steps.fail, steps.error = step, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bootstrap.set_up([])
    steps.fail = None
    steps.clear()
    bootstrap.set_up([])
    assert steps == EVERYTHING


def test_a_killed_update_is_not_trusted_but_a_failed_one_keeps_what_worked(bootstrap, steps):
    bootstrap.set_up([])
    steps.fail = "llmreg,dev"
    with pytest.raises(bootstrap.SetupError):
        bootstrap.set_up(["dev"])
    bootstrap.set_up([])
    assert steps == [*EVERYTHING, "llmreg,dev"]
    steps.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bootstrap.set_up(["dev"])
    steps.clear()
    bootstrap.set_up([])
    assert steps == EVERYTHING


def test_what_an_interrupted_set_up_left_is_cleared_but_not_the_lock(bootstrap, monkeypatch):
    bootstrap.BIN.mkdir(parents=True)
    (bootstrap.VENV / "lib64").symlink_to(bootstrap.BIN)
    for path in (bootstrap.PYTHON, bootstrap.LOCK, bootstrap.VENV / "pyvenv.cfg"):
        path.touch()
    monkeypatch.setattr(bootstrap, "run", lambda *_: "")
    bootstrap.create_environment()
    assert list(bootstrap.VENV.iterdir()) == [bootstrap.LOCK]


def test_a_failing_step_shows_what_it_printed(bootstrap, capsys):
    code = "import sys; print('out'); print('ERROR: no route', file=sys.stderr); sys.exit(3)"
    with pytest.raises(bootstrap.SetupError, match=r"(?s)PyTorch.*ERROR: no route"):
        bootstrap.run("PyTorch", sys.executable, "-c", code)
    assert capsys.readouterr().out == ""


def test_foreign_settings_do_not_reach_pip(bootstrap, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    environment = bootstrap.clean_environment()
    assert "PYTHONPATH" not in environment
    assert "PIP_USER" not in environment
    assert environment["PIP_INDEX_URL"] == "https://mirror.example/simple"


def hold(script, path, ready, seconds):
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.locked(path):
        ready.set()
        time.sleep(seconds)


def test_of_two_commands_at_once_the_second_waits(bootstrap, capsys):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(SCRIPT, bootstrap.LOCK, ready, 0.5))
    other.start()
    assert ready.wait(10)
    started = time.monotonic()
    with bootstrap.locked(bootstrap.LOCK):
        assert time.monotonic() - started > 0.2
    other.join()
    assert other.exitcode == 0
    assert "waiting" in capsys.readouterr().err


# The command.


def test_an_old_python_is_told_so_in_one_sentence(bootstrap, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(bootstrap, "find_python", lambda: "")
    assert bootstrap.main(["pytest"]) == 1
    error = capsys.readouterr().err
    assert "3.11" in error
    assert error.count("\n") == 1


def test_an_old_python_hands_over_to_a_newer_one(bootstrap, monkeypatch):
    calls = []
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(bootstrap, "find_python", lambda: "/opt/python3.12")
    monkeypatch.setattr(bootstrap.os, "execv", lambda *call: calls.append(call) or sys.exit(0))
    with pytest.raises(SystemExit):
        bootstrap.main(["pytest", "-x"])
    assert calls == [("/opt/python3.12", ["/opt/python3.12", str(SCRIPT), "pytest", "-x"])]


@pytest.mark.parametrize(("answer", "found"), [(0, True), (1, False), (127, False)])
def test_a_newer_python_is_tried_before_it_is_trusted(bootstrap, tmp_path, monkeypatch, answer, found):
    fake = tmp_path / "python3.12"
    fake.write_text(f"#!/bin/sh\nexit {answer}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.find_python() == (str(fake) if found else "")


@pytest.mark.parametrize(
    ("command", "extras"),
    [
        ("pytest -x", ["dev"]),
        ("ruff check .", ["dev"]),
        ("python -m mypy", ["dev"]),
        ("llmreg train recipes/quickstart.yaml", []),
        ("python train.py pytest", []),
        ("", []),
    ],
)
def test_only_the_developers_commands_bring_the_developers_tools(bootstrap, command, extras):
    assert bootstrap.extras_for(command.split()) == extras


def test_the_command_gets_the_environment_and_its_exit_code_comes_back(tmp_path):
    code = (
        "import importlib.util, sys, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('bootstrap', {str(SCRIPT)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"module.VENV = pathlib.Path({str(tmp_path)!r}); module.BIN = module.VENV / 'bin'\n"
        "module.set_up = lambda extras: None\n"
        "sys.exit(module.main(sys.argv[1:]))\n"
    )
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "tool"
    tool.write_text('#!/bin/sh\necho "$VIRTUAL_ENV" "$HF_HUB_OFFLINE" "$@"\nexit 42\n')
    tool.chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-c", code, "tool", "--json", "a b"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (42, f"{tmp_path} 1 --json a b\n")
    missing = subprocess.run([sys.executable, "-c", code, "no-such-tool"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "no-such-tool" in missing.stderr
    assert "Traceback" not in missing.stderr
