"""Where a processor of ``transformers`` makes the inputs of training the folder names it; else the log says why not."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.utils import is_torchvision_available

from megavlm.convert.processor import write_processor
from megavlm.data import Conversation, ImageRef, Message, SampleProcessor
from megavlm.data.chat_template import CHAT_TEMPLATES
from megavlm.recipe import Recipe

LLAVA, INTERNVL = "LlavaForConditionalGeneration", "InternVLForConditionalGeneration"
ALL_PARTS = ("vision", "connector", "language")
SPECIALS = ["<|im_start|>", "<|im_end|>", "<image>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
SIZES = {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
CLIP = {"kind": "clip", "image_size": 28, "patch_size": 7, "num_layers": 1, **SIZES}
TOWERS = {
    "clip": CLIP,
    "clip_with_class_token": {**CLIP, "keep_class_token": True},
    "siglip": {**CLIP, "kind": "siglip", "image_size": 30},
}
PLAIN = {"tiling": {"kind": "whole"}, "tile_tags": "none", "image_wrapper": "none"}
GRIDS = {"tiling": {"kind": "dynamic", "max_tiles": 6}, "tile_tags": "none", "image_wrapper": "internvl"}


def make_tokenizer(folder: Path, specials: list[str], *, adds_bos: bool = False) -> Path:
    """Like Qwen2's: bytes, no prefix."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", *specials],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["What is this? It is a red house. <img> user"] * 3, trainer)
    if adds_bos:
        bos = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", additional_special_tokens=specials
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), SPECIALS)


def export(folder: Path, tokenizer: Path, architecture: str, data: dict[str, Any], vision: dict[str, Any]) -> Recipe:
    """Write the processor files of a run; returns its recipe."""
    plain = {"pixel_shuffle_ratio": 1.0, "layernorm": False} if architecture == LLAVA else {}
    image_token = "<image>" if architecture == LLAVA else "<IMG_CONTEXT>"
    recipe = Recipe.model_validate(
        {
            "model": {
                "vision": vision,
                "connector": {"kind": "mlp", **plain},
                "fusion": {"kind": "decoder_only"},
                "language": {"num_layers": 2, **SIZES},
            },
            "tokenizer": {"kind": "huggingface", "path": str(tokenizer), "image_token": image_token},
            "data": {"train": {"kind": "jsonl", "path": "none.jsonl"}, "seq_length": 512, **data},
            "engine": {"kind": "megatron"},
            "training": {
                "trainable": ["connector"],
                "train_iters": 1,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "optimizer": {"lr": 0.1},
            },
            "checkpoint": {"save": "run"},
        }
    )
    folder.mkdir(exist_ok=True)
    model_type = "llava" if architecture == LLAVA else "internvl"
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    write_processor(folder, recipe, recipe.tokenizer.build(), ALL_PARTS, architecture)
    return recipe


def conversations() -> list[list[dict[str, Any]]]:
    random = numpy.random.default_rng(5)
    wide, tall = (Image.fromarray(random.integers(0, 256, (*size, 3), numpy.uint8)) for size in ((40, 131), (90, 31)))
    contents: list[list[dict[str, Any]]] = [
        [{"type": "text", "text": "What is  this?\n"}],
        [{"type": "image", "image": wide}, {"type": "text", "text": "\nWhat is this?"}],
        [{"type": "image", "image": tall}, {"type": "text", "text": " and "}, {"type": "image", "image": wide}],
    ]
    return [[{"role": "user", "content": content}] for content in contents]


def inputs_of(processor: Any, messages: Any) -> Any:
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def check_same(folder: Path, pixel_tolerance: float) -> None:
    """Compare what the folder gives with and without trust in its code."""
    stock = transformers.AutoProcessor.from_pretrained(folder)
    ours = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(stock).__module__.startswith("transformers.")
    assert type(ours).__name__ == "MegaVLMProcessor"
    for messages in conversations():
        expected, found = inputs_of(ours, messages), inputs_of(stock, messages)
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()
        assert ("pixel_values" in found) == ("pixel_values" in expected)
        if "pixel_values" in found:
            torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=0, atol=pixel_tolerance)


