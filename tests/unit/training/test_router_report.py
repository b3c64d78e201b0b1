"""What is told of routers: measures, the log line, the metrics file, warnings and the picture."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megavlm.config import load_recipe
from megavlm.engines import StepResult
from megavlm.models.language import LanguageConfig
from megavlm.models.moe import MoEConfig
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER
from megavlm.training.position import Position
from megavlm.training.report import METRICS_FILE, Report, read_metrics
from megavlm.training.router_health import RouterHealth
from megavlm.training.router_picture import draw_routers
from megavlm.training.starvation import StarvationAlarm

EXAMPLES = Path(__file__).parents[3] / "examples"

Group = dict[str, Any]
"""``chosen``, and where they differ from it ``kept`` and ``scores`` (sums); ``tokens`` (half of the choices),
``entropy`` and ``squares`` (sums, 0)."""


def pack(groups: list[Group], losses: tuple[float, float] = (0.0, 0.0)) -> list[float]:
    """One layer of the table that is added over ranks, as megavlm.models.moe.health.unpack reads it."""
    row: list[float] = []
    for group in groups:
        chosen = group["chosen"]
        tokens = group.get("tokens", sum(chosen) / 2)
        scores = group.get("scores", [tokens * share / max(1, sum(chosen)) for share in chosen])
        row += [*chosen, *group.get("kept", chosen), *scores, tokens, group.get("entropy", 0.0)]
        row.append(group.get("squares", 0.0))
    return [*row, *losses]


class Observer:
    """An observer that was told what to have counted."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.table: list[list[float]] = []
        self.num_sources = 0

    def tell_apart(self, num_sources: int) -> None:
        self.num_sources = num_sources

    def take(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float64)


@dataclass
class Run:
    """One rank, two model chunks of which the last has no experts."""

    observer: Observer
    health: RouterHealth

    def count(self, *rows: list[float]) -> None:
        self.observer.table = list(rows)


def make_run(sources: tuple[str, ...] = ("a.jsonl",), num_experts: int = 4, **moe: Any) -> Run:
    moe = {"num_moe_experts": num_experts, "moe_layer_freq": [0, 1, 0, 1], **moe}
    language = LanguageConfig(num_layers=4, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, moe=moe)
    observer = Observer((1, 3))
    chunks = [SimpleNamespace(language=SimpleNamespace(router_observer=one)) for one in (observer, Observer(()))]
    engine: Any = SimpleNamespace(
        chunks=chunks, sum_over_ranks=lambda numbers: numbers, sum_over_replicas=lambda numbers: numbers
    )
    return Run(observer, RouterHealth(engine, language, sources, is_trained=True))


NOTHING: Group = {"chosen": [0, 0, 0, 0]}


def test_no_token_no_word() -> None:
    run = make_run()
    run.count(pack([NOTHING] * 3), pack([NOTHING] * 3))
    assert run.observer.num_sources == 1
    assert run.health.take(10) is None
    assert run.health.take_loads() is None


def test_views_without_tokens_are_left_out() -> None:
    run = make_run(("a", "b", "c"))
    text_of_b = [NOTHING, {"chosen": [4, 4, 0, 0]}, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING]
    run.count(pack(text_of_b, (4.0, 8.0)), pack(text_of_b, (12.0, 0.0)))
    found = run.health.take(10)
    assert found is not None
    assert [view.name for view in found.views] == ["all", "text", "b"]
    assert found.losses == {"load balancing loss": 2.0}  # no z-loss in this model
    assert found.everything.load.tolist() == [[2.0, 2.0, 0.0, 0.0]] * 2


def test_loads_are_of_all_steps_since_they_were_told() -> None:
    run = make_run()
    one, other = pack([{"chosen": [4, 0, 0, 0]}, NOTHING, NOTHING]), pack([{"chosen": [0, 4, 4, 4]}, NOTHING, NOTHING])
    for row in (one, other):
        run.count(row, row)
        assert run.health.take(5) is not None
    whole = run.health.take_loads()
    assert whole is not None
    assert whole.num_steps == 10
    assert whole.everything.load.tolist() == [[1.0, 1.0, 1.0, 1.0]] * 2
    assert run.health.take_loads() is None


