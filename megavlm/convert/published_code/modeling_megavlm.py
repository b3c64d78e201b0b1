"""MegaVLM's own layout as a ``transformers`` model: NVLM-D, NVLM-X and NVLM-H (arXiv 2409.11402).

The file is copied into every folder of that layout and needs nothing but ``torch`` and ``transformers``, whose vision
towers and decoder layers it uses. Shape letters: N rows, S tokens of this step, P tokens before them, T tiles of all
rows, K features of a tile, G tokens of a tag, C places of a row's context (the keys and values of cross-attention), D
channels of a head, H hidden width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_megavlm import MegaVLMConfig
from .layers_megavlm import DECODER_LAYERS, Context, MegaVLMConnector, MegaVLMCrossAttention

_NORMS_AT_THE_END = {
    "internvl_vision": "layernorm",
    "clip_vision_model": "post_layernorm",
    "siglip_vision_model": "post_layernorm",
    "dinov2": "layernorm",
}
"""Vision tower -> its norm after the last layer, which features pass only with ``vision_layernorm``."""
_WITHOUT_CLASS_TOKEN = ("siglip_vision_model",)
_PER_TILE = ("pixel_values", "tile_in_context", "tile_tags")
_NO_TAG = -1


@dataclass
class MegaVLMOutput(CausalLMOutputWithPast):
    """Logits ``[N, S, V]``, and what generation keeps."""

    context: Context | None = None
    """What cross-attention reads, to be handed to the next step in place of pixels."""


class MegaVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision encoder, connector, cross-attention (NVLM-X and H) and language model."""

    config_class = MegaVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegaVLMLlamaLayer", "MegaVLMQwen2Layer", "MegaVLMCrossAttentionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MegaVLMConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision = AutoModel.from_config(vision)
        if not config.vision_layernorm:
            setattr(self.vision, _NORMS_AT_THE_END[vision.model_type], nn.Identity())
        self.num_skipped = 0 if config.keep_class_token or vision.model_type in _WITHOUT_CLASS_TOKEN else 1
        self.connector = MegaVLMConnector(config)
        self.cross_attention = MegaVLMCrossAttention(config) if config.cross_attention_layers else None
        self.language = AutoModelForCausalLM.from_config(text)
        layer = DECODER_LAYERS[text.model_type]
        self.language.model.layers = nn.ModuleList(layer(text, number) for number in range(text.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.language.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer."""
        self.language.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode tiles ``[T, 3, height, width]``, normalised: ``[T, K, H]``."""
        states = self.vision(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        return self.connector(states[:, self.num_skipped :])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | None = None,
        visible_tiles: Tensor | None = None,
        tile_in_context: Tensor | None = None,
        tile_tags: Tensor | None = None,
        context: Context | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MegaVLMOutput:
        """Run the model.

        Args:
            input_ids: ``[N, S]``, placeholders and tile tags expanded (by the processor).
            attention_mask: ``[N, P + S]``, 0 on padding.
            position_ids: ``[N, S]``; None: counted in ``attention_mask``.
            past_key_values: cache of self-attention.
            inputs_embeds: ``[N, S, H]`` in place of ``input_ids``; then without pixels.
            pixel_values: ``[T, 3, height, width]``: the tiles of all rows, row by row, normalised.
            num_tiles: ``[N]`` int64, tiles of each row. Needed for several rows of a model with cross-attention.
            visible_tiles: ``[N, S, 2]`` int64: half-open range of its row's tiles, counted from 0, that a token may see
                by cross-attention. Needed with pixels or ``context`` in a model with cross-attention.
            tile_in_context: ``[T]`` bool: whether cross-attention reads the tile; the features of the others take the
                place of placeholders. None: all (NVLM-X) or none (NVLM-D); needed for NVLM-H.
            tile_tags: ``[T, G]`` int64: token ids of the tag that goes into the context with a tile, -1 behind its end
                (NVLM-H). None: no tags.
            context: of an earlier step's output, in place of pixels.
            labels: ``[N, S]``, -100 where nothing is trained.
            logits_to_keep: how many of the last positions get logits (0: all), or which.
            kwargs: of the decoder (``use_cache``, ``output_hidden_states``, ...).

        Returns:
            Logits, cache and context; the loss with ``labels``.

        Raises:
            ValueError: the inputs do not fit each other, or one of them is missing.
        """
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None and context is None:
            if input_ids is None:
                raise ValueError("inputs_embeds: was given with pixel_values, which need input_ids. Give those.")
            features = self.get_image_features(pixel_values).to(embeddings.dtype)
            owners, tile_in_context = self._place_tiles(input_ids, len(features), num_tiles, tile_in_context)
            embeddings = self._fill_placeholders(embeddings, features[~tile_in_context], input_ids)
            if self.cross_attention is not None:
                context = self._make_context(features, tile_in_context, tile_tags, owners, len(input_ids))
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        outputs = self.language.model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **self._reader(context, visible_tiles, embeddings.shape[:2]),
            **{name: value for name, value in kwargs.items() if name != "return_dict"},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return MegaVLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            context=context,
        )

    def _rows_tiles(self, input_ids: Tensor, num_all: int, num_tiles: Tensor | None) -> Tensor:
        """Tiles of each row ``[N]``.

        Raises:
            ValueError: they are not given and cannot be counted, or are not as many as there are pixels of.
        """
        if num_tiles is None and len(input_ids) == 1:
            num_tiles = input_ids.new_tensor([num_all])
        elif num_tiles is None and self.cross_attention is None and num_all:
            placeholders = (input_ids == self.config.image_token_id).sum(1)
            num_tiles = placeholders * num_all // max(1, int(placeholders.sum()))
        elif num_tiles is None:
            raise ValueError(f"num_tiles=None: is needed for {len(input_ids)} rows. Give [N], the tiles of each row.")
        if len(num_tiles) != len(input_ids) or int(num_tiles.sum()) != num_all:
            raise ValueError(
                f"num_tiles={num_tiles.tolist()}: does not fit {len(input_ids)} rows with {num_all} tiles in "
                "pixel_values. Give [N], the tiles of each row."
            )
        return num_tiles

    def _place_tiles(
        self, input_ids: Tensor, num_all: int, num_tiles: Tensor | None, tile_in_context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Row and number in its row of each tile ``[T, 2]``, and whether cross-attention reads it ``[T]``."""
        kind = self.config.fusion["kind"]
        if tile_in_context is None and kind == "hybrid":
            raise ValueError("tile_in_context=None: is needed with pixel_values in NVLM-H. Give [T], as the processor.")
        if tile_in_context is None:
            tile_in_context = torch.full((num_all,), kind == "cross_attention", device=input_ids.device)
        if len(tile_in_context) != num_all:
            raise ValueError(f"tile_in_context: is of {len(tile_in_context)} tiles, and pixel_values has {num_all}.")
        if self.cross_attention is None:
            return input_ids.new_zeros(num_all, 2), tile_in_context.bool()
        counts = self._rows_tiles(input_ids, num_all, num_tiles).to(input_ids.device)
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        numbers = torch.arange(num_all, device=counts.device) - (counts.cumsum(0) - counts)[rows]
        return torch.stack([rows, numbers], dim=1), tile_in_context.bool()

    def _fill_placeholders(self, embeddings: Tensor, features: Tensor, input_ids: Tensor) -> Tensor:
        """Put features ``[T, K, H]`` where the placeholders stand."""
        is_placeholder = input_ids == self.config.image_token_id
        found, wanted = int(is_placeholder.sum()), features.shape[0] * features.shape[1]
        if found != wanted:
            raise ValueError(
                f"input_ids: hold {found} image placeholders (token {self.config.image_token_id}), but "
                f"{features.shape[0]} tiles of {features.shape[1]} tokens give {wanted} features. Let the processor "
                "expand the placeholders."
            )
        return embeddings.masked_scatter(is_placeholder.unsqueeze(-1), features)

    def _make_context(
        self, features: Tensor, tile_in_context: Tensor, tile_tags: Tensor | None, owners: Tensor, num_rows: int
    ) -> Context:
        assert self.cross_attention is not None
        rows, numbers = owners[tile_in_context].unbind(1)
        if tile_tags is None:
            tile_tags = numbers.new_zeros(len(tile_in_context), 0)
        ids = tile_tags[tile_in_context]
        embed = self.get_input_embeddings()
        tags = [embed(tag[tag != _NO_TAG]) for tag in ids]
        return self.cross_attention.lay_out(features[tile_in_context], tags, rows, numbers, num_rows)

    def _reader(self, context: Context | None, visible_tiles: Tensor | None, shape: torch.Size) -> dict[str, Any]:
        """What the decoder layers are given to read the context with; nothing where there is none."""
        if context is None or self.cross_attention is None or context[0].shape[1] == 0:
            return {}
        if visible_tiles is None or visible_tiles.shape[:2] != shape:
            found = None if visible_tiles is None else tuple(visible_tiles.shape)
            raise ValueError(
                f"visible_tiles.shape={found}: images need one of {(*shape, 2)}. Give the range of its row's tiles "
                "that each token may see, as the processor does."
            )
        owner = context[0].unsqueeze(1)
        is_seen = (owner >= visible_tiles[..., :1]) & (owner < visible_tiles[..., 1:]) & (owner >= 0)
        return {"cross_attention": partial(self.cross_attention.read, context, is_seen)}

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, visible_tiles: Tensor | None = None, context: Context | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return what :meth:`forward` is given for the next tokens: pixels at first, then what was made of them."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        if visible_tiles is not None:
            inputs["visible_tiles"] = visible_tiles[:, -tokens.shape[1] :]
        inputs["context"] = context
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """Keep the context with the cache. New tokens see what the last one saw."""
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)
        if outputs.past_key_values is not None:
            kept["context"] = outputs.context
        visible = kept.get("visible_tiles")
        if visible is not None:
            kept["visible_tiles"] = torch.cat([visible, visible[:, -1:].expand(-1, num_new_tokens, 2)], dim=1)
        return kept

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat every row ``expand_size`` times (beams, several answers), with its tiles."""
        pixels = model_kwargs.get("pixel_values")
        given = {name: model_kwargs.pop(name, None) for name in _PER_TILE}
        if expand_size > 1 and pixels is not None and input_ids is not None:
            counts = self._rows_tiles(input_ids, len(pixels), model_kwargs.get("num_tiles"))
            tiles = torch.arange(len(pixels), device=pixels.device).split(counts.tolist())
            order = torch.cat([row.repeat(expand_size) for row in tiles])
            given = {name: None if value is None else value[order] for name, value in given.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {name: value for name, value in given.items() if value is not None}
