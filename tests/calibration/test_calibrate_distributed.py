"""Two processes with half of the data each give the statistics of one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import two_processes
from calibration_worker import gather
from language_models import relative
from transformers import LlamaConfig, LlamaForCausalLM

from llmreg.calibration import Statistics, load_statistics

WORKER = Path(__file__).with_name("calibration_worker.py")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]


def run_two(model_dir: Path, out: Path) -> None:
    done = two_processes.run(str(WORKER), str(model_dir), str(out), timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def results(out: Path) -> dict[str, Statistics]:
    return {path.stem: load_statistics(path, base="b") for path in out.glob("*.safetensors")}


def test_two_processes_give_the_sums_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    (tmp_path / "one").mkdir()
    gather(str(tmp_path / "base"), tmp_path / "one", rank=0, world=1)
    (tmp_path / "two").mkdir()
    run_two(tmp_path / "base", tmp_path / "two")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert set(one) == set(two) == {"exact", "sketch", "experts"}
    for kind in one:
        assert set(one[kind]) == set(two[kind])
        assert len(one[kind].groups()) == len(two[kind].groups())
        for name, expected in one[kind].items():
            found = two[kind][name]
            assert (found.count, found.samples) == (expected.count, expected.samples)
            assert found.trace == pytest.approx(expected.trace, rel=1e-6)
            for mine, theirs in zip(found.parts(), expected.parts(), strict=True):
                assert relative(mine, theirs) < 1e-6
        assert two[kind].report.tokens == one[kind].report.tokens
        assert two[kind].report.unreached == one[kind].report.unreached
    assert one["experts"].report.unreached == ("experts.2.gate", "experts.2.up")
