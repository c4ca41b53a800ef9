"""The packaged model, loaded once for all tests of this folder."""

from __future__ import annotations

import pytest

from llmreg import pocket


@pytest.fixture(scope="session")
def model():
    return pocket.load_model()


@pytest.fixture(scope="session")
def tokenizer():
    return pocket.load_tokenizer()