def test_measures_at_their_ends() -> None:
    even: Group = {"chosen": [5, 5, 5, 5], "entropy": 10 * math.log(4)}
    collapsed: Group = {"chosen": [10, 10, 0, 0], "scores": [10.0, 0.0, 0.0, 0.0], "kept": [5, 0, 0, 0]}
    run = make_run()
    run.count(pack([even, collapsed, NOTHING]), pack([even, collapsed, NOTHING]))
    found = run.health.take(1)
    assert found is not None
    by_name = {view.name: view for view in found.modalities}
    text, image = by_name["text"], by_name["image"]
    for view, expected in ((text, (1, 0, 1, 1, 0, 1)), (image, (2, 2, 0, 0, 0.75, 2))):
        measured = (view.max_over_mean, view.num_dead, view.entropy, view.entropy_of_mean, view.dropped)
        assert [values[0].item() for values in (*measured, view.load_balancing_loss)] == pytest.approx(expected)


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(EXAMPLES / "nvlm/nvlm_d_72b_sft.yaml", ["logging.log_interval=2"], Recipe)


def busy(share: float) -> list[float]:
    """A layer whose first expert has ``share`` of the text; images go to two experts."""
    text = [1000 * share, *[1000 * (1 - share) / 3] * 3]
    return pack([{"chosen": text}, {"chosen": [60, 60, 0, 0], "kept": [60, 30, 0, 0]}, NOTHING], (1000.0, 500.0))


def report_some_steps(recipe: Recipe, folder: Path, run: Run) -> None:
    engine: Any = SimpleNamespace(sum_over_replicas=lambda numbers: numbers)
    with Report(recipe, engine, folder, is_writer=True, iteration=0, router_health=run.health) as out:
        assert not out.router_loads(0)
        for step in range(1, 5):
            run.count(busy(0.25 * step / 2), busy(0.4))
            out.step(Position(step, 8 * step), StepResult(1.0, 10, 1.0, None), [], lr=1e-3, data_wait=0.0)
        assert out.router_loads(4)


