"""Chooses training data: by perplexity, near duplicates, better captions, whole data sets. Data stays as it is."""

from megavlm.filters.individual_select import SelectionConfig, select_datasets
from megavlm.filters.near_duplicates import NearDuplicateSettings, filter_near_duplicates
from megavlm.filters.perplexity import PerplexitySettings, describe_scorer, filter_by_perplexity
from megavlm.filters.source import open_source

__all__ = [
    "NearDuplicateSettings",
    "PerplexitySettings",
    "SelectionConfig",
    "describe_scorer",
    "filter_by_perplexity",
    "filter_near_duplicates",
    "open_source",
    "select_datasets",
]
