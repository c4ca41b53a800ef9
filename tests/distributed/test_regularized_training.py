"""Law 3 over processes: a regulariser acts once a step, whatever the world size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).with_name("ddp_worker.py")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]


def run(processes: int, kind: str, model_dir: Path, out: Path) -> dict[str, torch.Tensor]:
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(WORKER), str(model_dir), str(out), kind, str(4 // processes)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "trained.safetensors")


@pytest.mark.parametrize("kind", ["decoupled", "loss"])
def test_two_processes_take_the_steps_of_one(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    one = run(1, kind, tmp_path / "base", tmp_path / "one")
    two = run(2, kind, tmp_path / "base", tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-6, rtol=1e-5)
