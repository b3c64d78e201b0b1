"""The names by which operations are counted are those of the model's parameters."""

from typing import Any

import pytest
from counted_models import EXPERTS, FEED_FORWARDS, FUSIONS, KINDS, LORAS, MODELS, batch_for
from megatron.core import parallel_state
from tiny_vlm import IMAGE_TOKEN_ID, TINY, VOCAB_SIZE

from megavlm.engines import MegatronEngineConfig
from megavlm.models import fusion
from megavlm.models.config import VLMConfig
from megavlm.models.connectors import CONNECTORS
from megavlm.models.part import PARTS, Trainable
from megavlm.models.vision import VISION_ENCODERS
from megavlm.models.vlm import VLM
from megavlm.planning.flops import count_flops
from megavlm.runtime.fake_world import fake_world

NAMED: dict[str, dict[str, Any]] = {
    **KINDS,
    **MODELS,
    **{f"experts, {name}": {**TINY, "language": {**TINY["language"], "moe": moe}} for name, moe in EXPERTS.items()},
    **{f"LoRA, {name}": {**TINY, "language": {**TINY["language"], "lora": lora}} for name, lora in LORAS.items()},
    **{f"fusion {kind}": {**TINY, "fusion": {"kind": kind, **fields}} for kind, fields in FUSIONS.items()},
    **{
        f"gated {name}": {**TINY, "fusion": {"kind": "cross_attention", "feed_forward": fields}}
        for name, fields in FEED_FORWARDS.items()
    },
}
NOT_ASKED = {"text.caption_bias", "text.temperature"}
"""Behind the last product, and behind similarities, which are left out."""


class Asked(Trainable):
    """Lets nothing train, and keeps the names that it was asked of."""

    def __contains__(self, name: str) -> bool:
        self.within[name] = []  # type: ignore[index]
        return False


def names_of(config: VLMConfig, *, moe_grouped_gemm: bool = True) -> set[str]:
    with fake_world(world_size=1, rank=0):
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        settings = MegatronEngineConfig(moe_grouped_gemm=moe_grouped_gemm).megatron_settings()
        model = VLM(config, settings, vocab_size=VOCAB_SIZE, image_token_id=IMAGE_TOKEN_ID)
        return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", NAMED)
def test_every_parameter_is_asked_for_by_its_name(kind: str) -> None:
    config = VLMConfig.model_validate(NAMED[kind])
    asked = Asked(frozenset(PARTS), {})
    flops = count_flops(config, batch_for(config, "images"), vocab_size=VOCAB_SIZE, trainable=asked)
    assert not flops.backward
    names = names_of(config)
    if config.language.moe is not None:  # which are kept together or one by one
        names |= names_of(config, moe_grouped_gemm=False)
    assert asked.within.keys() == names - NOT_ASKED


def test_every_kind_is_among_them() -> None:
    configs = [VLMConfig.model_validate(tree) for tree in NAMED.values()]
    assert {config.connector.kind for config in configs} == CONNECTORS.keys()
    assert {config.vision.kind for config in configs} == VISION_ENCODERS.keys()
    assert {config.fusion.kind for config in configs} == fusion.FUSIONS.keys()
