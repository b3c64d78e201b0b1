"""Which tests run by default. All run with ``--everything`` (``make test-all``).

A table that multiplies models by layouts proves each thing many times over: by default each model and each layout is
seen at least once in it. Left out are also tests of minutes whose parts others cover. So the suite stays short on two
cores.
"""

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase

CORE: dict[str, tuple[str, ...]] = {
    "tests/parallel/test_deepspeed.py::test_trains_as_the_megatron_engine": (
        "dp2-1",
        "dp2_X-3",
        "tp2_sp-2",
        "offloaded-3",
    ),
    "tests/parallel/test_deepspeed.py::test_parts_are_trained_as_by_the_megatron_engine": (
        "dp2-2",
        "tp2_sp-1",
        "within-3",
        "lora-3",
    ),
    "tests/parallel/test_deepspeed.py::test_bf16_tracks_the_megatron_engine": ("2",),
    "tests/parallel/test_deepspeed.py::test_resumed_run_goes_on_bit_for_bit": ("zero3",),
    "tests/parallel/test_deepspeed.py::test_engines_take_up_each_others_runs": ("zero3_megatron", "megatron_zero3"),
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
    "tests/parallel/test_experts.py::test_distributed_optimizer_clips_and_updates_as_one_process_does": (
        "D-ep2",
        "D-pp2_ep2",
    ),
    "tests/parallel/test_layouts.py::test_layout_equals_one_process": (
        "D-*",
        "X-tp2_sp_pp2",
        "X-pp2_vpp2",
        "X-dp2",
        "X-recompute",
        "H-tp2_sp_pp2",
        "H-pp2_vpp2",
        "H_adding-tp2_sp",
        "Flamingo-tp2_sp_pp2",
        "Flamingo_swiglu-tp2_sp",
    ),
    "tests/parallel/test_layouts.py::test_frozen_parts_under_layouts": ("tp2_sp_pp2-*", "pp2_vpp2-connector_only"),
    "tests/parallel/test_layouts.py::test_frozen_parts_with_cross_attention": (
        "X-tp2_sp_pp2-*",
        "X-pp2_vpp2-trainable0",
        "H-tp2_sp_pp2-trainable0",
    ),
    "tests/parallel/test_layouts.py::test_modules_of_parts_under_layouts": ("tp2_sp_pp2", "pp2_vpp2"),
    "tests/parallel/test_cross_attention.py::test_texts_keep_their_logits_*": (
        "1-*",
        "4-X",
    ),
    "tests/parallel/test_cross_attention.py::test_closed_gates_*": ("*-X", "1-Flamingo"),
    "tests/parallel/test_cross_attention.py::test_training_goes_on_under_the_same_and_other_layouts": ("X",),
    "tests/parallel/test_checkpoint.py::test_training_goes_on_under_another_layout": ("before[0125]*",),
    "tests/parallel/test_part_scales.py::test_each_part_decays_*": ("dp2 distributed",),
    "tests/parallel/test_packing.py::test_packed_rows_give_the_same_loss_and_gradients": ("mixed-*", "texts-X"),
    "tests/parallel/test_generation.py::test_cached_tokens_are_those_of_whole_sequences": (
        "*-1-greedy",
        "D-tp2_pp2-greedy",
        "X-pp2-sampled",
        "D-1-sampled",
    ),
    "tests/e2e/test_faults.py::test_the_other_rank_names_the_one_that_is_gone": ("9-0-*",),
    "tests/e2e/test_documents.py::test_documented_command": ("make *", "*--dry-run", "*plan examples/nvlm/nvlm_d_34b*"),
    "tests/e2e/test_convert_processor.py::test_an_exported_folder_answers_alone": ("llava", "X"),
    "tests/e2e/test_slurm.py::test_asked_as_slurm_asks_it_saves_and_comes_back": ("how0",),
    "tests/unit/convert/test_receipt.py::test_what_was_converted_holds": ("internvl",),
    "tests/parallel/test_backend_checkpoints.py::test_fused_layers_*": ("experts",),
    "tests/unit/planning/test_flops.py::test_counts_what_runs_in_every_fusion": (
        "decoder_only-packed",
        "cross_attention-images",
        "hybrid-text",
        "hybrid-images",
    ),
    "tests/unit/planning/test_flops.py::test_counts_what_runs_in_gated_blocks": ("squared ReLU-images",),
    "tests/unit/convert/test_receipt.py::test_equal_weights_of_another_model_do_not_hold": ("change0*",),
    "tests/unit/models/vision/test_encoders.py::test_checkpoint_loads_with_another_number_of_dummy_heads": ("2-4-*",),
    "tests/unit/upcycle/test_upcycle_folder.py::test_it_trains_from_the_dense_loss_under_every_layout": (
        "one",
        "tp2_ep2",
    ),
    "tests/unit/planning/test_flops.py::test_counts_what_runs_in_every_model": (
        "connector *-images",
        "tied *-images",
        "internvit*-images",
        "dinov2*-images",
    ),
    "tests/unit/planning/test_flops.py::test_counts_what_runs_in_experts": (
        "every layer-images",
        "experts filled*-images",
    ),
    "tests/e2e/test_loss_spikes.py::test_without_a_spike_nothing_is_different": ("rewind",),
    "tests/e2e/test_loss_spikes.py::test_a_spike_is_told_with_its_samples": ("skip",),
}
"""Test (patterns allowed) -> ids of the cases that run by default."""

