"""The processor of ``transformers`` that makes the inputs which training made, where there is one.

Read from ``models/llava/processing_llava.py`` and ``models/internvl/processing_internvl.py`` of transformers 5.23. A
stock processor needs no ``trust_remote_code``, and it is what vLLM looks for. Two things are beyond each of them, and
named in the log: a special token spelt inside a message is one there, and transparency is dropped (ours lies on white).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megavlm.convert.published_code.text_megavlm import PromptText
from megavlm.data import Tokenizer
from megavlm.data.config import DataConfig
from megavlm.data.encoding import IMAGE_WRAPPERS
from megavlm.data.tilings import DynamicTilingConfig, WholeTilingConfig
from megavlm.models.vision import SingleVisionConfig
from megavlm.models.vision.dual import DualConfig
from megavlm.recipe import Recipe

_PIL_BICUBIC = 3
_VIDEO_TOKEN = "<video>"


@dataclass(frozen=True)
class StockProcessor:
    """A processor of ``transformers``: its class, and what its files must say."""

    class_name: str
    settings: Mapping[str, Any]
    """For ``processor_config.json``."""
    image_processor: Mapping[str, Any]
    """``preprocessor_config.json``."""
    tokenizer: Mapping[str, Any]
    """For ``tokenizer_config.json``."""
    around_image: tuple[str, str]
    """What the class writes before and after the tokens of an image."""
    notes: tuple[str, ...] = ()
    """What else to know of it."""


def find_stock(
    architecture: str | None, recipe: Recipe, tokenizer: Tokenizer, published: Any
) -> tuple[StockProcessor | None, list[str]]:
    """Look for a stock processor by the settings of a recipe; its text is compared by :func:`first_stock_difference`.

    Args:
        architecture: class of the exported model; None: unknown.
        recipe: of the run.
        tokenizer: of the run.
        published: the same tokenizer as ``transformers`` loads it.

    Returns:
        The processor, and what stands in the way of one: either is empty.
    """
    if architecture not in _MAKERS:
        return None, [f"it has none for {architecture}"]
    return _MAKERS[architecture](recipe, tokenizer, published)


def _llava(recipe: Recipe, tokenizer: Tokenizer, published: Any) -> tuple[StockProcessor | None, list[str]]:
    vision, data = recipe.model.vision, recipe.data
    reasons = _reasons(data, "none")
    if not _is_one_tile(data):
        reasons.append(f"it stretches an image to one tile, which data.tiling.kind={data.tiling.kind} does not")
    if reasons:
        return None, reasons
    assert not isinstance(vision, DualConfig), "no such model is exported"
    keeps_all = vision.keep_class_token or not vision.has_class_token
    stock = StockProcessor(
        class_name="LlavaProcessor",
        settings={
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(vision.has_class_token),
            "vision_feature_select_strategy": "full" if keeps_all else "default",
            "image_token": published.convert_ids_to_tokens(tokenizer.image_token_id),
        },
        image_processor=_one_tile(vision),
        tokenizer={"padding_side": "left"},
        around_image=("", ""),
    )
    return stock, []


def _internvl(recipe: Recipe, tokenizer: Tokenizer, published: Any) -> tuple[StockProcessor | None, list[str]]:
    data, (before, after) = recipe.data, IMAGE_WRAPPERS["internvl"]
    reasons = _reasons(data, "internvl")
    image_processor = grid_processor(recipe)
    if image_processor is None:
        reasons.append(f"its image processor cuts other tiles than data.tiling.kind={data.tiling.kind}")
    lacking = [spelling for spelling in (before, after, _VIDEO_TOKEN) if tokenizer.special_id(spelling) is None]
    if lacking:
        reasons.append(f"it needs {', '.join(lacking)} as special tokens, and the tokenizer has none")
    if reasons or image_processor is None:
        return None, reasons
    notes = ["it needs torchvision, as its class does; without it, trust_remote_code=True"]
    if not _is_one_tile(data):
        notes.append(f"prompts of more than data.seq_length={data.seq_length} tokens keep all of their tiles")
    stock = StockProcessor(
        class_name="InternVLProcessor",
        settings={"image_seq_length": recipe.model.tokens_per_tile},
        image_processor=image_processor,
        tokenizer={
            "padding_side": "left",
            "start_image_token": before,
            "end_image_token": after,
            "context_image_token": published.convert_ids_to_tokens(tokenizer.image_token_id),
            "video_token": _VIDEO_TOKEN,
        },
        around_image=(before, after),
        notes=tuple(notes),
    )
    return stock, []


_MAKERS: dict[str, Callable[[Recipe, Tokenizer, Any], tuple[StockProcessor | None, list[str]]]] = {
    "InternVLForConditionalGeneration": _internvl,
    "LlavaForConditionalGeneration": _llava,
}
"""Class of a model -> what makes its processor."""


def _reasons(data: DataConfig, wrapper: str) -> list[str]:
    """What of the ``data`` part no stock processor with that wrapper does."""
    reasons = []
    if data.tile_tags != "none":
        reasons.append(f"it writes no data.tile_tags={data.tile_tags}")
    if data.image_wrapper != wrapper:
        reasons.append(f"its data.image_wrapper is {wrapper}, not {data.image_wrapper}")
    return reasons


def _is_one_tile(data: DataConfig) -> bool:
    tiling = data.tiling
    return isinstance(tiling, WholeTilingConfig) or (isinstance(tiling, DynamicTilingConfig) and tiling.max_tiles == 1)


def _one_tile(vision: SingleVisionConfig) -> dict[str, Any]:
    """Of CLIP or SigLIP: the whole image stretched to one tile."""
    side = {"height": vision.image_size, "width": vision.image_size}
    tree = {"image_processor_type": "SiglipImageProcessor" if vision.kind == "siglip" else "CLIPImageProcessor"}
    return tree | {"do_center_crop": False, "crop_size": side} | _pixels(vision)


def grid_processor(recipe: Recipe) -> dict[str, Any] | None:
    """The ``preprocessor_config.json`` of InternVL's grids; None where ``transformers`` cuts other tiles."""
    tiling, vision = recipe.data.tiling, recipe.model.vision
    if isinstance(vision, DualConfig):
        return None
    if isinstance(tiling, WholeTilingConfig):
        tiling = DynamicTilingConfig(max_tiles=1)
    if not isinstance(tiling, DynamicTilingConfig) or (tiling.max_tiles > 1 and not tiling.use_thumbnail):
        return None
    grid = {
        "crop_to_patches": tiling.max_tiles > 1,
        "min_patches": tiling.min_tiles,
        "max_patches": tiling.max_tiles,
    }
    return {"image_processor_type": "GotOcr2ImageProcessor"} | grid | _pixels(vision)


