"""What an exported folder makes of questions and images is what training made of them: tokens, tiles, template."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from PIL import Image

from megavlm.convert.processor import stop_token_ids, write_processor
from megavlm.convert.published_code.processing_megavlm import MegaVLMProcessor
from megavlm.data import TOKENIZERS, Conversation, ImageRef, Message, Sample, SampleProcessor, Tokenizer
from megavlm.data.chat_template import CHAT_TEMPLATES
from megavlm.data.encoding import IMAGE_WRAPPERS
from megavlm.recipe import Recipe

TILE_SIZE = 28
SPECIALS = ["<|im_start|>", "<|im_end|>"]
WORDS = [
    "The quick brown fox jumps over the lazy dog.",
    "user\nWhat is in the picture? assistant\nIt is a red house with 12 windows.",
    "def area(width, height):\n    return width * height",
    "Grüße aus Köln, 你好 café",
    *(f"number {n} is {n * n}, and {n + 7} is more" for n in range(60)),
]


def byte_bpe(folder: Path) -> dict[str, str]:
    """Like Qwen2's: bytes, no prefix."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return _train(backend, folder, tokenizers.trainers.BpeTrainer, initial_alphabet=alphabet)


def prefixed_bpe(folder: Path) -> dict[str, str]:
    """Like Llama 2's: a space before the text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    rules = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence(rules)
    return _train(
        backend, folder, tokenizers.trainers.BpeTrainer, initial_alphabet=[f"<0x{n:02X}>" for n in range(256)]
    )


def _train(backend: tokenizers.Tokenizer, folder: Path, trainer: Callable[..., Any], **options: Any) -> dict[str, str]:
    special = ["<unk>", "<s>", "</s>", *SPECIALS]
    backend.train_from_iterator(
        WORDS, trainer(vocab_size=520, special_tokens=special, show_progress=False, max_token_length=12, **options)
    )
    state = json.loads(backend.to_str())
    if state["model"]["byte_fallback"]:
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{value:02X}>": len(vocabulary) + value for value in range(256)}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", additional_special_tokens=SPECIALS
    ).save_pretrained(folder)
    return {"kind": "huggingface", "path": str(folder)}


def piece_model(model_type: str, **options: Any) -> Callable[[Path], dict[str, str]]:
    def make(folder: Path) -> dict[str, str]:
        (folder / "text.txt").write_text("\n".join(WORDS), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=options.pop("vocab_size", 400),
            model_type=model_type,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        return {"kind": "sentencepiece", "path": str(folder / "tokenizer.model")}

    return make


TOKENIZER_MAKERS: dict[str, Callable[[Path], dict[str, str]]] = {
    "byte_bpe": byte_bpe,
    "prefixed_bpe": prefixed_bpe,
    "unigram": piece_model("unigram", byte_fallback=True, control_symbols=[*SPECIALS, "<image>"]),
    "unigram_unknown": piece_model("unigram", user_defined_symbols=[*SPECIALS, "<x>"], vocab_size=200, pad_id=3),
    # Llama's settings: nothing is normalised, every space is kept
    "bpe": piece_model(
        "bpe",
        byte_fallback=True,
        control_symbols=SPECIALS,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        vocab_size=420,
    ),
}


@pytest.fixture(scope="module")
def tokenizer_trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in TOKENIZER_MAKERS.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A wide one, a tall one, a small grey one and one with holes."""
    folder, random = tmp_path_factory.mktemp("pictures"), numpy.random.default_rng(1)
    shapes = {"wide.png": (40, 130, 3), "tall.png": (171, 55, 3), "grey.png": (20, 21), "holes.png": (60, 61, 4)}
    for name, shape in shapes.items():
        Image.fromarray(random.integers(0, 256, shape, dtype=numpy.uint8)).save(folder / name)
    photo = Image.fromarray(random.integers(0, 256, (30, 90, 3), dtype=numpy.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6  # lies on its side
    photo.save(folder / "sideways.jpg", exif=exif)
    return [str(folder / name) for name in [*shapes, "sideways.jpg"]]


def make_recipe(tokenizer: dict[str, str], fusion: dict[str, Any] | None = None, **data: Any) -> Recipe:
    rows = {"kind": "jsonl", "path": "none.jsonl"}
    sizes = {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
    vision = {"kind": "clip", "image_size": TILE_SIZE, "patch_size": 7, "num_layers": 1, **sizes}
    return Recipe.model_validate(
        {
            "model": {
                "vision": vision,
                "connector": {"kind": "mlp"},
                "fusion": fusion or {"kind": "decoder_only"},
                "language": {"num_layers": 2, **sizes},
            },
            "tokenizer": tokenizer,
            "data": {"train": rows, "seq_length": 1024, **data},
            "engine": {"kind": "megatron"},
            "training": {
                "trainable": ["vision", "connector", "language"]
                + (["cross_attention"] if fusion is not None and fusion["kind"] != "decoder_only" else []),
                "train_iters": 1,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "optimizer": {"lr": 0.1},
            },
            "checkpoint": {"save": "run"},
        }
    )


class Both:
    """The run's own way to make a prompt, and the exported folder's."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.tokenizer: Tokenizer = recipe.tokenizer.build()
        write_processor(folder, recipe, self.tokenizer, ("vision", "connector", "language"))
        model = recipe.model
        self.ours = SampleProcessor(
            recipe.data, self.tokenizer, model.vision.image_size, model.tokens_per_tile, model.fusion.tile_route
        )
        settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["settings"]
        self.theirs = MegaVLMProcessor(
            transformers.AutoTokenizer.from_pretrained(folder),
            settings,
            chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        )
        vision = model.vision
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (vision.image_mean, vision.image_std))

    def check(self, conversation: Conversation) -> tuple[Sample, Any]:
        """Compare; return both."""
        sample = self.ours.prompt("key", conversation).sample
        inputs = self.theirs.apply_chat_template(
            as_messages(conversation), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert inputs["input_ids"].tolist() == [sample.tokens.tolist()]
        assert inputs["attention_mask"].tolist() == [[1] * sample.num_tokens]
        if sample.tiles.shape[0]:
            # the same operations on the same bytes: no difference at all
            assert torch.equal(inputs["pixel_values"], (sample.tiles.float() / 255 - self.mean) / self.std)
        else:
            assert "pixel_values" not in inputs
        return sample, inputs


def as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    def part(part: str | ImageRef) -> dict[str, str]:
        is_image = isinstance(part, ImageRef)
        return {"type": "image", "path": part.source} if is_image else {"type": "text", "text": str(part)}

    return [
        {"role": message.role, "content": [part(one) for one in message.parts]} for message in conversation.messages
    ]


def conversations(pictures: list[str]) -> dict[str, Conversation]:
    first, second = ImageRef(pictures[0]), ImageRef(pictures[1])
    return {
        "text": Conversation((Message("user", ("What is number 3?",)),)),
        "image": Conversation((Message("user", (first, "\n", "What is this?")),)),
        "two images": Conversation((Message("user", ("Compare ", first, " with ", second, ".")),)),
        "turns": Conversation(
            (
                Message("system", ("Be brief.\n",)),
                Message("user", (first, "\nWhat is this?")),
                Message("assistant", ("It is a house.",)),
                Message("user", ("And this? ", second)),
            )
        ),
        "spaces": Conversation((Message("user", ("  two  spaces, a\ttab\n\n ",)),)),
        "unknown letters": Conversation((Message("user", ("Grüße, 你好 \U0001f642, \uff21\uff22, café",)),)),
        "specials as text": Conversation(
            (Message("user", ("<|im_end|>\n<|im_start|>assistant\n</s><s><image>", first, "<|im_<|im_end|>end|> <x>")),)
        ),
        "specials over edges": Conversation((Message("user", ("<ima", "ge><|im_", "end|>")),)),
    }


@pytest.mark.parametrize(("tokenizer", "template"), list(itertools.product(TOKENIZER_MAKERS, CHAT_TEMPLATES)))
def test_prompts_are_the_same(
    tokenizer: str, template: str, tokenizer_trees: dict[str, Any], pictures: list[str], tmp_path: Path
) -> None:
    both = Both(make_recipe(tokenizer_trees[tokenizer], chat_template=template), tmp_path)
    for conversation in conversations(pictures).values():
        both.check(conversation)
    plain = conversations(pictures)["text"].messages[0].text
    messages = [{"role": "user", "content": plain}]  # the short form
    inputs = both.theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    sample = both.ours.prompt("key", conversations(pictures)["text"]).sample
    assert inputs["input_ids"].tolist() == [sample.tokens.tolist()]
    words = both.tokenizer.encode("It is a red house, café.")
    assert both.theirs.decode(words, skip_special_tokens=True) == both.tokenizer.decode(words)


def test_every_kind_of_tokenizer_is_tried(tokenizer_trees: dict[str, Any]) -> None:
    assert {tree["kind"] for tree in tokenizer_trees.values()} == set(TOKENIZERS)


TILINGS = [
    {"kind": "whole"},
    {"kind": "dynamic", "max_tiles": 12},
    {"kind": "dynamic", "max_tiles": 6, "min_tiles": 3},
    {"kind": "dynamic", "max_tiles": 4, "use_thumbnail": False},
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_tiles_and_tags_are_the_same(
    tiling: dict[str, Any], tokenizer_trees: dict[str, Any], pictures: list[str], tmp_path: Path
) -> None:
    styles = zip(("none", "1d", "2d_grid", "2d_box"), itertools.cycle(IMAGE_WRAPPERS), strict=False)
    for style, wrapper in styles:
        (tmp_path / style).mkdir()
        recipe = make_recipe(
            tokenizer_trees["byte_bpe"],
            tiling=tiling,
            tile_tags=style,
            image_wrapper=wrapper,
            thumbnail_tag="<tile_global>",
        )
        both = Both(recipe, tmp_path / style)
        for picture in pictures:
            both.check(Conversation((Message("user", (ImageRef(picture), "What is this?")),)))
    path = tmp_path / style / "preprocessor_config.json"
    assert path.exists() == tiling.get("use_thumbnail", True)
    if path.exists():
        stock = transformers.AutoImageProcessor.from_pretrained(path.parent)
        image = Image.open(pictures[0])
        _, inputs = both.check(Conversation((Message("user", (ImageRef(pictures[0]),)),)))
        # Worst seen without torchvision, over all 256 bytes: 0. With it the operations' order may differ.
        torch.testing.assert_close(
            torch.as_tensor(stock(image, return_tensors="pt")["pixel_values"]),
            inputs["pixel_values"],
            rtol=0,
            atol=1e-6,
        )


FUSIONS = [
    {"kind": "cross_attention"},
    {"kind": "hybrid", "tag_integration": "add"},
    {"kind": "hybrid", "tag_integration": "concatenate", "text_sees": "last_image"},
]


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_cross_attention_is_told_what_it_may_read(
    fusion: dict[str, Any], tokenizer_trees: dict[str, Any], pictures: list[str], tmp_path: Path
) -> None:
    both = Both(make_recipe(tokenizer_trees["byte_bpe"], fusion), tmp_path)
    for conversation in conversations(pictures).values():
        sample, inputs = both.check(conversation)
        assert inputs["num_tiles"].tolist() == [sample.tiles.shape[0]]
        assert torch.equal(inputs["visible_tiles"][0], sample.visible_tiles)
        assert inputs["tile_in_context"].tolist() == (sample.tile_context > 0).tolist()
        assert torch.equal(inputs["tile_tags"], sample.tile_tags)


def test_rows_are_filled_on_the_left(tokenizer_trees: dict[str, Any], pictures: list[str], tmp_path: Path) -> None:
    both = Both(make_recipe(tokenizer_trees["byte_bpe"], {"kind": "hybrid"}), tmp_path)
    asked = [conversations(pictures)[name] for name in ("text", "two images", "image")]
    samples = [both.ours.prompt("key", conversation).sample for conversation in asked]
    inputs = both.theirs.apply_chat_template(
        [as_messages(conversation) for conversation in asked],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    longest = max(sample.num_tokens for sample in samples)
    for row, sample in enumerate(samples):
        num_pads = longest - sample.num_tokens
        assert inputs["input_ids"][row].tolist() == [both.tokenizer.pad_id] * num_pads + sample.tokens.tolist()
        assert inputs["attention_mask"][row].tolist() == [0] * num_pads + [1] * sample.num_tokens
        assert torch.equal(inputs["visible_tiles"][row, num_pads:], sample.visible_tiles)
        assert not inputs["visible_tiles"][row, :num_pads].any()
    assert inputs["num_tiles"].tolist() == [sample.tiles.shape[0] for sample in samples]
    assert inputs["pixel_values"].shape[0] == sum(sample.tiles.shape[0] for sample in samples)


def test_long_prompts_lose_tiles_as_in_training(
    tokenizer_trees: dict[str, Any], pictures: list[str], tmp_path: Path
) -> None:
    counts = []
    for number, length in enumerate((1024, 220, 150)):
        (tmp_path / str(number)).mkdir()
        recipe = make_recipe(
            tokenizer_trees["byte_bpe"], seq_length=length, tiling={"kind": "dynamic", "max_tiles": 12}
        )
        both = Both(recipe, tmp_path / str(number))
        sample, _ = both.check(conversations(pictures)["two images"])
        counts.append(sample.tiles.shape[0])
    assert counts[0] > counts[1] > counts[2]
    with pytest.raises(ValueError, match="the model was trained on at most 150"):
        both.theirs(text="word " * 200)


@pytest.mark.parametrize("tokenizer", TOKENIZER_MAKERS)
@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_answers_end_where_ours_end(
    tokenizer: str, template: str, tokenizer_trees: dict[str, Any], tmp_path: Path
) -> None:
    recipe = make_recipe(tokenizer_trees[tokenizer], chat_template=template)
    built = recipe.tokenizer.build()
    ends = {built.eos_id} | ({built.special_id("<|im_end|>")} if template == "chatml" else set())
    assert set(stop_token_ids(recipe, built)) == ends


def test_default_system_messages_are_written(tokenizer_trees: dict[str, Any], tmp_path: Path) -> None:
    for number, prompt in enumerate([None, "", 'Say "yes" or\nno. @image {{ x }} \\n 你好']):
        (tmp_path / str(number)).mkdir()
        recipe = make_recipe(tokenizer_trees["byte_bpe"], chat_template="vicuna", system_prompt=prompt)
        both = Both(recipe, tmp_path / str(number))
        both.check(Conversation((Message("user", ("What?",)),)))
        both.check(Conversation((Message("system", ("Another.",)), Message("user", ("What?",)))))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"text": "<image> what?"}, "the texts have more <image> than there are images"),
        ({"text": "what?", "images": [Image.new("RGB", (9, 9))]}, "images: 1 more than the texts have <image>"),
        ({"text": "what?", "videos": [1]}, "trained on images and text alone"),
        ({"images": []}, "text=None.*a text is needed"),
        ({"text": "what?", "add_special_tokens": True}, "add_special_tokens=True.*Use apply_chat_template"),
        ({"text": "<image>", "images": numpy.zeros((3, 8, 8))}, r"has shape \(3, 8, 8\) of float64"),
        ({"text": "<image>", "images": Image.new("F", (9, 9))}, "floating-point greys"),
        ({"text": "<image>", "images": "data:image/png;base64,###"}, "is not valid base64"),
    ],
)
def test_what_cannot_be_read_is_refused(
    call: dict[str, Any], problem: str, tokenizer_trees: dict[str, Any], tmp_path: Path
) -> None:
    both = Both(make_recipe(tokenizer_trees["byte_bpe"]), tmp_path)
    with pytest.raises(ValueError, match=problem):
        both.theirs(**call)


def test_another_tokenizer_is_refused(tokenizer_trees: dict[str, Any], tmp_path: Path) -> None:
    both = Both(make_recipe(tokenizer_trees["byte_bpe"]), tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tokenizer_trees["prefixed_bpe"]["path"])
    with pytest.raises(ValueError, match=r"tokenizer: '<image>' is \S+, and the model was trained with"):
        MegaVLMProcessor(other, both.theirs.settings)
    with pytest.raises(ValueError, match=r"processor_config.json holds none"):
        MegaVLMProcessor(other)


def test_a_model_of_words_has_no_counterpart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "words").mkdir()
    tree = piece_model("word", control_symbols=SPECIALS, vocab_size=90)(tmp_path / "words")
    recipe = make_recipe(tree)
    (tmp_path / "hf").mkdir()
    write_processor(tmp_path / "hf", recipe, recipe.tokenizer.build(), ("vision", "connector", "language"))
    assert "cannot be written as tokenizer.json: model_type=WORD (only UNIGRAM and BPE)" in caplog.text
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"tokenizer.model", "preprocessor_config.json"}


def test_a_language_model_alone_gets_no_processor(tokenizer_trees: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tokenizer_trees["byte_bpe"])
    built = recipe.tokenizer.build()
    encoder = recipe.model.vision.model_dump()
    two = recipe.model_dump() | {
        "model": recipe.model.model_dump() | {"vision": {"kind": "dual", "encoders": [encoder, encoder]}}
    }
    write_processor(tmp_path, Recipe.model_validate(two), built, ("language",))
    write_processor(tmp_path, recipe, built, ("language",))
    assert not {"processor_config.json", "preprocessor_config.json"} & {path.name for path in tmp_path.iterdir()}
    found = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "What is number 3?"}], add_generation_prompt=True, return_dict=False
    )
    assert found == Both(recipe, tmp_path).ours.prompt("key", conversations(["a", "b"])["text"]).sample.tokens.tolist()


def test_the_code_that_travels_needs_none_of_ours() -> None:
    folder = Path(__file__).parents[3] / "megavlm" / "convert" / "published_code"
    for name in ("processing_megavlm.py", "text_megavlm.py", "tiles_megavlm.py"):
        assert "import megavlm" not in (text := (folder / name).read_text(encoding="utf-8"))
        assert "from megavlm" not in text
