"""What a run has used: no sample lost and none twice, however its lanes change."""

import itertools
import json
import random

import pytest

from megavlm.data import LaneProgress, Progress


def left(progress: Progress, stop: int) -> list[int]:
    """Positions below ``stop`` that are still to be used, of all lanes."""
    found = []
    for lane in progress.lanes:
        found += itertools.takewhile(lambda position: position < stop, lane.positions(len(progress.lanes)))
    return sorted(found)


def some_progress(num_lanes: int, seed: int) -> tuple[Progress, set[int]]:
    """Lanes that used some of their positions out of turn, and what they used."""
    draw = random.Random(seed)
    lanes, used = [], set()
    for number in range(num_lanes):
        seen = [number + num_lanes * index for index in range(draw.randrange(0, 12))]
        pending = tuple(sorted(draw.sample(seen, min(len(seen), draw.randrange(0, 5)))))
        lanes.append(LaneProgress(number + num_lanes * len(seen), pending))
        used |= set(seen) - set(pending)
    return Progress(tuple(lanes)), used


@pytest.mark.parametrize("before", [1, 2, 3, 8])
@pytest.mark.parametrize("after", [1, 2, 5, 8])
def test_another_number_of_lanes_has_the_same_samples_left(before: int, after: int) -> None:
    for seed in range(20):
        progress, used = some_progress(before, seed)
        expected = sorted(set(range(200)) - used)
        assert left(progress, 200) == expected
        dealt = progress.dealt_to(after)
        assert left(dealt, 200) == expected
        for number, lane in enumerate(dealt.lanes):
            assert all(position % after == number for position in (*lane.pending, lane.next_position))
        assert left(dealt.dealt_to(before), 200) == expected


def test_it_survives_json() -> None:
    progress, _ = some_progress(3, 1)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress


def test_ranks_are_gathered_by_their_lanes() -> None:
    progress, _ = some_progress(4, 2)
    lanes = dict(enumerate(progress.lanes))
    parts = [{number: lanes[number] for number in (0, 2)}, {number: lanes[number] for number in (1, 3)}]
    assert Progress.gathered(parts) == progress
    assert Progress.gathered([{0: lanes[0]}, {0: lanes[0]}]) == Progress((lanes[0],))  # all ranks know the one lane


def test_a_single_lane_counts_what_is_used() -> None:
    lane = LaneProgress(10, (3, 7))
    assert lane.num_used == 8
    assert [lane.position_of(number) for number in range(8, 13)] == [3, 7, 10, 11, 12]
    assert lane.after(9) == LaneProgress(10, (7,))
    assert lane.after(10) == LaneProgress(10)
    assert lane.after(12) == LaneProgress(12)
