"""Law 3 over processes for terms on the output: two processes take the step of one, however tokens are dealt out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fresh_process
import pytest
import torch
import trl_runs
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("output_terms_worker.py")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]


def trained(base: Path, out: Path, processes: int, rows: int) -> dict[str, torch.Tensor]:
    out.mkdir()
    arguments = [str(WORKER), str(base), str(out), str(rows)]
    if processes == 1:
        done = fresh_process.run(fresh_process.RUN_FILE, *arguments, folder=out)
    else:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "trained.safetensors")


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    base = trl_runs.checkpoint(tmp_path / "base")
    one = trained(base, tmp_path / "one", 1, 8)
    for name, processes, rows in (("two", 2, 4), ("two, accumulated", 2, 1)):
        found = trained(base, tmp_path / name, processes, rows)
        assert found.keys() == one.keys()
        for key, value in one.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)
