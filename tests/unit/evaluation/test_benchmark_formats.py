"""Every benchmark reads its own format, adds its instruction to the questions, and names what is wrong in a file."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_examples import EXAMPLES, first_entry

from megavlm.data import ImageRef
from megavlm.evaluation.benchmarks import BENCHMARKS, BenchmarkFiles
from megavlm.evaluation.benchmarks.load import load_benchmark
from megavlm.evaluation.score import check_metric

LACKING = [(kind, key) for kind in BENCHMARKS for key in EXAMPLES[kind].required]


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_a_file_is_read_and_answers_are_scored(kind: str, tmp_path: Path) -> None:
    example = EXAMPLES[kind]
    found = load_benchmark(kind, example.write(tmp_path))
    assert len(found.left_out) == example.num_left_out
    assert len(found.questions) == len(example.asked)
    for question, asked in zip(found.questions, example.asked, strict=True):
        assert question.key == asked.key.replace("PATH", str(tmp_path / "data.json"))
        assert question.text == asked.text
        assert question.images == [str(tmp_path / name) for name in asked.images]
        assert (question.references, question.choices, question.category) == (
            asked.references,
            asked.choices,
            asked.category,
        )
    check_metric(found.questions, BENCHMARKS[kind].metric)
    said = [question.item(asked.said) for question, asked in zip(found.questions, example.asked, strict=True)]
    assert BENCHMARKS[kind].metric.score(said).value == pytest.approx(example.value, rel=1e-12)


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_the_instruction_can_be_changed(kind: str, tmp_path: Path) -> None:
    found = load_benchmark(kind, EXAMPLES[kind].write(tmp_path), "Be brief.")
    usual = BENCHMARKS[kind].instruction
    has_its_own = {"2"} if kind == "ai2d" else set()  # the row's text ends with an instruction
    for question in found.questions:
        if question.key not in has_its_own:
            assert question.text.endswith("Be brief.")
            assert not usual or usual not in question.text


@pytest.mark.parametrize(("kind", "key"), LACKING)
def test_a_missing_key_is_named_with_its_entry_and_file(kind: str, key: str, tmp_path: Path) -> None:
    data = copy.deepcopy(EXAMPLES[kind].data)
    del first_entry(data)[key]
    files = replace(EXAMPLES[kind], data=data).write(tmp_path)
    with pytest.raises(ValueError, match=key) as caught:
        load_benchmark(kind, files)
    entry = {"gqa": "[201307251]", "vqav2": ".questions[0]", "coco_caption": ".images[0]"}
    entry |= dict.fromkeys(("textvqa", "docvqa", "infographicvqa"), ".data[0]")
    assert str(caught.value).startswith(f"{tmp_path / 'data.json'}{entry.get(kind, '[0]')}")


@pytest.mark.parametrize("kind", BENCHMARKS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "number|list, not an object"),
        ("{", "is not valid JSON"),
        ("[[", "is not valid JSON|list, not an object"),
        ("[]", "0 questions|list, not an object"),
        ("", "0 questions|is not valid JSON"),
    ],
)
def test_a_file_of_another_kind_is_one_error(kind: str, content: str, words: str, tmp_path: Path) -> None:
    files = EXAMPLES[kind].write(tmp_path)
    files.data.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        load_benchmark(kind, files)
    assert "data.json" in str(caught.value)


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_a_file_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    files = EXAMPLES[kind].write(tmp_path)
    files.data.unlink()
    with pytest.raises(ValueError, match=r"data.json: cannot be read .*No such file"):
        load_benchmark(kind, files)


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_options_of_no_use_are_refused(kind: str, tmp_path: Path) -> None:
    files, benchmark = EXAMPLES[kind].write(tmp_path), BENCHMARKS[kind]
    turned = replace(files, annotations=None if benchmark.takes_annotations else files.data)
    with pytest.raises(ValueError, match=r"--annotations=.*(needs a file of answers|takes none)"):
        load_benchmark(kind, turned)
    if not benchmark.takes_split:
        with pytest.raises(ValueError, match="--split=val: has no meaning"):
            load_benchmark(kind, replace(files, split="val"))


@pytest.mark.parametrize(
    ("kind", "key", "value", "words"),
    [
        ("textvqa", "answers", [""] * 10, "of which one says something"),
        ("textvqa", "answers", ["a", None], "not a list of texts"),
        ("textvqa", "question", "  ", "is blank"),
        ("docvqa", "question", ["a"], "is a list, not text"),
        ("vqav2", "image_id", "x", "no whole number"),
        ("vqav2", "question_id", 5, "has no annotation in .*annotations.json"),
        ("ai2d", "answer", "2", "neither an index from 0 to 1 nor one of AB"),
        ("ai2d", "options", None, "no key options"),
        ("mmmu", "options", "a, b", "neither a list nor the text of one"),
        ("mmmu", "options", "{'a': 1}", "is not a list of texts"),
        ("mmmu", "question", "<image 5>?", "image_5: is missing"),
        ("gqa", "types", [], "types: is a list, not an object"),
        ("coco_caption", "id", 5, "image_id='42': is none of the 3 images"),
    ],
)
def test_wrong_values_are_named(kind: str, key: str, value: object, words: str, tmp_path: Path) -> None:
    data = copy.deepcopy(EXAMPLES[kind].data)
    first_entry(data)[key] = value
    with pytest.raises(ValueError, match=words):
        load_benchmark(kind, replace(EXAMPLES[kind], data=data).write(tmp_path))


def test_a_question_name_given_twice_is_an_error(tmp_path: Path) -> None:
    data = copy.deepcopy(EXAMPLES["docvqa"].data)
    data["data"][1]["questionId"] = 337
    with pytest.raises(ValueError, match="2 questions have the name '337'"):
        load_benchmark("docvqa", replace(EXAMPLES["docvqa"], data=data).write(tmp_path))
    files = replace(EXAMPLES["docvqa"], data={"data": {}}).write(tmp_path)
    with pytest.raises(ValueError, match=r"data.json.data=.*is an object, not a list"):
        load_benchmark("docvqa", files)


def test_captions_need_names_of_images_and_an_instruction(tmp_path: Path) -> None:
    files = EXAMPLES["coco_caption"].write(tmp_path)
    with pytest.raises(ValueError, match=r"images\[0\].file_name: is missing. Give --split"):
        load_benchmark("coco_caption", replace(files, split=None))
    with pytest.raises(ValueError, match="all that is asked of captions"):
        load_benchmark("coco_caption", files, "")


def test_images_are_found_where_the_benchmarks_put_them(tmp_path: Path) -> None:
    places = {
        "vqav2": "val2014/COCO_val2014_000000000042.jpg",
        "coco_caption": "val2014/COCO_val2014_000000000042.jpg",
        "textvqa": "train_images/ab.jpg",
        "chartqa": "png/1.png",
        "gqa": "images/n161313.jpg",
        "docvqa": "a_1.png",
    }
    for kind, place in places.items():
        folder = tmp_path / kind
        (folder / place).parent.mkdir(parents=True)
        (folder / place).touch()
        assert load_benchmark(kind, EXAMPLES[kind].write(folder)).questions[0].images == [str(folder / place)]


def test_images_stand_where_mmmu_names_them(tmp_path: Path) -> None:
    found = load_benchmark("mmmu", EXAMPLES["mmmu"].write(tmp_path))
    first = found.questions[0].conversation.messages[0].parts
    assert first[:2] == ("Who painted ", ImageRef(str(tmp_path / "a.png")))
    row = {"id": "dev_Math_1", "question": "Which?", "options": ["1", "2"], "answer": "A", "image_1": "a.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    alone = load_benchmark("mmmu", BenchmarkFiles(tmp_path / "rows.jsonl", tmp_path), "")
    parts = alone.questions[0].conversation.messages[0].parts
    assert parts == (ImageRef(str(tmp_path / "a.png")), "\nWhich?\nA. 1\nB. 2")
    with pytest.raises(ValueError, match="0 questions of split test to ask, 0 left out"):
        load_benchmark("mmmu", BenchmarkFiles(tmp_path / "rows.jsonl", tmp_path, split="test"))
