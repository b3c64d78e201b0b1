"""Which cases of the large tables run by default. The others run with ``--everything`` (``make test-all``).

A table that multiplies models by layouts proves each thing many times over. By default each model and each layout is
seen at least once in it, so that the suite stays short on two cores.
"""

from fnmatch import fnmatchcase

CORE: dict[str, tuple[str, ...]] = {
    "tests/parallel/test_deepspeed.py::test_trains_as_the_megatron_engine": (
        "dp2-1",
        "dp2_X-3",
        "dp2_pieces-2",
        "tp2_sp-2",
        "connector_only-3",
        "offloaded-3",
    ),
    "tests/parallel/test_deepspeed.py::test_bf16_tracks_the_megatron_engine": ("2",),
    "tests/parallel/test_deepspeed.py::test_resumed_run_goes_on_bit_for_bit": ("zero3", "zero1_bf16"),
    "tests/parallel/test_deepspeed.py::test_engines_take_up_each_others_runs": ("saved0-*", "saved1-*"),
    "tests/parallel/test_deepspeed.py::test_checkpoint_is_the_megatron_engines": ("3",),
    "tests/parallel/test_deepspeed.py::test_skipped_steps_leave_no_trace": ("config3",),
    "tests/parallel/test_experts.py::test_layout_equals_one_process": (
        "D-sequential",
        "D-ep2",
        "D-ep2_allgather",
        "D-tp2_etp1",
        "D-tp2_ep2_etp2",
        "D-pp2_ep2",
        "D-tp2_pp2_vpp2_ep2",
        "D-recompute",
        "D_sequence-tp2_ep2_etp2",
        "D_first_half-pp2_ep2",
        "X-ep2",
        "H-tp2_ep2_etp2",
    ),
    "tests/e2e/test_faults.py::test_a_signal_to_everybody_is_survived_with_workers_and_writers": ("in a save",),
    "tests/e2e/test_loss_spikes.py::test_without_a_spike_nothing_is_different": ("rewind",),
    "tests/e2e/test_loss_spikes.py::test_a_spike_is_told_with_its_samples": ("skip",),
}
"""Test (patterns allowed) -> ids of the cases that run by default."""


def is_core(node_id: str) -> bool:
    """Whether a case runs by default: all do but those of a table above that it does not name."""
    test, _, case = node_id.removesuffix("]").partition("[")
    for pattern, cases in CORE.items():
        if fnmatchcase(test, pattern) and case:
            return any(fnmatchcase(case, wanted) for wanted in cases)
    return True
