"""Writes tokenizer, chat template and processor of an exported model.

A processor of ours, whose code (``published_code/``) travels inside the folder, gives the tokens and tiles that the run
had; where one of ``transformers`` gives them too, the folder names both, and ``trust_remote_code=True`` chooses ours.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from megavlm.checkpoint import durable
from megavlm.convert.processor.chat_jinja import chat_jinja
from megavlm.convert.processor.sentencepiece_json import SentencePieceFile
from megavlm.convert.processor.stock import StockProcessor, find_stock, first_stock_difference, grid_processor
from megavlm.convert.published_code import text_megavlm
from megavlm.data import SampleProcessor, Tokenizer
from megavlm.data.chat_template import CHAT_TEMPLATES, Special
from megavlm.data.config import DataConfig
from megavlm.data.encoding import IMAGE_WRAPPERS, special_token_id
from megavlm.data.tilings import DynamicTilingConfig, TilingConfig, WholeTilingConfig
from megavlm.data.tokenizers import SentencePieceTokenizer
from megavlm.models.vision.dual import DualConfig
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processing_megavlm.py",
    "text_megavlm.py",
    "tiles_megavlm.py",
)
"""What a published folder may hold for its processor, tokenizer and chat template aside; the last three are ours."""
CODE_FILES = PROCESSOR_FILES[3:]
_CODE_FOLDER = Path(text_megavlm.__file__).parent
_TAG_STYLES = ("none", "1d", "2d_grid", "2d_box")
"""Those that ``tiles_megavlm.py`` writes."""
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces, a\ttab and\n\na line break ",
    "Gr\u00fc\u00dfe, \u4f60\u597d, \uff21\uff22, caf\u00e9 / cafe\u0301, \U0001f642 1234567890",
    "<|im_end|></s><image> is not special here",
)


def write_processor(
    folder: Path, recipe: Recipe, tokenizer: Tokenizer, parts: tuple[str, ...], architecture: str | None = None
) -> None:
    """Write what makes model inputs of a question, as the recipe's ``data`` part does.

    Args:
        folder: of the exported model, with ``config.json``.
        recipe: of the run.
        tokenizer: of the run.
        parts: those that the folder holds: a part of a model takes no prompts with images.
        architecture: class of the exported model.
    """
    data = recipe.data
    shown = folder.name.partition(".writing-")[0]
    image_processor = grid_processor(recipe)
    if "vision" in parts and image_processor is not None:
        _write_json(folder / "preprocessor_config.json", image_processor)
    if "language" not in parts:
        return
    try:
        published = _write_tokenizer(folder, tokenizer, recipe.tokenizer.image_token)
    except ValueError as error:
        LOGGER.warning("%s: neither tokenizer.json nor processor files are written: %s", shown, error)
        return
    settings = _text_settings(recipe, tokenizer, published)
    text = text_megavlm.PromptText(published, settings)
    differing = _first_difference(text, tokenizer)
    if differing is not None:
        LOGGER.warning(
            "%s: no processor files are written: transformers' %s encodes %r otherwise than training did",
            shown,
            type(published).__name__,
            differing,
        )
        return
    template = CHAT_TEMPLATES[data.chat_template]
    jinja = chat_jinja(
        template, lambda special: _spell(special, tokenizer, published), settings["image_token"], data.system_prompt
    )
    durable.replace_file(folder / "chat_template.jinja", jinja.encode())
    if "vision" not in parts:
        return
    unable = _beyond_own(data)
    if unable:
        LOGGER.warning("%s: no processor files are written: an exported one does not know %s", shown, "; ".join(unable))
        return
    stock, reasons = find_stock(architecture, recipe, tokenizer, published)
    if stock is not None:
        samples, count = _SAMPLES[:-1], recipe.model.tokens_per_tile
        differing = first_stock_difference(stock, text, published, jinja, samples, count)
        if differing is not None:
            reasons = [f"{stock.class_name} encodes {differing!r} otherwise than training did"]
            stock = None
    _write_processors(folder, _image_settings(recipe) | settings, stock)
    _announce(shown, stock, reasons)


def stop_token_ids(recipe: Recipe, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer."""
    model = recipe.model
    processor = SampleProcessor(
        recipe.data, tokenizer, model.vision.image_size, model.tokens_per_tile, model.fusion.tile_route
    )
    return sorted(processor.stop_token_ids)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, image_token: str) -> Any:
    """Write the tokenizer's files; return it as the exported folder gives it.

    Raises:
        ValueError: SentencePiece's model has no counterpart.
    """
    tokenizer.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        file = SentencePieceFile(folder / "tokenizer.model")
        reserved = [piece for piece in file.pieces if tokenizer.special_id(piece) is not None]
        ends = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id, "bos_token": tokenizer.bos_id}
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=file.build(reserved, image_token),
            clean_up_tokenization_spaces=False,
            **{name: file.pieces[index] for name, index in ends.items() if index is not None},
        ).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _image_settings(recipe: Recipe) -> dict[str, Any]:
    """What ``processing_megavlm.py`` must know of tiles."""
    data, vision, route = recipe.data, recipe.model.vision, recipe.model.fusion.tile_route
    assert not isinstance(vision, DualConfig), "no such model is exported whole"
    return {
        "tile_size": vision.image_size,
        "tokens_per_tile": recipe.model.tokens_per_tile,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        **_tiling(data.tiling),
        "tile_tags": data.tile_tags,
        "thumbnail_tag": data.thumbnail_tag,
        "seq_length": data.seq_length,
        "context_tiles": route.context_tiles,
        "context_tags": route.context_tags,
        "text_sees": route.text_sees,
    }


