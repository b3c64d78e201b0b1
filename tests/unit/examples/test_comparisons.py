"""The small comparisons: every file of the folder resolves, and the scripts do what they say, without the network."""

import importlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from PIL import Image

from megavlm.benchmark.comparison import Chain, Comparison, load_comparison, plan_chains
from megavlm.data import BlendConfig
from megavlm.data.datasets import JsonlDatasetConfig
from megavlm.planning.parameters import count_recipe_parameters

FOLDER = Path(__file__).parents[3] / "examples" / "comparisons"
sys.path.insert(0, str(FOLDER))  # as Python does where the script is run
build_comparisons = importlib.import_module("build_comparisons")
pictures = importlib.import_module("pictures")
soup = importlib.import_module("soup")
sys.path.remove(str(FOLDER))

FILES = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}
COMPARISONS = [path for path, tree in FILES.items() if "variants" in tree]
SMALL = build_comparisons.Settings(num_single=2, num_page=3, num_strip=6, num_series=9, num_held_out=4, num_names=3)
EMOJI = [f"1f6{number:02x}" for number in range(40)]


def planned(path: Path) -> tuple[Comparison, list[Chain]]:
    comparison, for_recipes = load_comparison(path, [])
    return comparison, plan_chains(comparison, for_recipes, num_ranks=1)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both packages, with 40 emoji of five kinds and one flag."""
    folder = tmp_path_factory.mktemp("packages")
    stream = io.BytesIO()
    Image.new("RGBA", (96, 96), (200, 0, 0, 128)).save(stream, "WEBP")
    groups = [0, 3, 4, 7, 8]
    entries: dict[str, list[dict[str, Any]]] = {
        language: [
            {"hexcode": code.upper(), "label": f"{language} thing {number}", "group": groups[number % 5]}
            for number, code in enumerate(EMOJI)
        ]
        + [{"hexcode": "1F1E6-1F1E8", "label": "flag", "group": 9}]
        for language in ("en", "de", "fr")
    }
    entries["de"][0]["label"] = "a name of far too many letters"
    contents = {
        build_comparisons.PICTURES.name: {f"package/assets/{code}-fe0f.webp": stream.getvalue() for code in EMOJI},
        build_comparisons.LABELS.name: {
            f"package/{name}/data.json": json.dumps(e).encode() for name, e in entries.items()
        },
    }
    paths = {}
    for name, files in contents.items():
        paths[name] = folder / f"{len(paths)}.tgz"
        with tarfile.open(paths[name], "w:gz") as archive:
            for inside, content in files.items():
                member = tarfile.TarInfo(inside)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return paths


@pytest.fixture(scope="module")
def data(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What build_comparisons makes of them."""
    folder = tmp_path_factory.mktemp("data") / "comparisons"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_comparisons, "download", lambda package, _: packages[package.name])
        build_comparisons.build(SMALL, folder)
        yield folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def answers(folder: Path, name: str) -> list[str]:
    return [row["conversations"][-1]["value"] for row in rows(folder, name)]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_comparison_resolves_and_its_models_are_small(path: Path, data: Path) -> None:
    comparison, chains = planned(path)
    assert len(comparison.seeds) == 3
    # with the same seed a fresh connector would be the one that the start's other parts have grown up with
    assert not {FILES[FOLDER / f"{name}.yaml"]["training"].get("seed", 1) for name in ("model", "target")} & {
        *comparison.seeds
    }
    assert comparison.save == Path("runs/comparisons") / path.stem
    told = [str([stage.recipe.model_dump(exclude={"checkpoint": {"save"}}) for stage in c.stages]) for c in chains]
    assert len(set(told)) == len(chains) == 3 * len(comparison.variants) > 3, "two runs are alike"
    for chain in chains[: len(comparison.variants)]:
        for stage in chain.stages:
            tokenizer = stage.recipe.tokenizer.model_copy(update={"path": data / "tokenizer.model"})
            counts = count_recipe_parameters(stage.recipe.model_copy(update={"tokenizer": tokenizer}))
            assert 500_000 < counts.total() < 2_000_000


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_data_set_is_built(path: Path, data: Path) -> None:
    comparison, chains = planned(path)
    used = list(comparison.scores.values())
    for stage in (stage for chain in chains for stage in chain.stages):
        train = stage.recipe.data.train
        used += [source.dataset for source in train.sources] if isinstance(train, BlendConfig) else [train]
        used += [stage.recipe.data.valid] if stage.recipe.data.valid else []
    for dataset in used:
        if dataset.path.parts[0] == "data":
            found = JsonlDatasetConfig(path=data / dataset.path.relative_to("data/comparisons")).build()
            assert found.num_bad_rows == 0


