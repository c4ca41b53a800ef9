"""Shared by all tests: offline, one thread a worker, tiny random models in every storage, and the catalogue.

A test that asks for `method` runs once for every registered additive method, so a new method is tested by being
registered; `tiny_models` (a module beside this file) builds the models.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import tempfile

import fresh_process
import hypothesis
import made_up
import pytest
import tiny_models
import torch

from llmreg import AdditiveConfig
from llmreg.adapters.forms import FORMS

torch.set_num_threads(1)
#: The same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("explore")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
#: What the user of this machine keeps in the cache decides no test.
os.environ["LLMREG_CACHE"] = os.path.join(tempfile.gettempdir(), f"llmreg-tests-{os.getpid()}")
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

#: Config classes of all additive methods that add nothing at their start, by the method's name; EoRA, which does, has
#: tests of its own.
CATALOGUE = tuple(
    (name, config) for name, config in sorted(AdditiveConfig._CLASSES.items()) if FORMS[config.FORM].starts_at_zero
)


def pytest_configure(config: pytest.Config) -> None:
    """bitsandbytes' own deprecation warnings and its rounding notes are not ours to test."""
    config.addinivalue_line("filterwarnings", "ignore:.*8-bit linear may get different.*:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:.*4-bit linear may get different.*:UserWarning")


@pytest.fixture(params=[config_class for _, config_class in CATALOGUE], ids=[name for name, _ in CATALOGUE])
def method(request, monkeypatch):
    """The config class of one additive method; `method(r=4, target_modules=...)` is a config.

    Of a method with a regulariser these tests take the start alone, which any loop may train. A method that starts
    from data is given some where it would wait for it, and keeps its ranks.
    """
    monkeypatch.setattr(request.param, "needs_regularizer", lambda self: False)
    if request.param.NEEDS_DATA:
        made_up.give_data(request.param, monkeypatch.setattr)
    return request.param


@pytest.fixture(params=tiny_models.STORAGES)
def storage(request):
    """How the base is stored: "float32", "bfloat16", "float16", "nf4" or "int8"."""
    return request.param


@pytest.fixture
def tokens():
    """`(3, 7)` token ids for the tiny language models."""
    return torch.randint(1, tiny_models.VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def run_python(tmp_path):
    """A function (code, *arguments) -> stdout of a new process without PEFT and llmreg; stderr is shown if it fails."""

    def run(code: str, *arguments: str) -> str:
        done = fresh_process.run(code, *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
