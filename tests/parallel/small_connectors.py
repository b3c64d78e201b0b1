"""A small connector of every kind: 4 tokens of a tile of 16 patches (linear: of 4), for width 32 in and out."""

from typing import Any

SMALL_CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"bias": False},
    "mlp": {"ffn_hidden_size": 48},
    "shared_mlp": {"weights": [0.7, 0.3], "mlp": {"kind": "mlp", "bias": True, "layernorm": False}},
    "average_pooling": {"num_tokens": 4},
    "attention_pooling": {"num_tokens": 4, "hidden_size": 24, "num_attention_heads": 3},
    "c_abstractor": {"num_tokens": 4, "hidden_size": 24, "depth": 2, "group_size": 24},
    "qformer": {
        "num_tokens": 4,
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 3,
    },
    "visual_abstractor": {"num_queries": 3, "num_layers": 2, "ffn_hidden_size": 40, "num_attention_heads": 4},
    "resampler": {"num_tokens": 4, "num_layers": 2, "num_attention_heads": 3, "kv_channels": 8},
}
"""Kind -> its fields. Every kind of ``megavlm.models.connectors.CONNECTORS`` is here, and a test says so."""


def small_model(kind: str, model: dict[str, Any]) -> dict[str, Any]:
    """Put the small connector of a kind into a model with tiles of 16 patches, ``shared_mlp`` behind two encoders."""
    connector, vision = {"kind": kind, **SMALL_CONNECTORS[kind]}, model["vision"]
    if kind == "shared_mlp":
        connector["mlp"] = {**connector["mlp"], "init_method_std": 0.2}
        half = {**vision, "hidden_size": vision["hidden_size"] // 2}
        vision = {"kind": "dual", "encoders": [half, {**half, "num_layers": 1}], "combine": "concatenate"}
    else:
        connector["init_method_std"] = 0.2
    if kind == "linear":  # a token for each patch
        vision = {**vision, "patch_size": 2 * vision["patch_size"]}
    return {**model, "vision": vision, "connector": connector}
