"""A Q-Former and its text side that start from BERT, as BLIP-2's first stage does (arXiv 2301.12597; LAVIS).

Self-attention, feed-forward layers, norms, words and positions are BERT's; queries start with its feed-forward layers,
too. Queries, cross-attention, heads and the decode token stay as they are drawn.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.checkpoint import save_checkpoint
from megavlm.convert.read_hf import PublishedFolder
from megavlm.engines import MegatronEngine, MegatronEngineConfig
from megavlm.models.backend import BACKENDS
from megavlm.models.blip2 import QFormerText, QFormerTextConfig
from megavlm.models.connectors.qformer import QFormer, QFormerConfig
from megavlm.models.initialization import initialize_weights
from megavlm.recipe import Recipe

CLASS_TOKEN = "[CLS]"
_LAYER = {
    "attention.self.query": ("self_attention.query",),
    "attention.self.key": ("self_attention.key",),
    "attention.self.value": ("self_attention.value",),
    "attention.output.dense": ("self_attention.output",),
    "attention.output.LayerNorm": ("self_attention_norm",),
    "intermediate.dense": ("query_ffn.up", "text_ffn.up"),
    "output.dense": ("query_ffn.down", "text_ffn.down"),
    "output.LayerNorm": ("query_ffn.norm", "text_ffn.norm"),
}
"""Modules of a layer of BERT -> modules of a layer here."""
_HEAD = {
    "cls.predictions.transform.dense.weight": "text.caption_transform.weight",
    "cls.predictions.transform.dense.bias": "text.caption_transform.bias",
    "cls.predictions.transform.LayerNorm.weight": "text.caption_norm.weight",
    "cls.predictions.transform.LayerNorm.bias": "text.caption_norm.bias",
    "cls.predictions.bias": "text.caption_bias",
    "cls.predictions.decoder.bias": "text.caption_bias",
}
"""The head that writes words, which folders of BertModel alone do not have."""
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
"""As the first published folders have them."""


class QFormerWithText(MegatronModule):
    """Both parts under the names that they have in a model."""

    def __init__(self, connector: QFormer, text: QFormerText) -> None:
        """Take the parts."""
        super().__init__(connector.config)
        self.connector = connector
        self.text = text


def start_from_bert(source: Path, recipe: Recipe, target: Path) -> QFormerWithText:
    """Write the run folder. Needs a default process group of one rank.

    Args:
        source: BERT's folder.
        recipe: of BLIP-2's first stage.
        target: the run folder; must not exist.

    Returns:
        The parts with their weights.

    Raises:
        ValueError: the recipe is no first stage or has other widths than BERT, the folder lacks a tensor, or the target
            exists.
    """
    if target.exists():
        raise ValueError(f"target={target}: exists already. Choose another, or remove it.")
    qformer, language = recipe.model.connector, recipe.model.language
    if not isinstance(qformer, QFormerConfig) or not isinstance(language, QFormerTextConfig):
        raise ValueError(
            f"model.connector.kind={qformer.kind!r}, model.language.kind={language.kind!r}: BERT's weights are for a "
            "Q-Former and its text side. Give a recipe of BLIP-2's first stage (qformer, qformer_text)."
        )
    bert = PublishedFolder(source)
    tokenizer = recipe.tokenizer.build()
    vocab_size = language.vocab_size or tokenizer.vocab_size
    _check(bert, qformer, language, vocab_size)
    class_id = tokenizer.special_id(CLASS_TOKEN)
    if class_id is None:
        raise ValueError(f"tokenizer: has no {CLASS_TOKEN}, whose embedding captions start with. Use BERT's.")
    engine = MegatronEngine(MegatronEngineConfig())
    engine.start()
    parts = QFormerWithText(
        *language.build(
            qformer,
            recipe.model.vision.hidden_size,
            engine.config.megatron_settings(),
            BACKENDS["torch"],
            vocab_size=vocab_size,
            image_token_id=tokenizer.image_token_id,
            seed=recipe.training.seed,
        )
    )
    initialize_weights([parts], recipe.training.seed)
    _fill(dict(parts.named_parameters()), tensors_of(bert, qformer.num_layers, class_id))
    engine.wrap([parts], training=False)
    save_checkpoint(target, "release", engine, with_optimizer=False)
    return parts


def _check(bert: PublishedFolder, qformer: QFormerConfig, language: QFormerTextConfig, vocab_size: int) -> None:
    """Compare config.json with the recipe.

    Raises:
        ValueError: names what differs, with both values.
    """
    pairs = {
        "model.connector.num_layers": (qformer.num_layers, "num_hidden_layers"),
        "model.connector.hidden_size": (qformer.hidden_size, "hidden_size"),
        "model.connector.ffn_hidden_size": (qformer.ffn_hidden_size, "intermediate_size"),
        "model.connector.num_attention_heads": (qformer.num_attention_heads, "num_attention_heads"),
        "model.connector.layernorm_epsilon": (qformer.layernorm_epsilon, "layer_norm_eps"),
    }
    for name, (ours, theirs) in pairs.items():
        if bert.config.get(theirs) != ours:
            raise ValueError(
                f"{name}={ours}: {bert.path}/config.json has {theirs}={bert.config.get(theirs)}. Change the recipe, or "
                "take another BERT."
            )
    if bert.config.get("model_type") != "bert" or bert.config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"{bert.path}/config.json: model_type={bert.config.get('model_type')!r}, hidden_act="
            f"{bert.config.get('hidden_act')!r}: the Q-Former's layers are those of a BERT with gelu. Take one."
        )
    rooms = {
        "model.language.vocab_size": (vocab_size, "vocab_size", vocab_size < bert.config["vocab_size"]),
        "model.language.max_position_embeddings": (
            language.max_position_embeddings,
            "max_position_embeddings",
            language.max_position_embeddings > bert.config["max_position_embeddings"],
        ),
    }
    for name, (ours, theirs, is_wrong) in rooms.items():
        if is_wrong:
            limit = "has room for" if theirs == "vocab_size" else "are more than"
            raise ValueError(
                f"{name}={ours}: {limit} the {bert.config[theirs]} of {bert.path}/config.json. "
                f"{'Raise' if theirs == 'vocab_size' else 'Lower'} it."
            )


def tensors_of(bert: Mapping[str, Tensor], num_layers: int, class_id: int) -> Iterator[tuple[str, Tensor]]:
    """BERT's tensors under the names of our parameters; some fill only the first rows.

    Raises:
        ValueError: one is missing.
    """
    prefix = "bert." if any(name.startswith("bert.") for name in bert) else ""

    def read(name: str) -> Tensor:
        spelt = _spelt(bert, prefix + name)
        if spelt not in bert:
            raise ValueError(f"{prefix}{name}: is not in the folder. Take a folder of BertModel or one of its heads.")
        return bert[spelt].float()

    words = read("embeddings.word_embeddings.weight")
    yield "text.word_embeddings", words
    yield "text.start_embeddings", words[class_id : class_id + 1]
    # text is of BERT's first type throughout
    first_type = read("embeddings.token_type_embeddings.weight")[0]
    yield "text.position_embeddings", read("embeddings.position_embeddings.weight") + first_type
    for kind in ("weight", "bias"):
        yield f"connector.layernorm.{kind}", read(f"embeddings.LayerNorm.{kind}")
        for number in range(num_layers):
            for theirs, ours in _LAYER.items():
                tensor = read(f"encoder.layer.{number}.{theirs}.{kind}")
                yield from ((f"connector.layers.{number}.{name}.{kind}", tensor) for name in ours)
    yield from ((ours, bert[name].float()) for theirs, ours in _HEAD.items() if (name := _spelt(bert, theirs)) in bert)


def _spelt(bert: Mapping[str, Tensor], name: str) -> str:
    """The name under which the folder has a tensor."""
    if name not in bert:
        for new, old in _OLD_NAMES.items():
            name = name.replace(new, old)
    return name


def _fill(parameters: Mapping[str, torch.nn.Parameter], tensors: Iterator[tuple[str, Tensor]]) -> None:
    with torch.no_grad():
        for name, tensor in tensors:
            rows = min(len(parameters[name]), len(tensor))
            parameters[name][:rows].copy_(tensor[:rows])
