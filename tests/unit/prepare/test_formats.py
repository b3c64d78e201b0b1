"""What each format makes of its files."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_up_source import llava, write_image, write_jsonl

from megavlm.prepare import FORMATS, FormatOptions
from megavlm.prepare.formats import find_format
from megavlm.prepare.formats.text import split_text
from megavlm.prepare.item import Row, RowError

PAGE = """<html><head><title>no</title><script>if (1 < 2) no()</script></head><body>
<nav>menu <ul><li>no</ul></nav>
<h1>Title &amp; more</h1><p>First   part
of <b>it</b>.<img src="images/a%20b.png?x=1" alt="no"></p>
<figure><img src='https://example.org/far.png'/><figcaption>Caption</figcaption></figure>
<pre>x = 1
  y = 2</pre><table><tr><td>1</td><td>2</td></tr></table><script src="x"/>after</body></html>"""


def read(name: str, source: Path, options: FormatOptions | None = None) -> list[Row]:
    format_ = FORMATS[name](source, options or FormatOptions())
    return [row for item in format_.items() for row in format_.rows(item)]


def test_a_page_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGE)
    [row] = read("html", tmp_path / "page.html")
    assert row.where == "page.html"
    assert row.image_root == tmp_path
    assert list(zip(row.content["texts"], row.content["images"], strict=True)) == [
        ("Title & more\n\nFirst part of it.", None),
        (None, "images/a b.png"),
        (None, "https://example.org/far.png"),
        ("\n\nCaption\n\nx = 1\n  y = 2\n\n1 2\n\nafter", None),
    ]


@pytest.mark.parametrize("text", ["", "<p>", "<html><head>", "<svg><svg></svg>", "<nav>" * 50 + "</nav>"])
def test_odd_pages_give_no_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "page.html").write_text(text)
    [row] = read("html", tmp_path / "page.html")
    assert row.content == {"texts": [], "images": []}


def test_mmc4_puts_images_before_their_sentences(tmp_path: Path) -> None:
    images = [{"image_name": name, "matched_text_index": place} for name, place in (("a", 1), ("b", 0), ("c", 1))]
    source = write_jsonl(tmp_path / "docs.jsonl", [{"text_list": ["One.", "Two."], "image_info": images}])
    assert find_format(source) == "mmc4"
    [row] = read("mmc4", source)
    assert row.content == {
        "texts": [None, "One. ", None, None, "Two."],
        "images": ["b", None, "a", "c", None],
    }


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text_list": "x", "image_info": []}, r"text_list is no list of texts"),
        ({"text_list": ["x"], "image_info": [1]}, r"image_info is no list of objects"),
        (
            {"text_list": ["x"], "image_info": [{"matched_text_index": 1}]},
            r"matched_text_index is 1, and text_list has 1",
        ),
        ({"text_list": ["x"], "image_info": [{"matched_text_index": True}]}, r"matched_text_index is True"),
        ({"messages": []}, r"the row has no text_list \(keys: messages\)"),
    ],
)
def test_bad_rows_of_mmc4(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    with pytest.raises(RowError, match=text):
        read("mmc4", write_jsonl(tmp_path / "docs.jsonl", [row]))


def test_captions_beside_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a/cat.png")
    (tmp_path / "a/cat.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    write_image(tmp_path / "b/dog.PNG".replace("PNG", "png"))
    write_image(tmp_path / "c/listed.png")
    write_jsonl(tmp_path / "c/metadata.jsonl", [{"file_name": "listed.png", "text": "a list"}, {"file_name": "x"}])
    assert find_format(tmp_path) == "imagefolder"
    format_ = FORMATS["imagefolder"](tmp_path, FormatOptions())
    rows, bad = [], []
    for item in format_.items():
        try:
            rows += format_.rows(item)
        except RowError as error:
            bad.append((error.where, error.message))
    assert [(row.content, row.image_root.name) for row in rows] == [
        ({"image": "listed.png", "caption": "a list"}, "c"),
        ({"image": "cat.png", "caption": "a cat"}, "a"),
    ]
    assert bad == [
        ("c/metadata.jsonl:2", "needs file_name, and text or caption, each once (keys: file_name)."),
        ("b/dog.png", "has no caption: dog.txt is not there."),
    ]


@pytest.mark.parametrize("most", [2, 7, 20, 1000])
def test_a_cut_text_loses_nothing_but_blanks(most: int) -> None:
    text = "one two three\nfour five\n\nsix " + "x" * 50 + "\n\nend"
    pieces = split_text(text, most)
    assert all(0 < len(piece) <= most for piece in pieces)
    assert "".join("".join(piece.split()) for piece in pieces) == "".join(text.split())


def test_cuts_stand_between_paragraphs() -> None:
    text = "\n\n".join(f"paragraph {number} of some length" for number in range(9))
    for piece in split_text(text, 100):
        assert piece.startswith("paragraph")
        assert piece.endswith("length")


def test_text_files_are_cut_into_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("aa bb cc")
    (tmp_path / "a.md").write_text("short")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    format_ = FORMATS["text"](tmp_path, FormatOptions(max_document_characters=6))
    items = format_.items()
    rows = [(row.where, row.content["text"]) for item in items[:2] for row in format_.rows(item)]
    assert rows == [("a.md#1", "short"), ("b.txt#1", "aa bb"), ("b.txt#2", "cc")]
    with pytest.raises(RowError, match=r"is not UTF-8 text \(byte 0\)"):
        format_.rows(items[2])


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"a.jsonl": json.dumps(llava(1))}, "rows"),
        ({"a.jsonl": '{broken\n{"text_list": []}'}, "mmc4"),
        ({"a.json": json.dumps([{"text_list": []}])}, "mmc4"),
        ({"a.jsonl": '{"text_list": []}', "b.json": "[]"}, "rows"),
        ({"x/a.html": "<p>", "x/a.png": ""}, "html"),
        ({"a.png": "", "a.txt": ""}, "imagefolder"),
        ({"a.txt": ""}, "text"),
    ],
)
def test_formats_are_found(tmp_path: Path, files: dict[str, str], name: str) -> None:
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content)
    assert find_format(tmp_path) == name
    if len(files) == 1:
        assert find_format(tmp_path / next(iter(files))) == name


def test_unknown_sources(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"the ending '.parquet' says nothing. Name the format with --format=llava\|"):
        find_format(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"holds nothing that is known \(.parquet\)"):
        find_format(tmp_path)
    with pytest.raises(ValueError, match=r"gone: is no file and no folder"):
        find_format(tmp_path / "gone")
    (tmp_path / "rows.json").write_text("{")
    with pytest.raises(ValueError, match=r"rows.json: is not valid JSON"):
        read("rows", tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text("3")
    with pytest.raises(ValueError, match=r"rows.json: holds one int, not a list of rows"):
        read("rows", tmp_path / "rows.json")
    for name in ("html", "text"):
        with pytest.raises(ValueError, match=r"has no \.\w+ or"):
            read(name, tmp_path)
    with pytest.raises(ValueError, match=r"is no folder. --format=imagefolder needs one"):
        read("imagefolder", tmp_path / "rows.json")


def test_a_needed_shape_is_needed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [llava(1)])
    assert len(read("llava", source)) == len(read("sharegpt", source)) == 1
    with pytest.raises(RowError, match=r"the row has no messages \(keys: conversations, id\)"):
        read("openai", source)


def test_long_runs_of_blanks_take_no_time(tmp_path: Path) -> None:
    """Each would take minutes if its time grew with the square of its length."""
    blanks = " " * 2_000_000
    (tmp_path / "page.html").write_text(f"<pre>a{blanks}b\n{blanks}\n\n\nc</pre>")
    [row] = read("html", tmp_path / "page.html")
    assert len(row.content["texts"][0]) > 2_000_000
    assert len(split_text("word " * 2_000_000, 1000)) > 9_000
