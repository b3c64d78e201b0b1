"""MM1's recipes: published parameter counts, settings of the paper, experts where the paper has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megavlm.config import load_recipe
from megavlm.models.config import VLMConfig
from megavlm.planning.experts import count_experts
from megavlm.planning.memory import count_memory
from megavlm.planning.parameters import count_recipe_parameters
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"

# arXiv 2403.09611: experts, every n layers, all parameters in billions, peak learning rate of the dense model
PUBLISHED = {"3b": (64, 2, 64, "6e-05"), "7b": (32, 4, 47, "4e-05")}


def load(name: str) -> Recipe:
    return load_recipe(EXAMPLES / f"mm1/mm1_{name}.yaml", [], Recipe)


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_the_published_ones(size: str) -> None:
    dense, moe = (count_recipe_parameters(load(name)) for name in (size, f"{size}_moe"))
    language = load(f"{size}_moe").model.language
    num_experts, every, total, _ = PUBLISHED[size]
    assert round(moe.total() / 1e9) == total
    assert (moe["vision"], moe["connector"]) == (dense["vision"], dense["connector"])
    llama = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama)
        assert dense["language"] == sum(parameter.numel() for parameter in model.parameters())
    assert f"{dense['language'] / 1e9:.0f}b" == size
    added = (num_experts - 1) * 3 * language.ffn_hidden_size * language.hidden_size + num_experts * language.hidden_size
    assert moe["language"] == dense["language"] + language.num_layers // every * added
    # a token meets one expert more than the dense layer, and the router
    experts = count_experts(language)
    assert moe["language"] - experts.idle == dense["language"] + experts.active_experts // 2 + experts.router


@pytest.mark.parametrize("size", PUBLISHED)
def test_settings_are_those_of_the_paper(size: str) -> None:
    num_experts, every, _, learning_rate = PUBLISHED[size]
    dense, sparse = load(size), load(f"{size}_moe")
    for recipe in (dense, sparse):
        training, optimizer = recipe.training, recipe.training.optimizer
        assert (training.global_batch_size, training.train_iters, recipe.data.seq_length) == (512, 200_000, 4096)
        assert set(training.trainable) == {"vision", "connector", "language"}
        assert f"{optimizer.lr:.0e}" == learning_rate
        assert optimizer.weight_decay == optimizer.min_lr == pytest.approx(0.1 * optimizer.lr)
        assert (optimizer.lr_warmup_iters, optimizer.lr_decay_style) == (2000, "cosine")
    assert sparse.training == dense.training
    assert dense.model.language.moe is None
    moe = sparse.model.language.moe
    assert moe is not None
    assert (moe.num_moe_experts, moe.moe_router_topk) == (num_experts, 2)
    assert (moe.moe_aux_loss_coeff, moe.moe_z_loss_coeff) == (0.01, 0.001)
    assert sparse.model.language.layers_with_experts == tuple(range(0, dense.model.language.num_layers, every))


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_rank_of_64_holds_its_share(size: str) -> None:
    recipe = load(f"{size}_moe")
    (rank,) = count_memory(recipe, 64, vocab_size=32000)
    experts = count_experts(recipe.model.language).experts
    # bfloat16 weights and float32 gradients on each of 32 ranks; three float32 of Adam shared by the two copies of each
    assert rank.experts == experts / 32 * (2 + 4) + experts / 64 * 12
    assert rank.total < 80e9, "and its activations still find room beside that"
    (dense,) = count_memory(load(size), 64, vocab_size=32000)
    assert dense.experts == 0
    assert rank.weights > dense.weights


def test_the_tiny_model_has_experts_in_every_second_layer() -> None:
    recipe = load_recipe(EXAMPLES / "moe/tiny.yaml", [], Recipe)
    dense: dict[str, Any] = load_recipe(EXAMPLES / "nvlm/tiny.yaml", [], Recipe).model.model_dump()
    assert recipe.model.language.layers_with_experts == (0, 2)
    assert recipe.model == VLMConfig.model_validate(
        {**dense, "language": {**dense["language"], "moe": recipe.model.language.moe}}
    )