def _pixels(vision: SingleVisionConfig) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": _PIL_BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def first_stock_difference(
    stock: StockProcessor, text: PromptText, published: Any, jinja: str, samples: Sequence[str], tokens_per_tile: int
) -> str | None:
    """Return the first sample that a stock processor reads otherwise than training, alone or behind an image.

    Args:
        stock: the processor.
        text: what reads prompts as training does.
        published: the tokenizer as ``transformers`` loads it.
        jinja: the chat template.
        samples: texts without special tokens.
        tokens_per_tile: image tokens of a tile.
    """
    image_token, (before, after) = text.image_token, stock.around_image
    image_ids = [published.convert_tokens_to_ids(image_token)] * tokens_per_tile
    for sample in samples:
        for parts in ([], [{"type": "image"}], [{"type": "image"}, {"type": "text", "text": " "}, {"type": "image"}]):
            messages = [{"role": "user", "content": [*parts, {"type": "text", "text": sample}]}]
            prompt = published.apply_chat_template(
                messages, chat_template=jinja, add_generation_prompt=True, tokenize=False
            )
            try:
                ours = [index for run in text.runs(prompt) for index in (image_ids if run is None else run)]
            except ValueError:
                continue  # letters that it does not know, and neither reads
            has_bos = bool(published.bos_token) and prompt.startswith(published.bos_token)
            expanded = prompt.replace(image_token, before + image_token * tokens_per_tile + after)
            if published(expanded, add_special_tokens=not has_bos)["input_ids"] != ours:
                return sample
    return None
