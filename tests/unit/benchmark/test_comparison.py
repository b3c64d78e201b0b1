"""The file of a comparison: what it may say, what recipes come out, what is refused before anything runs."""

from pathlib import Path

import pytest
from made_up import plan, write_comparison

from megavlm.benchmark.comparison import Comparison, check_inputs, load_comparison
from megavlm.recipe import Recipe


def test_every_run_gets_its_recipe(tmp_path: Path) -> None:
    _, chains = plan(write_comparison(tmp_path), "training.train_iters=7", "data.seq_length=128")
    assert [(chain.variant, chain.seed) for chain in chains] == [("tags", 1), ("none", 1), ("tags", 2), ("none", 2)]
    chain = chains[3]
    first, second = (stage.recipe for stage in chain.stages)
    assert first.checkpoint.save == tmp_path / "runs/none/seed2/first"
    assert first.checkpoint.pretrained_checkpoint == []
    assert second.checkpoint.save == tmp_path / "runs/none/seed2/second"
    assert [source.path for source in second.checkpoint.pretrained_checkpoint] == [first.checkpoint.save]
    for recipe in (first, second):
        assert (recipe.training.seed, recipe.data.tile_tags) == (2, "none")
        # the command line stands above the comparison's own override, which stands above the recipe's file
        assert (recipe.training.train_iters, recipe.data.seq_length) == (7, 128)
    assert chains[2].last.recipe.data.tile_tags == "1d"


def test_the_command_line_stands_above_a_variant(tmp_path: Path) -> None:
    _, chains = plan(write_comparison(tmp_path), "data.tile_tags=2d_grid")
    assert {chain.last.recipe.data.tile_tags for chain in chains} == {"2d_grid"}


def test_an_override_may_be_for_one_stage(tmp_path: Path) -> None:
    variants = {"x": ["second.data.tile_tags=none", "data.seq_length=200", "first.training.optimizer.lr=0.25"]}
    path = write_comparison(tmp_path, variants=variants, overrides=["first.training.train_iters=9"])
    first, second = (stage.recipe for stage in plan(path)[1][0].stages)
    assert (first.data.tile_tags, second.data.tile_tags) == ("1d", "none")
    assert (first.data.seq_length, second.data.seq_length) == (200, 200)
    assert (first.training.optimizer.lr, second.training.optimizer.lr) == (0.25, 0.001)
    assert (first.training.train_iters, second.training.train_iters) == (9, 20)


def test_stages_whose_names_begin_alike(tmp_path: Path) -> None:
    overrides = ["second.b.data.seq_length=99", "second.data.seq_length=98"]
    path = write_comparison(tmp_path, variants={"x": overrides}, stages=["second.yaml", "second.b.yaml"])
    (tmp_path / "second.b.yaml").write_bytes((tmp_path / "second.yaml").read_bytes())
    assert [stage.recipe.data.seq_length for stage in plan(path)[1][0].stages] == [98, 99]


def test_each_run_is_scored_on_its_own(tmp_path: Path) -> None:
    _, chains = plan(write_comparison(tmp_path, scores={"text": {"kind": "jsonl", "path": "words.jsonl"}}))
    [score] = chains[3].scores
    assert (score.name, score.dataset.path) == ("text", Path("words.jsonl"))
    assert score.folder == tmp_path / "runs/none/seed2/second/scores/text"


def test_keys_of_the_comparison_on_the_command_line(tmp_path: Path) -> None:
    path = write_comparison(tmp_path)
    comparison, for_recipes = load_comparison(
        path, ["seeds=[7]", "save=elsewhere", "speed.rounds=9", "model.language.num_layers=2", "train=false"]
    )
    assert (comparison.seeds, comparison.save, comparison.train) == ([7], Path("elsewhere"), False)
    assert comparison.speed is not None
    assert (comparison.speed.rounds, comparison.speed.steps) == (9, 3)
    assert for_recipes == ["model.language.num_layers=2"]
    assert comparison.stages == [tmp_path / "first.yaml", tmp_path / "second.yaml"]


def test_no_key_could_be_meant_for_both() -> None:
    assert not Comparison.model_fields.keys() & Recipe.model_fields.keys()


