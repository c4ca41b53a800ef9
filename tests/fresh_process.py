"""New processes that know neither PEFT nor llmreg, in a moment: forks of one that imported what is heavy and not ours.

Importing torch and transformers takes seconds, which a test about what PEFT or llmreg do in another process does not
need to wait for. A fork has their modules, an environment, a folder, arguments and streams of its own; it has not
another hash seed, so a test about that starts Python itself.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Reads a request a line. Each is run by a grandchild, whose parent waits for it and writes its exit code down.
_SERVER = r"""
import atexit, contextlib, gc, json, os, signal, sys, threading, traceback, types
import accelerate, huggingface_hub, safetensors.torch, torch, torch._inductor.utils
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
with contextlib.suppress(ImportError):
    import bitsandbytes
assert not {"peft", "llmreg"} & set(sys.modules)
torch.set_num_threads(1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
gc.freeze()  # what is shared is not touched, so not copied
for line in sys.stdin:
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(line)
    child = os.fork()
    if not child:
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(request["end"], "w") as pipe:
        pipe.write(str(code))
    os._exit(0)
else:
    os._exit(0)
for number, name in enumerate(("stdin", "stdout", "stderr")):
    stream = os.open(request[name], os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY)
    os.dup2(stream, number)
    os.close(stream)
    setattr(sys, name, open(number, "w" if number else "r", closefd=False))
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"])
sys.argv = ["-c", *request["arguments"]]
main = sys.modules["__main__"] = types.ModuleType("__main__")
code = 0
try:
    exec(compile(request["code"], "<string>", "exec"), vars(main))
except SystemExit as leave:
    code = leave.code if isinstance(leave.code, int) else int(bool(leave.code))
    if code and not isinstance(leave.code, int):
        print(leave.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    code = 1
# The end of a process as Python has it, less the destruction of every module, which takes seconds.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


class _Server:
    process: subprocess.Popen | None = None
    folder: tempfile.TemporaryDirectory | None = None
    lock = threading.Lock()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _server() -> subprocess.Popen:
    """The process that forks, started once."""
    if _Server.process is None:
        _Server.folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-c", _SERVER]
        _Server.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, cwd=_Server.folder.name, env=_environment()
        )
        atexit.register(_stop)
    assert _Server.process.poll() is None, "the process that forks ended"
    return _Server.process


def _stop() -> None:
    if _Server.process is not None and _Server.folder is not None:
        _Server.process.stdin.close()
        _Server.process.wait(timeout=20)
        _Server.folder.cleanup()


def start(
    code: str, *arguments: str, folder: Path, stdin: str, stdout: str, stderr: str, end: str = os.devnull
) -> None:
    """Start `code` as `python -c` would in `folder`, its streams files or pipes; its exit code is written to `end`."""
    request = {
        "code": code,
        "arguments": [str(argument) for argument in arguments],
        "folder": str(folder),
        "environment": _environment(),
        "stdin": stdin,
        "stdout": stdout,
        "stderr": stderr,
        "end": end,
    }
    with _Server.lock:
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()


#: Runs the file that is the first argument, as `python FILE` would.
RUN_FILE = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """Run `code` as `python -c` would in `folder`: the exit code and what it printed."""
    with tempfile.TemporaryDirectory() as streams:
        out, err, end = (Path(streams, name) for name in ("stdout", "stderr", "end"))
        os.mkfifo(end)
        start(code, *arguments, folder=folder, stdin=os.devnull, stdout=str(out), stderr=str(err), end=str(end))
        returncode = int(end.read_text())  # waits until it is written
        return subprocess.CompletedProcess(code, returncode, out.read_text(), err.read_text())