def test_the_report_has_the_routers(recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    report_some_steps(recipe, tmp_path, make_run(moe_z_loss_coeff=1e-3))
    first, second = [record.getMessage() for record in caplog.records if "consumed samples" in record.getMessage()]
    assert first.endswith(
        " samples cut off: 0 | load balancing loss: 1.785714E+00 | z loss: 8.928571E-01 |"
        " router max/mean load: image 2.00 text 1.60 | dead experts: 0 | dropped tokens: 2.68% |"
    )
    assert "image 2.00 text 2.00 |" in second

    points = read_metrics(tmp_path)
    routers = [point["router"] for point in points if "router" in point]
    assert [point["iteration"] for point in points if "router" in point] == [2, 4]
    assert (routers[0]["layers"], routers[0]["steps"]) == ([1, 3], 2)
    image = next(view for view in routers[0]["views"] if view["name"] == "image")
    assert (image["tokens"], image["max/mean load"]) == (60, [2.0, 2.0])
    assert (image["dead experts"], image["dropped tokens"]) == ([2, 2], [0.25, 0.25])
    [loads] = [point["router load"] for point in points if "router load" in point]
    assert loads["steps"] == 4
    text = next(view for view in loads["views"] if view["name"] == "text")
    assert text["load"] == [[1.5, 0.8333, 0.8333, 0.8333], [1.6, 0.8, 0.8, 0.8]]

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars, histograms = set(events.Tags()["scalars"]), set(events.Tags()["histograms"])
    assert {"router/load balancing loss", "router/layer_3/max over mean load/image"} <= scalars
    assert {"router/layer_1/entropy/all", "router/layer_1/dropped tokens/text"} <= scalars
    assert {"router/layer_1/load/all", "router/layer_3/load/text"} <= histograms
    assert events.Scalars("router/layer_3/max over mean load/image")[0].step == 2


def test_a_model_without_experts_says_nothing_of_routers(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    engine: Any = SimpleNamespace(sum_over_replicas=lambda numbers: numbers)
    with Report(recipe, engine, tmp_path, is_writer=True, iteration=0) as out:
        for step in (1, 2):
            out.step(Position(step, 8), StepResult(1.0, 10, 1.0, None), [], lr=1e-3, data_wait=0.0)
        assert not out.router_loads(2)
    assert "consumed samples" in caplog.text
    assert "router" not in caplog.text + (tmp_path / METRICS_FILE).read_text()


def test_picture(recipe: Recipe, tmp_path: Path) -> None:
    report_some_steps(recipe, tmp_path, make_run())
    with Image.open(draw_routers(tmp_path)) as picture:
        assert picture.size > (600, 300)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # something was drawn


@pytest.mark.parametrize(("num_layers", "num_experts", "num_sources"), [(1, 2, 1), (60, 128, 5)])
def test_picture_of_few_and_of_many(tmp_path: Path, num_layers: int, num_experts: int, num_sources: int) -> None:
    names = ["all", "text", *(f"source {number}" for number in range(num_sources))]
    load = [[float(expert % 3) for expert in range(num_experts)] for _ in range(num_layers)]
    views = [{"name": name, "tokens": 7, "load": load, "max/mean load": [2.0] * num_layers} for name in names]
    layers = list(range(num_layers))
    lines: list[dict[str, Any]] = [
        {"iteration": 10, "router": {"layers": layers, "steps": 10, "views": views[:2]}},
        {"iteration": 20, "router": {"layers": layers, "steps": 10, "views": views}},
        {"iteration": 20, "router load": {"layers": layers, "steps": 20, "views": views}},
    ]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Image.open(draw_routers(tmp_path)) as picture:
        assert picture.size > (600, 300)


def test_no_picture_of_a_run_without_routers(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"iteration": 1, "lm loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"its metrics hold no load of an expert\. Train a model with experts there"):
        draw_routers(tmp_path)


# ---- warnings --------------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    name: str
    choices: Tensor


def tokens(name: str, *rows: list[float]) -> Tokens:
    return Tokens(name, torch.tensor(rows, dtype=torch.float64))


def alarm(*, is_trained: bool = True, **moe: Any) -> StarvationAlarm:
    return StarvationAlarm(MoEConfig(num_moe_experts=4, **moe), (3, 5), is_trained=is_trained)


EVEN = [1000.0] * 4


def test_a_starving_expert_is_told_once_until_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    one = alarm()
    for first, is_told in [(50.0, True), (0.0, False), (400.0, False), (80.0, False), (900.0, False), (50.0, True)]:
        caplog.clear()
        one.check(tokens("all", EVEN, [first, 1000.0, 1000.0, 1000.0]), [], 10)
        assert len(caplog.records) == is_told, first
    assert caplog.messages == [
        "layer 5: expert 0 got 1.6 % of the tokens over the last 10 steps (even share 25.0 %): it starves. Raise "
        "model.language.moe.moe_aux_loss_coeff=0.01, lower the learning rate, or have fewer experts than "
        "num_moe_experts=4."
    ]


def test_an_expert_of_one_modality_is_told_as_such(caplog: pytest.LogCaptureFixture) -> None:
    text, image = [0.0, 900.0, 900.0, 900.0], [900.0, 900.0, 0.0, 900.0]
    both = [a + b for a, b in zip(text, image, strict=True)]
    alarm().check(tokens("all", both), [tokens("image", image), tokens("text", text)], 7)
    assert [message.split(" Raise")[0] for message in caplog.messages] == [
        "layer 3: expert 2 got 0.0 % of the image tokens over the last 7 steps (even share 25.0 %): it learns nothing "
        "of them, only of the others.",
        "layer 3: expert 0 got 0.0 % of the text tokens over the last 7 steps (even share 25.0 %): it learns nothing "
        "of them, only of the others.",
    ]


def test_an_expert_that_starves_of_everything_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    row = [0.0, 900.0, 900.0, 900.0]
    alarm().check(tokens("all", row), [tokens("image", row), tokens("text", row)], 7)
    assert len(caplog.messages) == 1


def test_few_tokens_prove_nothing(caplog: pytest.LogCaptureFixture) -> None:
    one = alarm()
    one.check(tokens("all", [0.0, 130.0, 130.0, 130.0]), [], 10)  # even share 97.5
    assert not caplog.records
    one.check(tokens("all", [0.0, 140.0, 140.0, 140.0]), [], 10)  # even share 105
    assert len(caplog.records) == 1


def test_many_warnings_become_one_number(caplog: pytest.LogCaptureFixture) -> None:
    collapsed = [[4000.0, 0.0, 0.0, 0.0], [4000.0, 0.0, 0.0, 0.0]]
    one = alarm()
    one.check(tokens("all", *collapsed), [], 10)
    assert len(caplog.messages) == 6
    assert caplog.messages[-1] == "1 more experts began to starve; router.png shows them"


@pytest.mark.parametrize(
    ("is_trained", "moe", "advice"),
    [
        (True, {"moe_router_load_balancing_type": "none"}, "moe.moe_router_load_balancing_type=aux_loss."),
        (True, {"moe_aux_loss_coeff": 0.0}, "Raise model.language.moe.moe_aux_loss_coeff=0, "),
        (False, {}, "The routers are frozen: add language to training.trainable, or start from other weights."),
    ],
)
def test_advice_fits_the_run(
    is_trained: bool, moe: dict[str, Any], advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    alarm(is_trained=is_trained, **moe).check(tokens("all", [0.0, 900.0, 900.0, 900.0]), [], 10)
    assert advice in caplog.text
