"""Caption fusion: what each model is asked, what is kept of it, and Hugging Face folders as writers."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from megavlm.data import Conversation, Message
from megavlm.filters import open_source
from megavlm.filters.caption_fusion import FusionSettings, Stage, run_stage
from megavlm.filters.sharing import all_ranks
from megavlm.filters.writer import TEXT, HuggingFaceWriter, Problem, Written

SETTINGS = FusionSettings("describe it", "<{described}|{raw}>", batch_size=2)


class Echo:
    """Writes what it was asked; refuses one text."""

    def __init__(self, refused: str = "nothing is refused") -> None:
        self.asked: list[str] = []
        self._refused = refused

    def write(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[Written | Problem]:
        texts = [prompt.messages[-1].text.strip() for prompt in prompts]
        self.asked += texts
        return [Problem("image_broken: it is") if self._refused in text else Written(text) for text in texts]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 20), (90, 10, 10)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "caption": "raw zero"},
        {"image": ["a.png", "a.png"], "caption": "two images"},
        {"image": "a.png", "caption": "raw {described} two"},
        {"text": "a document"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: Path, out: Path, name: str, writer: Echo) -> int:
    return run_stage(open_source(source), out, SETTINGS, Stage(name, "echo", writer, all_ranks()))


def test_both_captions_reach_the_language_model(source: Path, tmp_path: Path) -> None:
    out, captioner, fuser = tmp_path / "out", Echo(), Echo()
    assert run(source, out, "described", captioner) == 2
    assert captioner.asked == ["describe it"] * 2
    assert run(source, out, "fused", fuser) == 2
    assert fuser.asked == ["<describe it|raw zero>", "<describe it|raw {described} two>"]
    rows = [json.loads(line) for line in (out / "fused.jsonl").read_text().splitlines()]
    assert [(row["caption"], row["raw_caption"], row["described"]) for row in rows] == [
        ("<describe it|raw zero>", "raw zero", "describe it"),
        ("<describe it|raw {described} two>", "raw {described} two", "describe it"),
    ]
    assert len(open_source(out / "fused.jsonl")) == 2
    report = json.loads((out / "report.json").read_text())
    assert (report["num_kept"], report["reasons"]) == (2, {"no_caption": 2})
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [entry["score"] is None for entry in scores] == [False, True, False, True]
    assert 0 < scores[0]["score"] < 1


def test_it_goes_on_and_asks_nobody_twice(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"described/scores.jsonl: cannot be read .* Run --stage=described first"):
        run(source, out, "fused", Echo())
    run(source, out, "described", Echo())
    path = out / "described/scores.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match=r"describes 2 of 4 samples. Run --stage=described again"):
        run(source, out, "fused", Echo())
    again = Echo()
    run(source, out, "described", again)
    assert len(again.asked) == 1
    assert path.read_text() == "".join(lines)


def test_what_a_model_refuses_is_counted(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, "described", Echo())
    assert run(source, out, "fused", Echo(refused="zero")) == 1
    report = json.loads((out / "report.json").read_text())
    assert report["reasons"] == {"no_caption": 2, "image_broken": 1}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (FusionSettings(fusion_prompt="{raw}"), r"--fusion-prompt='{raw}': must have {described} in it, once"),
        (FusionSettings(fusion_prompt="{raw}{raw}{described}"), r"must have {raw} in it, once"),
        (FusionSettings(batch_size=0), r"--batch-size=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: FusionSettings, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        settings.check()


@pytest.mark.parametrize("has_template", [True, False])
def test_a_hugging_face_folder_writes(tmp_path: Path, has_template: bool) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    if has_template:
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    writer = HuggingFaceWriter(tmp_path, TEXT)
    prompts = [Conversation((Message("user", (text,)),)) for text in ("one two", "two", "one two")]
    first, _, third = writer.write(prompts, 4)
    assert isinstance(first, Written)
    assert first == third
    assert set(first.split()) <= {"one", "two", "<unk>"}


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model=.*: transformers cannot load it as text \("):
        HuggingFaceWriter(tmp_path, TEXT)