LEFT_OUT = (
    "tests/e2e/test_bench.py::test_compare_runs_once_and_refuses_what_differs",
    "tests/e2e/test_data.py::test_filters_with_a_trained_run",
    "tests/e2e/test_deepspeed_run.py::test_run_is_trained_evaluated_and_gone_on_with",
    "tests/e2e/test_documents.py::test_make_moe_in_small",
    "tests/e2e/test_faults.py::test_a_signal_to_everybody_is_survived_with_workers_and_writers",
    "tests/e2e/test_inspect.py::*",  # a busy machine can keep a browser from seeing the pointer
    "tests/e2e/test_real_weights.py::*",
    "tests/e2e/test_router_run.py::*",
    "tests/e2e/test_slurm.py::test_stopped_and_killed_it_goes_on_with_the_same_curve",
    "tests/e2e/test_train.py::test_asked_to_stop_it_saves_and_the_curve_is_the_same",
    "tests/e2e/test_train.py::test_second_stage_starts_from_the_first_and_trains_only_its_parts",
    "tests/e2e/test_train.py::test_time_is_up_and_resumed_under_another_layout",
    "tests/parallel/test_deepspeed_nvme.py::*",  # its operator takes minutes to compile
    "tests/unit/convert/test_own_layout.py::test_a_receipt_holds",
    "tests/unit/convert/test_own_layout.py::test_bfloat16_is_near_float32",
    "tests/unit/convert/test_receipt.py::test_rounded_weights_are_compared_as_rounded",
    "tests/unit/tools/test_benchmark.py::*",
    "tests/unit/tools/test_gpu_check.py::test_a_smoke_run_*",
    "tests/unit/models/test_range_attention.py::test_compiled_*",
    "tests/unit/planning/test_flops_in_part.py::test_counts_what_runs_where_one_parameter_trains",
    "tests/unit/upcycle/test_carried_optimizer.py::test_it_goes_on_alike_under_other_layouts",
    "tests/unit/upcycle/test_upcycle_memory.py::*",
)
"""Tests (patterns allowed) that run with ``--everything`` only."""


def is_core(node_id: str) -> bool:
    """Whether a case runs by default."""
    test, _, case = node_id.removesuffix("]").partition("[")
    if any(fnmatchcase(test, pattern) for pattern in LEFT_OUT):
        return False
    for pattern, cases in CORE.items():
        if fnmatchcase(test, pattern) and case:
            return any(fnmatchcase(case, wanted) for wanted in cases)
    return True


def forgotten(node_ids: Iterable[str]) -> list[str]:
    """What is written above and is no longer there, of all cases that there are."""
    tests: dict[str, list[str]] = defaultdict(list)
    for node_id in node_ids:
        test, _, case = node_id.removesuffix("]").partition("[")
        tests[test].append(case)
    lost = [pattern for pattern in LEFT_OUT if not any(fnmatchcase(test, pattern) for test in tests)]
    for pattern, wanted in CORE.items():
        cases = [case for test, found in tests.items() if fnmatchcase(test, pattern) for case in found]
        lost += [f"{pattern}[{case}]" for case in wanted if not any(fnmatchcase(found, case) for found in cases)]
    return lost
