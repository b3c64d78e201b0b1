"""The vision-language model: vision encoder -> connector -> fusion -> language model, one pipeline stage of it.

Shape letters: N rows, S tokens a row, T tiles, P patches of a tile, K tokens of a tile, C tokens of a row's context, H
hidden width. Under sequence parallelism, tensors between stages hold a tensor-parallel rank's share of S and of C.
"""

import contextlib
import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.batch import Batch
from megavlm.models.backend import find_backend, settle_emulation
from megavlm.models.blip2 import PairLosses, QFormerText, QFormerTextConfig
from megavlm.models.cache import KeyValueCache
from megavlm.models.config import VLMConfig, model_vocab_size
from megavlm.models.connectors.qformer import QFormerConfig
from megavlm.models.fusion import fill_placeholders, lay_out_context, sum_tags
from megavlm.models.language import LanguageModel, decoder_layer_specs
from megavlm.models.part_precision import part_precision


class VLM(MegatronModule):
    """One pipeline stage (or virtual stage). Vision encoder and connector live on the first.

    ``forward`` is what megatron-core's schedules call: hidden states on all stages but the last, which gives per-token
    losses or logits. A model with cross-attention sends its context along, behind the hidden states in one tensor, and
    so gets the context's gradient back by the same way.
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
        bf16_parts: Collection[str] = (),
        seed: int = 0,
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
            bf16_parts: of ``vision``, ``connector``, ``language``, ``cross_attention`` and ``experts`` those that
                stay in bfloat16 where the settings ask for FP8.
            seed: of what the model draws while it trains (BLIP-2's negatives).

        Raises:
            ValueError: the tokenizer has more tokens than the model's vocabulary, or the backend is not installed.
        """
        settings_of, layers_of = part_precision(megatron_settings, backend, bf16_parts)
        if isinstance(config.language, QFormerTextConfig):
            assert isinstance(config.connector, QFormerConfig)
            transformer_config = config.language.transformer_config(settings_of["connector"], config.connector)
        else:
            transformer_config = config.language.transformer_config(settings_of["language"])
        super().__init__(transformer_config)
        self.model_type = ModelType.encoder_or_decoder
        self.route = config.fusion.tile_route
        self.image_token_id = image_token_id
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = config.language.share_embeddings_and_output_weights
        layers = layers_of["language"]
        self.text: QFormerText | None = None
        self.loss_names: tuple[str, ...] = ()
        """Of the losses of tokens and of rows, where it has both."""
        self.tile_shape = (3, config.vision.image_size, config.vision.image_size)
        self.patch_shape = (config.vision.num_patches, config.vision.hidden_size)
        self._received: Tensor | None = None
        self.always_encodes = False
        """Whether encoder and connector run on every micro-batch, on a blank tile if it has none: where data-parallel
        ranks hold parts of each weight, they gather them together."""
        if isinstance(config.language, QFormerTextConfig):
            assert isinstance(config.connector, QFormerConfig)
            self.vision = config.vision.build(settings_of["vision"], layers_of["vision"])
            self.connector, self.text = config.language.build(
                config.connector,
                config.vision.hidden_size,
                settings_of["connector"],
                layers_of["connector"],
                vocab_size=model_vocab_size(config.language, vocab_size),
                image_token_id=image_token_id,
                seed=seed,
            )
            self._settle_precision(megatron_settings, backend, bf16_parts)
            self.loss_names = QFormerText.LOSS_NAMES
            return
        if pre_process:
            self.vision = config.vision.build(settings_of["vision"], layers_of["vision"])
            self.connector = config.connector.build(
                config.vision.hidden_size,
                config.language.hidden_size,
                settings_of["connector"],
                layers_of["connector"],
                num_patches=config.vision.num_patches,
            )
            if self.route.uses_context:
                # every rank normalises the whole context, so the gradient of the weight is whole on each
                whole_config = copy.copy(transformer_config)
                whole_config.sequence_parallel = False
                self.context_layernorm = layers.norm(
                    config=whole_config, hidden_size=config.language.hidden_size, eps=config.language.layernorm_epsilon
                )
        self.language = LanguageModel(
            config.language,
            transformer_config,
            config.fusion.extend(
                decoder_layer_specs(config.language, transformer_config, layers, layers_of["experts"]),
                layers_of["cross_attention"],
            ),
            layers,
            vocab_size=model_vocab_size(config.language, vocab_size),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self._settle_precision(megatron_settings, backend, bf16_parts)

    def _settle_precision(self, settings: Mapping[str, Any], backend: str, bf16_parts: Collection[str]) -> None:
        """Check the parts that emulate FP8, when all are built."""
        if find_backend(backend).emulating is None or settings.get("fp8") is None:
            return
        parts = {"language": self.language.decoder if self.text is None else self.text}
        if self.pre_process:
            parts |= {"vision": self.vision, "connector": self.connector}
        settle_emulation(parts, settings, bf16_parts)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the output of the stage before (called by megatron-core's schedules)."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied word embedding, for megatron-core's all-reduce of its gradient between first and last stage."""
        return None if self.text is not None else self.language.shared_embedding_or_output_weight()

    def forward(
        self, batch: Batch, wanted_logits: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor | PairLosses:
        """Run this stage on a micro-batch.

        Args:
            batch: the micro-batch, on this rank's device.
            wanted_logits: ``[N, S]``, nonzero where the last stage shall give logits instead of losses.
            cache: in generation, what came before; after the first step the tokens of the batch are those of text that
                follow, and its tiles those that they may see, without pixels.

        Returns:
            ``[S + C, N, H]`` hidden states and context, or on the last stage ``[N, S]`` losses (0 where nothing is
            trained) or ``[M, V]`` logits. Of a model that learns from pairs the losses of tokens and of rows.

        Raises:
            ValueError: the batch holds another number of placeholders, or another room for the tiles in the context,
                than the features of its tiles take.
        """
        if self.route.uses_context != (batch.context_length > 0):
            raise ValueError(
                f"batch.context_length={batch.context_length}: does not fit a model with"
                f"{'' if self.route.uses_context else 'out'} cross-attention. Make batches by the model's tile_route."
            )
        if self.text is not None:
            return self._pair_losses(self.text, batch)
        goes_on = cache is not None and not cache.is_empty
        if not self.pre_process:
            hidden_states, context = self._split_received(batch, has_context=self.route.uses_context and not goes_on)
        elif goes_on:
            hidden_states, context = self.language.embed(batch.tokens, batch.position_ids), None
        else:
            hidden_states, context = self._embed(batch)
        attention_mask = packed_attention_mask(batch) if batch.is_packed else None
        visible_context = batch.visible_context() if self.route.uses_context else None
        hidden_states = self.language(
            hidden_states,
            batch.position_ids,
            attention_mask,
            context,
            visible_context,
            cache,
            batch.is_padding() if self.config.num_moe_experts else None,
            self.language.router_observer.groups(batch, self.image_token_id),
        )
        if not self.post_process:
            return hidden_states if context is None else torch.cat([hidden_states, context])
        if wanted_logits is not None:
            return self.language.logits(hidden_states, wanted_logits)
        return self.language.token_losses(hidden_states, batch.labels, batch.loss_mask)

    def _split_received(self, batch: Batch, *, has_context: bool) -> tuple[Tensor, Tensor | None]:
        """Hidden states and context out of what the stage before sent."""
        received = self._received
        assert received is not None, "a later stage was called without set_input_tensor"
        if not has_context:
            return received, None
        shares = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        num_hidden = batch.tokens.shape[1] // shares
        return received[:num_hidden], received[num_hidden:]

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Tokens and tiles -> hidden states ``[S, N, H]`` and context ``[C, N, H]``."""
        embeddings = self.language.embed(batch.tokens, batch.position_ids)
        if batch.tiles.shape[0]:
            features = self._connect(self._encode_tiles(batch.tiles))
        else:
            features = embeddings.new_zeros(0, 1, embeddings.shape[-1])
            # megatron-core backpropagates on every stage and overlapped gradient reduction waits for every parameter,
            # so the parts that train must be in the graph of every micro-batch, here with weight zero.
            trains = torch.is_grad_enabled() and self._trains(self.vision, self.connector)
            if trains or self.always_encodes:
                nothing = self._connect(self._encode_nothing(embeddings))
                embeddings = embeddings + nothing.sum() * 0.0
                features = nothing[:0]
        if not self.route.uses_context:
            embeddings = fill_placeholders(embeddings, features, batch.tokens, self.image_token_id)
            context = None
        else:
            among_tokens = batch.tile_context == 0
            embeddings = fill_placeholders(embeddings, features[among_tokens], batch.tokens, self.image_token_id)
            context = self._lay_out_context(features[~among_tokens].to(embeddings.dtype), batch)
            context = self.language.split_over_sequence(context)
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            embeddings.requires_grad_()  # a stage without trained parameters still has to pass a gradient on
        return self.language.split_over_sequence(embeddings), context

    def _lay_out_context(self, features: Tensor, batch: Batch) -> Tensor:
        """Features of the context's tiles -> ``[C, N, H]`` with their tags, normalised."""
        if self.route.context_tags == "text":
            return self.context_layernorm(self._lay_out(features, None, batch))
        ids = batch.tile_tags[batch.tile_context != 0]
        tags = self.language.embed(ids.clamp(min=0), torch.zeros_like(ids))
        if self.route.context_tags == "concatenate":
            return self.context_layernorm(self._lay_out(features, tags, batch))
        # projected features are many times larger than word embeddings, so each is normalised by itself
        summed = sum_tags(tags, batch).unsqueeze(1).expand_as(features)
        normed = [self.context_layernorm(self._lay_out(part, None, batch)) for part in (features, summed)]
        return normed[0] + normed[1]

    def _lay_out(self, features: Tensor, tags: Tensor | None, batch: Batch) -> Tensor:
        """The context, with what it is made of in its graph even where it holds nothing."""
        context = lay_out_context(features, tags, batch)
        if self.always_encodes and features.shape[0] == 0:
            context = context + (features.sum() + (0.0 if tags is None else tags.sum()))
        return context

    def _pair_losses(self, text: QFormerText, batch: Batch) -> PairLosses:
        if batch.tiles.shape[0]:
            features = self._encode_tiles(batch.tiles)
        else:  # what trains must be in the graph of every micro-batch
            features = self._encode_nothing(text.word_embeddings)[:0]
        return text(self.connector, features, batch)

    def embed_pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and captions of rows as they are compared: ``[N, K, E]`` and ``[N, E]`` float32.

        Raises:
            ValueError: the model does not learn from pairs, or a row is none.
        """
        if self.text is None:
            raise ValueError("model.language.kind='decoder': compares no images and captions. Use qformer_text.")
        features = self._encode_tiles(batch.tiles)
        return self.text.embed_images(self.connector, features), self.text.embed_texts(self.connector, batch)

    def _encode_tiles(self, tiles: Tensor) -> Tensor:
        """``[T, 3, H, W]`` -> ``[T, P, D]``; a frozen encoder keeps no activations."""
        frozen = not self._trains(self.vision)
        with torch.no_grad() if frozen else contextlib.nullcontext():
            return self.vision(tiles)

    def _connect(self, features: Tensor) -> Tensor:
        """``[T, P, D]`` -> ``[T, K, H]``; layers of encoder and decoder see to FP8 themselves."""
        with get_fp8_context(self.connector.config):
            return self.connector(features)

    def _encode_nothing(self, like: Tensor) -> Tensor:
        """Features ``[1, P, D]`` of a blank tile, without the cost of the encoder if that is frozen."""
        if self._trains(self.vision) or self.always_encodes:
            return self._encode_tiles(torch.zeros(1, *self.tile_shape, dtype=torch.uint8, device=like.device))
        return torch.zeros(1, *self.patch_shape, dtype=like.dtype, device=like.device)

    @staticmethod
    def _trains(*parts: torch.nn.Module) -> bool:
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def packed_attention_mask(batch: Batch) -> Tensor:
    """Causal mask that also keeps the samples of a row apart.

    Returns:
        ``[N, 1, S, S]`` bool, True where a token may not look (megatron-core's convention).
    """
    row_length = batch.tokens.shape[1]
    sample = batch.sample_of_tokens()
    other_sample = sample[:, :, None] != sample[:, None, :]
    future = torch.ones(row_length, row_length, dtype=torch.bool, device=batch.tokens.device).triu(1)
    return (other_sample | future).unsqueeze(1)
