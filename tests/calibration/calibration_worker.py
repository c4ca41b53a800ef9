"""One process of a calibration: calibration_worker.py MODEL_DIR OUT under torchrun, or `gather` alone."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from llmreg.calibration import CalibrationCache, Need, calibrate, save_statistics
from llmreg.errors import LlmregError


class Routed(torch.nn.Module):
    """Three experts of two layers; all but the first token of a batch go to the one that its first number names."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ({"gate": torch.nn.Linear(6, 4), "up": torch.nn.Linear(6, 4)} for _ in range(3))
        self.experts = torch.nn.ModuleList(map(torch.nn.ModuleDict, pairs))

    def forward(self, x):
        chosen = self.experts[int(x[0, 0, 0] > 0)]
        tokens = x[0, 1:]
        return chosen["gate"](tokens) * chosen["up"](tokens)


def main() -> None:
    """One rank under torchrun."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    gather(sys.argv[1], Path(sys.argv[2]), dist.get_rank(), dist.get_world_size())
    dist.barrier()
    dist.destroy_process_group()


def gather(model_dir: str, out: Path, rank: int, world: int) -> None:
    """Calibrate on this rank's share of the batches and save what all of them gave."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:-1]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (1, 5 + i), generator=generator) for i in range(7)]
    batches = [{"input_ids": row} for row in rows][rank::world]
    need = Need(sample_scale="signed_max", mean=True)
    for label, form in (("exact", {}), ("sketch", {"sketch": 6})):
        cache = CalibrationCache(out / "cache", base="b", data="d")
        for _ in range(2):
            statistics = calibrate(model, batches, names, need, distributed=world > 1, cache=cache, **form)
        assert statistics.report.cached
        if rank == 0:
            save_statistics(out / f"{label}.safetensors", statistics, base="b")
    experts = [f"experts.{i}.{part}" for i in range(3) for part in ("gate", "up")]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 3, 6, generator=generator) for _ in range(2)]
    for sign, x in zip((-1.0, 1.0), inputs, strict=True):
        x[..., 0] = sign
    routed = calibrate(Routed(), inputs[rank::world], experts, distributed=world > 1)
    if rank == 0:
        save_statistics(out / "experts.safetensors", routed, base="b")
    if world > 1:
        fails_together(model, names, batches, rank)


def fails_together(model, names, batches, rank: int) -> None:
    """One process without usable data stops all of them, with its reason."""
    broken = [{"input_ids": batches[0]["input_ids"], "attention_mask": torch.ones(3, 3, 3)}]
    with pytest.raises(LlmregError, match="attention_mask"):
        calibrate(model, broken if rank else batches, names, distributed=True)


if __name__ == "__main__":
    main()
