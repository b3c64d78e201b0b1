"""The language model: a decoder-only transformer of the Llama and Qwen2 families, from megatron-core parts.

Shape letters: N rows, S tokens a row, H hidden width, V vocabulary, M tokens whose logits are wanted.
"""

import copy

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megavlm.models.backend import Backend, block_spec
from megavlm.models.cache import KeyValueCache
from megavlm.models.language.config import LanguageConfig
from megavlm.models.moe import Router, RouterObserver
from megavlm.models.weights import mark_padded


class LanguageModel(LanguageModule):
    """Embedding, decoder layers and output layer of one pipeline stage (or virtual stage).

    It differs from megatron-core's ``GPTModel`` in what a VLM needs: embeddings can be filled with image features
    before they are split over the sequence, positions may restart inside a row, and the output layer and loss run on
    the trained tokens only (prompts and image tokens, most of a sequence, cost nothing there).
    """

    def __init__(
        self,
        config: LanguageConfig,
        transformer_config: TransformerConfig,
        layers: list[ModuleSpec],
        backend: Backend,
        *,
        vocab_size: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        """Build this stage's part.

        Args:
            config: shape of the decoder.
            transformer_config: see :meth:`LanguageConfig.transformer_config`.
            layers: specs of all layers of the model; this stage takes its own.
            backend: where the final norm comes from.
            vocab_size: real tokens, image token included, padding not.
            pre_process, post_process: whether the stage is the first, the last.
            vp_stage: index of the virtual stage, or None without interleaving.
        """
        super().__init__(transformer_config)
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.vocab_size = vocab_size
        self.share_embeddings_and_output_weights = config.share_embeddings_and_output_weights
        padded_vocab_size = -(-vocab_size // config.make_vocab_size_divisible_by) * config.make_vocab_size_divisible_by

        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=transformer_config,
                vocab_size=padded_vocab_size,
                max_sequence_length=0,  # only used by learned positions
                position_embedding_type="rope",
                scatter_to_sequence_parallel=False,  # image features come in first
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=transformer_config.kv_channels,
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling_factor is not None,
            rope_scaling_factor=config.rope_scaling_factor or 1.0,
        )
        first = get_transformer_layer_offset(transformer_config, vp_stage=vp_stage)
        count = get_num_layers_to_build(transformer_config, vp_stage=vp_stage)
        self.decoder = TransformerBlock(
            config=transformer_config,
            spec=block_spec(backend, layers[first : first + count]),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.router_observer = RouterObserver([m for m in self.decoder.modules() if isinstance(m, Router)])
        if post_process:
            # The loss gathers the sequence before it picks the trained tokens, so this layer sees whole rows of hidden
            # states and must all-reduce its input gradient even when the rest of the model is sequence parallel.
            output_config = copy.copy(transformer_config)
            output_config.sequence_parallel = False
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                transformer_config.hidden_size,
                padded_vocab_size,
                config=output_config,
                init_method=transformer_config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and self.share_embeddings_and_output_weights,
            )
        if pre_process or post_process:
            self._mark_vocabulary_padding(transformer_config.hidden_size)
            self.setup_embeddings_and_output_layer()

    def _mark_vocabulary_padding(self, hidden_size: int) -> None:
        if self.pre_process:
            mark_padded(self.embedding.word_embeddings.weight, (self.vocab_size, hidden_size))
        if self.post_process and self.output_layer.weight is not None:
            mark_padded(self.output_layer.weight, (self.vocab_size, hidden_size))

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Look up token embeddings: ``[N, S]`` int64 -> ``[S, N, H]``, whole on every tensor-parallel rank."""
        return self.embedding(input_ids=tokens, position_ids=position_ids)

    def split_over_sequence(self, states: Tensor) -> Tensor:
        """``[S, N, H]`` whole on every tensor-parallel rank -> this rank's share, under sequence parallelism."""
        if self.config.sequence_parallel:
            return tensor_parallel.scatter_to_sequence_parallel_region(states)
        return states

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        context: Tensor | None = None,
        visible_context: Tensor | None = None,
        cache: KeyValueCache | None = None,
        is_padding: Tensor | None = None,
        token_groups: Tensor | None = None,
    ) -> Tensor:
        """Run this stage's decoder layers.

        Args:
            hidden_states: ``[S, N, H]``, of :meth:`embed` or of the stage before; this and ``context`` are split over
                the sequence under sequence parallelism (:meth:`split_over_sequence`).
            position_ids: ``[N, S]`` int64.
            attention_mask: None for plain causal rows; ``[N, 1, S, S]`` bool, True where a token may not look, for
                packed rows.
            context: ``[C, N, H]``, keys and values of cross-attention; None if no layer has any.
            visible_context: ``[N, S, 2]`` int64, the range of its row's context that each token may see.
            cache: in generation, what came before these tokens; says positions and mask itself.
            is_padding: ``[N, S]`` bool, tokens that the losses of routers leave out; None: no token is.
            token_groups: ``[N, S]`` int64, what ``router_observer`` counts each token as; None: nothing is counted.

        Returns:
            ``[S, N, H]``, split as ``hidden_states`` is.
        """
        if not self.pre_process:
            self.decoder.set_input_tensor(hidden_states)
        if cache is not None:
            attention_mask, position_ids = cache.mask(position_ids.shape[1]), cache.positions()
        frequencies = self.rotary_pos_emb(position_ids.shape[1])
        if attention_mask is not None:  # packed or padded on the left: each row has frequencies of its own
            frequencies = frequencies[position_ids, 0, 0].transpose(0, 1).unsqueeze(2)
        with self.router_observer.watch(self._own_tokens(token_groups)):
            return self.decoder(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                rotary_pos_emb=frequencies,
                context=context,
                context_mask=visible_context,
                inference_context=cache,
                padding_mask=self._own_tokens(is_padding),
            )

    def _own_tokens(self, per_token: Tensor | None) -> Tensor | None:
        """``[N, S]`` -> the columns of this rank, under sequence parallelism."""
        if per_token is None or not self.config.sequence_parallel:
            return per_token
        shares = per_token.chunk(parallel_state.get_tensor_model_parallel_world_size(), dim=1)
        return shares[parallel_state.get_tensor_model_parallel_rank()]

    def token_losses(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        """Cross-entropy of the trained tokens.

        Args:
            hidden_states: ``[S, N, H]`` of the last stage.
            labels: ``[N, S]`` int64.
            loss_mask: ``[N, S]``; positions with 0 are not computed.

        Returns:
            ``[N, S]`` float32, 0 where ``loss_mask`` is 0. It always depends on the hidden states, so a batch with no
            trained token still has a (zero) gradient and runs the same collectives.
        """
        trained = loss_mask.flatten().nonzero().squeeze(1)
        if trained.numel() == 0:
            trained = trained.new_zeros(1)
        logits = self._logits_at(hidden_states, trained, row_length=labels.shape[1])
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.flatten()[trained])
        scattered = torch.zeros(labels.numel(), dtype=losses.dtype, device=losses.device)
        return scattered.index_put((trained,), losses).view_as(labels) * (loss_mask != 0)

    def logits(self, hidden_states: Tensor, wanted: Tensor) -> Tensor:
        """Logits at chosen positions.

        Args:
            hidden_states: ``[S, N, H]`` of the last stage.
            wanted: ``[N, S]``, nonzero where logits are wanted (row by row).

        Returns:
            ``[M, V]``, whole on every tensor-parallel rank, vocabulary padding cut off.
        """
        positions = wanted.flatten().nonzero().squeeze(1)
        logits = self._logits_at(hidden_states, positions, row_length=wanted.shape[1])
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)[:, : self.vocab_size]

    def _logits_at(self, hidden_states: Tensor, positions: Tensor, row_length: int) -> Tensor:
        """Return ``[M, V / tp]`` logits at flat positions ``n * S + s``; padded tokens get -inf."""
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        num_rows = hidden_states.shape[1]
        rows, columns = positions // row_length, positions % row_length
        chosen = hidden_states.flatten(0, 1).index_select(0, columns * num_rows + rows)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(chosen, weight=weight)
        first_token = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        num_real = max(0, self.vocab_size - first_token)
        if num_real < logits.shape[-1]:
            is_padding = torch.arange(logits.shape[-1], device=logits.device) >= num_real
            logits = logits.masked_fill(is_padding, float("-inf"))
        return logits
