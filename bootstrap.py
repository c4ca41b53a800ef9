"""Set up `.venv` beside this file, once, and run a command inside it.

    python3 bootstrap.py llmreg train recipes/quickstart.yaml
    python3 bootstrap.py pytest
    python3 bootstrap.py           (sets up only)

PyTorch comes as a CPU build where there is no NVIDIA GPU and as a CUDA build where there is one.
LLMREG_TORCH asks for another version of it, LLMREG_TORCH_INDEX for another build: the name of a PyTorch
wheel index (cpu, cu126, cu130, ...) or the address of any index. Both are remembered.
"""

# An old Python must be able to parse this file, to be told that it is too old:
# ruff: noqa: UP006, UP035, UP036

import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, Iterator, List

TORCH = "2.13.0"
WHEELS = "https://download.pytorch.org/whl/"
ROOT = pathlib.Path(__file__).resolve().parent
VENV = ROOT / ".venv"
WINDOWS = os.name == "nt"
BIN = VENV / ("Scripts" if WINDOWS else "bin")
PYTHON = BIN / ("python.exe" if WINDOWS else "python")
LOCK = VENV / "llmreg-setup.lock"
STAMP = VENV / "llmreg-setup.json"  # written last: where it is missing, the environment is incomplete
PROBE = """
import datasets, matplotlib.pyplot, peft, torch
from transformers import LlamaForCausalLM, Trainer
from trl import SFTTrainer
print(torch.version.cuda or "-", torch.cuda.is_available())
"""
DEV_TOOLS = {"pytest", "ruff", "mypy"}


class SetupError(Exception):
    """What went wrong and what to do about it, in words for the user."""


def say(text: str, end: str = "\n") -> None:
    sys.stderr.write(text + end)
    sys.stderr.flush()


def find_python() -> str:
    """A Python >= 3.11 on PATH, for when the running one is older; "" if there is none."""
    probe = "import sys; sys.exit(sys.version_info < (3, 11))"
    for name in ("python3.13", "python3.12", "python3.11", "python3.14"):
        path = shutil.which(name)
        if path and subprocess.call([path, "-c", probe], stderr=subprocess.DEVNULL) == 0:
            return path
    return ""


def cuda_driver() -> int:
    """The CUDA version that the NVIDIA driver supports (13000 is 13.0), or 0 where no GPU can be reached.

    Asks the driver's libraries, as nvidia-smi does: /proc also shows GPUs that a container may not use.
    """
    management = ("nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlSystemGetCudaDriverVersion")
    compute = ("cuInit", "cuDeviceGetCount", "cuDriverGetVersion")
    for library, names in (
        ("nvml.dll" if WINDOWS else "libnvidia-ml.so.1", management),
        ("nvcuda.dll" if WINDOWS else "libcuda.so.1", compute),
    ):
        with contextlib.suppress(OSError, AttributeError):
            driver = ctypes.CDLL(library)
            init, count, version = (getattr(driver, name) for name in names)
            devices, number = ctypes.c_int(0), ctypes.c_int(0)
            if init(0) == 0 and count(ctypes.byref(devices)) == 0 and devices.value > 0:
                version(ctypes.byref(number))
                return number.value or 1
    return 0


def torch_arguments(version: str, index: str, driver: int, offered: List[str], platform: str) -> List[str]:
    """What to give `pip install` for the right build of torch.

    `driver` is what `cuda_driver` returned, `offered` the versions pip sees as this machine configures it.
    """
    cpu = f"torch=={version}+cpu"  # the local version says CPU: no CUDA build can take its place
    if index not in ("", "cpu"):
        return [f"torch=={version}", "--index-url", index if "/" in index else WHEELS + index]
    if platform == "darwin":
        return [f"torch=={version}"]
    if index == "cpu" or not driver:
        return [cpu] if f"{version}+cpu" in offered else [cpu, "--index-url", WHEELS + "cpu"]
    if driver < 13000:  # the default build needs a driver for CUDA 13
        return [f"torch=={version}", "--index-url", WHEELS + "cu126"]
    if platform == "win32":  # the default build is for the CPU
        return [f"torch=={version}", "--index-url", WHEELS + "cu130"]
    return [f"torch=={version},!={version}+cpu"]


