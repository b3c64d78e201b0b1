"""A look at what a recipe makes of its data, before any training."""

from megavlm.inspection.gallery import inspect_data
from megavlm.inspection.show import show_data
from megavlm.inspection.view import ImageView, SampleView, SkippedView, Span, view_sample, view_samples

__all__ = [
    "ImageView",
    "SampleView",
    "SkippedView",
    "Span",
    "inspect_data",
    "show_data",
    "view_sample",
    "view_samples",
]
