"""The vision-language model: vision encoder -> connector -> fusion -> language model, one pipeline stage of it.

Shape letters: N rows, S tokens a row, T tiles, P patches of a tile, K tokens of a tile, H hidden width.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.batch import Batch
from megavlm.config import Config
from megavlm.models.backend import BACKENDS
from megavlm.models.connectors import AnyConnectorConfig
from megavlm.models.fusion import AnyFusionConfig
from megavlm.models.language import LanguageConfig, LanguageModel
from megavlm.models.vision import AnyVisionConfig

PARTS = ("vision", "connector", "language")
"""Names of a model's parts: what a recipe can train or freeze, and the first word of every checkpoint key."""


class VLMConfig(Config):
    """A model, as data."""

    vision: AnyVisionConfig
    connector: AnyConnectorConfig
    fusion: AnyFusionConfig
    language: LanguageConfig

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that one tile takes in the sequence of the language model."""
        return self.connector.tokens_per_tile(self.vision.num_patches)


class VLM(MegatronModule):
    """One pipeline stage (or virtual stage). Vision encoder and connector live on the first.

    ``forward`` is what megatron-core's schedules call: hidden states on all stages but the last, which gives per-token
    losses or logits.
    """

    def __init__(
        self,
        config: VLMConfig,
        megatron_settings: Mapping[str, Any],
        *,
        vocab_size: int,
        image_token_id: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        backend: str = "torch",
    ) -> None:
        """Build this stage's part.

        Args:
            config: the whole model.
            megatron_settings: TransformerConfig arguments that come from the layout and the precision.
            vocab_size: tokens of the tokenizer, image token included.
            image_token_id: the placeholder that image features replace.
            pre_process, post_process: whether the stage is the first, the last.
            vp_stage: index of the virtual stage, or None without interleaving.
            backend: a row of ``megavlm.models.backend.BACKENDS``.

        Raises:
            ValueError: the tokenizer has more tokens than the model's vocabulary.
        """
        transformer_config = config.language.transformer_config(megatron_settings)
        super().__init__(transformer_config)
        self.model_type = ModelType.encoder_or_decoder
        self.fusion = config.fusion
        self.image_token_id = image_token_id
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = config.language.share_embeddings_and_output_weights
        layers = BACKENDS[backend]
        if pre_process:
            self.vision = config.vision.build(megatron_settings, layers)
            self.connector = config.connector.build(
                config.vision.hidden_size, config.language.hidden_size, megatron_settings, layers
            )
        self.language = LanguageModel(
            config.language,
            transformer_config,
            config.fusion.layer_specs(config.language, layers),
            layers,
            vocab_size=model_vocab_size(config.language, vocab_size),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.tile_shape = (3, config.vision.image_size, config.vision.image_size)
        self.patch_shape = (config.vision.num_patches, config.vision.hidden_size)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take hidden states from the stage before (called by megatron-core's schedules)."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied word embedding, for megatron-core's all-reduce of its gradient between first and last stage."""
        return self.language.shared_embedding_or_output_weight()

    def forward(self, batch: Batch, wanted_logits: Tensor | None = None) -> Tensor:
        """Run this stage on a micro-batch.

        Args:
            batch: the micro-batch, on this rank's device.
            wanted_logits: ``[N, S]``, nonzero where the last stage shall give logits instead of losses.

        Returns:
            ``[S, N, H]`` hidden states, or on the last stage ``[N, S]`` losses (0 where nothing is trained) or
            ``[M, V]`` logits.

        Raises:
            ValueError: placeholders in the tokens and features of the tiles differ in number.
        """
        hidden_states = self._embed(batch) if self.pre_process else None
        attention_mask = packed_attention_mask(batch) if batch.is_packed else None
        hidden_states = self.language(hidden_states, batch.position_ids, attention_mask)
        if not self.post_process:
            return hidden_states
        if wanted_logits is not None:
            return self.language.logits(hidden_states, wanted_logits)
        return self.language.token_losses(hidden_states, batch.labels, batch.loss_mask)

    def _embed(self, batch: Batch) -> Tensor:
        """Tokens and tiles -> ``[S, N, H]``."""
        embeddings = self.language.embed(batch.tokens, batch.position_ids)
        if batch.tiles.shape[0]:
            features = self.connector(self._encode_tiles(batch.tiles))
            return self.fusion.merge(embeddings, features, batch, self.image_token_id)
        # Text only. megatron-core backpropagates on every stage and overlapped gradient reduction waits for every
        # parameter, so the parts that train must be in the graph of every micro-batch, here with weight zero.
        if torch.is_grad_enabled() and self._trains(self.vision, self.connector):
            embeddings = embeddings + self.connector(self._encode_nothing(embeddings)).sum() * 0.0
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            embeddings.requires_grad_()
        return embeddings

    def _encode_tiles(self, tiles: Tensor) -> Tensor:
        """``[T, 3, H, W]`` -> ``[T, P, D]``; a frozen encoder keeps no activations."""
        frozen = not self._trains(self.vision)
        with torch.no_grad() if frozen else contextlib.nullcontext():
            return self.vision(tiles)

    def _encode_nothing(self, like: Tensor) -> Tensor:
        """Features ``[1, P, D]`` of a blank tile, without the cost of the encoder if that is frozen."""
        if self._trains(self.vision):
            return self.vision(torch.zeros(1, *self.tile_shape, dtype=torch.uint8, device=like.device))
        return torch.zeros(1, *self.patch_shape, dtype=like.dtype, device=like.device)

    @staticmethod
    def _trains(*parts: torch.nn.Module) -> bool:
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def model_vocab_size(config: LanguageConfig, tokenizer_vocab_size: int) -> int:
    """Tokens that a model for this tokenizer has.

    Raises:
        ValueError: the tokenizer has more tokens than the recipe's vocabulary.
    """
    if config.vocab_size is None:
        return tokenizer_vocab_size
    if config.vocab_size < tokenizer_vocab_size:
        raise ValueError(
            f"model.language.vocab_size={config.vocab_size}: the tokenizer has {tokenizer_vocab_size} tokens (image "
            "token included). Raise vocab_size, or leave it out to take the tokenizer's."
        )
    return config.vocab_size


def packed_attention_mask(batch: Batch) -> Tensor:
    """Causal mask that also keeps the samples of a row apart.

    Returns:
        ``[N, 1, S, S]`` bool, True where a token may not look (megatron-core's convention).
    """
    num_rows, row_length = batch.tokens.shape
    flat_positions = torch.arange(num_rows * row_length, device=batch.tokens.device)
    sample = torch.searchsorted(batch.cu_seqlens.to(torch.int64), flat_positions, right=True).view(num_rows, row_length)
    other_sample = sample[:, :, None] != sample[:, None, :]
    future = torch.ones(row_length, row_length, dtype=torch.bool, device=batch.tokens.device).triu(1)
    return (other_sample | future).unsqueeze(1)
