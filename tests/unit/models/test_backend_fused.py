"""How Transformer Engine's layers are wrapped, with stand-ins for the package, which no CPU can import."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch.nn.attention.flex_attention import flex_attention

from megavlm.models.backend import BACKENDS, SDPACoreAttention, attention_spec, find_backend, layer_spec
from megavlm.models.backend.blocks import attend_in_blocks, takes_blocks
from megavlm.models.backend.transformer_engine import RotarySelfAttention, Wraps, build_backend

CONFIG: Any = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, apply_rope_fusion=True)


class FakeLinear(torch.nn.Module):
    """Takes what the package's takes, and insists on it."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        gather_output: bool,
        skip_bias_add: bool,
        is_expert: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        assert not gather_output, "not supported"
        self.weight = torch.nn.Parameter(torch.ones(output_size, input_size))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return states @ self.weight.t(), None

    def get_extra_state(self) -> torch.Tensor:
        raise AssertionError("would be pickled into checkpoints")

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("would be unpickled from a checkpoint")


class FakeRowLinear(FakeLinear):
    def __init__(self, input_size: int, output_size: int, *, is_expert: bool, skip_bias_add: bool, bias: bool) -> None:
        super().__init__(
            input_size, output_size, gather_output=False, skip_bias_add=skip_bias_add, is_expert=is_expert, bias=bias
        )


class FakeNormLinear(FakeLinear):
    def __init__(self, *sizes: int, **kwargs: Any) -> None:
        super().__init__(*sizes, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(sizes[0]))


class FakeNorm:
    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        return torch.nn.LayerNorm(hidden_size, eps)


class FakeAttention(torch.nn.Module):
    def __init__(self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str) -> None:
        super().__init__()
        self.calls: list[AttnMaskType] = []

    def forward(self, query: Any, key: Any, value: Any, mask: None, attn_mask_type: AttnMaskType) -> torch.Tensor:
        assert mask is None, "a causal mask type would ignore it"
        self.calls.append(attn_mask_type)
        return query.flatten(2)


FAKES = Wraps(FakeNorm, FakeLinear, FakeNormLinear, FakeRowLinear, FakeAttention, FakeLinear, FakeLinear)
BACKEND = build_backend(FAKES)


def test_the_backend_that_is_missing_says_how_to_get_it() -> None:
    assert "transformer_engine" not in BACKENDS
    with pytest.raises(ValueError, match=r"engine\.backend=transformer_engine: .*pip install .*requirements-gpu\.txt"):
        find_backend("transformer_engine")
    assert find_backend("torch") is BACKENDS["torch"]


@pytest.mark.parametrize("layer", [BACKEND.column_parallel_linear, BACKEND.row_parallel_linear])
def test_linear_layers_keep_nothing_but_weights_in_checkpoints(layer: Any) -> None:
    built = layer(3, 2, bias=False, skip_bias_add=False)
    assert {name: value is None for name, value in built.state_dict().items()} == {
        "weight": False,
        "_extra_state": True,
    }
    built.load_state_dict({"weight": torch.zeros(2, 3), "_extra_state": b"\x80\x04not to be unpickled"})
    assert built(torch.ones(1, 3))[0].tolist() == [[0.0, 0.0]]


def test_norms_start_at_one_and_are_built_from_specs() -> None:
    norm = build_module(BACKEND.norm, config=CONFIG, hidden_size=4, eps=1e-6)
    assert isinstance(norm, torch.nn.LayerNorm)
    assert (norm.eps, norm.weight.constant) == (1e-6, 1.0)
    linear = BACKEND.norm_column_parallel_linear(
        3, 2, gather_output=False, skip_bias_add=False, is_expert=False, bias=False
    )
    assert linear.layer_norm_weight.constant == 1.0
    assert not hasattr(linear.weight, "constant")


def causal_attention(dtype: torch.dtype, mask: torch.Tensor | None, query_length: int = 4) -> tuple[Any, torch.Tensor]:
    attention = BACKEND.core_attention(CONFIG, 1, AttnMaskType.causal, attention_type="self").eval()
    query = torch.randn(query_length, 2, 2, 8, dtype=dtype)
    key = torch.randn(4, 2, 2, 8, dtype=dtype)
    return attention, attention(query, key, key, mask, attn_mask_type=AttnMaskType.causal)