# Without torchvision the worst difference seen is 0. With it transformers resizes by its bicubic: 0.26 on noise.
PIXEL_TOLERANCE = 0.5 if is_torchvision_available() else 1e-6


@pytest.mark.parametrize(
    ("tower", "template"), [*((tower, "chatml") for tower in TOWERS), *(("clip", name) for name in CHAT_TEMPLATES)]
)
def test_llava_is_read_by_its_own_processor(tower: str, template: str, tokenizer: Path, tmp_path: Path) -> None:
    recipe = export(tmp_path / "hf", tokenizer, LLAVA, {**PLAIN, "chat_template": template}, TOWERS[tower])
    stock = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert type(stock).__name__ == "LlavaProcessor"
    assert ("Siglip" in type(stock.image_processor).__name__) == (tower == "siglip")
    check_same(tmp_path / "hf", PIXEL_TOLERANCE)
    counted = stock._get_num_multimodal_tokens(image_sizes=[(40, 131)])  # what vLLM asks
    assert counted.num_image_tokens == [recipe.model.tokens_per_tile]


@pytest.mark.skipif(not is_torchvision_available(), reason="InternVLProcessor needs torchvision")
def test_internvl_is_read_by_its_own_processor(tokenizer: Path, tmp_path: Path) -> None:
    export(tmp_path / "hf", tokenizer, INTERNVL, GRIDS, CLIP)
    check_same(tmp_path / "hf", PIXEL_TOLERANCE)


