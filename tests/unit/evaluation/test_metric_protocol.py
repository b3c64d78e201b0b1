"""What every metric promises, over the dict of metrics."""

import random
from dataclasses import replace

import pydantic
import pytest

from megavlm.evaluation.metrics import METRICS, Item, MetricConfig
from megavlm.evaluation.metrics.item import average

CAPTIONS = [
    "a brown dog runs over wet sand",
    "two men play chess near the harbour",
    "an old tram climbs a steep street",
    "caf\u00e9 terrace with empty chairs at noon",
]
AWKWARD = ["nan", "1e999999999", "5%", "-", "....", "?", "\u65e5\u672c", "(Z)", "A" * 3000, "\\frac{1}{2}", "''"]


def question(kind: str, number: int, prediction: str | None = None) -> Item:
    """Make a question that suits a metric; the prediction is the right answer unless given."""
    caption = CAPTIONS[number % len(CAPTIONS)]
    truth = "ABCD"[number % 4] if kind == "multiple_choice" else caption
    choices = ("dog", "men", "tram", "terrace") if kind == "multiple_choice" else ()
    return Item(f"q{number}", truth if prediction is None else prediction, [truth] * 10, choices)


@pytest.fixture(params=METRICS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_recipe_names_it_by_its_kind(kind: str) -> None:
    metric = pydantic.TypeAdapter(MetricConfig).validate_python({"kind": kind})
    assert type(metric) is METRICS[kind]


def test_the_exact_answer_scores_full(kind: str) -> None:
    metric = METRICS[kind]()
    result = metric.score([question(kind, number) for number in range(4)])
    # CIDEr divides by lengths of vectors: off by 2e-15 at most
    assert result.per_item == pytest.approx([metric.highest] * 4, abs=1e-12)
    assert result.value == pytest.approx(metric.highest, abs=1e-12)
    assert result.num_unparsed == 0


@pytest.mark.parametrize("nothing", ["", " \n\t"])
def test_an_empty_answer_scores_nothing(kind: str, nothing: str) -> None:
    metric = METRICS[kind]()
    result = metric.score([question(kind, 0, nothing), *(question(kind, number) for number in range(1, 4))])
    assert result.per_item[0] == 0.0
    assert result.value == pytest.approx(metric.highest * 3 / 4, abs=1e-12)


def test_an_empty_answer_does_not_match_a_blank_reference(kind: str) -> None:
    items = [question(kind, number) for number in range(4)]
    items[0] = replace(items[0], prediction="", references=[*items[0].references, ""])
    assert METRICS[kind]().score(items).per_item[0] == 0.0


def test_a_blank_reference_makes_nothing_right(kind: str) -> None:
    items = [question(kind, number) for number in range(4)]
    items[0] = replace(items[0], prediction="neither", references=[*items[0].references, " "])
    assert METRICS[kind]().score(items).per_item[0] == 0.0


def test_awkward_answers_stay_in_range(kind: str) -> None:
    metric = METRICS[kind]()
    result = metric.score([question(kind, number, prediction) for number, prediction in enumerate(AWKWARD)])
    assert all(0.0 <= score <= metric.highest for score in result.per_item)


def test_neither_order_nor_ranks_matter(kind: str) -> None:
    metric = METRICS[kind]()
    draw = random.Random(0)
    items = []
    for number in range(90):
        words = question(kind, number).prediction.split()
        letters = list(" ".join(draw.sample(words, draw.randint(1, len(words)))))
        letters[draw.randrange(len(letters))] = draw.choice("abA. ")
        items.append(replace(question(kind, number, "".join(letters)), references=draw.choices(CAPTIONS, k=10)))
        if kind == "multiple_choice":
            items[-1] = replace(items[-1], references=draw.choices("ABCD", k=2))
    expected = metric.score(items)
    by_rank = [item for rank in range(4) for item in items[rank::4]]
    for order in (items[::-1], by_rank, draw.sample(items, len(items))):
        result = metric.score(order)
        scores = dict(zip((item.key for item in order), result.per_item, strict=True))
        assert [scores[item.key] for item in items] == list(expected.per_item)
        assert result.value == expected.value
        assert result.num_unparsed == expected.num_unparsed


def test_the_mean_is_the_same_to_the_last_bit() -> None:
    # added from left to right, these two orders give 0.6 and 0.6000000000000001
    assert average([0.1, 0.2, 0.3]).value == average([0.3, 0.2, 0.1]).value


def test_no_items_have_no_score(kind: str) -> None:
    with pytest.raises(ValueError, match=r"items=\[\]: .* 0"):
        METRICS[kind]().score([])


@pytest.mark.parametrize("references", [[], [""], ["", " \n"]])
def test_a_question_without_references_is_named(references: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"page 7: references=.*none of these {len(references)} says anything"):
        Item("page 7", "yes", references)


@pytest.mark.parametrize("field", ["references", "choices"])
def test_one_string_is_no_list(field: str) -> None:
    with pytest.raises(ValueError, match=f"page 7: {field}='yes': .* letter by letter"):
        Item("page 7", "yes", **{"references": ["yes"], field: "yes"})