def check_torch(cuda: str, available: bool, driver: int, wanted: Dict[str, Any]) -> None:
    """Refuse a CUDA build where there is no GPU, and a GPU that torch cannot use, unless so chosen."""
    if wanted["index"]:
        return
    if driver and not available:
        raise SetupError(
            f"this machine has an NVIDIA GPU (driver for CUDA {driver // 1000}.{driver % 1000 // 10}), but "
            f"PyTorch {wanted['torch']} cannot use it: update the driver, or choose a build with "
            "LLMREG_TORCH_INDEX, such as cu126, or cpu to go without the GPU."
        )
    if cuda and not wanted["gpu"]:
        raise SetupError(
            "a CUDA build of PyTorch was installed although no NVIDIA GPU can be reached: see `pip config "
            "list`, or name an index that has CPU builds in LLMREG_TORCH_INDEX."
        )


def extras_for(command: List[str]) -> List[str]:
    """The extras of pyproject.toml that a command needs: the main job none, the tests `dev`."""
    tool = command[2:3] if command[:2] == ["python", "-m"] else command[:1]
    return ["dev"] if DEV_TOOLS.intersection(tool) else []


def wanted_state(stamp: Dict[str, Any], extras: List[str], driver: int) -> Dict[str, Any]:
    """What the environment should be, given what it is (its stamp)."""
    version, index = os.environ.get("LLMREG_TORCH", ""), os.environ.get("LLMREG_TORCH_INDEX", "")
    if not version and not index:
        version, index = stamp.get("chosen", ""), stamp.get("index", "")
    files = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "bootstrap.py").read_bytes()
    return {
        "root": str(ROOT),
        "python": os.path.realpath(str(PYTHON)) if PYTHON.exists() else "",
        "chosen": version,
        "torch": version or TORCH,
        "index": index,
        "gpu": bool(driver or stamp.get("gpu")),  # a CUDA build also runs where the GPU has gone
        "files": hashlib.sha256(files).hexdigest(),
        "extras": sorted({*extras, *stamp.get("extras", [])}),
    }


def next_action(stamp: Dict[str, Any], wanted: Dict[str, Any]) -> str:
    """`ready`, `update` (install on top), or `rebuild` (absent, incomplete, moved, or the wrong torch)."""
    fixed = ["root", "python", "torch", "index"] + ([] if wanted["index"] else ["gpu"])
    if not stamp or any(stamp.get(key) != wanted[key] for key in fixed):
        return "rebuild"
    return "ready" if all(stamp.get(key) == wanted[key] for key in ("files", "extras")) else "update"


def read_stamp() -> Dict[str, Any]:
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp: Dict[str, Any]) -> None:
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    os.replace(str(partial), str(STAMP))


def try_lock(descriptor: int) -> bool:
    try:
        if WINDOWS:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold the file's lock, so that of two commands started at once the second waits for the first.

    pip inherits the handle: should this process be killed, the next one waits for the pip it left behind.
    """
    path.parent.mkdir(exist_ok=True)
    with open(str(path), "a+b") as handle:
        os.set_inheritable(handle.fileno(), True)
        if not try_lock(handle.fileno()):
            say(f"Another command is setting up {path.parent}; waiting for it.")
            while not try_lock(handle.fileno()):
                time.sleep(0.2)
        yield


def clean_environment() -> Dict[str, str]:
    """The user's environment, less what makes pip install or Python read and write modules elsewhere."""
    foreign = {"PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"}
    foreign |= {"PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"}
    return {key: value for key, value in os.environ.items() if key not in foreign}


def run(step: str, *command: str) -> str:
    """Run one step with a line of progress and return what it printed; if it fails, show that and stop."""
    started, terminal = time.monotonic(), sys.stderr.isatty()
    label = f"Setting up (once): {step} ..."
    say(label, end="")
    with tempfile.TemporaryFile() as log:
        streams: Dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        with subprocess.Popen(command, env=clean_environment(), close_fds=False, **streams) as process:
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=1)
                    if terminal:
                        say(f"\r{label} {time.monotonic() - started:.0f} s", end="")
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        output = log.read().decode(errors="replace")
    say("" if terminal else f" {time.monotonic() - started:.0f} s")
    if process.returncode:
        raise SetupError(f"this step failed: {step}\n{output}")
    return output


