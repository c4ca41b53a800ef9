"""What connects regularisers to a trainer; nothing here knows a method's formula."""

from .callback import RegularizerCallback

__all__ = ["RegularizerCallback"]
