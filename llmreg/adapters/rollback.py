"""All or nothing: an adapter that cannot be added leaves the model exactly as it was.

PEFT injects layer by layer and, when one fails, leaves those before it wrapped, frozen and half registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["unchanged_on_error"]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised in this context, interruption included, first restores the modules of `model`.

    Restored are each module's attributes (containers among them one level deep: children, parameters, the
    bookkeeping of adapters) and `requires_grad`. Only references are kept: values of tensors are not.
    """
    modules = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes, contents in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in contents:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The module's containers and a copy of what they hold; restored in place, because others may refer to them."""
    return [(value, value.copy()) for value in vars(module).values() if isinstance(value, dict | list | set)]
