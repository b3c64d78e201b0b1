"""What routers add to the loss is the published formula, on hand-worked cases and under every split of the tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megavlm.engines import MegatronEngine, MegatronEngineConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.moe import Router

NUM_EXPERTS, HIDDEN_SIZE, TOP_K = 4, 8, 2
ROWS, LENGTH = 2, 6
SCALE = 0.25


def make_router(engine_config: dict[str, Any], moe: dict[str, Any]) -> Router:
    engine = MegatronEngine(MegatronEngineConfig(**engine_config))
    engine.start()
    config = LanguageConfig(
        num_layers=1,
        hidden_size=HIDDEN_SIZE,
        ffn_hidden_size=16,
        num_attention_heads=2,
        moe={"num_moe_experts": NUM_EXPERTS, "moe_router_topk": TOP_K, **moe},
    ).transformer_config(engine.config.megatron_settings())
    config.auxiliary_loss_scale_func = lambda: SCALE
    router = Router(config, ProcessGroupCollection.use_mpu_process_groups())
    router.weight.data.copy_(torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)))
    return router.train()


def hidden_states() -> Tensor:
    return torch.randn(LENGTH, ROWS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))


def is_padding(kind: str) -> Tensor:
    """``[S, N]``."""
    padding = torch.zeros(LENGTH, ROWS, dtype=torch.bool)
    if kind == "one_row":
        padding[3:, 1] = True
    if kind == "all":
        padding[:] = True
    return padding


def published_losses(weight: Tensor, padding: Tensor, rows_apart: bool) -> tuple[Tensor, Tensor]:
    """Sums over tokens of the load-balancing loss (Switch Transformer, equations 4 to 6) and of the z-loss (ST-MoE,
    equation 5), written token by token."""
    logits = hidden_states() @ weight.T
    groups = [[row] for row in range(ROWS)] if rows_apart else [list(range(ROWS))]
    balance = z_loss = torch.zeros(())
    for rows in groups:
        tokens = [(s, n) for s in range(LENGTH) for n in rows if not padding[s, n]]
        if not tokens:
            continue
        counts = [0] * NUM_EXPERTS
        mean_score = torch.zeros(NUM_EXPERTS)
        for s, n in tokens:
            score = torch.exp(logits[s, n]) / torch.exp(logits[s, n]).sum()
            mean_score = mean_score + score / len(tokens)
            for expert in torch.argsort(score, descending=True)[:TOP_K].tolist():
                counts[expert] += 1
            z_loss = z_loss + torch.log(torch.exp(logits[s, n]).sum()) ** 2
        shares = [count / (len(tokens) * TOP_K) for count in counts]
        total = sum(shares[expert] * mean_score[expert] for expert in range(NUM_EXPERTS))
        balance = balance + len(tokens) * NUM_EXPERTS * total
    return balance, z_loss


def router_gradient(engine_config: dict[str, Any], moe: dict[str, Any], padding: Tensor) -> dict[str, np.ndarray]:
    """Gradient that the auxiliary losses alone give the router's weight, and the reported losses, on this rank."""
    router = make_router(engine_config, moe)
    size = engine_config.get("tensor_model_parallel_size", 1)
    rank = torch.distributed.get_rank() % size
    weights, _ = router(hidden_states().chunk(size)[rank], padding.chunk(size)[rank])
    (weights * 0.0).sum().backward()
    assert router.last is not None
    assert router.weight.grad is not None
    return {
        "gradient": router.weight.grad.numpy(),
        "balance": router.last.load_balancing_loss.numpy(),
        "z": router.last.z_loss.numpy(),
    }


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize("kind", ["none", "one_row", "all"])
@pytest.mark.parametrize("balancing", ["aux_loss", "seq_aux_loss"])
@pytest.mark.parametrize("layout", [{}, TP2], ids=["1", "tp2_sp"])
def test_auxiliary_losses_are_the_published_ones(layout: dict[str, Any], balancing: str, kind: str) -> None:
    moe = {"moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.2, "moe_router_load_balancing_type": balancing}
    results = run_ranks(router_gradient, 2 if layout else 1, layout, moe, is_padding(kind))
    weight = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    balance, z_loss = published_losses(weight, is_padding(kind), rows_apart=balancing == "seq_aux_loss")
    expected = np.zeros((NUM_EXPERTS, HIDDEN_SIZE))
    if kind != "all":
        (SCALE * (0.3 * balance + 0.2 * z_loss)).backward()
        assert weight.grad is not None
        expected = weight.grad.numpy()
    # worst seen: gradients 7.2e-7 (largest 1.5), losses 4e-7 relative
    np.testing.assert_allclose(sum(result["gradient"] for result in results), expected, atol=1e-5)
    np.testing.assert_allclose(sum(result["balance"] for result in results), balance.item(), rtol=1e-5)
    np.testing.assert_allclose(sum(result["z"] for result in results), z_loss.item(), rtol=1e-5)


def even_and_collapsed() -> tuple[float, float]:
    """Reported loss per token with scores all equal, and with all tokens certain of the same two of four experts."""
    router = make_router({}, {})
    router.weight.data.zero_()
    router(hidden_states())
    assert router.last is not None
    even = router.last.load_balancing_loss.item()
    router.weight.data[:2] = 50.0
    router(torch.ones(LENGTH, ROWS, HIDDEN_SIZE))
    return even / (LENGTH * ROWS), router.last.load_balancing_loss.item() / (LENGTH * ROWS)


def test_loss_of_an_even_and_of_a_collapsed_load() -> None:
    """E * sum f P: 4 * (4 * 1/4 * 1/4) = 1 for even scores, 4 * (2 * 1/2 * 1/2) = 2 for two experts of four."""
    [(even, collapsed)] = run_ranks(even_and_collapsed, 1)
    assert even == pytest.approx(1.0)
    assert collapsed == pytest.approx(2.0)


def losses_reach_the_input(is_trained: bool, is_training: bool) -> bool:
    router = make_router({}, {"moe_aux_loss_coeff": 1.0}).train(is_training)
    router.weight.requires_grad_(is_trained)
    states = hidden_states().requires_grad_()
    weights, _ = router(states)
    (weights * 0.0).sum().backward()
    assert states.grad is not None
    return bool(states.grad.any())


@pytest.mark.parametrize(
    ("is_trained", "is_training", "expected"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_only_a_router_that_trains_adds_a_loss(is_trained: bool, is_training: bool, expected: bool) -> None:
    assert run_ranks(losses_reach_the_input, 1, is_trained, is_training) == [expected]
