"""Layers in every storage, and a tiny Llama checkpoint, for the tests of this room."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
IN, OUT = 128, 96


@pytest.fixture(autouse=True)
def _quiet_surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREG_CACHE", str(tmp_path / "llmreg-cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_python():
    """A function (code, *arguments, **environment) -> stdout of another process that imports only this room.

    The package root registers with PEFT; that is neither under test here nor quick.
    """
    root = Path(__file__).parents[2]
    stub = "import sys; sys.modules['llmreg'] = p = type(sys)('llmreg'); p.__path__ = ['llmreg']\n"

    def run(code, *arguments, **environment):
        command = [sys.executable, "-c", stub + code, *arguments]
        env = {**os.environ, **environment}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def gaussian(out: int = OUT, width: int = IN, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def linear4bit(quant_type="nf4", storage=torch.uint8, double=False, dtype=torch.float32, W=None, moved=True):
    bnb = pytest.importorskip("bitsandbytes")
    W = gaussian() if W is None else W
    layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False)
    layer.quant_storage = storage
    layer.weight = bnb.nn.Params4bit(
        W.to(dtype),
        requires_grad=False,
        quant_type=quant_type,
        quant_storage=storage,
        compress_statistics=double,
        module=layer,
    )
    return layer.to("cpu") if moved else layer


def linear8bit(W=None, moved=True, keeps_float=False):
    bnb = pytest.importorskip("bitsandbytes")
    W = gaussian() if W is None else W
    layer = bnb.nn.Linear8bitLt(W.shape[1], W.shape[0], bias=False, has_fp16_weights=keeps_float)
    layer.weight = bnb.nn.Int8Params(W.clone(), requires_grad=False, has_fp16_weights=keeps_float)
    return layer.to("cpu") if moved else layer


def linear(dtype=torch.float32, W=None):
    W = gaussian() if W is None else W
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight = nn.Parameter(W.to(dtype).clone(), requires_grad=False)
    return layer


def conv1d(dtype=torch.float32, W=None):
    from transformers.pytorch_utils import Conv1D

    W = gaussian() if W is None else W
    layer = Conv1D(W.shape[0], W.shape[1])
    layer.weight = nn.Parameter(W.t().contiguous().to(dtype), requires_grad=False)
    return layer


@pytest.fixture
def make():
    """Builders of layers holding the same Gaussian weight (or a given `W`)."""
    return SimpleNamespace(
        gaussian=gaussian, linear=linear, conv1d=conv1d, linear4bit=linear4bit, linear8bit=linear8bit
    )


def tiny_llama(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def llama():
    """A function (seed) -> tiny random Llama built in memory."""
    return tiny_llama


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    tiny_llama().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="session")
def stories_folder():
    data = os.environ.get("LLMREG_REAL_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = (Path(data) / "stories260k").resolve()
    if not folder.is_dir():
        pytest.skip("real data absent: set LLMREG_REAL_DATA to the folder that holds stories260k")
    return folder
