"""Decoder-only fusion (NVLM-D, LLaVA): image features take the place of placeholder tokens.

Shape letters: N rows, S tokens a row, T tiles, K tokens of a tile, H hidden width.
"""

from typing import Literal

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megavlm.batch import Batch
from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.language import LanguageConfig, decoder_layer_specs


class DecoderOnlyConfig(Config):
    """All image tokens go through the decoder's self-attention."""

    kind: Literal["decoder_only"] = "decoder_only"

    def layer_specs(self, language: LanguageConfig, backend: Backend) -> list[ModuleSpec]:
        """One spec per decoder layer: the language model's own layers."""
        return decoder_layer_specs(language, backend)

    def merge(self, embeddings: Tensor, features: Tensor, batch: Batch, image_token_id: int) -> Tensor:
        """Put image features where the placeholders stand.

        Args:
            embeddings: ``[S, N, H]`` of all tokens.
            features: ``[T, K, H]``, tiles in the order of their placeholders.
            batch: the micro-batch.
            image_token_id: id of the placeholder token.

        Returns:
            ``[S, N, H]``.

        Raises:
            ValueError: the tokens hold another number of placeholders than the tiles have features.
        """
        rows, columns = (batch.tokens == image_token_id).nonzero(as_tuple=True)
        num_features = features.shape[0] * features.shape[1]
        if rows.numel() != num_features:
            raise ValueError(
                f"batch.tokens: hold {rows.numel()} image placeholders (token {image_token_id}), but "
                f"{features.shape[0]} tiles of {features.shape[1]} tokens give {num_features} features. The data must "
                "expand placeholders with this model's tokens_per_tile."
            )
        if num_features == 0:
            return embeddings
        flat = features.flatten(0, 1).to(embeddings.dtype)
        return torch.index_put(embeddings, (columns, rows), flat)
