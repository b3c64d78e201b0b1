"""Which layouts fit, and what is said of those that do not."""

from dataclasses import dataclass, fields
from typing import Any

import pytest

from megavlm.runtime.layout import check_parallel_config


@dataclass
class Case:
    """A layout that fits; tests change single fields."""

    tensor_model_parallel_size: int = 2
    pipeline_model_parallel_size: int = 2
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = True
    num_layers: int = 8
    hidden_size: int = 64
    ffn_hidden_size: int | None = 128
    num_attention_heads: int = 8
    num_query_groups: int | None = 4
    num_moe_experts: int | None = None
    world_size: int = 8
    micro_batch_size: int = 2
    global_batch_size: int = 16
    seq_length: int = 32
    padded_vocab_size: int = 1024


KEYWORDS = ("world_size", "micro_batch_size", "global_batch_size", "seq_length", "padded_vocab_size")


def _check(**changes: Any) -> None:
    case = Case(**changes)
    check_parallel_config(case, case, **{name: getattr(case, name) for name in KEYWORDS})


FITTING = [
    {},
    {"tensor_model_parallel_size": 1, "sequence_parallel": False},
    {"virtual_pipeline_model_parallel_size": 4},
    {"virtual_pipeline_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
    {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 1},  # 4 query groups, each on two ranks
    {"context_parallel_size": 2, "global_batch_size": 2},
    {"num_moe_experts": 4, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
    {"num_query_groups": None, "ffn_hidden_size": None},
]


@pytest.mark.parametrize("changes", FITTING, ids=str)
def test_layouts_that_fit(changes: dict[str, Any]) -> None:
    assert set(changes) <= {field.name for field in fields(Case)}
    _check(**changes)


NOT_FITTING = [
    ({"tensor_model_parallel_size": 0}, r"tensor_model_parallel_size=0: must be at least 1"),
    ({"pipeline_model_parallel_size": 0}, r"pipeline_model_parallel_size=0: must be at least 1"),
    ({"world_size": 6}, r"world_size=6: is no multiple of .* = 2 \* 2 \* 1 = 4\. .* one of 1, 2, 3, 6\."),
    (
        {"num_attention_heads": 9, "num_query_groups": 2},
        r"tensor_model_parallel_size=2: does not divide num_attention_heads=9\. Use one of 1\.",
    ),
    ({"hidden_size": 65}, r"tensor_model_parallel_size=2: does not divide hidden_size=65"),
    ({"ffn_hidden_size": 127}, r"tensor_model_parallel_size=2: does not divide ffn_hidden_size=127"),
    (
        {"num_query_groups": 3},
        r"tensor_model_parallel_size=2: is neither a divisor nor a multiple of num_query_groups=3\. Use one of 1, 3\.",
    ),
    (
        {"padded_vocab_size": 1023},
        r"padded_vocab_size=1023: is no multiple of tensor_model_parallel_size=2\. Pad the vocabulary to 1024\.",
    ),
    ({"tensor_model_parallel_size": 1}, r"sequence_parallel=True: splits along tensor_model_parallel_size=1"),
    ({"seq_length": 33}, r"seq_length=33: is no multiple of 2, .* Use 34\."),
    ({"seq_length": 34, "context_parallel_size": 2}, r"seq_length=34: is no multiple of 8, .* Use 40\."),
    (
        {"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": 2},
        r"virtual_pipeline_model_parallel_size=2: needs pipeline stages .* pipeline_model_parallel_size=1",
    ),
    ({"virtual_pipeline_model_parallel_size": 0}, r"virtual_pipeline_model_parallel_size=0: must be at least 1"),
    ({"num_layers": 7}, r"num_layers=7: is no multiple of .* = 2 \* 1 = 2\. .* one of 1, 7\."),
    (
        {"virtual_pipeline_model_parallel_size": 3},
        r"num_layers=8: is no multiple of .* = 2 \* 3 = 6\. .* one of 1, 2, 4, 8\.",
    ),
    ({"expert_model_parallel_size": 2}, r"expert_model_parallel_size=2: the language model has no experts"),
    (
        {"num_moe_experts": 6, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
        r"expert_model_parallel_size=4: does not divide num_moe_experts=6\. Use one of 1, 2, 3, 6\.",
    ),
    (
        {"num_moe_experts": 8, "expert_model_parallel_size": 4},
        r"world_size=8: is no multiple of expert_tensor_parallel_size .* = 2 \* 4 \* 2 = 16",
    ),
    (
        {"num_moe_experts": 8, "sequence_parallel": False},
        r"sequence_parallel=False: experts with tensor_model_parallel_size=2 need it",
    ),
    ({"global_batch_size": 18}, r"global_batch_size=18: is no multiple of .* = 2 \* 2 = 4\. Use 16 or 20\."),
    ({"global_batch_size": 3}, r"global_batch_size=3: is no multiple of .* = 4\. Use 4\."),
    ({"micro_batch_size": 0}, r"micro_batch_size=0, global_batch_size=16: must be at least 1"),
    (
        {"virtual_pipeline_model_parallel_size": 2, "global_batch_size": 12},
        r"global_batch_size=12: makes 3 micro-batches, .* pipeline_model_parallel_size=2\. Use 16\.",
    ),
]


@pytest.mark.parametrize(("changes", "message"), NOT_FITTING, ids=str)
def test_layouts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _check(**changes)
    assert len(str(caught.value).splitlines()) == 1


def test_all_that_does_not_fit_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="num_layers=7") as caught:
        _check(num_layers=7, seq_length=33, padded_vocab_size=1023)
    assert len(str(caught.value).splitlines()) == 3
