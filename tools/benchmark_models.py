"""The two sides of ``tools/benchmark.py``: one InternVL shape as MegaVLM and as transformers train it.

Also the data they share.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from benchmark_size import Size
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megavlm.batch import Batch
from megavlm.convert import internvl
from megavlm.convert.weight_map import load_weights
from megavlm.engines import MegatronEngine, MegatronEngineConfig, OptimizerSettings
from megavlm.models.config import VLMConfig
from megavlm.models.vlm import VLM
from megavlm.training.freeze import freeze_except

OPTIMIZER = OptimizerSettings(lr=3e-4, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0)


@dataclass(frozen=True)
class Mode:
    """A precision: what the engine does, and its counterpart in transformers."""

    ours: str
    dtype: torch.dtype
    """Of the matrix products."""
    their_parameters: torch.dtype
    autocast: bool


MODES = {
    "fp32": Mode("fp32", torch.float32, torch.float32, autocast=False),
    "bf16": Mode("bf16", torch.bfloat16, torch.float32, autocast=True),
    # no master weights on their side: updates below a bfloat16's last digit are lost
    "bf16_pure": Mode("bf16", torch.bfloat16, torch.bfloat16, autocast=False),
}


def make_batches(size: Size, trained_share: float, count: int = 4) -> list[Batch]:
    """Make full rows of random text that begin with one tile each.

    Args:
        size: the shape.
        trained_share: share of the text tokens that have a loss; always the last ones of a row.
        count: how many, to be taken in turn.
    """
    shape = (size.num_rows, size.length)
    batches = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, size.image_token, shape, generator=generator)
        tokens[:, : size.tokens_per_tile] = size.image_token
        loss_mask = torch.zeros(shape)
        num_trained = max(1, round(trained_share * (size.length - size.tokens_per_tile)))
        loss_mask[:, size.length - 1 - num_trained : -1] = 1.0
        batches.append(
            Batch(
                tokens=tokens,
                labels=tokens.roll(-1, dims=1) * loss_mask.long(),
                loss_mask=loss_mask,
                position_ids=torch.arange(size.length).repeat(size.num_rows, 1),
                cu_seqlens=torch.arange(size.num_rows + 1, dtype=torch.int32) * size.length,
                tiles=torch.randint(
                    0,
                    256,
                    (size.num_rows, 3, size.image_size, size.image_size),
                    generator=generator,
                    dtype=torch.uint8,
                ),
                tiles_per_image=torch.ones(size.num_rows, dtype=torch.int64),
                visible_tiles=torch.zeros(*shape, 2, dtype=torch.int64),
            )
        )
    return batches


class Side(Protocol):
    """A model in training."""

    def step(self) -> float:
        """Train on the next batch; return its loss."""


class Ours:
    """MegaVLM as a run has it: the engine with its gradient buffers and distributed optimizer, one rank."""

    def __init__(
        self,
        size: Size,
        mode: str,
        trainable: Sequence[str],
        steps: Sequence[Sequence[Batch]],
        weights: Mapping[str, Tensor],
    ) -> None:
        config = vlm_config(size)
        self.engine = MegatronEngine(MegatronEngineConfig(precision=MODES[mode].ours))
        self.engine.start()
        self.model = VLM(
            config,
            self.engine.config.megatron_settings(),
            vocab_size=size.vocab_size,
            image_token_id=size.image_token,
        )
        load_weights([self.model], internvl.weight_map(config), weights)
        freeze_except([self.model], trainable)
        self.engine.wrap([self.model])
        self.engine.build_optimizer(OPTIMIZER)
        self.steps = steps
        """Micro-batches of each step; taken in turn."""
        self._next = 0

    def step(self) -> float:
        """Train on the micro-batches of the next step; return their loss."""
        batches = self.steps[self._next % len(self.steps)]
        self._next += 1
        return self.engine.train_step(list(batches)).loss


class Theirs:
    """InternVLForConditionalGeneration in a plain loop: SDPA, fused AdamW, gradients set to None."""

    def __init__(self, size: Size, mode: str, trainable: Sequence[str], steps: Sequence[Sequence[Batch]]) -> None:
        torch.manual_seed(1)
        self.model = InternVLForConditionalGeneration(their_config(size)).train()
        _unsettle(self.model)
        self.model.to(MODES[mode].their_parameters)
        self.model.config.use_cache = False
        parts = {
            "vision": self.model.model.vision_tower,
            "connector": self.model.model.multi_modal_projector,
            "language": self.model.model.language_model,
        }
        for name, part in parts.items():
            part.requires_grad_(name in trainable)
        self._autocast = MODES[mode].autocast
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        vectors = [parameter for parameter in self._parameters if parameter.ndim == 1]
        matrices = [parameter for parameter in self._parameters if parameter.ndim > 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=OPTIMIZER.lr,
            betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
            eps=OPTIMIZER.adam_eps,
            weight_decay=OPTIMIZER.weight_decay,
            fused=True,
        )
        dtype = MODES[mode].their_parameters
        self._steps = [[their_inputs(batch, size, dtype) for batch in batches] for batches in steps]
        self._next = 0

    def initial_weights(self) -> dict[str, Tensor]:
        """Copies of the weights, by their names."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def step(self) -> float:
        """Train on the micro-batches of the next step; return their loss, the mean over all their trained tokens."""
        batches = self._steps[self._next % len(self._steps)]
        self._next += 1
        self._optimizer.zero_grad(set_to_none=True)
        num_trained = sum(int((inputs["labels"] != -100).sum()) for inputs in batches)
        whole_loss = 0.0
        for inputs in batches:
            with torch.autocast("cpu", torch.bfloat16) if self._autocast else contextlib.nullcontext():
                loss = self.model(**inputs, num_items_in_batch=num_trained).loss
            loss.backward()
            whole_loss += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._parameters, OPTIMIZER.clip_grad)
        self._optimizer.step()
        return whole_loss


