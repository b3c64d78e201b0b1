"""Layers of MegaVLM's own layout that ``transformers`` has not: connector, and cross-attention inside decoder layers.

The file is copied into every folder of that layout. Shape letters: N rows, S tokens, T tiles, P patches, K features of
a tile, G tokens of a tag, C places of a row's context (the keys and values of cross-attention), D channels, H hidden
width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .configuration_megavlm import MegaVLMConfig

KeysAndValues = tuple[Tensor, Tensor]
Context = tuple[Tensor, tuple[KeysAndValues, ...]]
"""``[N, C]`` int64, the tile of its row that each place belongs to (-1: padding), and for each cross-attention layer
keys and values ``[N, groups, C, D]``."""


class _WithCrossAttention:
    """A decoder layer of Llama's build that lets the cross-attention between self-attention and feed-forward layer."""

    def forward(self, hidden_states: Tensor, cross_attention: Any = None, **kwargs: Any) -> Tensor:
        """Run the layer: ``[N, S, H]`` -> the same. ``cross_attention(layer, states)`` gives the states changed."""
        layer: Any = self
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if cross_attention is not None:
            hidden_states = cross_attention(layer.self_attn.layer_idx, hidden_states)
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


class MegaVLMLlamaLayer(_WithCrossAttention, LlamaDecoderLayer):
    """Llama's, with room for cross-attention."""


class MegaVLMQwen2Layer(_WithCrossAttention, Qwen2DecoderLayer):
    """Qwen2's, with room for cross-attention."""


DECODER_LAYERS: dict[str, type[nn.Module]] = {"llama": MegaVLMLlamaLayer, "qwen2": MegaVLMQwen2Layer}


class MegaVLMConnector(nn.Module):
    """Pixel shuffle, LayerNorm, one or two linear layers: ``[T, P, D]`` -> ``[T, K, H]``."""

    def __init__(self, config: MegaVLMConfig) -> None:
        super().__init__()
        fields, output_size = config.connector, config.text_config.hidden_size
        self.shuffles = fields["pixel_shuffle"]
        width = config.vision_config.hidden_size * (4 if self.shuffles else 1)
        has_two_layers = fields["num_layers"] == 2
        inner_size = fields["hidden_size"] if has_two_layers else output_size
        self.norm = nn.LayerNorm(width, eps=fields["layernorm_epsilon"]) if fields["layernorm"] else None
        self.linear_1 = nn.Linear(width, inner_size, bias=fields["bias"])
        self.linear_2 = nn.Linear(inner_size, output_size, bias=fields["bias"]) if has_two_layers else None

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features."""
        if self.shuffles:
            features = pixel_shuffle(features)
        if self.norm is not None:
            features = self.norm(features)
        states = self.linear_1(features)
        return states if self.linear_2 is None else self.linear_2(F.gelu(states))


def pixel_shuffle(features: Tensor) -> Tensor:
    """Fold each 2 x 2 block of patches into one token: ``[T, P, D]`` -> ``[T, P / 4, 4 * D]``.

    Tokens go row by row; channels are the block's patches in the order top left, top right, bottom left, bottom right.
    """
    num_tiles, num_patches, width = features.shape
    half = math.isqrt(num_patches) // 2
    blocks = features.reshape(num_tiles, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(num_tiles, half * half, 4 * width)


class MegaVLMCrossAttentionLayer(nn.Module):
    """Gated cross-attention of one decoder layer, with grouped heads. Keys carry no positions."""

    def __init__(self, config: MegaVLMConfig) -> None:
        super().__init__()
        text = config.text_config
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        query_size, key_size = self.head_dim * text.num_attention_heads, self.head_dim * text.num_key_value_heads
        self.norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.q_proj = nn.Linear(text.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(text.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(text.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, text.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def keys_and_values(self, context: Tensor) -> KeysAndValues:
        """Project ``[N, C, H]`` to two of ``[N, groups, C, D]``."""
        return self._heads(self.k_proj(context)), self._heads(self.v_proj(context))

    def forward(self, hidden_states: Tensor, key: Tensor, value: Tensor, is_seen: Tensor) -> Tensor:
        """Add what the tokens read to the residual stream.

        Args:
            hidden_states: ``[N, S, H]``.
            key, value: of :meth:`keys_and_values`.
            is_seen: ``[N, S, C]`` bool. A token that sees nothing is left as it is.
        """
        sees_nothing = ~is_seen.any(-1, keepdim=True)
        mask = (is_seen | sees_nothing).unsqueeze(1)  # a softmax over nothing has no value; its result is taken away
        query = self._heads(self.q_proj(self.norm(hidden_states)))
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        read = read.transpose(1, 2).flatten(2).masked_fill(sees_nothing, 0.0)
        return torch.addcmul(hidden_states, self.o_proj(read), torch.tanh(self.gate))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MegaVLMCrossAttention(nn.Module):
    """All cross-attention layers, by the decoder layer that each stands in, and the norm of what they read."""

    def __init__(self, config: MegaVLMConfig) -> None:
        super().__init__()
        text = config.text_config
        self.tag_integration = config.fusion.get("tag_integration")
        self.context_norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.layers = nn.ModuleDict(
            {str(number): MegaVLMCrossAttentionLayer(config) for number in config.cross_attention_layers}
        )

    def lay_out(self, features: Tensor, tags: list[Tensor], rows: Tensor, tiles: Tensor, num_rows: int) -> Context:
        """Put the tiles of each row behind each other.

        Args:
            features: ``[T, K, H]`` of the tiles that are read by cross-attention.
            tags: for each, the embeddings of its tag ``[G, H]``; empty where no tag goes into the context.
            rows: ``[T]`` int64, row of each.
            tiles: ``[T]`` int64, its number in its row.
            num_rows: N.
        """
        pieces: list[list[Tensor]] = [[features.new_zeros(0, features.shape[-1])] for _ in range(num_rows)]
        owners: list[list[Tensor]] = [[tiles[:0]] for _ in range(num_rows)]
        for tile, tag, row, number in zip(features, tags, rows.tolist(), tiles, strict=True):
            if self.tag_integration == "add":
                piece = self.context_norm(tile) + self.context_norm(tag.sum(0).expand_as(tile))
            else:
                piece = self.context_norm(torch.cat([tag, tile]))
            pieces[row].append(piece)
            owners[row].append(number.expand(len(piece)))
        context = pad_sequence([torch.cat(row) for row in pieces], batch_first=True)
        owner = pad_sequence([torch.cat(row) for row in owners], batch_first=True, padding_value=-1)
        layers: Any = self.layers.values()
        return owner, tuple(layer.keys_and_values(context) for layer in layers)

    def read(self, context: Context, is_seen: Tensor, layer: int, hidden_states: Tensor) -> Tensor:
        """Return the states ``[N, S, H]`` of decoder layer ``layer`` after its cross-attention, if it has one."""
        name = str(layer)
        if name not in self.layers:
            return hidden_states
        key, value = context[1][list(self.layers).index(name)]
        return self.layers[name](hidden_states, key, value, is_seen)
