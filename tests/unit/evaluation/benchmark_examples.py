"""A small made-up file in each benchmark's format, what it says, and what some answers to it are worth, by hand."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.evaluation.benchmarks import BenchmarkFiles

WORD_OR_PHRASE = "Answer the question using a single word or phrase."
WORD_PHRASE_OR_NUMBER = "Answer the question using a single word, phrase, or number."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Asked:
    """A question as it should be read."""

    key: str
    text: str
    images: list[str]
    """Below the folder of images."""
    references: tuple[str, ...]
    said: str
    """What a model answers."""
    choices: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True)
class Example:
    """A file and what is in it."""

    data: Any
    asked: list[Asked]
    value: float
    """Of the benchmark's metric, for what is said."""
    required: tuple[str, ...]
    """Keys of the first entry without which it is refused."""
    annotations: Any = None
    split: str | None = None
    num_left_out: int = 0

    def write(self, folder: Path) -> BenchmarkFiles:
        """Write the files; images begin in the same folder."""
        data, annotations = folder / "data.json", folder / "annotations.json"
        data.write_text(json.dumps(self.data), encoding="utf-8")
        if self.annotations is not None:
            annotations.write_text(json.dumps(self.annotations), encoding="utf-8")
        return BenchmarkFiles(data, folder, annotations if self.annotations is not None else None, self.split)


TEN = ["yes"] * 3 + ["no"] * 7

