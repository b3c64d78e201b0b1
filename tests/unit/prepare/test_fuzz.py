"""Damaged inputs: no crash, no hang, every loss counted."""

from fuzzer import fuzz


def test_nothing_is_lost_without_a_word() -> None:
    found = fuzz(100, seed=1)
    assert found["inputs"] == 100
    assert "row_ambiguous" not in found
    assert not [what for what in found if what.startswith("refused without a place")]
    for what in ("good", "row_malformed", "image_unreadable", "sample read", "sample refused", "image_missing"):
        assert found[what] > 0, found