@pytest.mark.parametrize("tiling", [GRIDS["tiling"], PLAIN["tiling"]], ids=str)
def test_internvl_goes_out_for_its_own_processor(tiling: Any, tokenizer: Path, tmp_path: Path) -> None:
    """Whether or not torchvision is there: the tokens that its class makes of the folder, and its tiles, are ours."""
    folder = tmp_path / "hf"
    export(folder, tokenizer, INTERNVL, {**GRIDS, "tiling": tiling}, CLIP)
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    assert settings["processor_class"] == "InternVLProcessor"
    published = transformers.AutoTokenizer.from_pretrained(folder)
    stock = InternVLProcessor.__new__(InternVLProcessor)
    stock.image_seq_length = settings["image_seq_length"]
    stock.image_token, stock.start_image_token, stock.end_image_token = (
        getattr(published, f"{name}_token") for name in ("context_image", "start_image", "end_image")
    )
    assert (published.video_token, published.padding_side) == ("<video>", "left")
    cut = transformers.AutoImageProcessor.from_pretrained(folder)
    ours = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for messages in conversations():
        prompt = published.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = inputs_of(ours, messages)
        tiles = []
        for part in messages[0]["content"]:
            if part["type"] == "image":
                made = cut(part["image"], crop_to_patches=True, return_tensors="pt")  # as InternVLProcessor asks
                tiles.append(made["pixel_values"])
                replacement = stock.replace_image_token({"num_patches": made["num_patches"].tolist()}, 0)
                prompt = prompt.replace(stock.image_token, replacement.replace(stock.image_token, "\0"), 1)
        ids = published(prompt.replace("\0", stock.image_token))["input_ids"]
        assert ids == expected["input_ids"][0].tolist()
        if tiles:
            torch.testing.assert_close(torch.cat(tiles), expected["pixel_values"], rtol=0, atol=PIXEL_TOLERANCE)
    if not is_torchvision_available():
        with pytest.raises(ValueError, match="requires `torchvision`"):
            transformers.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("architecture", "data", "reason"),
    [
        (LLAVA, {**PLAIN, "tile_tags": "1d"}, "it writes no data.tile_tags=1d"),
        (LLAVA, {**PLAIN, "image_wrapper": "nvlm"}, "its data.image_wrapper is none, not nvlm"),
        (LLAVA, {**PLAIN, "tiling": GRIDS["tiling"]}, "one tile, which data.tiling.kind=dynamic does not"),
        (INTERNVL, {**GRIDS, "tile_tags": "2d_box", "image_wrapper": "none"}, "no data.tile_tags=2d_box; its data"),
        (
            INTERNVL,
            {**GRIDS, "tiling": {"kind": "dynamic", "use_thumbnail": False}},
            "its image processor cuts other tiles",
        ),
        ("MegaVLMForConditionalGeneration", PLAIN, "it has none for MegaVLMForConditionalGeneration"),
    ],
)
def test_every_reason_against_a_stock_processor_is_named(
    architecture: str,
    data: dict[str, Any],
    reason: str,
    tokenizer: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        export(tmp_path / "hf", tokenizer, architecture, data, CLIP)
    assert f"no processor of transformers does: {reason}" in caplog.text or reason in caplog.text
    settings = json.loads((tmp_path / "hf" / "processor_config.json").read_text(encoding="utf-8"))
    assert settings["processor_class"] == "MegaVLMProcessor"


def test_a_tokenizer_without_its_special_tokens_is_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_tokenizer(tmp_path / "tokenizer", [token for token in SPECIALS if token not in ("<img>", "<video>")])
    with caplog.at_level(logging.INFO):
        export(tmp_path / "hf", made, INTERNVL, GRIDS, CLIP)
    assert "it needs <img>, <video> as special tokens, and the tokenizer has none" in caplog.text


def test_a_tokenizer_that_adds_tokens_of_its_own_is_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ChatML has no begin-of-text token, and a processor of transformers would let the tokenizer add one."""
    made = make_tokenizer(tmp_path / "tokenizer", SPECIALS, adds_bos=True)
    with caplog.at_level(logging.INFO):
        export(tmp_path / "hf", made, LLAVA, PLAIN, CLIP)
    assert "LlavaProcessor encodes 'The quick brown fox" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        export(tmp_path / "bos", made, LLAVA, {**PLAIN, "chat_template": "vicuna"}, CLIP)
    assert "transformers' LlavaProcessor gives the same" in caplog.text
    check_same(tmp_path / "bos", PIXEL_TOLERANCE)


@pytest.mark.parametrize(
    "data",
    [
        {"tiling": {"kind": "square"}},
        {"tile_tags": "separators"},
        {"split_below_images": 3},
        {"split_last_images": 1},
        {"max_tiles_per_sample": 8},
    ],
    ids=str,
)
def test_what_no_exported_processor_does_is_refused(
    data: dict[str, Any], tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(tmp_path / "hf", tokenizer, LLAVA, {**PLAIN, **data}, CLIP)
    name, value = next(iter(data.items()))
    shown = f"{name}.kind=square" if isinstance(value, dict) else f"{name}={value}"
    assert f"no processor files are written: an exported one does not know data.{shown}" in caplog.text
    assert not (tmp_path / "hf" / "processor_config.json").exists()
    assert (tmp_path / "hf" / "preprocessor_config.json").exists() == (name != "tiling")


def test_wrappers_that_are_special_tokens_stay_so(tokenizer: Path, tmp_path: Path) -> None:
    """In training and in the exported folder alike; a tokenizer without them reads their letters."""
    plain = make_tokenizer(tmp_path / "plain", [token for token in SPECIALS if "img" not in token])
    for name, made in {"special": tokenizer, "text": plain}.items():
        recipe = export(tmp_path / name, made, "", {**GRIDS, "tile_tags": "1d"}, CLIP)
        ours = transformers.AutoProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        messages = conversations()[1]
        ids = inputs_of(ours, messages)["input_ids"][0].tolist()
        messages[0]["content"][0]["image"].save(tmp_path / "picture.png")
        asked = Message("user", (ImageRef(str(tmp_path / "picture.png")), messages[0]["content"][1]["text"]))
        processor = SampleProcessor(
            recipe.data, recipe.tokenizer.build(), recipe.model.vision.image_size, recipe.model.tokens_per_tile
        )
        assert ids == processor.prompt("key", Conversation((asked,))).sample.tokens.tolist()
        special = ours.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        assert [token for token in ids if token in special] == (special if name == "special" else [])