def test_attention_is_fused_only_where_it_gives_the_same() -> None:
    fused, _ = causal_attention(torch.bfloat16, None)
    assert fused.calls == [AttnMaskType.causal]
    packed = torch.ones(4, 4, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1)
    packed[:, :, 2:, :2] = True
    for dtype, mask in ((torch.bfloat16, packed), (torch.float32, None), (torch.float32, packed)):
        attention, _ = causal_attention(dtype, mask)
        assert attention.calls == [], (dtype, mask)
    # one token after others: a causal kernel would let it see the first key only
    attention, _ = causal_attention(torch.bfloat16, torch.zeros(2, 1, 1, 4, dtype=torch.bool), query_length=1)
    assert attention.calls == []


@pytest.mark.parametrize(("rows", "is_fused"), [(1, True), (3, False)])
def test_rotary_positions_are_fused_where_rows_share_them(
    rows: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SelfAttention, "__init__", lambda self, config: torch.nn.Module.__init__(self))
    monkeypatch.setattr(SelfAttention, "forward", lambda self, *_, **__: self.config.apply_rope_fusion)
    attention = RotarySelfAttention(CONFIG)
    assert attention(rotary_pos_emb=torch.zeros(5, rows, 1, 8)) is is_fused
    assert attention(rotary_pos_emb=torch.zeros(5, 1, 1, 8)) is True  # it does not stay unfused
    assert CONFIG.apply_rope_fusion


def test_a_fused_norm_is_saved_under_the_key_of_one_that_stands_alone() -> None:
    dense = layer_spec(BACKEND, attention_spec(BACKEND, AttnMaskType.causal)).submodules
    assert dense.input_layernorm is dense.pre_mlp_layernorm is IdentityOp
    assert dense.sharded_state_dict_keys_map == {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    }
    experts = layer_spec(BACKEND, attention_spec(BACKEND, AttnMaskType.causal), mlp=ModuleSpec(module=IdentityOp))
    assert experts.submodules.pre_mlp_layernorm is BACKEND.norm
    assert list(experts.submodules.sharded_state_dict_keys_map.values()) == ["input_layernorm."]
    torch_layer = layer_spec(BACKENDS["torch"], attention_spec(BACKENDS["torch"], AttnMaskType.causal)).submodules
    assert torch_layer.sharded_state_dict_keys_map == {}


def test_unquantized_layers_are_none_of_the_package() -> None:
    plain = BACKEND.unquantized
    assert plain.column_parallel_linear is BACKENDS["torch"].column_parallel_linear
    assert plain.row_parallel_linear is BACKENDS["torch"].row_parallel_linear
    assert plain.norm_column_parallel_linear is plain.quantized_experts is None
    assert BACKEND.quantized_experts is not None


# 300: three blocks, the last one not whole
@pytest.mark.parametrize("length", [1, 130, 300])
@pytest.mark.parametrize("is_shared", [True, False])
def test_packed_rows_in_blocks_are_masked_attention(length: int, is_shared: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(length, 2, 4, 8, generator=generator)
    key, value = (torch.randn(length, 2, 2, 8, generator=generator) for _ in range(2))
    sample = torch.arange(length) // 47
    masks = [(sample[:, None] != sample) | torch.ones(length, length, dtype=torch.bool).triu(1)]
    masks += [] if is_shared else [torch.ones(length, length, dtype=torch.bool).triu(1)]
    mask = torch.stack(masks).unsqueeze(1)
    expected = SDPACoreAttention(CONFIG, 1, AttnMaskType.causal, "self")(query, key, value, mask)
    attended = attend_in_blocks(query, key, value, mask, None, flex=flex_attention)
    # measured: 6.0e-7
    torch.testing.assert_close(attended, expected, rtol=0, atol=3e-6)
    assert not takes_blocks(query, mask), "on a CPU the masked attention is the compiled one"
