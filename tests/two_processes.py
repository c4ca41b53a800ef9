"""Starts a worker file in two processes that know of each other, and the modes in which a model is sharded there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

_LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

#: Cases of a test about sharded models, by a worker's name for them.
SHARDED = (
    "fsdp2",
    pytest.param(
        "zero3",
        marks=[
            pytest.mark.slow,  # the first run compiles DeepSpeed's communication for a minute or two
            pytest.mark.skipif(
                importlib.util.find_spec("deepspeed") is None, reason="needs the extra llmreg[deepspeed]"
            ),
        ],
    ),
)


def run(*arguments: str, timeout: float = 580, **environment: str) -> subprocess.CompletedProcess[str]:
    """A worker's path and its arguments; each process has one thread."""
    return subprocess.run(
        [sys.executable, *_LAUNCHER, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        timeout=timeout,
        check=False,
    )
