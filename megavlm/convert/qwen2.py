"""Weights of ``transformers``' Qwen2ForCausalLM (Qwen 2 and 2.5).

The names are Llama's; queries, keys and values have biases as well, which the same rows of the table cover
(``add_qkv_bias: true``). The small models tie their embeddings (``share_embeddings_and_output_weights: true``).
"""

from megavlm.convert import llama
from megavlm.convert.weight_map import WeightMap
from megavlm.models.language import LanguageConfig


def weight_map(config: LanguageConfig) -> WeightMap:
    """Return the map between ``language.*`` and a Qwen2ForCausalLM checkpoint.

    Raises:
        ValueError: the recipe's model has no bias on queries, keys and values, which every Qwen2 has.
    """
    if not config.add_qkv_bias:
        raise ValueError(
            "model.language.add_qkv_bias=False: every Qwen2 has a bias on queries, keys and values. Set it to true."
        )
    return llama.weight_map(config)