def test_folders_with_odd_names_reach_the_recipe(tmp_path: Path) -> None:
    _, chains = plan(write_comparison(tmp_path, save="runs: a #1, [b]"))
    assert chains[0].last.folder == Path("runs: a #1, [b]/tags/seed1/second")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "variant={}: unknown key. Did you mean 'variants'"),
        ({"speed": {"round": 2}}, "speed.round=2: unknown key. Did you mean 'rounds'"),
        ({"speed": {"rounds": 0}}, "speed.rounds=0: Input should be greater than 0"),
        ({"stages": []}, r"stages=\[\]: List should have at least 1 item"),
        ({"variants": {}}, "variants={}: Dictionary should have at least 1 item"),
        ({"variants": {"x": "data.tile_tags=none"}}, "variants.x='data.tile_tags=none': Input should be a valid list"),
        ({"variants": {"../x": []}}, "variants='../x': is also a folder's name.*Rename it"),
        ({"scores": {"a b": {"kind": "jsonl", "path": "x"}}}, "scores='a b': is also a folder's name.*Rename it"),
        ({"scores": {"text": {"kind": "jsonl", "path": "x", "limt": 2}}}, "scores.text.limt=2: unknown key.*'limit'"),
        (
            {"variants": {"x": ["second.checkpoint.save=here"]}},
            "variants.x='checkpoint.save=here': a comparison sets checkpoint.save itself. Use `save`",
        ),
        ({"seeds": [1, 2, 1]}, "seeds=1, 2, 1: 1 is there twice, and both would share a run folder. Rename or remove"),
        ({"stages": ["a/s.yaml", "b/s.yaml"]}, "stages=s, s: s is there twice"),
        ({"train": False, "speed": None}, "train=False: and speed=null, so there is nothing to do"),
        ({"overrides": ["training.seed=3"]}, "overrides='training.seed=3': a comparison sets.*Use `seeds`"),
        (
            {"variants": {"x": ["checkpoint.save=here"]}},
            "variants.x='checkpoint.save=here': a comparison sets checkpoint.save itself. Use `save`",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_files(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write_comparison(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_comparison(path, [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seds=1", "override='seds=1': 'seds' is no key of a comparison or a recipe. Did you mean 'seeds'"),
        ("trainig.seed=1", "Did you mean 'training'"),
        ("xyz=1", "A comparison has stages, overrides, variants"),
        ("training.seed=1", "command line='training.seed=1': a comparison sets training.seed itself. Use `seeds`"),
        ("speed.rounds", "override='speed.rounds': is not of the form"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    path = write_comparison(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_comparison(path, [override])


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("data.tile_tag=none", "variants.bad, stage first: recipe=.*\n.*tile_tag='none': unknown key. Did you mean"),
        (
            "second.data.tile_tag=none",
            "variants.bad, stage second: recipe=.*\n.*tile_tag='none': unknown key. Did you mean",
        ),
        ("third.data.tile_tags=none", "variants.bad, stage first: recipe=.*\n.*third=.*: unknown key"),
        ("training.micro_batch_size=5", "variants.bad, stage first: .*global_batch_size"),
        ("data.valid=null", "variants.bad: data.valid=None in its last stage second: there is nothing to evaluate on"),
    ],
)
def test_a_wrong_variant_is_named_before_anything_runs(tmp_path: Path, variant: str, message: str) -> None:
    path = write_comparison(tmp_path, variants={"good": [], "bad": [variant]})
    with pytest.raises(ValueError, match=message):
        plan(path)


def test_without_training_no_validation_data_is_needed(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, variants={"x": ["data.valid=null"]}, train=False)
    assert len(plan(path)[1]) == 2


def test_missing_files_are_told_before_the_first_run(tmp_path: Path) -> None:
    _, chains = plan(write_comparison(tmp_path), "tokenizer.path=nowhere.model")
    with pytest.raises(ValueError, match=r"variants\.tags, stage first: .*nowhere\.model"):
        check_inputs(chains)


def test_missing_scores_are_told_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavlm.benchmark.comparison.build_processor", lambda recipe: None)  # there is no tokenizer
    data = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    (tmp_path / "rows.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n', encoding="utf-8"
    )
    path = write_comparison(tmp_path, scores={"text": {"kind": "jsonl", "path": "nowhere.jsonl"}})
    _, chains = plan(path, f"data.train={data}", f"data.valid={data}")
    with pytest.raises(ValueError, match=r"variants\.tags, stage first: dataset\.path=nowhere\.jsonl: cannot be read"):
        check_inputs(chains)
