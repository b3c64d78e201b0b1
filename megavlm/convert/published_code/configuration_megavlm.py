"""Configuration of MegaVLM's own layout for ``transformers``: NVLM-D, NVLM-X and NVLM-H (arXiv 2409.11402).

The file is copied into every folder of that layout and needs nothing but ``transformers``.
"""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


class MegaVLMConfig(PreTrainedConfig):
    """Vision encoder, connector, fusion and language model."""

    model_type = "megavlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        connector: dict[str, Any] | None = None,
        fusion: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        keep_class_token: bool = False,
        vision_layernorm: bool = False,
        image_seq_length: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        """Fill in the parts.

        Args:
            text_config: of a ``llama`` or ``qwen2`` decoder.
            vision_config: of one of ``transformers``' vision towers, with the layers that are used and no more.
            connector: ``pixel_shuffle`` (fold 2 x 2 patches into one token), ``layernorm``, ``layernorm_epsilon``,
                ``num_layers`` (1 or 2), ``hidden_size`` (between the two layers), ``bias``.
            fusion: ``kind`` (``decoder_only``, ``cross_attention`` or ``hybrid``); with cross-attention also
                ``every_n_layers``, ``first_layer`` (which decoder layers have it), ``text_sees`` (``all_images`` or
                ``last_image``, which the processor follows) and, for ``hybrid``, ``tag_integration`` (``add`` or
                ``concatenate``).
            image_token_id: the placeholder of image features among the tokens.
            keep_class_token: whether the vision encoder's class token is a feature too.
            vision_layernorm: whether features pass the norm that the tower has after its last layer.
            image_seq_length: features that one tile becomes.
            tie_word_embeddings: whether embedding and output layer are one matrix.
            kwargs: of every configuration.
        """
        self.text_config = _part(text_config, "llama")
        self.vision_config = _part(vision_config, "internvl_vision")
        self.connector = {
            "pixel_shuffle": True,
            "layernorm": True,
            "layernorm_epsilon": 1e-5,
            "num_layers": 2,
            "hidden_size": self.text_config.hidden_size,
            "bias": False,
            **(connector or {}),
        }
        self.fusion = {"kind": "decoder_only", **(fusion or {})}
        self.image_token_id = image_token_id
        self.keep_class_token = keep_class_token
        self.vision_layernorm = vision_layernorm
        self.image_seq_length = image_seq_length
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers with cross-attention."""
        if self.fusion["kind"] == "decoder_only":
            return ()
        first, step = self.fusion["first_layer"], self.fusion["every_n_layers"]
        return tuple(range(first, self.text_config.num_hidden_layers, step))


def _part(config: dict[str, Any] | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config or {})
    return CONFIG_MAPPING[fields.pop("model_type", default_type)](**fields)
