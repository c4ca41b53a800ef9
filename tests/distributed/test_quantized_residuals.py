"""In a distributed run every rank has rank 0's factors and its residual's very bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import adapter_files as saved
import pytest

WORKER = Path(__file__).with_name("quantized_worker.py")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]


def test_all_ranks_hold_the_first_one_s_residual(tmp_path):
    base = saved.checkpoint(tmp_path / "base")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(base)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
