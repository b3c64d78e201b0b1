"""From rows of a file to batches: row -> images -> tiles -> tags -> tokens -> :class:`Sample` -> Batch.

Imports no model and no megatron-core. ``Loader`` is what training iterates over; ``SampleProcessor`` makes one sample
or prompt; ``expansion`` is the only place that counts tokens.
"""

from megavlm.data.balance import MicroBatchCost, balanced_order, costs_of, simulate_pipeline
from megavlm.data.blend import Blend, BlendConfig
from megavlm.data.collate import collate, pack
from megavlm.data.config import DataConfig
from megavlm.data.conversation import Conversation, ImageRef, Message, parse_conversation
from megavlm.data.datasets import DATASETS, Dataset, DatasetConfig
from megavlm.data.few_shot import few_shot
from megavlm.data.image import ImageError
from megavlm.data.loader import Loader
from megavlm.data.order_facts import describe_changes, order_facts
from megavlm.data.packed_loader import PackedLoader
from megavlm.data.packing import PackingConfig
from megavlm.data.processor import SampleProcessor
from megavlm.data.progress import LaneProgress, Progress
from megavlm.data.sample import Prompt, Sample, SampleError
from megavlm.data.tilings import TILINGS, TileLayout, Tiling, TilingConfig
from megavlm.data.tokenizers import TOKENIZERS, Tokenizer, TokenizerConfig

__all__ = [
    "DATASETS",
    "TILINGS",
    "TOKENIZERS",
    "Blend",
    "BlendConfig",
    "Conversation",
    "DataConfig",
    "Dataset",
    "DatasetConfig",
    "ImageError",
    "ImageRef",
    "LaneProgress",
    "Loader",
    "Message",
    "MicroBatchCost",
    "PackedLoader",
    "PackingConfig",
    "Progress",
    "Prompt",
    "Sample",
    "SampleError",
    "SampleProcessor",
    "TileLayout",
    "Tiling",
    "TilingConfig",
    "Tokenizer",
    "TokenizerConfig",
    "balanced_order",
    "collate",
    "costs_of",
    "describe_changes",
    "few_shot",
    "order_facts",
    "pack",
    "parse_conversation",
    "simulate_pipeline",
]