def _unsettle(model: torch.nn.Module) -> None:
    """Move weights so far from a fresh model's (zero biases, a uniform guess) that a wrong model has another loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def vlm_config(size: Size) -> VLMConfig:
    """The shape as a recipe has it: InternViT-300M's and Qwen2's kinds of layers."""
    return VLMConfig.model_validate(
        {
            "vision": {
                "kind": "internvit",
                "image_size": size.image_size,
                "patch_size": size.patch_size,
                "num_layers": size.vision_layers,
                "hidden_size": size.vision_hidden_size,
                "ffn_hidden_size": size.vision_ffn_hidden_size,
                "num_attention_heads": size.vision_heads,
                "normalization": "LayerNorm",
                "qk_layernorm": False,
                "add_qkv_bias": True,
            },
            "connector": {"kind": "mlp", "bias": True},
            "fusion": {"kind": "decoder_only"},
            "language": {
                "num_layers": size.num_layers,
                "hidden_size": size.hidden_size,
                "ffn_hidden_size": size.ffn_hidden_size,
                "num_attention_heads": size.num_heads,
                "num_query_groups": size.num_query_groups,
                "vocab_size": size.vocab_size,
                "add_qkv_bias": True,
                "layernorm_epsilon": 1e-6,
            },
        }
    )


def their_config(size: Size) -> InternVLConfig:
    """The same shape as transformers has it."""
    config = InternVLConfig(
        vision_config={
            "image_size": size.image_size,
            "patch_size": size.patch_size,
            "num_hidden_layers": size.vision_layers,
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": size.vision_ffn_hidden_size,
            "num_attention_heads": size.vision_heads,
            "attention_bias": True,
            "attn_implementation": "sdpa",
        },
        text_config={
            "model_type": "qwen2",
            "num_hidden_layers": size.num_layers,
            "hidden_size": size.hidden_size,
            "intermediate_size": size.ffn_hidden_size,
            "num_attention_heads": size.num_heads,
            "num_key_value_heads": size.num_query_groups,
            "vocab_size": size.vocab_size,
            "attn_implementation": "sdpa",
            "tie_word_embeddings": False,
        },
        image_token_id=size.image_token,
        image_seq_length=size.tokens_per_tile,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    return config


def their_inputs(batch: Batch, size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch as their forward takes it: labels not yet shifted, pixels normalised beforehand (not in their time)."""
    labels = torch.full_like(batch.tokens, -100)
    labels[:, 1:] = torch.where(batch.loss_mask[:, :-1] != 0, batch.tokens[:, 1:], -100)
    inputs = {"input_ids": batch.tokens, "labels": labels}
    padding = batch.is_padding()
    if padding is not None and padding.any():
        inputs["attention_mask"] = (~padding).long()
    if len(batch.tiles):
        mean = torch.tensor(vlm_config(size).vision.image_mean).view(3, 1, 1)
        std = torch.tensor(vlm_config(size).vision.image_std).view(3, 1, 1)
        inputs["pixel_values"] = ((batch.tiles.float() / 255 - mean) / std).to(dtype)
    return inputs
