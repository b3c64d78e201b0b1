"""What a recipe can say about the experts of a language model. Names are megatron-core's."""

from typing import Any, Literal

import pydantic

from megavlm.config import Config


class MoEConfig(Config):
    """Top-k mixture of experts in place of some layers' feed-forward (GShard, arXiv 2006.16668; ST-MoE, 2202.08906)."""

    num_moe_experts: int = pydantic.Field(ge=2)
    """Experts of a layer."""
    moe_layer_freq: pydantic.PositiveInt | list[Literal[0, 1]] = 1
    """Which layers have experts: n for layers 0, n, 2n, ... (megatron-core's rule), or a 1 or 0 for each layer."""
    moe_router_topk: pydantic.PositiveInt = 2
    """Experts that each token goes to."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts, before the choice: the weights of the chosen then sum to less than 1. Otherwise it is
    over the chosen, whose weights sum to 1 (Mixtral; needed for an upcycled model to start equal to the dense one)."""
    moe_router_topk_scaling_factor: pydantic.PositiveFloat | None = None
    """Multiplies the weights of the chosen experts; only with ``moe_router_pre_softmax``."""
    moe_ffn_hidden_size: pydantic.PositiveInt | None = None
    """Width inside one expert; None: the dense layers' ``ffn_hidden_size``."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] = "aux_loss"
    """What is balanced: the tokens of a micro-batch, those of each of its rows, or nothing."""
    moe_aux_loss_coeff: pydantic.NonNegativeFloat = 1e-2
    """Weight of the load-balancing loss of each layer (Switch Transformer, arXiv 2101.03961, equation 4, the shares of
    a top-k choice summing to 1), which is 1 when the load is even."""
    moe_z_loss_coeff: pydantic.NonNegativeFloat | None = None
    """Weight of the z-loss of each layer (ST-MoE, equation 5); None: off."""
    moe_expert_capacity_factor: pydantic.PositiveFloat | None = None
    """Tokens that an expert takes, as a multiple of its even share; the others are dropped. None: no token is."""
    moe_pad_expert_input_to_capacity: bool = False
    """Give every expert exactly its capacity; only with ``moe_expert_capacity_factor``."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of the router, whatever the run's is."""

    @pydantic.model_validator(mode="after")
    def _choices_fit(self) -> "MoEConfig":
        if self.moe_router_topk > self.num_moe_experts:
            raise ValueError(
                f"model.language.moe.moe_router_topk={self.moe_router_topk}: there are only num_moe_experts="
                f"{self.num_moe_experts} to choose from. Lower it."
            )
        if self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            raise ValueError(
                "model.language.moe.moe_router_topk=1: a softmax over one chosen expert is always 1 and teaches the "
                "router nothing. Set moe_router_pre_softmax to true."
            )
        if self.moe_router_topk_scaling_factor is not None and not self.moe_router_pre_softmax:
            raise ValueError(
                f"model.language.moe.moe_router_topk_scaling_factor={self.moe_router_topk_scaling_factor}: only means "
                "something with moe_router_pre_softmax=true."
            )
        if self.moe_pad_expert_input_to_capacity and self.moe_expert_capacity_factor is None:
            raise ValueError(
                "model.language.moe.moe_pad_expert_input_to_capacity=True: needs a moe_expert_capacity_factor."
            )
        return self

    def has_experts(self, num_layers: int) -> list[bool]:
        """Say for each layer of a model whether it has experts.

        Raises:
            ValueError: the pattern has another number of layers, or no layer has experts.
        """
        if isinstance(self.moe_layer_freq, int):
            return [layer % self.moe_layer_freq == 0 for layer in range(num_layers)]
        if len(self.moe_layer_freq) != num_layers or not any(self.moe_layer_freq):
            raise ValueError(
                f"model.language.moe.moe_layer_freq={self.moe_layer_freq}: has {len(self.moe_layer_freq)} entries, "
                f"{sum(self.moe_layer_freq)} of them 1, and the model has num_layers={num_layers}. Give a 0 or 1 for "
                "each layer and at least one 1."
            )
        return [bool(entry) for entry in self.moe_layer_freq]

    def megatron_fields(self, ffn_hidden_size: int) -> dict[str, Any]:
        """Arguments of megatron-core's TransformerConfig. ``ffn_hidden_size``: width of the dense layers."""
        return self.model_dump() | {"moe_ffn_hidden_size": self.moe_ffn_hidden_size or ffn_hidden_size}
