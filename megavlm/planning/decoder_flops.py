"""Operations of the decoder, product by product as megatron-core computes its layers and ``models`` what it adds."""

import math
from collections.abc import Mapping

from megavlm.batch import Batch
from megavlm.models.config import VLMConfig, model_vocab_size
from megavlm.models.connectors import Products
from megavlm.models.gated_block import GatedFeedForwardConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.moe import MoEConfig
from megavlm.planning.experts import expert_width


def count_decoder(
    language: Products, model: VLMConfig, batch: Batch, vocab_size: int, *, embeddings: bool, context: bool
) -> None:
    """Tell the products of all layers, and of the output layer where tokens are trained.

    Args:
        language: takes them.
        model: the whole model.
        batch: the micro-batch.
        vocab_size: tokens of the tokenizer.
        embeddings: whether the gradient of what goes into the first layer is needed.
        context: whether that of the context is.
    """
    config, states = model.decoder, embeddings
    crossed, with_experts = model.cross_attention_layers, config.layers_with_experts
    for number in range(config.num_layers):
        layer = language.within(f"decoder.layers.{number}")
        if number in crossed and model.gated_feed_forward is not None:
            block = layer.within("gated_block")
            states = _count_gated_block(block, model.gated_feed_forward, config, batch, states, context)
        states = _count_self_attention(layer, config, number, batch, states)
        if number in crossed and model.gated_feed_forward is None:
            states = _count_cross_attention(layer, config, batch, states, context)
        normed = layer.norm("pre_mlp_layernorm", states, bias=False)
        if config.moe is not None and number in with_experts:
            states |= _count_experts(layer.within("mlp"), config, config.moe, batch.tokens.numel(), normed)
        else:
            states |= _count_feed_forward(layer.within("mlp"), config, number, batch.tokens.numel(), normed)
    states = language.norm("decoder.final_layernorm", states, bias=False)
    divisor = config.make_vocab_size_divisible_by
    padded_vocab_size = -(-model_vocab_size(config, vocab_size) // divisor) * divisor
    num_trained = max(1, int(batch.loss_mask.count_nonzero()))  # as LanguageModel.token_losses
    is_tied = config.share_embeddings_and_output_weights
    weight = "embedding.word_embeddings.weight" if is_tied else "output_layer.weight"
    language.matrix([weight], num_trained, config.hidden_size, padded_vocab_size, states)


def _count_self_attention(layer: Products, config: LanguageConfig, number: int, batch: Batch, states: bool) -> bool:
    num_rows, row_length = batch.tokens.shape
    num_vectors, width = num_rows * row_length, config.hidden_size
    query_width, key_width = config.query_width, config.key_width
    attention = layer.within("self_attention")
    normed = layer.norm("input_layernorm", states, bias=False)
    widths = {"q_proj": query_width, "k_proj": key_width, "v_proj": key_width}
    needs = _count_projections(attention, "linear_qkv", config, number, num_vectors, width, widths, normed)
    needs |= config.add_qkv_bias and attention.trains("linear_qkv.bias")
    needs = attention.attention(num_vectors * row_length, query_width, query=needs, key=needs, value=needs)
    widths = {"o_proj": width}
    return states | _count_projections(
        attention, "linear_proj", config, number, num_vectors, query_width, widths, needs
    )


def _count_cross_attention(layer: Products, config: LanguageConfig, batch: Batch, states: bool, context: bool) -> bool:
    num_rows, row_length = batch.tokens.shape
    num_vectors, num_read, width = num_rows * row_length, num_rows * batch.context_length, config.hidden_size
    query_width, key_width = config.query_width, config.key_width
    attention = layer.within("cross_attention")
    normed = layer.norm("pre_cross_attn_layernorm", states, bias=False)
    query = attention.linear("linear_q", num_vectors, width, query_width, normed, bias=False)
    read = attention.linear("linear_kv", num_read, width, 2 * key_width, context, bias=False)
    attended = attention.attention(num_vectors * batch.context_length, query_width, query=query, key=read, value=read)
    states |= attention.linear("linear_proj", num_vectors, query_width, width, attended, bias=False)
    return states or layer.trains("cross_attn_bda.gate")


def _count_gated_block(
    block: Products,
    feed_forward: GatedFeedForwardConfig,
    config: LanguageConfig,
    batch: Batch,
    states: bool,
    context: bool,
) -> bool:
    """Cross-attention and feed-forward layer, before a decoder layer."""
    states = _count_cross_attention(block, config, batch, states, context)
    num_vectors, width = batch.tokens.numel(), config.hidden_size
    inner_size, num_inputs = feed_forward.width(width), 2 if feed_forward.activation == "swiglu" else 1
    normed = block.norm("pre_mlp_layernorm", states, bias=False)
    inner = block.linear("mlp.linear_fc1", num_vectors, width, num_inputs * inner_size, normed, bias=False)
    states |= block.linear("mlp.linear_fc2", num_vectors, inner_size, width, inner, bias=False)
    return states or block.trains("mlp_bda.gate")


def _count_feed_forward(mlp: Products, config: LanguageConfig, number: int, num_vectors: int, needs: bool) -> bool:
    width, inner_size = config.hidden_size, config.ffn_hidden_size
    widths = {"gate_proj": inner_size, "up_proj": inner_size}
    inner = _count_projections(mlp, "linear_fc1", config, number, num_vectors, width, widths, needs)
    return _count_projections(mlp, "linear_fc2", config, number, num_vectors, inner_size, {"down_proj": width}, inner)


def _count_projections(
    scope: Products,
    module: str,
    config: LanguageConfig,
    number: int,
    num_vectors: int,
    input_size: int,
    widths: Mapping[str, int],
    needs_input: bool,
) -> bool:
    """A linear layer that holds these projections, of these widths, and LoRA of those that are adapted."""
    needs = scope.linear(module, num_vectors, input_size, sum(widths.values()), needs_input, bias=False)
    for projection, width in widths.items():
        if config.lora is not None and config.lora.adapts(number, projection):
            pair, rank = scope.within(f"{module}.lora.{projection}"), config.lora.r
            inner = pair.matrix(["a"], num_vectors, input_size, rank, needs_input)
            needs |= pair.matrix(["b"], num_vectors, rank, width, inner)
    return needs


def _count_experts(mlp: Products, config: LanguageConfig, moe: MoEConfig, num_tokens: int, needs: bool) -> bool:
    """Router and experts. An expert's inner values are multiplied by what the router gives it."""
    width, inner_size, experts = config.hidden_size, expert_width(config), mlp.within("experts")

    def matrices(name: str) -> list[str]:  # of all experts together, or of each
        return [f"{name}_weight", *(f"local_experts.{expert}.{name}.weight" for expert in range(moe.num_moe_experts))]

    routed = mlp.linear("router", num_tokens, width, moe.num_moe_experts, needs, bias=False)
    num_vectors = _rows_of_experts(moe, num_tokens)
    inner = experts.matrix(matrices("linear_fc1"), num_vectors, width, 2 * inner_size, needs)
    return experts.matrix(matrices("linear_fc2"), num_vectors, inner_size, width, inner or routed)


def _rows_of_experts(moe: MoEConfig, num_tokens: int) -> int:
    """Vectors that go through the experts of a layer, all experts together."""
    num_chosen = num_tokens * moe.moe_router_topk
    if moe.moe_expert_capacity_factor is None:
        return num_chosen
    # as megatron-core.transformer.moe.moe_utils.get_capacity
    capacity = math.ceil(num_chosen / moe.num_moe_experts * moe.moe_expert_capacity_factor)
    room = capacity * moe.num_moe_experts
    return room if moe.moe_pad_expert_input_to_capacity else min(num_chosen, room)
