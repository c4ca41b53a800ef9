"""Law 3 over processes: a regulariser acts once a step, whatever the world size."""

from __future__ import annotations

from pathlib import Path

import fresh_process
import pytest
import torch
import two_processes
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).with_name("ddp_worker.py")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of processes, the folder with what they trained: `decoupled.safetensors` and `loss.safetensors`."""
    folder = tmp_path_factory.mktemp("regularized")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    outs = {}
    for processes in (1, 2):
        outs[processes] = folder / str(processes)
        outs[processes].mkdir()
        arguments = [str(WORKER), str(folder / "base"), str(outs[processes]), str(4 // processes)]
        if processes == 1:
            done = fresh_process.run(fresh_process.RUN_FILE, *arguments, folder=folder)
        else:
            done = two_processes.run(*arguments, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr[-3000:]
    return outs


@pytest.mark.parametrize("kind", ["decoupled", "loss"])
def test_two_processes_take_the_steps_of_one(kind: str, results: dict[int, Path]) -> None:
    one, two = (load_file(results[processes] / f"{kind}.safetensors") for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-6, rtol=1e-5)
