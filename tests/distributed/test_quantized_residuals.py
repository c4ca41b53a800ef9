"""In a distributed run every rank has rank 0's factors and its residual's very bytes."""

from __future__ import annotations

from pathlib import Path

import adapter_files as saved
import pytest
import two_processes

WORKER = Path(__file__).with_name("quantized_worker.py")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]


def test_all_ranks_hold_the_first_one_s_residual(tmp_path):
    base = saved.checkpoint(tmp_path / "base")
    done = two_processes.run(str(WORKER), str(base))
    assert done.returncode == 0, done.stderr[-3000:]
