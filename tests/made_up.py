"""Made-up statistics, for tests that are not about data: what every layer was given, Gaussian with a mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import llmreg.adapters.model
from llmreg.adapters.data_start import start_from_data, start_from_statistics, waiting_layers
from llmreg.calibration import CalibrationReport, InputStatistics, Statistics

__all__ = ["give_data", "start_from_made_up_data", "statistics_for"]


def give_data(config_class: Any, set_attribute: Callable[..., Any] = setattr) -> None:
    """Let adapters of this class start as soon as they are put on a model, at the ranks that they were given."""
    set_attribute(llmreg.adapters.model, "start_from_data", start_from_made_up_data)
    set_attribute(config_class, "redistributes", lambda self: False)
    set_attribute(config_class, "new_ranks", lambda self, groups, surveys: None)


def statistics_for(widths: dict[str, int], need: Any, *, tokens: int = 200, seed: int = 0) -> Statistics:
    """Statistics of each layer on its own, `widths` by its name."""
    of_layer = {}
    for number, (name, width) in enumerate(widths.items()):
        generator = torch.Generator().manual_seed(seed + number)
        scales = torch.linspace(2, 0.1, width)
        X = torch.randn(tokens, width, generator=generator) * scales + 0.3
        of_layer[name] = InputStatistics(width, need)
        of_layer[name].add(X)
    return Statistics(of_layer, CalibrationReport(tokens, 1, 1, 0.0, "made up"))


def start_from_made_up_data(tuner: Any, adapter_name: str) -> None:
    """In place of `start_from_data`: what would wait is started."""
    start_from_data(tuner, adapter_name)
    layers = waiting_layers(tuner.model, adapter_name)
    if layers and not next(iter(layers.values())).factors(adapter_name)["lora_A0"].is_meta:
        widths = {name: layer.in_features for name, layer in layers.items()}
        start_from_statistics(tuner, adapter_name, [statistics_for(widths, tuner.peft_config[adapter_name].need())])
