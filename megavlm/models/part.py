"""A model's parts: what a recipe trains or freezes, what is counted apart, what a checkpoint can lack as a whole."""

PARTS = ("vision", "connector", "cross_attention", "language", "lora")

_CROSS_ATTENTION_MODULES = frozenset(
    {"context_layernorm", "pre_cross_attn_layernorm", "cross_attention", "cross_attn_bda"}
)


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to.

    Cross-attention and LoRA live mostly inside the language model's layers, where megatron-core has its place, but are
    parts of their own.

    Args:
        name: of a parameter of a :class:`megavlm.models.vlm.VLM`, or its checkpoint key.
    """
    words = name.split(".")
    if words[0] in ("vision", "connector"):  # a connector may have cross-attention of its own
        return words[0]
    if "lora" in words:
        return "lora"
    return "cross_attention" if _CROSS_ATTENTION_MODULES.intersection(words) else words[0]
