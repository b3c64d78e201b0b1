"""Classes of ``transformers`` with cross-attention, and why none of them can carry a model of ours exactly.

Read from ``models/mllama/modeling_mllama.py`` and ``models/idefics/modeling_idefics.py`` of transformers 5.23. A row is
a condition on our model and the sentence that it proves; conditions that hold for every model are reasons all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megavlm.models.config import VLMConfig
from megavlm.models.connectors.mlp import MLPConnectorConfig


@dataclass(frozen=True)
class Reason:
    """One thing that a class does and our model does not, or the other way round."""

    text: str
    holds: Callable[[VLMConfig], bool] = lambda model: True


def _is_context_free(model: VLMConfig) -> bool:
    return not model.fusion.tile_route.uses_context


def _is_hybrid(model: VLMConfig) -> bool:
    return model.fusion.tile_route.context_tiles == "regular"


def _is_more_than_linear(model: VLMConfig) -> bool:
    connector = model.connector
    if not isinstance(connector, MLPConnectorConfig):
        return connector.kind != "linear"
    return connector.layernorm or connector.num_layers == 2 or connector.pixel_shuffle_ratio != 1.0


_BOTH = (
    Reason("it reads every image by cross-attention, and this model has none", _is_context_free),
    Reason("it has no place for NVLM-H's thumbnail tokens among the text, nor for tags in the context", _is_hybrid),
)

CANNOT_CARRY: dict[str, tuple[Reason, ...]] = {
    "MllamaForConditionalGeneration": (
        *_BOTH,
        Reason(
            "its cross-attention always normalises queries and keys head by head (q_norm, k_norm), which no weight can "
            "undo"
        ),
        Reason(
            "its cross-attention layers are whole blocks in the place of decoder layers, each with a gated "
            "feed-forward layer of its own; ours stands inside a decoder layer, before its feed-forward layer",
            lambda model: model.gated_feed_forward is None,
        ),
        Reason(
            "its cross-attention layers stand in the place of decoder layers; ours stand before them",
            lambda model: model.gated_feed_forward is not None,
        ),
        Reason("it has no norm between projected features and keys and values (our context_layernorm)"),
        Reason(
            "its vision tower is its own: two encoders one after the other (the second gated), tile and aspect-ratio "
            "embeddings, and features of several layers concatenated"
        ),
        Reason("its projector is one linear layer without pixel shuffle, norm or a second layer", _is_more_than_linear),
        Reason("its self-attention has no bias on queries, keys and values", lambda model: model.decoder.add_qkv_bias),
    ),
    "IdeficsForVisionText2Text": (
        *_BOTH,
        Reason("it has no norm between vision features and keys and values (our context_layernorm)"),
        Reason("it has no connector: keys and values are projected from the vision tower's own width"),
        Reason(
            "a connector of pixel shuffle, norm or two layers is nothing that a key projection can take in",
            _is_more_than_linear,
        ),
        Reason(
            "its gated block stands before a decoder layer and has a feed-forward layer of its own; ours stands inside "
            "the layer, between self-attention and feed-forward layer",
            lambda model: model.gated_feed_forward is None,
        ),
        Reason(
            "its vision tower is CLIP's with the class token among the features",
            lambda model: not (model.vision.kind == "clip" and model.vision.keep_class_token),
        ),
        Reason(
            "its attention has as many key/value heads as query heads",
            lambda model: (
                (model.decoder.num_query_groups or model.decoder.num_attention_heads)
                != model.decoder.num_attention_heads
            ),
        ),
        Reason(
            "its cross-attention begins with the first layer",
            lambda model: bool(model.cross_attention_layers) and model.cross_attention_layers[0] != 0,
        ),
        Reason("its self-attention has no bias on queries, keys and values", lambda model: model.decoder.add_qkv_bias),
        Reason(
            "its heads have hidden_size / num_attention_heads channels",
            lambda model: (
                model.decoder.kv_channels not in (None, model.decoder.hidden_size // model.decoder.num_attention_heads)
            ),
        ),
    ),
}
"""Class -> reasons, those that hold for this model only with their condition."""


def reasons_against(architecture: str, model: VLMConfig) -> list[str]:
    """Name every reason why a class of :data:`CANNOT_CARRY` cannot carry a model. There is always one."""
    return [reason.text for reason in CANNOT_CARRY[architecture] if reason.holds(model)]
