"""One rank that makes quantised residuals, of which rank 1 would choose others: quantized_worker.py MODEL_DIR."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import adapter_files as saved
import residual_models as residuals
import torch
import torch.distributed as dist

from llmreg.adapters import residual_errors


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for method in residuals.METHODS:
        for quantization in residuals.QUANTIZATIONS:
            settings = {"residual_iterations": 3 - 2 * dist.get_rank()}
            wrapped = residuals.wrap(residuals.load(Path(sys.argv[1]), quantization), method, **settings)
            mine = (residuals.bases(wrapped), saved.factor_bytes(wrapped), residual_errors(wrapped))
            everybody = [None, None]
            dist.all_gather_object(everybody, mine)
            assert everybody[0] == everybody[1], (method, quantization)
            assert everybody[0] is not None
            wrapped.unload()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