def test_each_stage_names_what_it_starts_from() -> None:
    """Only start.yaml and target.yaml start from nothing."""
    starts = {path.stem: tree.get("checkpoint", {}).get("pretrained_checkpoint") for path, tree in FILES.items()}
    recipes = {path.stem: tree for path, tree in FILES.items() if "checkpoint" in tree}
    fresh = {
        name for name, tree in recipes.items() if starts[name] is None and tree["base"] in ("model.yaml", "start.yaml")
    }
    assert fresh == {"start", "target"}


def test_data_of_made_up_packages(data: Path) -> None:
    assert [len(answer) for answer in answers(data, "page_train")] == [9] * 3
    assert {len(answer) for answer in answers(data, "strip_test")} <= set(range(2, 7))
    assert answers(data, "coarse_test") == answers(data, "page_test")
    coarse, page = (Image.open(data / rows(data, f"{name}_test")[0]["image"]).size for name in ("coarse", "page"))
    assert coarse == (16, 16)
    assert page >= (54, 54)
    # four questions of 40 emoji for each part that is held out; the flag is none of the kinds
    parts = [{row["image"] for row in rows(data, f"kind_{part}")} for part in ("train", "select", "test")]
    assert [len(part) for part in parts] == [32, 4, 4]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    words = rows(data, "words_train")
    assert words == rows(data, "words_test")
    assert len(words) == 3 * 2
    asked = words[0]["conversations"][0]["value"]
    assert asked.startswith("What is en thing ")
    assert words[0]["conversations"][1]["value"] == asked.removeprefix("What is en").removesuffix(" in German?").join(
        ["de", ""]
    )


def test_a_series_tells_what_its_letters_mean(data: Path) -> None:
    kinds = {row["image"]: row["conversations"][1]["value"] for row in rows(data, "kind_train")}
    series = rows(data, "series_train")
    assert len(series) == 9
    for row in series:
        letters = [turn["value"] for turn in row["conversations"][1::2]]
        meaning = {
            letter: {kinds[image] for image, told in zip(row["images"], letters, strict=True) if told == letter}
            for letter in letters
        }
        assert len(letters) == 5
        assert set(letters[:4]) == set(letters), "the letter that is asked for was shown"
        assert all(len(kind) == 1 for kind in meaning.values())
    wrong = [a != b for a, b in zip(answers(data, "noisy_train"), answers(data, "kind_train"), strict=True)]
    assert not any(wrong[::2])
    assert sum(wrong[1::2]) > len(wrong) / 4


def test_the_same_settings_give_the_same_files(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = data.with_name("again")
    build_comparisons.build(SMALL, again)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert len(files) > 60
    assert [(again / file).read_bytes() == (data / file).read_bytes() for file in files] == [True] * len(files)
    capsys.readouterr()
    build_comparisons.build(SMALL, again)
    assert "already built" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"out=.*again: exists with other settings\. Choose another"):
        build_comparisons.build(build_comparisons.Settings(), again)
    shutil.rmtree(again)


def test_digits_stand_in_their_cells() -> None:
    rng = numpy.random.default_rng(0)
    drawn = numpy.asarray(
        pictures.draw_digits("12345", 3, (30, 20), build_comparisons.Scans(held_out=True), rng), numpy.int64
    )
    assert drawn.shape == (40, 90)
    cells = drawn.reshape(2, 20, 3, 30).swapaxes(1, 2).reshape(6, -1)
    depth = cells.max(axis=1) - cells.min(axis=1)
    assert (depth[:5] > 100).all(), "ink in five cells"
    assert depth[5] == 0, "none in the last"


def test_soup_table(tmp_path: Path) -> None:
    """The best single model is the one that was best on the half that the soup was chosen on."""
    scores = {"a": (0.5, 0.25), "b": (0.25, 0.75)}  # test, select
    for name, (test, _) in scores.items():
        write_evaluation(tmp_path / name / "seed2" / "soup_member", test)
    write_evaluation(tmp_path / "soup-seed2", 0.375)
    models = [{"name": name, "score": select} for name, (_, select) in scores.items()]
    (tmp_path / "soup-seed2/soup.json").write_text(json.dumps({"models": models, "order": ["b", "a"]}))
    lines = soup.table(tmp_path, ["seed2"], ["a", "b"]).splitlines()
    assert lines[2] == "| seed2 | 50.0% | 25.0% | 25.0% | 37.5% | 2 |"
    assert len({line.count("|") for line in lines}) == 1


def test_soup_needs_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"save=.*: holds no comparison\. Run `megavlm bench compare`"):
        soup.main([str(tmp_path)])


def write_evaluation(folder: Path, exact_match: float) -> None:
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"score": {"exact_match": exact_match}}), encoding="utf-8")
