"""Writes tokenizer, chat template and processor of an exported model.

The processor's code (``published_code/``) travels inside the folder, and gives the tokens and tiles that the run had.
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
from megavlm.convert.published_code import text_megavlm
from megavlm.data import SampleProcessor, Tokenizer
from megavlm.data.chat_template import CHAT_TEMPLATES, Special
from megavlm.data.expansion import IMAGE_WRAPPERS, special_token_id
from megavlm.data.tilings import DynamicTilingConfig, TilingConfig
from megavlm.data.tokenizers import SentencePieceTokenizer
from megavlm.models.vision import AnyVisionConfig
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
_PIL_BICUBIC = 3
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces, a\ttab and\n\na line break ",
    "Gr\u00fc\u00dfe, \u4f60\u597d, \uff21\uff22, caf\u00e9 / cafe\u0301, \U0001f642 1234567890",
    "<|im_end|></s><image> is not special here",
)


def write_processor(folder: Path, recipe: Recipe, tokenizer: Tokenizer, parts: tuple[str, ...]) -> None:
    """Write what makes model inputs of a question, as the recipe's ``data`` part does.

    Args:
        folder: of the exported model, with ``config.json``.
        recipe: of the run.
        tokenizer: of the run.
        parts: those that the folder holds: a part of a model takes no prompts with images.
    """
    vision, data = recipe.model.vision, recipe.data
    shown = folder.name.partition(".writing-")[0]
    if "vision" in parts:
        _write_image_processor(folder, vision, data.tiling)
    if "language" not in parts:
        return
    try:
        published = _write_tokenizer(folder, tokenizer, recipe.tokenizer.image_token)
    except ValueError as error:
        LOGGER.warning("%s: neither tokenizer.json nor processor files are written: %s", shown, error)
        return
    settings = _settings(recipe, tokenizer, published)
    differing = _first_difference(text_megavlm.PromptText(published, settings), tokenizer)
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
    if "vision" in parts:
        _write_own(folder, settings)
        LOGGER.info(
            "%s: AutoProcessor.from_pretrained(..., trust_remote_code=True) gives the prompts and tiles of training; "
            "the processor is the folder's own, as none of transformers' writes image_wrapper=%s as text, "
            "tile_tags=%s and at most %d tokens",
            shown,
            data.image_wrapper,
            data.tile_tags,
            data.seq_length,
        )


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


def _settings(recipe: Recipe, tokenizer: Tokenizer, published: Any) -> dict[str, Any]:
    """What ``processing_megavlm.py`` must know."""
    data, vision, route = recipe.data, recipe.model.vision, recipe.model.fusion.tile_route
    ids = {spelling: tokenizer.special_id(spelling) for spelling in published.get_vocab()}
    file = None
    if isinstance(tokenizer, SentencePieceTokenizer):
        file = SentencePieceFile(Path(published.name_or_path) / "tokenizer.model")
    return {
        "tile_size": vision.image_size,
        "tokens_per_tile": recipe.model.tokens_per_tile,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        **_tiling(data.tiling),
        "tile_tags": data.tile_tags,
        "thumbnail_tag": data.thumbnail_tag,
        "image_wrapper": list(IMAGE_WRAPPERS[data.image_wrapper]),
        "image_token": published.convert_ids_to_tokens(tokenizer.image_token_id),
        "seq_length": data.seq_length,
        "context_tiles": route.context_tiles,
        "context_tags": route.context_tags,
        "text_sees": route.text_sees,
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


def _write_own(folder: Path, settings: Mapping[str, Any]) -> None:
    """The processor's settings and code, which imports its neighbours from the folder that it lies in."""
    tree = {
        "processor_class": "MegaVLMProcessor",
        "auto_map": {"AutoProcessor": "processing_megavlm.MegaVLMProcessor"},
        "settings": settings,
    }
    durable.write_file(folder / "processor_config.json", _json(tree))
    for name in CODE_FILES:
        durable.copy_file(_CODE_FOLDER / name, folder / name)


def _write_image_processor(folder: Path, vision: AnyVisionConfig, tiling: TilingConfig) -> None:
    """The image processor of transformers that cuts the same tiles, if there is one."""
    cut = _tiling(tiling)
    if cut["max_tiles"] > 1 and not cut["use_thumbnail"]:
        return
    tree = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": _PIL_BICUBIC,
        "crop_to_patches": cut["max_tiles"] > 1,
        "min_patches": cut["min_tiles"],
        "max_patches": cut["max_tiles"],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    durable.write_file(folder / "preprocessor_config.json", _json(tree))


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
