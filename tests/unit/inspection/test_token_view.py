"""What each token says and who says it, under tokenizers and templates of all manners."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from made_up_run import RECIPE, write_tokenizer
from PIL import Image

from megavlm.build import build_processor
from megavlm.config import load_recipe
from megavlm.inspection.legible import legible
from megavlm.inspection.token_view import TokenView, token_texts, view_tokens
from megavlm.inspection.view import SampleView, view_samples
from megavlm.recipe import Recipe

HARD = "\ufb01ne caf\u00e9 \U0001f600\U0001f469\u200d\U0001f680 \u0645\u0631\u062d\u0628\u0627 \u5206 two  spaces\tand"
ROW = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\n<image>user\n"},  # as the template's own line
        {"from": "gpt", "value": HARD},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "Green. <Image> <|im_end|>"},
    ],
    "image": ["tall.png", "tall.png"],
}
DOCUMENT = {"texts": ["Before ", None, " after"], "images": [None, "tall.png", None]}


def write_byte_tokenizer(folder: Path) -> None:
    """Every byte a token of its own: characters have up to four."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<img>", "</img>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["What is it? Red, green, four."], trainer)
    full = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        bos_token="<s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<img>", "</img>"],
    )
    full.save_pretrained(folder / "byte")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("token_view")
    Image.new("RGB", (30, 90), (30, 200, 30)).save(folder / "tall.png")
    for name, row in (("chats", ROW), ("documents", DOCUMENT)):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    write_tokenizer(folder)
    write_byte_tokenizer(folder)
    (folder / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    return folder


def byte_level(folder: Path) -> str:
    return f"tokenizer={{kind: huggingface, path: {folder}/byte}}"


def viewed(folder: Path, *overrides: str) -> dict[str, tuple[SampleView, list[TokenView]]]:
    """The only sample of each source, and its tokens."""
    recipe = load_recipe(folder / "recipe.yaml", ("data.seq_length=800", *overrides), Recipe)
    train, processor = recipe.data.train, build_processor(recipe)
    found = {}
    for view in view_samples(train.build(), train.source_names, processor, range(4), seed=1, shuffle=False):
        assert isinstance(view, SampleView), view
        found[view.source] = (view, view_tokens(view, processor))
    return found


def said(tokens: list[TokenView], category: str) -> str:
    return "".join(token.text for token in tokens if token.category == category)


@pytest.mark.parametrize("wrapper", ["nvlm", "internvl", "none"])
@pytest.mark.parametrize("template", ["chatml", "plain", "llama2", "vicuna"])
def test_who_says_each_token(folder: Path, template: str, wrapper: str) -> None:
    found = viewed(folder, byte_level(folder), f"data.chat_template={template}", f"data.image_wrapper={wrapper}")
    view, tokens = found["chats"]
    kinds = view.kinds()
    assert len(tokens) == view.sample.num_tokens
    assert [token.is_trained for token in tokens] == [kind == "trained" for kind in kinds]
    assert [token.category == "image" for token in tokens] == [kind == "image" for kind in kinds]
    for number, message in enumerate(view.conversation.messages):
        text = "".join(token.text for token in tokens if token.message == number and token.category != "special")
        # trained, and so of the turn, but the template's: a space, a line break
        assert text == message.text or (message.role == "assistant" and text.strip() == message.text.strip()), number
        assert said(tokens, message.role).count(message.text) >= 1
    _, document = found["documents"]
    assert said(document, "document") == "Before  after"
    assert {token.category for token in document if token.is_trained} == {"document", "special"}


def test_special_tokens_have_their_spelling(folder: Path) -> None:
    _, tokens = viewed(folder, byte_level(folder), "data.image_wrapper=internvl")["chats"]
    specials = [token.text for token in tokens if token.category == "special"]
    user = ["<|im_start|>", "<img>", "</img>", "<img>", "</img>", "<|im_end|>"]
    other = ["<|im_start|>", "<|im_end|>"]
    assert specials == [*other, *user, *other, *other, *other]


def test_a_tokenizer_that_changes_its_text(folder: Path) -> None:
    """SentencePiece drops and joins spaces, and writes a ligature as two letters: each turn begins rightly anew."""
    _, tokens = viewed(folder)["chats"]
    assert said(tokens, "system").strip() == "Be brief."
    assert "".join(said(tokens, "user").split()) == "userAnd?"
    assert said(tokens, "assistant").strip().endswith("Green. <Image> <|im_end|>")
    assert "caf\u00e9" in said(tokens, "assistant")


@pytest.mark.parametrize("text", [HARD, "", " ", "a b", "\U0001f600"])
def test_texts_of_tokens_join_to_the_text(folder: Path, text: str) -> None:
    recipe = load_recipe(folder / "recipe.yaml", (byte_level(folder),), Recipe)
    tokenizer = recipe.tokenizer.build()
    texts = token_texts(tokenizer.encode(text), tokenizer)
    assert "".join(texts) == text
    assert len(texts) == len(tokenizer.encode(text))


def test_a_character_cut_in_two_is_shown(folder: Path) -> None:
    """The ids of half an emoji: no text, no error, and the next token keeps its own."""
    recipe = load_recipe(folder / "recipe.yaml", (byte_level(folder),), Recipe)
    tokenizer = recipe.tokenizer.build()
    half = tokenizer.encode("\U0001f600")[:2]
    assert token_texts([*half, *tokenizer.encode("x")], tokenizer)[-1] == "x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u5206 \u00e9", "plain \u5206 \u00e9"),
        ("a\x00b\x1b\x7f", "a\\x00b\\x1b\\x7f"),
        ("\u202eevil\u2069", "\\u202eevil\\u2069"),
        ("\ud800", "\\ud800"),
        ("line\u2028\r\nbreak", "line\\u2028\\r\\nbreak"),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),
        ("\u00a0\u3000", "\\xa0\\u3000"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    assert legible(text) == shown
    shown.encode("utf-8")
