"""Sharded training gives what one process gives: losses, factors, and an adapter that plain PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path

import fresh_process
import pytest
import torch
import two_processes
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).with_name("worker.py")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


METHODS = ("pissa", "balora", "sorsa", "svfit", "corda", "eva", "bone", "bat")
#: Their statistics are sums over ranks, equal to those of one process to rounding.
FROM_DATA = ("corda", "eva")
Results = dict[str, tuple[list[float], dict[str, torch.Tensor]]]


def run(mode: str, model_dir: Path, out: Path) -> Results:
    """Losses and saved factors by method, of a run of `worker.py`."""
    out.mkdir()
    arguments = [str(WORKER), mode, str(model_dir), str(out)]
    if mode == "single":
        done = fresh_process.run(fresh_process.RUN_FILE, *arguments, folder=out)
    else:
        done = two_processes.run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return {method: _result(out / method) for method in METHODS}


def _result(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    factors = folder / "llmreg_factors.safetensors"
    tensors = load_file(factors if factors.is_file() else folder / "adapter_model.safetensors")
    return json.loads((folder / "losses.json").read_text()), tensors


@pytest.fixture(scope="module")
def one_process(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run("single", model_dir, tmp_path_factory.mktemp("single") / "out")


@pytest.mark.parametrize("mode", two_processes.SHARDED)
def test_two_sharded_processes_equal_one(mode: str, model_dir: Path, tmp_path: Path, one_process: Results) -> None:
    results = run(mode, model_dir, tmp_path / "out")
    for method, (expected_losses, expected) in one_process.items():
        losses, factors = results[method]
        rtol = 1e-5 if method in FROM_DATA else 1e-6
        torch.testing.assert_close(
            losses, expected_losses, rtol=rtol, atol=0, msg=lambda text, m=method: f"{m}: {text}"
        )
        assert losses[-1] != losses[0]
        assert factors.keys() == expected.keys()
        for key, value in expected.items():
            if method in FROM_DATA:
                torch.testing.assert_close(factors[key], value, rtol=1e-3, atol=1e-3)
                continue
            # starts are equal to the last bit; trained factors differ by the order of the gradient's sum over ranks
            if ".lora_A0." in key or ".lora_B0." in key:
                assert torch.equal(factors[key], value), key
            torch.testing.assert_close(factors[key], value, rtol=1e-5, atol=1e-6)
