"""Which tensors of a connector are of the language model's width, and what a converter makes of them.

The paper prints the merged projection in a way whose dimensions do not fit; meant, and done by its code, is the
converter behind the projection: ``W' = C W`` and ``b' = C b + c``. Shape letters: S and T widths of the source's and
the target's language model, I any other width.
"""

from collections.abc import Collection

from torch import Tensor

from megavlm.convert.parts import ModelParts, weight_shapes
from megavlm.models.config import VLMConfig
from megavlm.models.connectors import AnyConnectorConfig
from megavlm.models.connectors.mlp import MLPConnectorConfig
from megavlm.models.connectors.shared_mlp import SharedMLPConnectorConfig
from megavlm.models.language import LanguageConfig
from megavlm.transfer.converter import Converter

_PREFIX = "connector."


def with_inner_width(connector: AnyConnectorConfig, width: int) -> AnyConnectorConfig:
    """Return a connector whose inner width, where it is the language model's by default, is a number of its own."""
    if isinstance(connector, SharedMLPConnectorConfig):
        return connector.model_copy(update={"mlp": with_inner_width(connector.mlp, width)})
    if isinstance(connector, MLPConnectorConfig) and connector.num_layers == 2 and connector.ffn_hidden_size is None:
        return connector.model_copy(update={"ffn_hidden_size": width})
    return connector


def output_keys(model: VLMConfig) -> tuple[str, ...]:
    """Return the checkpoint keys of a connector's tensors whose first dimension is the language model's width.

    They are found by building it for another width.

    Args:
        model: with a connector of :func:`with_inner_width`.

    Raises:
        ValueError: the language model's width is inside the connector too, which no matrix behind it can change.
    """
    width = model.decoder.hidden_size
    shapes, wider = (_connector_shapes(model, size) for size in (width, 2 * width))
    keys = tuple(key for key in shapes if shapes[key] != wider[key])
    matrices = [key for key in keys if len(shapes[key]) > 1]
    inside = [key for key in keys if wider[key] != (2 * width, *shapes[key][1:])]
    if inside or len(matrices) != 1:
        raise ValueError(
            f"model.connector.kind={model.connector.kind!r}: {', '.join(inside or matrices)} is inside it and of the "
            f"language model's width ({width}), so it cannot be taken to another. Only the last layer may be."
        )
    return keys


def _connector_shapes(model: VLMConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Checkpoint key -> shape of a connector for a language model of some width."""
    language = LanguageConfig(num_layers=1, hidden_size=width, ffn_hidden_size=1, num_attention_heads=1)
    parts = ModelParts(vision=model.vision, connector=model.connector, language=language)
    return {key: tensor.shape for key, tensor in weight_shapes(parts, 1).items() if key.startswith(_PREFIX)}


def has_bias(keys: Collection[str]) -> bool:
    """Whether the last layer has a bias, which a converter's can be merged into."""
    return any(key.endswith("bias") for key in keys)


def convert_tensor(tensor: Tensor, converter: Converter) -> Tensor:
    """Put the converter behind a tensor: a matrix ``[S, I]`` -> ``[T, I]``, a vector ``[S]`` -> ``[T]``.

    A vector is a place in embedding space (a bias, a learned end token) and gets the converter's bias, a matrix is not.
    """
    converted = converter.weight.double() @ tensor.double()
    if tensor.dim() == 1 and converter.bias is not None:
        converted = converted + converter.bias.double()
    return converted.to(tensor.dtype)
