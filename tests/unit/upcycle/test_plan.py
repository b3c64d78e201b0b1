"""What settings become: layers, sizes, the factor, and what they promise."""

import math
from typing import Any

import pytest
import torch

from megavlm.models.language import LanguageConfig
from megavlm.models.moe import MoEConfig
from megavlm.upcycle.plan import UpcycleSettings, simplest_spelling

LANGUAGE = LanguageConfig(num_layers=6, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)


def settings(**changes: Any) -> UpcycleSettings:
    return UpcycleSettings(**{"num_experts": 8, **changes})


@pytest.mark.parametrize(
    ("changes", "layers", "spelling"),
    [
        ({}, (0, 1, 2, 3, 4, 5), 1),
        ({"every": 2}, (0, 2, 4), 2),
        ({"every": 4}, (0, 4), 4),
        ({"every": 9}, (0,), 6),
        ({"every": 2, "first": 1}, (1, 3, 5), [0, 1, 0, 1, 0, 1]),
        ({"first": 5}, (5,), [0, 0, 0, 0, 0, 1]),
        ({"layers": (4, 0, 2)}, (0, 2, 4), 2),
        ({"layers": (1, 2)}, (1, 2), [0, 1, 1, 0, 0, 0]),
    ],
)
def test_layers_are_spelt_as_megatron_core_reads_them(
    changes: dict[str, Any], layers: tuple[int, ...], spelling: int | list[int]
) -> None:
    fields = settings(**changes).moe_fields(LANGUAGE)
    assert fields["moe_layer_freq"] == spelling
    moe = MoEConfig(**fields)
    assert LANGUAGE.model_copy(update={"moe": moe}).layers_with_experts == layers


def test_the_spelling_says_the_same_for_every_choice() -> None:
    for bits in range(1, 2**5):
        layers = tuple(layer for layer in range(5) if bits >> layer & 1)
        moe = MoEConfig(num_moe_experts=2, moe_layer_freq=simplest_spelling(layers, 5))
        assert tuple(number for number, has in enumerate(moe.has_experts(5)) if has) == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": 5}, r"--granularity=5: does not divide model\.language\.ffn_hidden_size=48"),
        ({"granularity": 3}, r"--num-experts=8: is no multiple of --granularity=3"),
        ({"granularity": 0}, r"--granularity=0: must be at least 1"),
        ({"every": 0}, r"--every=0: must be at least 1"),
        ({"first": 6}, r"--first=6: the language model has 6 layers"),
        ({"first": -1}, r"--first=-1: the language model has 6 layers"),
        ({"layers": (1, 6)}, r"--layers=1,6: \[6\] are not among the 6 of the language model"),
        ({"layers": (-1,)}, r"--layers=-1: \[-1\] are not among the 6"),
        ({"layers": (1, 1)}, r"--layers=1,1: are not a list of distinct layers of the 6"),
        ({"layers": ()}, r"--layers=: are not a list of distinct layers"),
        ({"noise": -0.1}, r"--noise=-0\.1: is no standard deviation"),
        ({"noise": math.nan}, r"--noise=nan: is no standard deviation"),
        ({"router_std": 0.0}, r"--router-std=0\.0: must be above 0"),
        ({"seed": 2**63}, r"--seed=9223372036854775808: is no 64-bit number"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes).moe_fields(LANGUAGE)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 1.0),
        ({"granularity": 4, "top_k": 8}, 4.0),
        ({"pre_softmax": True}, 4.0),  # each of two experts has a weight of 1/8
        ({"pre_softmax": True, "topk_scaling": 2.0}, 2.0),
        ({"pre_softmax": True, "granularity": 2, "top_k": 4}, 4.0),
        ({"pre_softmax": True, "granularity": 2, "top_k": 8}, 2.0),
    ],
)
def test_the_factor_is_right_for_equal_scores(changes: dict[str, Any], scale: float) -> None:
    assert settings(**changes).fc2_scale == scale


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "moe", "dtype", "reasons"),
    [
        ({}, {}, F32, []),
        ({}, {}, BF16, []),
        ({"granularity": 2, "top_k": 4}, {}, BF16, []),
        ({"granularity": 2, "top_k": 3}, {}, F32, [r"--top-k=3 is no multiple of --granularity=2"]),
        ({"granularity": 3, "num_experts": 6, "top_k": 3}, {}, F32, []),
        ({"granularity": 3, "num_experts": 6, "top_k": 3}, {}, BF16, ["bfloat16, in which a matrix times 3 is"]),
        ({"pre_softmax": True}, {}, F32, ["--pre-softmax"]),
        ({"pre_softmax": True, "top_k": 8}, {}, F32, []),
        ({"noise": 0.1, "pre_softmax": True}, {}, F32, ["--pre-softmax", r"--noise=0\.1"]),
        ({}, {"moe_expert_capacity_factor": 1.5}, F32, [r"moe_expert_capacity_factor=1\.5"]),
    ],
)
def test_only_what_is_exact_is_promised(
    changes: dict[str, Any], moe: dict[str, Any], dtype: torch.dtype, reasons: list[str]
) -> None:
    chosen = settings(**changes)
    found = chosen.reasons_not_exact(MoEConfig(**chosen.moe_fields(LANGUAGE), **moe), {dtype})
    assert len(found) == len(reasons)
    for text, pattern in zip(found, reasons, strict=True):
        assert pattern.replace("\\", "") in text