def pip(step: str, *arguments: str) -> None:
    """`pip install`. Bytecode is left to the first imports: most modules of these packages never see one."""
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    run(step, str(PYTHON), "-m", "pip", "install", *options, *arguments)


def create_environment() -> None:
    """An empty environment with pip in place of what is there, but for the lock file, which others hold."""
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path))
        elif path != LOCK:
            path.unlink()
    try:
        run("environment", getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(VENV))
    except SetupError as error:
        raise SetupError(
            f"{error}\nThis Python cannot make a virtual environment with pip in it. On Debian and Ubuntu, "
            "`sudo apt install python3-venv` mends that; then run the same command again."
        ) from None


def install_torch(wanted: Dict[str, Any], driver: int) -> None:
    listing = subprocess.run(
        [str(PYTHON), "-m", "pip", "index", "versions", "torch"],  # asks the indexes, downloads nothing
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    offered = listing.stdout.decode(errors="replace").replace(",", " ").split()
    build = wanted["index"] or ("for the GPU" if wanted["gpu"] else "without CUDA")
    arguments = torch_arguments(wanted["torch"], wanted["index"], driver, offered, sys.platform)
    pip(f"PyTorch {wanted['torch']}, {build}", *arguments)


def install_project(extras: List[str]) -> None:
    """llmreg, editable, and what it needs; torch stays exactly as installed."""
    version = "import importlib.metadata as m; print('torch==' + m.version('torch'))"
    constraint = VENV / "torch.txt"
    constraint.write_bytes(subprocess.check_output([str(PYTHON), "-c", version], env=clean_environment()))
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    pip("llmreg and what it needs", "--constraint", str(constraint), "--editable", target)


def set_up(extras: List[str]) -> None:
    """Bring `.venv` to the wanted state; where it already is, that takes milliseconds."""
    driver = cuda_driver()
    if next_action(read_stamp(), wanted_state(read_stamp(), extras, driver)) == "ready":
        return
    with locked(LOCK):
        stamp = read_stamp()  # another command may have done the work meanwhile
        wanted = wanted_state(stamp, extras, driver)
        action = next_action(stamp, wanted)
        if action == "ready":
            return
        with contextlib.suppress(FileNotFoundError):
            STAMP.unlink()  # whoever is killed from here on leaves an incomplete environment
        if action == "rebuild":
            create_environment()
            install_torch(wanted, driver)
        try:
            install_project(wanted["extras"])
        except SetupError:
            if action == "update":
                write_stamp(stamp)  # pip gave up by itself: what was there still works
            raise
        cuda, available = run("first import", str(PYTHON), "-c", PROBE).split()[-2:]
        check_torch(cuda.strip("-"), available == "True", driver, wanted)
        write_stamp({**wanted, "python": os.path.realpath(str(PYTHON))})


def execute(command: List[str]) -> int:
    """Run the command with the environment first on PATH; on POSIX it takes this process's place."""
    os.environ["PATH"] = str(BIN) + os.pathsep + os.environ.get("PATH", os.defpath)
    os.environ["VIRTUAL_ENV"] = str(VENV)
    os.environ.pop("PYTHONHOME", None)
    program = shutil.which(command[0])
    if program is None:
        raise SetupError(f"there is no command {command[0]!r} in {BIN} or on PATH.")
    if WINDOWS:  # exec would return to the prompt at once
        return subprocess.call([program, *command[1:]])
    os.execv(program, command)


def stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # an exception, so that run() ends pip too


def main(arguments: List[str]) -> int:
    if sys.version_info < (3, 11):
        newer = find_python()
        if newer:
            os.execv(newer, [newer, os.path.abspath(__file__), *arguments])
        say(f"llmreg needs Python 3.11 or newer: this is {sys.version.split()[0]}, and PATH has no newer one.")
        return 1
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    try:
        before = signal.signal(signal.SIGTERM, stop)
        set_up(extras_for(arguments))
        signal.signal(signal.SIGTERM, before)
        if arguments:
            return execute(arguments)
    except SetupError as error:
        say(f"llmreg set-up: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted. The same command run again starts the set-up over.")
        return 130
    activate = BIN / "activate" if WINDOWS else f"source {BIN}/activate"
    say(f"Ready. To activate: {activate}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