EXAMPLES: dict[str, Example] = {
    "vqav2": Example(
        {
            "data_subtype": "val2014",
            "questions": [
                {"image_id": 42, "question": "Is it red?", "question_id": 42000},
                {"image_id": 7, "question": "How many?", "question_id": 7001},
            ],
        },
        [
            Asked(
                "42000",
                f"Is it red?\n{WORD_OR_PHRASE}",
                ["COCO_val2014_000000000042.jpg"],
                tuple(TEN),
                "Yes.",
                (),
                "yes/no",
            ),
            Asked(
                "7001",
                f"How many?\n{WORD_OR_PHRASE}",
                ["COCO_val2014_000000000007.jpg"],
                ("2",) * 10,
                "3",
                (),
                "number",
            ),
        ],
        0.45,  # three of ten people agree: 0.9; none: 0
        ("image_id", "question", "question_id"),
        annotations={
            "annotations": [
                {"question_id": 7001, "answer_type": "number", "answers": [{"answer": "2"}] * 10},
                {"question_id": 42000, "answer_type": "yes/no", "answers": [{"answer": text} for text in TEN]},
            ]
        },
    ),
    "textvqa": Example(
        {
            "data": [
                {"question_id": 1, "image_id": "ab", "question": "what brand?", "answers": ["nokia"] * 10},
                {"question_id": 2, "image_id": "cd", "question": "what time?", "answers": ["5:00"] * 2 + ["5"] * 8},
            ]
        },
        [
            Asked("1", f"what brand?\n{WORD_PHRASE_OR_NUMBER}", ["ab.jpg"], ("nokia",) * 10, "Nokia"),
            Asked("2", f"what time?\n{WORD_PHRASE_OR_NUMBER}", ["cd.jpg"], ("5:00",) * 2 + ("5",) * 8, "5:00"),
        ],
        0.8,  # 1 and 0.6 (two people)
        ("question_id", "image_id", "question", "answers"),
    ),
    "docvqa": Example(
        {
            "data": [
                {
                    "questionId": 337,
                    "question": "What is the date?",
                    "image": "documents/a_1.png",
                    "answers": ["1/8/93", "January 8"],
                    "question_types": ["table/list", "form"],
                },
                {"questionId": 338, "question": "Who?", "image": "documents/b_2.png", "answers": ["Paul"]},
            ]
        },
        [
            Asked(
                "337",
                f"What is the date?\n{WORD_PHRASE_OR_NUMBER}",
                ["documents/a_1.png"],
                ("1/8/93", "January 8"),
                "1/8/92",
                (),
                "form, table/list",
            ),
            Asked("338", f"Who?\n{WORD_PHRASE_OR_NUMBER}", ["documents/b_2.png"], ("Paul",), "Paula"),
        ],
        (5 / 6 + 4 / 5) / 2,  # one letter of six is wrong; one of five is too many
        ("questionId", "question", "image", "answers"),
    ),
    "infographicvqa": Example(
        {
            "data": [
                {
                    "questionId": 98313,
                    "question": "How many?",
                    "image_local_name": "20471.jpeg",
                    "answers": ["2%"],
                    "answer_type": ["single span"],
                },
            ]
        },
        [Asked("98313", f"How many?\n{WORD_PHRASE_OR_NUMBER}", ["20471.jpeg"], ("2%",), "2%", (), "single span")],
        1.0,
        ("questionId", "question", "answers"),
    ),
    "chartqa": Example(
        [
            {"imgname": "1.png", "query": "How much?", "label": "14"},
            {"imgname": "2.png", "query": "Which?", "label": "Norway"},
        ],
        [
            Asked("data.json[0]", f"How much?\n{WORD_OR_PHRASE}", ["1.png"], ("14",), "14.5"),
            Asked("data.json[1]", f"Which?\n{WORD_OR_PHRASE}", ["2.png"], ("Norway",), "Sweden"),
        ],
        0.5,  # 14.5 is 3.6 % off
        ("imgname", "query", "label"),
    ),
    "ocrbench": Example(
        [
            {
                "dataset_name": "IIIT5K",
                "id": 1,
                "image_path": "IIIT5K/test/1.png",
                "question": "what is written in the image?",
                "answers": "CENTRE",
                "type": "Regular Text Recognition",
            },
            {
                "dataset_name": "HME100k",
                "id": 1,
                "image_path": "HME100k/2.jpg",
                "question": "Please write out the expression.",
                "answers": ["x ^ 2"],
                "type": "Handwritten Mathematical Expression Recognition",
            },
        ],
        [
            Asked(
                "data.json[0]",
                "what is written in the image?",
                ["IIIT5K/test/1.png"],
                ("CENTRE",),
                "It says Centre.",
                (),
                "Regular Text Recognition",
            ),
            Asked(
                "data.json[1]",
                "Please write out the expression.",
                ["HME100k/2.jpg"],
                ("x ^ 2",),
                "X^2",  # case counts in formulas
                (),
                "Handwritten Mathematical Expression Recognition",
            ),
        ],
        0.5,
        ("image_path", "question", "answers", "type"),
    ),
    "ai2d": Example(
        [
            {"image": "1.png", "question": "Which is prey?", "options": ["owl", "mouse"], "answer": "1"},
            {
                "image": "data/ai2diagram/AI2D_TEST/2.png",
                "question": f"What is C?\nA. leaf\nB. root\nC. stem\n{LETTER}",
                "answer": "C",
                "question_id": 2,
            },
            {"image": "3.png", "question": "What eats B?\nA. grass\nB. cat", "answer": "A", "question_id": 3},
        ],
        [
            Asked(
                "data.json[0]",
                f"Which is prey?\nA. owl\nB. mouse\n{LETTER}",
                ["1.png"],
                ("B",),
                "(B)",
                ("owl", "mouse"),
            ),
            Asked(
                "2",
                f"What is C?\nA. leaf\nB. root\nC. stem\n{LETTER}",
                ["data/ai2diagram/AI2D_TEST/2.png"],
                ("C",),
                "stem",
                ("leaf", "root", "stem"),
            ),
            Asked("3", f"What eats B?\nA. grass\nB. cat\n{LETTER}", ["3.png"], ("A",), "B", ("grass", "cat")),
        ],
        2 / 3,
        ("image", "question", "answer"),
    ),
    "mmmu": Example(
        [
            {
                "id": "validation_Art_Theory_1",
                "question": "Who painted <image 1>?",
                "options": "['Ada', 'Bo']",
                "answer": "A",
                "image_1": "a.png",
                "image_2": None,
            },
            {"id": "validation_Math_2", "question": "How long?", "options": "[]", "answer": "3.5", "image_1": "b.png"},
            {
                "id": "validation_Math_5",
                "question": "Why?",
                "options": [],
                "answer": "['x', 'y z']",
                "image_1": "b.png",
            },
            {
                "id": "validation_Math_3",
                "question": "Which?",
                "options": ["<image 2>", "<image 1>"],
                "answer": "B",
                "image_1": {"path": "c.png"},
                "image_2": "d.png",
            },
            {"id": "test_Math_4", "question": "Which?", "options": ["1", "2"], "answer": "?", "image_1": "e.png"},
        ],
        [
            Asked(
                "validation_Art_Theory_1",
                f"Who painted ?\nA. Ada\nB. Bo\n{LETTER}",
                ["a.png"],
                ("A",),
                "A",
                ("Ada", "Bo"),
                "Art_Theory",
            ),
            Asked("validation_Math_2", f"How long?\n{WORD_OR_PHRASE}", ["b.png"], ("3.5",), "It is 3.50 m", (), "Math"),
            Asked("validation_Math_5", f"Why?\n{WORD_OR_PHRASE}", ["b.png"], ("x", "y z"), "z y", (), "Math"),
            Asked(
                "validation_Math_3",
                f"Which?\nA. \nB. \n{LETTER}",
                ["d.png", "c.png"],
                ("B",),
                "A",
                ("<image 2>", "<image 1>"),
                "Math",
            ),
        ],
        0.5,
        ("id", "question", "options", "answer", "image_1"),
        split="validation",
    ),
    "gqa": Example(
        {
            "201307251": {
                "imageId": "n161313",
                "question": "Is it on the left?",
                "answer": "no",
                "types": {"structural": "verify", "semantic": "rel"},
            },
            "201640614": {"imageId": "n235859", "question": "Who is it?", "answer": "girl"},
        },
        [
            Asked("201307251", f"Is it on the left?\n{WORD_OR_PHRASE}", ["n161313.jpg"], ("no",), "No.", (), "verify"),
            Asked("201640614", f"Who is it?\n{WORD_OR_PHRASE}", ["n235859.jpg"], ("girl",), "a girl"),
        ],
        0.5,
        ("imageId", "question", "answer"),
    ),
    "coco_caption": Example(
        {
            "images": [{"id": 42}, {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 8}],
            "annotations": [
                {"image_id": 42, "caption": "a dog runs on grass"},
                {"image_id": 7, "caption": "two red kites fly high"},
                {"image_id": 42, "caption": "a dog runs on grass"},
            ],
        },
        [
            Asked(
                "42",
                "Give a brief description of this image in one sentence.",
                ["COCO_val2014_000000000042.jpg"],
                ("a dog runs on grass",) * 2,
                "a dog runs on grass",
            ),
            Asked(
                "7",
                "Give a brief description of this image in one sentence.",
                ["COCO_val2014_000000000007.jpg"],
                ("two red kites fly high",),
                "a cat",
            ),
        ],
        5.0,  # 10 for a caption equal to its references, 0 for one without a word of them
        ("id",),
        split="val2014",
        num_left_out=1,
    ),
    "llava": Example(
        [
            {
                "image": "a.png",
                "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "it is 4"}],
            },
            {"conversations": [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "no"}]},
        ],
        [
            Asked("PATH[0]", "Which?", ["a.png"], ("it is 4",), "it is 4"),
            Asked("PATH[1]", "And?", [], ("no",), "No"),
        ],
        0.5,
        ("conversations",),
    ),
}


def first_entry(data: Any) -> dict[str, Any]:
    """The first entry of a file, to be damaged."""
    for key in ("questions", "data", "images"):
        if isinstance(data, dict) and key in data:
            return data[key][0]
    return data[0] if isinstance(data, list) else next(iter(data.values()))
