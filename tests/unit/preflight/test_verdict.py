"""Which node fails, and what is said of it: plain findings in, failures out."""

import pytest

from megavlm.preflight.collective import Measured
from megavlm.preflight.fact import Facts
from megavlm.preflight.verdict import clock_offsets, expected_node, judge_answers, judge_measured, name_ranks


def facts_of(num_nodes: int, ranks_per_node: int = 2) -> dict[int, Facts]:
    """Ranks of equal nodes n1, n2 ..."""
    return {
        rank: Facts(
            rank,
            rank % ranks_per_node,
            f"n{rank // ranks_per_node + 1}",
            device="cpu",
            versions={"torch": "2.13.0", "python": "3.11.7"},
            files={"data.train.path": 100},
        )
        for rank in range(num_nodes * ranks_per_node)
    }


def judged(facts: dict[int, Facts], world_size: int, doing: dict[int, str] | None = None) -> list[str]:
    return [str(failure) for failure in judge_answers(facts, world_size, doing or {}, 30.0)]


def test_equal_nodes_pass() -> None:
    assert judged(facts_of(3), 6) == []


def test_a_missing_node_and_a_hanging_rank_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAVLM_NODES", "n1 n2 n3")
    facts = facts_of(3)
    del facts[2], facts[3], facts[4]
    assert judged(facts, 6, {4: "data"}) == [
        "n2 (ranks 2-3): start: gave no sign of life within 30 s.",
        "n3 (rank 4): data: hangs; was given 30 s.",
    ]


def test_a_missing_rank_is_named_without_a_list_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAVLM_NODES", raising=False)
    facts = facts_of(1)
    del facts[1]
    assert judged(facts, 2) == ["unknown node (rank 1): start: gave no sign of life within 30 s."]


@pytest.mark.parametrize(
    ("nodes", "rank", "world_size", "node"),
    [
        ("a b", 0, 2, "a"),
        ("a b", 1, 2, "b"),
        ("a b c", 8, 12, "c"),
        ("a b", 2, 3, "unknown node"),  # the ranks are not spread evenly
        ("", 0, 1, "unknown node"),
    ],
)
def test_nodes_hold_equally_many_ranks(
    monkeypatch: pytest.MonkeyPatch, nodes: str, rank: int, world_size: int, node: str
) -> None:
    monkeypatch.setenv("MEGAVLM_NODES", nodes)
    assert expected_node(rank, world_size) == node


def test_the_version_of_the_majority_is_right_wherever_it_is() -> None:
    facts = facts_of(3)
    for rank in (0, 1):  # the first node is the odd one
        facts[rank].versions = {"torch": "2.12.0", "python": "3.11.7"}
    assert judged(facts, 6) == [
        "n1 (ranks 0-1): versions: torch is 2.12.0 here and 2.13.0 on 4 of 6 ranks. Install the same on every node."
    ]


def test_of_two_versions_that_are_as_frequent_the_first_ranks_is_right() -> None:
    facts = facts_of(2)
    for rank in (2, 3):
        facts[rank].versions = {**facts[rank].versions, "torch": "2.12.0"}
    assert [text.split(":")[0] for text in judged(facts, 4)] == ["n2 (ranks 2-3)"]


def test_devices_and_files_must_be_the_same() -> None:
    facts = facts_of(3)
    facts[5].device = "NVIDIA H200, 139 GiB"
    facts[1].files = {"data.train.path": 99}
    assert judged(facts, 6) == [
        "n3 (rank 5): device: is NVIDIA H200, 139 GiB here and cpu on 5 of 6 ranks. Take nodes of one kind (sbatch "
        "--constraint).",
        "n1 (rank 1): data: data.train.path is 99 bytes here and 100 bytes on 5 of 6 ranks. The nodes do not see the "
        "same file.",
    ]


def test_what_all_ranks_of_a_node_report_is_said_once() -> None:
    facts = facts_of(2)
    for rank in (2, 3):
        facts[rank].problems = [("run folder", "cannot be written to")]
    assert judged(facts, 4) == ["n2 (ranks 2-3): run folder: cannot be written to"]


def test_facts_survive_the_journey() -> None:
    facts = facts_of(1)[1]
    facts.problems = [("data", 'x="1": gone')]
    assert Facts.from_json(facts.to_json()) == facts
    measured = Measured([3], "wrong", 1.5, 8, 0.25, "no")
    assert Measured.from_json(measured.to_json()) == measured


def measured_of(world_size: int) -> dict[int, Measured]:
    return {rank: Measured(clock_seconds=1000.0, num_bytes=100, all_reduce_seconds=0.5) for rank in range(world_size)}


def together(measured: dict[int, Measured], num_nodes: int = 2) -> list[str]:
    return [str(failure) for failure in judge_measured(measured, facts_of(num_nodes), 30.0)]


def test_right_numbers_and_clocks_pass() -> None:
    measured = measured_of(4)
    measured[3].clock_seconds += 4.9
    assert together(measured) == []
    assert clock_offsets(measured)[3] == pytest.approx(4.9)


def test_the_sender_of_wrong_numbers_is_named_not_who_received_them() -> None:
    measured = measured_of(4)
    for rank in (0, 1, 3):
        measured[rank].wrong_ranks = [2]
    assert together(measured) == [
        "n2 (rank 2): all-gather: what it sent arrived changed on ranks 0-1, 3. Suspect its memory or network card."
    ]


def test_a_clock_that_is_wrong_is_named() -> None:
    measured = measured_of(6)
    for rank in (2, 3):
        measured[rank].clock_seconds -= 60.0
    assert together(measured, 3) == [
        "n2 (ranks 2-3): clock: is -60.0 s from the median of all ranks, at most 5 s. Start NTP there."
    ]


def test_collectives_that_fail_hang_or_add_wrongly() -> None:
    measured = measured_of(4)
    measured[0].wrong_sum = "element 1 of the sum is 3.0, not 10.0"
    measured[1] = Measured(error="Connection closed by peer")
    del measured[2]
    assert together(measured) == [
        "n2 (rank 2): collectives: did not come back within 30 s.",
        "n1 (rank 0): all-reduce: element 1 of the sum is 3.0, not 10.0.",
        "n1 (rank 1): collectives: Connection closed by peer",
    ]


def test_bandwidth_is_that_of_a_ring() -> None:
    plain, per_rank = measured_of(4)[0].bandwidth(4)
    assert (plain, per_rank) == (200.0, 300.0)


@pytest.mark.parametrize(
    ("ranks", "text"), [([4], "rank 4"), ([3, 1, 2], "ranks 1-3"), ([0, 2, 3, 9], "ranks 0, 2-3, 9")]
)
def test_ranks_are_named_shortly(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text
