"""The ``data`` part of a recipe."""

import pydantic

from megavlm.config import Config
from megavlm.data.chat_template import CHAT_TEMPLATES
from megavlm.data.datasets import DatasetConfig
from megavlm.data.expansion import ImageWrapper
from megavlm.data.image import DEFAULT_MAX_PIXELS, LARGEST_MAX_PIXELS
from megavlm.data.tile_tag import TileTagStyle
from megavlm.data.tilings import DynamicTilingConfig, TilingConfig


class DataConfig(Config):
    """Where samples come from and how they become tokens and tiles."""

    train: DatasetConfig
    """What is trained on."""
    valid: DatasetConfig | None = None
    """What the validation loss is measured on; none where not given."""
    seq_length: int = pydantic.Field(ge=2)
    """Most tokens of a sample, image tokens and tags included. A longer one loses tiles, then is skipped."""
    tiling: TilingConfig = DynamicTilingConfig()
    """How an image becomes tiles."""
    tile_tags: TileTagStyle = "1d"
    """The text before each tile: ``none``, ``1d`` (NVLM), ``2d_grid`` or ``2d_box``."""
    thumbnail_tag: str = pydantic.Field(default="<tile_global_thumbnail>", min_length=1)
    """Tag of the thumbnail, and of the tile of a single-tile image. NVLM 34B: ``<tile_global>``."""
    image_wrapper: ImageWrapper = "nvlm"
    """The text around an image: ``nvlm`` (``<Image>...</Image>``), ``internvl`` (``<img>...</img>``) or ``none``."""
    chat_template: str = "chatml"
    """How a conversation is written; one of ``megavlm.data.chat_template.CHAT_TEMPLATES``."""
    system_prompt: str | None = None
    """System message of conversations without one. Not given: the template's own, if any; empty: none."""
    max_image_pixels: int = pydantic.Field(default=DEFAULT_MAX_PIXELS, ge=1, le=LARGEST_MAX_PIXELS)
    """Images with more pixels are skipped before they are unpacked."""
    shuffle: bool = True
    """Whether the training samples are shuffled anew in each epoch."""
    num_workers: int = pydantic.Field(default=2, ge=0)
    """Processes that read and cut images, for each rank; 0 reads in the training process."""
    worker_timeout_seconds: int = pydantic.Field(default=300, ge=1)
    """A worker that gives no batch for so long is an error."""

    @pydantic.field_validator("chat_template")
    @classmethod
    def _check_chat_template(cls, name: str) -> str:
        if name not in CHAT_TEMPLATES:
            raise ValueError(f"unknown template; must be one of {', '.join(CHAT_TEMPLATES)}")
        return name
