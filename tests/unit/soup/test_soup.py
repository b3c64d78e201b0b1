"""Soups: the mean itself, who goes in, what is refused, and what is reported."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_release import write_model
from tiny_vlm import TINY

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.cli import main
from megavlm.cli.without_cuda import environment_before, restart_without_cuda
from megavlm.config import load_recipe
from megavlm.recipe import Recipe
from megavlm.soup import Candidate, ScoreSettings, SoupSettings, make_soup
from megavlm.soup.choice import choose_greedily, choose_maximum
from megavlm.soup.mean import shares


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models; every number of the second is 0, of the third 6."""
    folder = tmp_path_factory.mktemp("runs")
    constant = {1: 0.0, 2: 6.0}
    paths = [write_model(folder / "a", seed=1)]
    for place, number in constant.items():
        paths.append(
            write_model(folder / "abc"[place], value=lambda _, tensor, number=number: torch.full(tensor.shape, number))
        )
    return paths


def weights_of(run: Path) -> CheckpointWeights:
    return CheckpointWeights(run / "release")


def test_the_mean_is_that_of_every_tensor(runs: list[Path], tmp_path: Path) -> None:
    make_soup(runs, tmp_path / "soup", SoupSettings(weights=(2, 1, 1)))
    mixed, first = weights_of(tmp_path / "soup"), weights_of(runs[0])
    assert set(mixed) == set(first)
    for key in mixed:
        # 0.5 a + 0.25 * 0 + 0.25 * 6; worst difference measured: 2.4e-7 of numbers up to 5
        torch.testing.assert_close(mixed[key], first[key] / 2 + 1.5, rtol=0, atol=1e-6)
    report = json.loads((tmp_path / "soup/soup.json").read_text())
    assert [model["share"] for model in report["models"]] == [0.5, 0.25, 0.25]
    assert "| soup | not measured | 1.000 |" in (tmp_path / "soup/soup.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_equal_models_is_that_model(dtype: torch.dtype, tmp_path: Path) -> None:
    same = [write_model(tmp_path / name, seed=4, dtype=dtype) for name in "abc"]
    make_soup(same, tmp_path / "soup", SoupSettings())
    mixed, first = weights_of(tmp_path / "soup"), weights_of(same[0])
    assert all(torch.equal(mixed[key], first[key]) and mixed[key].dtype == dtype for key in first)


def test_the_soup_is_a_run_folder_of_its_own(runs: list[Path], tmp_path: Path) -> None:
    soup = make_soup(runs[1:], tmp_path / "soup", SoupSettings())
    recipe = load_recipe(soup.checkpoint / "recipe.yaml", [], Recipe)
    assert recipe.checkpoint.save == tmp_path / "soup"
    assert (soup.checkpoint / "tokenizer/vocab.txt").read_bytes() == b"a b"
    with pytest.raises(ValueError, match="exists already"):
        make_soup(runs[1:], tmp_path / "soup", SoupSettings())


def score_command(tmp_path: Path) -> str:
    """A command, quick to start, that likes weights of 3: 0 for a model that is full of them, else -3."""
    script = tmp_path / "score.py"
    script.write_text(
        "import pathlib, struct, sys\n"
        "files = [path.read_bytes() for path in pathlib.Path(sys.argv[1], 'release').glob('*.distcp')]\n"
        "wanted = struct.pack('<f', 3.0) * 64\n"
        "print('score:')\nprint(0 if any(wanted in file for file in files) else -3)\n"
    )
    return f"{sys.executable} {script} {{folder}}"


def test_greedy_scores_soups_as_it_goes(runs: list[Path], tmp_path: Path) -> None:
    command = score_command(tmp_path)  # half of the second and half of the third is best
    soup = make_soup(runs[1:], tmp_path / "soup", SoupSettings("greedy", score=ScoreSettings(command)))
    assert [candidate.score for candidate in soup.candidates] == [-3, -3]
    assert soup.choice.members == (0, 1)
    assert soup.choice.score == 0
    [trial] = json.loads((tmp_path / "soup/soup.json").read_text())["trials"]
    assert trial == {"members": [str(runs[1]), str(runs[2])], "score": 0.0, "kept": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["score.py", "soup"]  # no trial is left behind


# Scores of sets of the models 0 to 3: what each alone has, and what mixing brings.
ALONE = (0.5, 0.7, 0.6, 0.7)
MIXED = {(1, 3): 0.7, (1, 3, 2): 0.65, (1, 3, 0): 0.9}


@pytest.mark.parametrize("sign", [1, -1])
def test_greedy_keeps_what_does_no_harm(sign: int) -> None:
    candidates = [Candidate("abcd"[place], sign * score) for place, score in enumerate(ALONE)]
    choice = choose_greedily(candidates, lambda members: sign * MIXED[members], lower_is_better=sign < 0)
    assert choice.members == (1, 3, 0)
    assert choice.score == sign * 0.9
    assert [trial.kept for trial in choice.trials] == [True, False, True]


def test_maximum_takes_the_best() -> None:
    candidates = [Candidate("abcd"[place], score) for place, score in enumerate(ALONE)]
    assert choose_maximum(candidates, 3).members == (1, 3, 2)
    assert choose_maximum(candidates, 2, lower_is_better=True).members == (0, 2)
    with pytest.raises(ValueError, match=r"--top=5: there are 4 models"):
        choose_maximum(candidates, 5)
    with pytest.raises(ValueError, match=r"b: has no score"):
        choose_maximum([Candidate("a", 1.0), Candidate("b", None)], 1)


def write_evaluation(run: Path, score: float, digest: str = "") -> None:
    digest = digest or hashlib.sha256((run / "release/manifest.json").read_bytes()).hexdigest()[:16]
    settings = {"checkpoint": {"name": "release", "manifest": f"manifest.json (sha256 {digest})"}}
    (run / "evaluation.json").write_text(json.dumps({"score": {"value": score}, "settings": settings}))


def test_scores_of_eval_are_read_if_they_are_of_these_weights(tmp_path: Path) -> None:
    runs = [write_model(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    for run, score in zip(runs, (0.1, 0.3, 0.2), strict=True):
        write_evaluation(run, score)
    soup = make_soup(runs, tmp_path / "soup", SoupSettings("maximum", top=2))
    assert soup.choice.members == (1, 2)
    write_evaluation(runs[0], 0.5, digest="0" * 16)
    with pytest.raises(ValueError, match=r"a/evaluation\.json: is of another checkpoint"):
        make_soup(runs, tmp_path / "again", SoupSettings("maximum", top=2))
    soup = make_soup(runs, tmp_path / "mean", SoupSettings())  # nothing is chosen by scores
    assert [candidate.score for candidate in soup.candidates] == [None, 0.3, 0.2]
    (runs[0] / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a/evaluation\.json: is no result of megavlm eval"):
        make_soup(runs, tmp_path / "again", SoupSettings("maximum", top=2))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("true {folder}", r"its last line is no number, and it left no .*evaluation\.json"),
        ("echo nan {folder}", r"its last line is no number"),
        ("false {folder}", r"ended with 1 for"),
        ("no-such-command {folder}", r"cannot be run"),
        ("echo 1", r"does not name \{folder\}"),
        ("echo 'a {folder}", r"cannot be run"),
    ],
)
def test_commands_that_do_not_score(command: str, message: str, runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_soup(runs[1:], tmp_path / "soup", SoupSettings("greedy", score=ScoreSettings(command)))
    assert not list(tmp_path.iterdir())


def changed(**language: Any) -> dict[str, Any]:
    return {**TINY, "language": {**TINY["language"], **language}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": changed(rotary_base=500)}, r"b: model\.language\.rotary_base=500, and in .*a 10000"),
        ({"model": changed(ffn_hidden_size=32)}, r"language\.ffn_hidden_size=32, and in .*a 64"),
        ({"dtype": torch.bfloat16}, r"b: \S+ is bfloat16 \[.*\], and in .*a float32 \["),
        ({"vocabulary": b"b a"}, r"b: its tokenizer/vocab\.txt is not that of"),
    ],
)
def test_models_that_are_not_alike(settings: dict[str, Any], message: str, runs: list[Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "b", **settings)
    with pytest.raises(ValueError, match=message):
        make_soup([runs[0], other], tmp_path / "soup", SoupSettings())
    assert not (tmp_path / "soup").exists()


def test_lora_is_not_mixed(tmp_path: Path) -> None:
    model = changed(lora={"r": 2})
    runs = [write_model(tmp_path / name, model, seed=1) for name in "ab"]
    with pytest.raises(ValueError, match=r"a: has LoRA, and the mean of A times the mean of B"):
        make_soup(runs, tmp_path / "soup", SoupSettings())


def test_numbers_that_are_not_finite_are_named(runs: list[Path], tmp_path: Path) -> None:
    def value(key: str, tensor: Any) -> torch.Tensor:
        filled = torch.zeros(tensor.shape)
        if key == "connector.linear_fc2.weight":
            filled[0, 3] = float("inf")
        return filled

    other = write_model(tmp_path / "b", value=value)
    with pytest.raises(ValueError, match=r"b: connector\.linear_fc2\.weight holds numbers that are not finite"):
        make_soup([runs[0], other], tmp_path / "soup", SoupSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_damage_is_found_before_anything_is_mixed(runs: list[Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "b")
    [weights, *_] = sorted((other / "release").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=weights.name):
        make_soup([runs[0], other], tmp_path / "soup", SoupSettings())


@pytest.mark.parametrize(
    ("given", "message"),
    [((1, 2), r"--weights=1,2: 2 for 3 models"), ((1, 0, 1), r"0 is not above 0"), ((1, float("inf"), 1), r"inf is")],
)
def test_wrong_weights(given: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares(given, 3)


@pytest.mark.parametrize(
    ("settings", "num_runs", "message"),
    [
        (SoupSettings(), 1, r"a soup is of two models or more"),
        (SoupSettings("maximum"), 2, r"--method=maximum: needs --top"),
        (SoupSettings(top=2), 2, r"--method=average: has no --top"),
        (SoupSettings("greedy"), 2, r"--method=greedy: .* Give --score-command"),
        (SoupSettings("maximum", (1, 1), 2), 2, r"--weights: belong to --method average"),
    ],
)
def test_options_that_do_not_fit(
    settings: SoupSettings, num_runs: int, message: str, runs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_soup(runs[:num_runs], tmp_path / "soup", settings)


def test_a_model_is_named_once(runs: list[Path], tmp_path: Path) -> None:
    for again in (runs[0], runs[0] / "release"):
        with pytest.raises(ValueError, match=r"a/release stands twice"):
            make_soup([runs[0], again], tmp_path / "soup", SoupSettings())
    with pytest.raises(ValueError, match=r"source=.*none: holds no checkpoint"):
        make_soup([runs[0], tmp_path / "none"], tmp_path / "soup", SoupSettings())


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["soup", str(tmp_path / "soup"), str(runs[1]), str(runs[2]), "--weights", "1,3"])
    assert "average soup" in capsys.readouterr().out
    assert weights_of(tmp_path / "soup")["connector.linear_fc2.weight"].unique().tolist() == [4.5]


def test_the_command_sees_the_devices_that_were_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are learnt without CUDA; what scores the models is not kept from it."""
    for before in (None, "2,3"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
        monkeypatch.delenv("MEGAVLM_CUDA_VISIBLE_DEVICES", raising=False)
        seen: list[dict[str, str]] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("os.execve", lambda path, words, environment: seen.append(environment))  # noqa: B023
        if before is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        restart_without_cuda()
        assert seen[0]["CUDA_VISIBLE_DEVICES"] == ""
        for name in ("CUDA_VISIBLE_DEVICES", "MEGAVLM_CUDA_VISIBLE_DEVICES"):
            if name in seen[0]:
                monkeypatch.setenv(name, seen[0][name])
        assert environment_before().get("CUDA_VISIBLE_DEVICES") == before
        assert "MEGAVLM_CUDA_VISIBLE_DEVICES" not in environment_before()


def test_models_that_were_imported(tmp_path: Path) -> None:
    """Such a checkpoint has a ``model.yaml`` and no recipe, and so has the soup."""
    runs = [write_model(tmp_path / name, seed=seed, trained=False) for seed, name in enumerate("ab")]
    soup = make_soup(runs, tmp_path / "soup", SoupSettings())
    assert (soup.checkpoint / "model.yaml").read_bytes() == (runs[0] / "release/model.yaml").read_bytes()
    assert not (soup.checkpoint / "recipe.yaml").exists()


def test_checkpoints_of_one_run(tmp_path: Path) -> None:
    """They can be mixed, but a command that is given the run folder would score the newest for both."""
    run = write_model(tmp_path / "run", seed=1)
    shutil.copytree(run / "release", run / "iter_0000007")
    runs = [run / "release", run / "iter_0000007"]
    soup = make_soup(runs, tmp_path / "soup", SoupSettings())
    assert soup.shares == (0.5, 0.5)
    with pytest.raises(
        ValueError, match=r"release: --score-command is given the run folder, whose newest .*iter_0000007"
    ):
        make_soup(runs, tmp_path / "again", SoupSettings(score=ScoreSettings("echo 1 {folder}")))
