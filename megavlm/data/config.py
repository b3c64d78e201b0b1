"""The ``data`` part of a recipe."""

from typing import Annotated

import pydantic

from megavlm.config import Config
from megavlm.data.balance import BalancingConfig
from megavlm.data.blend import BlendConfig
from megavlm.data.chat_template import CHAT_TEMPLATES
from megavlm.data.datasets import DatasetConfig
from megavlm.data.encoding import ImageWrapper
from megavlm.data.expansion import LossWeighting
from megavlm.data.fitting import OverLengthPolicy
from megavlm.data.image import DEFAULT_MAX_PIXELS, LARGEST_MAX_PIXELS
from megavlm.data.packing import PackingConfig
from megavlm.data.tile_tag import TileTagStyle
from megavlm.data.tilings import DynamicTilingConfig, TilingConfig

TrainDataConfig = Annotated[DatasetConfig | BlendConfig, pydantic.Field(discriminator="kind")]


class DataConfig(Config):
    """Where samples come from and how they become tokens and tiles."""

    train: TrainDataConfig
    """What is trained on: a dataset, or a blend of several."""
    valid: DatasetConfig | None = None
    """What the validation loss is measured on; none where not given."""
    seq_length: int = pydantic.Field(ge=2)
    """Most tokens of a sample (where samples are packed: and of a row), image tokens and tags included. A longer sample
    loses tiles, step by step; then ``over_length`` decides."""
    over_length: OverLengthPolicy = "skip"
    """What becomes of a sample that is too long with every image at its fewest tiles: ``skip`` it, ``truncate_images``
    (leave out whole images, the last first) or ``truncate_text`` (cut off its end, at the border of an image)."""
    max_tiles_per_sample: int | None = pydantic.Field(default=None, ge=1)
    """Most tiles of all images of a sample; beyond it images lose tiles as if the sample were too long. A micro-batch
    then has at most ``micro_batch_size`` times as many. None: as many as fit ``seq_length``."""
    split_below_images: int | None = pydantic.Field(default=None, ge=1)
    """From so many images in a sample on, each is a single tile. MM1.5: 3."""
    split_last_images: int | None = pydantic.Field(default=None, ge=0)
    """Only so many images at a sample's end are split; those before are a single tile each. MM1, few-shot prompts."""
    loss_weighting: LossWeighting = "token"
    """How much a token's loss counts: ``token`` (all alike), ``sample`` (each turn alike) or ``square_root`` (of the
    length of its turn). Validation counts all alike."""
    next_image_probability: float = pydantic.Field(default=0.0, ge=0.0, le=1.0)
    """How likely the text of a document (interleaved data: rows of ``text`` or ``texts``) sees by cross-attention, in
    training, the image behind it in place of the one before it; drawn for each document. Flamingo: 0.5."""
    packing: PackingConfig | None = None
    """Several samples in a row; None: one."""
    balancing: BalancingConfig | None = None
    """Order of the micro-batches of a step; None: as they come."""
    tiling: TilingConfig = DynamicTilingConfig()
    """How an image becomes tiles."""
    tile_tags: TileTagStyle = "1d"
    """The text before each tile: ``none``, ``1d`` (NVLM), ``2d_grid``, ``2d_box``, or MM1.5's ``index`` or
    ``separators``."""
    thumbnail_tag: str = pydantic.Field(default="<tile_global_thumbnail>", min_length=1)
    """Tag of the thumbnail, and of the tile of a single-tile image. NVLM 34B: ``<tile_global>``."""
    image_wrapper: ImageWrapper = "nvlm"
    """The text around an image: ``nvlm`` (``<Image>...</Image>``), ``internvl`` (``<img>...</img>``), ``minigpt4``
    (``<Img>...</Img>``) or ``none``."""
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