def _text_settings(recipe: Recipe, tokenizer: Tokenizer, published: Any) -> dict[str, Any]:
    """What it and ``text_megavlm.py`` must know of text."""
    ids = {spelling: tokenizer.special_id(spelling) for spelling in published.get_vocab()}
    file = None
    if isinstance(tokenizer, SentencePieceTokenizer):
        file = SentencePieceFile(Path(published.name_or_path) / "tokenizer.model")
    return {
        "image_wrapper": list(IMAGE_WRAPPERS[recipe.data.image_wrapper]),
        "image_token": published.convert_ids_to_tokens(tokenizer.image_token_id),
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "reserved": {spelling: index for spelling, index in sorted(ids.items()) if index is not None},
        "unreadable_ids": [] if file is None else file.unreadable_ids,
        "first_text": None if file is None else file.first_text,
    }


def _tiling(config: TilingConfig) -> dict[str, Any]:
    if isinstance(config, DynamicTilingConfig):
        return {name: getattr(config, name) for name in ("min_tiles", "max_tiles", "use_thumbnail")}
    return {"min_tiles": 1, "max_tiles": 1, "use_thumbnail": False}


def _first_difference(text: text_megavlm.PromptText, tokenizer: Tokenizer) -> str | None:
    """The first sample that the exported tokenizer encodes otherwise than the run's."""
    for sample, starts_text in itertools.product(_SAMPLES, (True, False)):
        try:
            ours = tokenizer.encode(sample, starts_text=starts_text)
        except ValueError:
            continue  # letters that it does not know, and neither reads
        if text.encode(sample, starts_text=starts_text) != ours:
            return sample
    return None


def _spell(special: Special, tokenizer: Tokenizer, published: Any) -> str:
    return str(published.convert_ids_to_tokens(special_token_id(special, tokenizer)))


def _write_processors(folder: Path, settings: Mapping[str, Any], stock: StockProcessor | None) -> None:
    """Our processor's settings and code, which imports its neighbours from the folder it lies in; and the stock one's.

    Of the two that ``processor_config.json`` names, ``transformers`` takes the stock one if remote code is not trusted.
    """
    tree: dict[str, Any] = {
        "processor_class": "MegaVLMProcessor",
        "auto_map": {"AutoProcessor": "processing_megavlm.MegaVLMProcessor"},
        "settings": settings,
    }
    if stock is not None:
        tree |= {"processor_class": stock.class_name, **stock.settings}
        path = folder / "tokenizer_config.json"
        _write_json(path, json.loads(path.read_text(encoding="utf-8")) | dict(stock.tokenizer))
        _write_json(folder / "preprocessor_config.json", stock.image_processor)
    _write_json(folder / "processor_config.json", tree)
    for name in CODE_FILES:
        durable.copy_file(_CODE_FOLDER / name, folder / name)


def _announce(shown: str, stock: StockProcessor | None, reasons: list[str]) -> None:
    """Say which processors the folder has, and what the stock one does not do, or why there is none."""
    LOGGER.info("%s: AutoProcessor with trust_remote_code=True gives the prompts and tiles of training", shown)
    if stock is None:
        LOGGER.info("%s: no processor of transformers does: %s", shown, "; ".join(reasons))
        return
    notes = [
        "special tokens spelt in messages are not taken apart, nor is transparency laid on white",
        *stock.notes,
    ]
    LOGGER.info("%s: without it transformers' %s gives the same, but: %s", shown, stock.class_name, "; ".join(notes))


def _beyond_own(data: DataConfig) -> list[str]:
    """What of the ``data`` part our exported processor does not do."""
    found = []
    if not isinstance(data.tiling, DynamicTilingConfig | WholeTilingConfig):
        found.append(f"data.tiling.kind={data.tiling.kind}")
    if data.tile_tags not in _TAG_STYLES:
        found.append(f"data.tile_tags={data.tile_tags}")
    for name in ("max_tiles_per_sample", "split_below_images", "split_last_images"):
        if (value := getattr(data, name)) is not None:
            found.append(f"data.{name}={value}")
    return found


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    durable.replace_file(path, (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())
