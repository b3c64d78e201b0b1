"""Connectors: a tile's patch features to tokens of the language model's width.

A kind is one file here and one row in :data:`CONNECTORS`. Its config is a pydantic class with ``kind`` and what
:class:`ConnectorConfig` lists; ``build`` makes the module, whose ``forward`` takes ``features [T, P, D]`` and gives
``tokens [T, K, hidden]`` with ``K = tokens_per_tile(P)``.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Protocol

import pydantic
import torch

from megavlm.models.backend import Backend
from megavlm.models.connectors.mlp import MLPConnectorConfig


class ConnectorConfig(Protocol):
    """What the rest of the project asks of a connector's config."""

    kind: str

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes.

        Raises:
            ValueError: the connector cannot take that many patches.
        """

    def build(
        self, input_size: int, output_size: int, megatron_settings: Mapping[str, Any], backend: Backend
    ) -> torch.nn.Module:
        """Make the module, from width ``input_size`` to width ``output_size``."""


CONNECTORS: dict[str, type] = {
    "mlp": MLPConnectorConfig,
}

AnyConnectorConfig = Annotated[MLPConnectorConfig, pydantic.Field(discriminator="kind")]
