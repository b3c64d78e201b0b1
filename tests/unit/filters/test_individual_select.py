"""Individual Select: what joins, in which order, and that no trial is made twice."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megavlm.config import load_recipe
from megavlm.filters import SelectionConfig, select_datasets

TABLE = {"a": 50.0, "a+b": 49.0, "c+a": 52.0, "a+c+d": 52.5, "a+d": 51.0, "a+b+c": 53.0, "a+b+c+d": 53.1}


def config(**settings: Any) -> SelectionConfig:
    return SelectionConfig.model_validate({"start": ["a"], "candidates": ["b", "c", "d"], "table": TABLE} | settings)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({}, ["a", "c", "d"]),
        ({"min_gain": 0.5}, ["a", "c"]),
        ({"order": "best"}, ["a", "c", "b", "d"]),
        ({"order": "best", "min_gain": 0.1}, ["a", "c", "b"]),
        ({"candidates": ["b"]}, ["a"]),
        ({"start": [], "candidates": ["a", "b"]}, ["a"]),
    ],
)
def test_what_joins(tmp_path: Path, settings: dict[str, Any], chosen: list[str]) -> None:
    assert select_datasets(config(**settings), tmp_path) == chosen
    tree = json.loads((tmp_path / "choice.json").read_text())
    assert tree["chosen"] == chosen
    assert tree["score"] == TABLE["c+a" if chosen == ["a", "c"] else "+".join(sorted(chosen))]
    assert (tmp_path / "report.png").stat().st_size > 5_000


SCRIPT = """
import json, pathlib, sys
names, folder = sys.argv[1].split("+"), pathlib.Path(sys.argv[2])
if "broken" in names: print("out of disk"); sys.exit(3)
value = "much" if "text" in names else len(names) - 2 * ("bad" in names)
(folder / "evaluation.json").write_text(json.dumps({"score": {"value": value}}))
with open(sys.argv[3], "a") as log: log.write(sys.argv[1] + "\\n")
"""


@pytest.fixture
def command(tmp_path: Path) -> str:
    (tmp_path / "trial.py").write_text(SCRIPT)
    return f"{sys.executable} {tmp_path}/trial.py {{names}} {{folder}} {tmp_path}/log.txt"


def test_a_command_makes_scores_once(tmp_path: Path, command: str) -> None:
    chosen = config(table=None, candidates=["bad", "c"], command=command)
    for _ in range(2):
        assert select_datasets(chosen, tmp_path / "out") == ["a", "c"]
    more = chosen.model_copy(update={"candidates": ["bad", "c", "d"]})
    assert select_datasets(more, tmp_path / "out") == ["a", "c", "d"]
    assert (tmp_path / "log.txt").read_text().split() == ["a", "a+bad", "a+c", "a+c+d"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"candidates": ["broken"]}, r"command: ends with 3 for 'a\+broken'; what it says is in .*output.txt"),
        ({"candidates": ["text"]}, r"score_key=score.value: is 'much' in .*evaluation.json, not a number"),
        ({"score_key": "score.mean"}, r"score_key=score.mean: is not in .*\(KeyError: 'mean'\)"),
        ({"score_file": "x.json"}, r"score_file=.*x.json: cannot be read"),
        ({"command": "/no/such/program"}, r"command='/no/such/program': cannot be run"),
        ({"command": None, "table": {"a": 1}}, r"table: has no score of 'a\+b', and there is no command"),
    ],
)
def test_trials_that_fail(tmp_path: Path, command: str, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        select_datasets(config(**({"table": None, "command": command} | settings)), tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("candidates: [b, a]", r"a stand\(s\) twice in start and candidates"),
        ("candidates: [b+c]", r"'b\+c' is empty or has a '\+'"),
        ("candidates: [b]\ntable: null", r"neither table nor command says where scores come from"),
        ("candidates: []", r"candidates"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, line: str, text: str) -> None:
    content = f"start: [a]\n{line}\n" + ("" if "table" in line else "table: {a: 1}\n")
    (tmp_path / "choice.yaml").write_text(content)
    with pytest.raises(ValueError, match=text):
        load_recipe(tmp_path / "choice.yaml", [], SelectionConfig)
