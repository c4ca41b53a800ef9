"""What a spawned worker runs: a module that imports nothing of ours, so that unpickling has to."""

from __future__ import annotations

import pickle
import sys
from typing import Any


def work(lives: list[tuple[str, bytes]], queue: Any) -> None:
    """Unpickle (config class, (model, input, output)) pairs and use the models; puts their number or the error."""
    try:
        assert not {"llmreg", "peft"} & set(sys.modules), "the worker knows them already"
        for config_class, data in lives:
            _use(config_class, data)
        queue.put(len(lives))
    except BaseException as error:
        queue.put(repr(error))
        raise


def _use(config_class: str, data: bytes) -> None:
    model, x, expected = pickle.loads(data)
    import peft

    config = model.peft_config["default"]
    assert type(config).__name__ == config_class
    assert peft.PeftType(config.peft_type.value) is config.peft_type
    assert model(x).equal(expected)
    model(x).sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    model.merge_adapter()
    assert model(x).allclose(expected, atol=1e-4)
    model.unmerge_adapter()
    model.add_adapter("other", config)
