"""BLIP-2's first stage against ``transformers``: scores of Blip2ForImageTextRetrieval, and the three losses put
together from its Q-Former, one pass for each, with torch's own cross-entropy. Values and gradients in float32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from megavlm.batch import Batch
from megavlm.models.backend import BACKENDS
from megavlm.models.blip2 import QFormerText, QFormerTextConfig
from megavlm.models.blip2.model import similarity
from megavlm.models.blip2.negative import draw_numbers
from megavlm.models.connectors.qformer import QFormer, QFormerConfig
from megavlm.runtime import process

SETTINGS: dict[str, Any] = {"params_dtype": torch.float32, "perform_initialization": False}
VOCAB_SIZE, IMAGE, CLASS, DECODE = 30, 29, 30, 31
"""Our vocabulary, and two more rows of theirs."""
WIDTH, QUERIES, FEATURES, SMOOTHING, SEED = 24, 4, 20, 0.1, 11
LENGTHS = (3, 6, 1, 4, 5)
NUM_ROWS = len(LENGTHS)

# Measured worst: 1.2e-6 of the largest value (sums in another order).
TOLERANCE = 2e-5

# their name -> ours, in this order
RENAMED = {
    "embeddings.word_embeddings.weight": "word_embeddings",
    "embeddings.position_embeddings.weight": "position_embeddings",
    "vision_projection.": "image_projection.",
    "itm_head.": "matching_head.",
    "query_tokens": "queries",
    "qformer.": "",
    "encoder.layer.": "layers.",
    ".crossattention.attention.": ".cross_attention.",
    ".crossattention.output.dense.": ".cross_attention.output.",
    ".crossattention.output.LayerNorm.": ".cross_attention_norm.",
    ".attention.attention.": ".self_attention.",
    ".attention.output.dense.": ".self_attention.output.",
    ".attention.output.LayerNorm.": ".self_attention_norm.",
    ".intermediate_query.dense.": ".query_ffn.up.",
    ".output_query.dense.": ".query_ffn.down.",
    ".output_query.LayerNorm.": ".query_ffn.norm.",
    ".intermediate.dense.": ".text_ffn.up.",
    "output.dense.": "text_ffn.down.",
    ".output.LayerNorm.": ".text_ffn.norm.",
}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def our_name(name: str) -> str:
    for theirs, ours in RENAMED.items():
        if theirs == "output.dense." and ("attention.output" in name):
            continue
        name = name.replace(theirs, ours)
    return name.replace("self_attention.text_ffn.down.", "self_attention.output.")


class Both:
    """Our modules and theirs with the same weights, and a batch for both."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.theirs = Blip2ForImageTextRetrieval(
            Blip2Config(
                vision_config={
                    "hidden_size": FEATURES,
                    "intermediate_size": 24,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 28,
                    "patch_size": 14,
                },
                qformer_config={
                    "vocab_size": VOCAB_SIZE + 2,
                    "hidden_size": WIDTH,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 3,
                    "intermediate_size": 40,
                    "encoder_hidden_size": FEATURES,
                    "max_position_embeddings": 12,
                    "use_qformer_text_input": True,
                    "cross_attention_frequency": 2,
                    "pad_token_id": None,
                },
                num_query_tokens=QUERIES,
                image_text_hidden_size=16,
            )
        ).eval()
        self.theirs.config.image_token_index = None
        language = QFormerTextConfig(max_position_embeddings=12, contrast_size=16, label_smoothing=SMOOTHING)
        qformer = QFormerConfig(
            num_tokens=QUERIES, num_layers=3, hidden_size=WIDTH, ffn_hidden_size=40, num_attention_heads=3
        )
        self.qformer: QFormer
        self.text: QFormerText
        self.qformer, self.text = language.build(
            qformer,
            FEATURES,
            SETTINGS,
            BACKENDS["torch"],
            vocab_size=VOCAB_SIZE,
            image_token_id=IMAGE,
            seed=SEED,
        )
        for module in (self.theirs, self.qformer, self.text):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        self.names = [name for name, _ in self.theirs.named_parameters() if not name.startswith("vision_model.")]
        self.own = dict([*self.qformer.named_parameters(), *self.text.named_parameters()])
        with torch.no_grad():
            self.text.temperature.fill_(0.2)
            for name in self.names:
                self.own[our_name(name)].copy_(
                    self.theirs.get_parameter(name).detach()[: self.num_rows(name)].squeeze()
                )
            self.text.start_embeddings.copy_(self.theirs.embeddings.word_embeddings.weight[VOCAB_SIZE:])
        self.features = torch.randn(NUM_ROWS, 7, FEATURES)
        self.captions = [torch.randint(0, IMAGE, (length,)).tolist() for length in LENGTHS]

    @staticmethod
    def num_rows(name: str) -> int | None:
        return VOCAB_SIZE if "word_embeddings" in name else None

    def batch(self) -> Batch:
        """Images first, then the captions, all trained, as the data lays them out."""
        length = QUERIES + max(LENGTHS)
        tokens = torch.zeros(NUM_ROWS, length, dtype=torch.int64)
        tokens[:, :QUERIES] = IMAGE
        loss_mask = torch.zeros(NUM_ROWS, length)
        for row, caption in enumerate(self.captions):
            tokens[row, QUERIES : QUERIES + len(caption)] = torch.tensor(caption)
            loss_mask[row, QUERIES - 1 : QUERIES - 1 + len(caption)] = 1.0
        return Batch(
            tokens=tokens,
            labels=torch.where(loss_mask > 0, tokens.roll(-1, 1), 0),
            loss_mask=loss_mask,
            position_ids=torch.arange(length).repeat(NUM_ROWS, 1),
            cu_seqlens=torch.arange(0, NUM_ROWS * length + 1, length, dtype=torch.int32),
            tiles=torch.zeros(NUM_ROWS, 3, 28, 28, dtype=torch.uint8),
            tiles_per_image=torch.ones(NUM_ROWS, dtype=torch.int64),
            visible_tiles=torch.zeros(NUM_ROWS, length, 2, dtype=torch.int64),
            row_lengths=torch.tensor([QUERIES + length for length in LENGTHS]),
        )

    def ids(self, start: int, captions: list[list[int]] | None = None) -> tuple[Tensor, Tensor]:
        """Their input: ids behind a start token, and which are no padding."""
        rows = [[start, *caption] for caption in captions or self.captions]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    def difference(self, found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        return float((found - expected).detach().abs().max() / max(0.1, float(expected.detach().abs().max())))

    def worst_gradient(self) -> float:
        """Of all weights that both have; start tokens beside their rows of the vocabulary."""
        differences = []
        for name in self.names:
            expected = self.theirs.get_parameter(name).grad
            found = self.own[our_name(name)].grad
            if expected is None:
                assert found is None, name
                continue
            assert found is not None, name
            differences.append(self.difference(found, expected[: self.num_rows(name)].reshape(found.shape)))
        words = self.theirs.embeddings.word_embeddings.weight.grad
        assert words is not None
        assert self.text.start_embeddings.grad is not None
        return max(*differences, self.difference(self.text.start_embeddings.grad, words[VOCAB_SIZE:]))


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    made = Both()

    class Seen:
        """Their vision encoder gives our features."""

        def __call__(self, **_: Any) -> tuple[Tensor]:
            return (made.features,)

    monkeypatch.delattr(made.theirs, "vision_model")
    monkeypatch.setattr(made.theirs, "vision_model", Seen(), raising=False)
    return made


def test_contrast_scores_are_theirs(both: Both) -> None:
    ids, attention = both.ids(CLASS)
    expected = both.theirs(pixel_values=torch.zeros(1), input_ids=ids, attention_mask=attention)
    # theirs pairs all images with one text; ours all with all
    images = both.text.embed_images(both.qformer, both.features)
    texts = both.text.embed_texts(both.qformer, both.batch())
    assert both.difference(images, expected.image_embeds) < TOLERANCE
    assert both.difference(texts, expected.text_embeds) < TOLERANCE
    found = similarity(images, texts)
    by_hand = (expected.image_embeds @ expected.text_embeds.t()).amax(1)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (by_hand * weights).sum().backward()
    assert both.difference(found, by_hand) < TOLERANCE
    assert both.worst_gradient() < TOLERANCE


def test_matching_scores_are_theirs(both: Both) -> None:
    ids, attention = both.ids(CLASS)
    expected = both.theirs(
        pixel_values=torch.zeros(1), input_ids=ids, attention_mask=attention, use_image_text_matching_head=True
    ).logits_per_image
    found = both.text.judge(both.qformer, both.features, ids[:, 1:], attention[:, 1:] > 0)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert both.difference(found, expected) < TOLERANCE
    assert both.worst_gradient() < TOLERANCE


def drawn(scores: Tensor, own: int, number: float) -> int:
    """The candidate that a number in [0, 1) stands for, when each takes the share of its probability."""
    shares = torch.softmax(scores.double().masked_fill(torch.arange(NUM_ROWS) == own, -1e30), 0)
    sums = [float(shares[: column + 1].sum()) for column in range(NUM_ROWS)]
    return next(column for column, total in enumerate(sums) if total > number)


def their_losses(both: Both) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast, matching and caption loss, mean over pairs, over triples and over tokens, from three passes."""
    theirs, numbers = both.theirs, draw_numbers(SEED, 0, NUM_ROWS)
    ids, attention = both.ids(CLASS)
    output = theirs(pixel_values=torch.zeros(1), input_ids=ids, attention_mask=attention)
    scores = (output.image_embeds @ output.text_embeds.t()).amax(1) / both.text.temperature
    targets = torch.arange(NUM_ROWS)
    contrast = 0.5 * sum(F.cross_entropy(one, targets, label_smoothing=SMOOTHING) for one in (scores, scores.t()))
    other_images = [drawn(scores.t()[row].detach(), row, float(numbers[0, row])) for row in range(NUM_ROWS)]
    other_texts = [drawn(scores[row].detach(), row, float(numbers[1, row])) for row in range(NUM_ROWS)]
    captions = both.captions
    ids, attention = both.ids(CLASS, [*captions, *captions, *(captions[row] for row in other_texts)])
    features = both.features
    both.features = torch.cat([features, features[other_images], features])
    logits = theirs(
        pixel_values=torch.zeros(1), input_ids=ids, attention_mask=attention, use_image_text_matching_head=True
    ).logits_per_image
    both.features = features
    labels = torch.tensor([1] * NUM_ROWS + [0] * 2 * NUM_ROWS)
    matching = F.cross_entropy(logits, labels)
    ids, attention = both.ids(DECODE)
    embedded = theirs.embeddings(input_ids=ids, query_embeds=theirs.query_tokens.expand(NUM_ROWS, -1, -1))
    length = ids.shape[1]
    sees = torch.zeros(NUM_ROWS, 1, QUERIES + length, QUERIES + length, dtype=torch.bool)
    sees[..., :QUERIES] = True
    sees[:, 0, QUERIES:, QUERIES:] = (attention[:, None] > 0).expand(-1, length, -1).tril()
    states = theirs.qformer(
        query_embeds=embedded, query_length=QUERIES, attention_mask=sees, encoder_hidden_states=features
    ).last_hidden_state[:, QUERIES:-1]
    text = both.text
    states = text.caption_norm(F.gelu(text.caption_transform(states)))
    logits = F.linear(states, theirs.embeddings.word_embeddings.weight[:VOCAB_SIZE], text.caption_bias)
    labels = ids[:, 1:].masked_fill(attention[:, 1:] == 0, -100)
    caption = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=SMOOTHING)
    return contrast, matching, caption  # type: ignore[return-value]


def test_losses_are_those_of_three_passes(both: Both) -> None:
    """One pass for contrast and captions, by its mask, is as good as one for each."""
    batch = both.batch()
    tokens, rows = both.text(both.qformer, both.features, batch)
    found = torch.stack([*rows.mean(0), tokens.sum() / batch.loss_mask.sum()])
    found.sum().backward()
    mine = {name: parameter.grad for name, parameter in both.text.named_parameters()}
    heads = ("temperature", "caption_transform.weight", "caption_norm.weight", "caption_bias")
    kept = {name: mine[name].clone() for name in heads}  # type: ignore[union-attr]
    for name in heads:
        both.text.get_parameter(name).grad = None
    expected = torch.stack(their_losses(both))
    expected.sum().backward()
    assert both.difference(found, expected) < TOLERANCE
    for name in heads:
        gradient = both.text.get_parameter(name).grad
        assert gradient is not None
        assert both.difference(kept[name], gradient) < TOLERANCE, name
    assert both.worst_gradient() < TOLERANCE
