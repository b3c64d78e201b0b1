"""Learning rates that a recipe gives as a law, against the published ones."""

from pathlib import Path

import pytest

from megavlm.config import dump_recipe, load_recipe
from megavlm.engines.learning_rate import mm1_learning_rate
from megavlm.recipe import Recipe

TINY = Path(__file__).parents[3] / "examples/nvlm/tiny.yaml"
MM1 = "training.optimizer.lr={law: mm1, num_parameters: 3.0e9}"

# Peak learning rates of MM1's models, one digit each (arXiv 2403.09611).
PUBLISHED = {3e9: "6e-05", 7e9: "4e-05", 30e9: "2e-05"}


@pytest.mark.parametrize("num_parameters", PUBLISHED)
def test_mm1_law_gives_the_published_rates(num_parameters: float) -> None:
    assert f"{mm1_learning_rate(num_parameters):.0e}" == PUBLISHED[num_parameters]


def test_mm1_law_is_a_power_law() -> None:
    """Ten times the parameters divide the rate by 10 ** 0.4214 = 2.639, wherever one starts."""
    for num_parameters in (9e6, 85e6, 302e6, 1.2e9):
        ratio = mm1_learning_rate(num_parameters) / mm1_learning_rate(10 * num_parameters)
        assert ratio == pytest.approx(2.63876, abs=1e-5)
    assert mm1_learning_rate(1) == pytest.approx(0.574934, abs=1e-6)  # exp(-0.5535)


def test_a_recipe_holds_the_numbers(tmp_path: Path) -> None:
    shares = [f"training.optimizer.{name}={{times_lr: 0.1}}" for name in ("min_lr", "weight_decay")]
    recipe = load_recipe(TINY, [MM1, *shares], Recipe)
    optimizer = recipe.training.optimizer
    assert optimizer.lr == mm1_learning_rate(3e9)
    assert optimizer.min_lr == optimizer.weight_decay == pytest.approx(5.83e-6, abs=5e-9)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(resolved, [], Recipe) == recipe
    assert load_recipe(resolved, ["training.optimizer.lr=1e-3"], Recipe).training.optimizer.lr == 1e-3


def test_a_number_of_a_recipe_replaces_the_law_of_its_base_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "law.yaml").write_text(
        f"base: {TINY}\ntraining: {{optimizer: {{lr: {{law: mm1, num_parameters: 1200000000}}}}}}\n", encoding="utf-8"
    )
    (tmp_path / "number.yaml").write_text("base: law.yaml\ntraining: {optimizer: {lr: 3e-4}}\n", encoding="utf-8")
    rates = [load_recipe(tmp_path / f"{name}.yaml", [], Recipe).training.optimizer.lr for name in ("law", "number")]
    assert rates == [mm1_learning_rate(1.2e9), 3e-4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr={law: mm1}", r"training\.optimizer\.lr=\{'law': 'mm1'\}: is a law with other keys .*num_parameters: N"),
        ("lr={law: mm2, num_parameters: 3e9}", r"training\.optimizer\.lr\.law='mm2': is no known law.* mm1\."),
        ("lr={law: mm1, num_parameters: -3}", r"training\.optimizer\.lr\.num_parameters=-3: must be a number above 0"),
        ("lr={law: mm1, num_parameters: 3B}", r"training\.optimizer\.lr\.num_parameters='3B': must be a number"),
        ("lr={law: mm1, num_parameters: .inf}", r"training\.optimizer\.lr\.num_parameters=inf: must be a number"),
        ("lr={law: mm1, num_parameters: true}", r"training\.optimizer\.lr\.num_parameters=True: must be a number"),
        ("weight_decay={times: 0.1}", r"training\.optimizer\.weight_decay=\{'times': 0\.1\}: has other keys"),
        ("weight_decay={times_lr: 0}", r"training\.optimizer\.weight_decay\.times_lr=0: must be a number above 0"),
        ("min_lr={times_lr: 2}", r"training\.optimizer\.min_lr=0\.002: is above lr=0\.001"),
        ("min_lr=0.1x", r"training\.optimizer\.min_lr='0\.1x': "),
    ],
)
def test_a_wrong_law_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(TINY, [f"training.optimizer.{override}"], Recipe)


def test_a_multiple_of_no_number_is_named() -> None:
    overrides = ["training.optimizer.lr=fast", "training.optimizer.min_lr={times_lr: 0.1}"]
    with pytest.raises(ValueError, match=r"optimizer\.min_lr=.*: is a multiple of training\.optimizer\.lr='fast'"):
        load_recipe(TINY, overrides, Recipe)
