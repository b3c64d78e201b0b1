"""Language models and whole models against transformers' classes: same weights, same logits, same gradients."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity import gradients, largest_difference, load_part, relative_difference, start
from published import IMAGE_TOKEN, LANGUAGE_MODELS, VOCAB_SIZE, WHOLE_MODELS, Published
from torch import Tensor

from megavlm.batch import Batch
from megavlm.convert.weight_map import WeightMap, load_weights, to_theirs
from megavlm.models.backend import BACKENDS
from megavlm.models.config import VLMConfig
from megavlm.models.language import LanguageConfig, LanguageModel, decoder_layer_specs
from megavlm.models.vlm import VLM

ROWS, LENGTH = 2, 12
Result = tuple[Tensor, dict[str, Tensor]]


def language_logits(
    tp: int, config: LanguageConfig, table: WeightMap, weights: Mapping[str, Tensor], tokens: Tensor, upstream: Tensor
) -> Result:
    """On ranks: logits ``[N, S, V]`` of the decoder alone, and gradients under published names."""
    settings = start(tp)
    backend, transformer_config = BACKENDS["torch"], config.transformer_config(settings)
    part = LanguageModel(
        config,
        transformer_config,
        decoder_layer_specs(config, transformer_config, backend),
        backend,
        vocab_size=VOCAB_SIZE,
        pre_process=True,
        post_process=True,
    )
    holder = load_part("language", part, table, weights)
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    hidden_states = part(part.embed(tokens, positions), positions, None)
    logits = part.logits(hidden_states, torch.ones_like(tokens)).view(ROWS, LENGTH, VOCAB_SIZE)
    logits.backward(upstream)
    return logits.detach(), to_theirs(table, gradients(holder))


def whole_logits(
    tp: int, config: VLMConfig, table: WeightMap, weights: Mapping[str, Tensor], batch: Batch, upstream: Tensor
) -> Result:
    """On ranks: logits ``[N, S, V]`` of a whole model, and gradients under published names."""
    model = VLM(config, start(tp), vocab_size=VOCAB_SIZE, image_token_id=IMAGE_TOKEN)
    load_weights([model], table, weights)
    logits = model(batch, torch.ones_like(batch.tokens)).view(ROWS, LENGTH, VOCAB_SIZE)
    logits.backward(upstream)
    return logits.detach(), to_theirs(table, gradients(model))


def check(published: Published, expected: Tensor, upstream: Tensor, answers: list[Result], tolerance: float) -> None:
    expected.backward(upstream)
    table = published.weight_map
    by_name = {
        table.in_table_spelling(name): tensor.grad
        for name, tensor in published.model.named_parameters()
        if tensor.grad is not None  # what stands behind the selected layer
    }
    for logits, weight_gradients in answers:
        found = relative_difference(logits, expected.detach()), largest_difference(weight_gradients, by_name)
        assert max(found) < tolerance, found


def weights_of(published: Published) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in published.model.state_dict().items()}


def random_tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(0, IMAGE_TOKEN, (ROWS, LENGTH), generator=generator)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_language_model_equals_transformers(family: str, tp: int) -> None:
    published = LANGUAGE_MODELS[family]()
    generator = torch.Generator().manual_seed(5)
    tokens = random_tokens(generator)
    expected = published.model(tokens).logits
    upstream = torch.randn(expected.shape, generator=generator)
    answers = run_ranks(
        language_logits, tp, tp, published.config, published.weight_map, weights_of(published), tokens, upstream
    )
    # Worst seen: logits 4e-7, gradients 9e-7.
    check(published, expected, upstream, answers, 1e-5)


def make_batch(generator: torch.Generator, image_size: int = 56) -> Batch:
    """Two rows with one tile each, four placeholders at different places."""
    tokens = random_tokens(generator)
    tokens[0, 2:6] = tokens[1, 5:9] = IMAGE_TOKEN
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    tiles = (torch.rand(2, 3, image_size, image_size, generator=generator) - mean[:, None, None]) / std[:, None, None]
    return Batch(
        tokens=tokens,
        labels=torch.zeros_like(tokens),
        loss_mask=torch.zeros(ROWS, LENGTH),
        position_ids=torch.arange(LENGTH).expand(ROWS, -1).contiguous(),
        cu_seqlens=torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32),
        tiles=tiles,
        tiles_per_image=torch.tensor([1, 1]),
        visible_tiles=torch.zeros(ROWS, LENGTH, 2, dtype=torch.int64),
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_whole_model_equals_transformers(family: str, tp: int) -> None:
    published = WHOLE_MODELS[family]()
    generator = torch.Generator().manual_seed(5)
    batch = make_batch(generator, published.config.vision.image_size)
    expected = published.model(input_ids=batch.tokens, pixel_values=batch.tiles).logits
    upstream = torch.randn(expected.shape, generator=generator)
    arguments: tuple[Any, ...] = (tp, published.config, published.weight_map, weights_of(published), batch, upstream)
    # Worst seen: logits 6e-7, gradients 1.6e-6.
    check(published, expected, upstream, run_ranks(whole_logits, tp, *arguments), 1e-5)
