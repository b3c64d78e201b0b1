"""The ``transfer`` verb: from a model and another language model to a run folder that a warm-up starts from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavlm.checkpoint import RunFolder
from megavlm.checkpoint.release import ReleaseTensor, write_release
from megavlm.convert.own_checkpoint import OwnCheckpoint, open_checkpoint
from megavlm.convert.parts import EMBEDDING, MODEL_NAME, ModelFile, ModelParts, weight_shapes
from megavlm.convert.staging import progress_bar, staged
from megavlm.data.tokenizers import Tokenizer
from megavlm.models.config import VLMConfig, model_vocab_size
from megavlm.runtime.log import LOGGER
from megavlm.transfer.connector import convert_tensor, has_bias, output_keys, with_inner_width
from megavlm.transfer.converter import Converter, ConverterSettings, Fit, fit_converter
from megavlm.transfer.pair import pairs_of_captions, pairs_of_vocabularies, read_captions

REPORT_NAME = "transfer.json"


@dataclass(frozen=True)
class Transferred:
    """What was made."""

    checkpoint: Path
    model: ModelParts
    converted: tuple[str, ...]
    """Checkpoint keys of the tensors that the converter was merged into."""
    fit: Fit


def transfer(
    source: Path, language: Path, target: Path, settings: ConverterSettings, *, captions: Path | None = None
) -> Transferred:
    """Take a model's vision encoder and connector to another language model.

    Args:
        source: run folder or checkpoint of the model.
        language: of the other language model, alone or in a model, with its tokenizer.
        target: the run folder to make, with ``release/`` and ``transfer.json``; must not exist.
        settings: of the converter.
        captions: text file, a caption a line, whose tokens are paired (VPGTrans: COCO's and SBU's); None: tokens that
            both vocabularies spell alike.

    Returns:
        What was made. The connector then gives what it gave before, through the converter.

    Raises:
        ValueError: a checkpoint is damaged or lacks a part, the connector or fusion cannot be transferred, or the two
            vocabularies share no tokens; nothing is left behind.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"target={target}: exists already. Choose another, or remove it.")
    old, new = open_checkpoint(source), open_checkpoint(language)
    parts = _new_parts(old, new)
    keys = output_keys(_model_of(old))
    tokenizers = [_tokenizer_of(old), _tokenizer_of(new)]
    if captions is None:
        pairs = pairs_of_vocabularies(*tokenizers)
        LOGGER.info("%d tokens that both vocabularies spell alike", len(pairs))
    else:
        texts = read_captions(captions)
        pairs, num_used = pairs_of_captions(texts, *tokenizers)
        LOGGER.info("%d pairs of tokens, of %d of %d captions", len(pairs), num_used, len(texts))
    converter, fit = fit_converter(_embedding(old), _embedding(new), pairs, settings, bias=has_bias(keys))
    with staged(target) as folder:
        written = _write(folder, target, parts, (old, new), keys, converter)
        report = {
            "source": str(old.path),
            "language": str(new.path),
            "captions": None if captions is None else str(captions),
            "converter": asdict(settings),
            "converted": list(keys),
            "fit": asdict(fit),
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return Transferred(target / written.name, parts, keys, fit)


def _model_of(checkpoint: OwnCheckpoint) -> VLMConfig:
    """The source's model, its connector with an inner width of its own."""
    model = checkpoint.model.model.whole()
    connector = with_inner_width(model.connector, model.decoder.hidden_size)
    return model.model_copy(update={"connector": connector})


def _new_parts(old: OwnCheckpoint, new: OwnCheckpoint) -> ModelParts:
    """The model to come.

    Raises:
        ValueError: a part is missing, or the fusion holds weights inside the language model.
    """
    parts, language = old.model.model, new.model.model.language
    if not parts.is_whole:
        raise ValueError(
            f"source={old.source}: holds {', '.join(parts.names)}, and a transfer needs a whole model: vision, "
            "connector, language. Give one."
        )
    if parts.fusion is not None and parts.fusion.tile_route.uses_context:
        raise ValueError(
            f"source={old.source}: model.fusion.kind={parts.fusion.kind!r} has weights inside the language model's "
            "layers, which no converter takes along. Only decoder_only can be transferred."
        )
    if language is None:
        raise ValueError(
            f"language={new.source}: holds {', '.join(new.model.model.names)} and no language model. Give one, for "
            "instance a Hugging Face folder through megavlm convert."
        )
    theirs = new.model.model
    if theirs.is_whole and theirs.whole().cross_attention_layers:
        LOGGER.warning("%s: its cross-attention is left out; the language model takes images as tokens now", new.source)
    return parts.model_copy(update={"connector": _model_of(old).connector, "language": language})


def _embedding(checkpoint: OwnCheckpoint) -> Tensor:
    """Read a language model's embedding ``[V, H]``.

    Raises:
        ValueError: it holds numbers that are not finite.
    """
    embedding = checkpoint.weights[EMBEDDING]
    if not torch.isfinite(embedding).all():
        raise ValueError(f"source={checkpoint.source}: {EMBEDDING} holds numbers that are not finite. Choose another.")
    return embedding


def _tokenizer_of(checkpoint: OwnCheckpoint) -> Tokenizer:
    """Load a checkpoint's tokenizer.

    Raises:
        ValueError: it has none, it cannot be read, or it has more tokens than the embedding has rows.
    """
    config = checkpoint.model.tokenizer
    if config is None:
        raise ValueError(f"source={checkpoint.source}: has no tokenizer, by which tokens are paired. Choose another.")
    copy = checkpoint.path / "tokenizer"
    if not config.path.exists() and copy.is_dir():
        config = config.model_copy(update={"path": copy})
    tokenizer = config.build()
    language = checkpoint.model.model.language
    assert language is not None
    model_vocab_size(language, tokenizer.vocab_size)  # raises
    if tokenizer.vocab_size > checkpoint.vocab_size:
        raise ValueError(
            f"source={checkpoint.source}: its tokenizer has {tokenizer.vocab_size} tokens, the image's included, and "
            f"its embedding {checkpoint.vocab_size} rows. Convert it with model.language.vocab_size="
            f"{tokenizer.vocab_size}."
        )
    return tokenizer


def _write(
    folder: Path,
    target: Path,
    parts: ModelParts,
    models: tuple[OwnCheckpoint, OwnCheckpoint],
    keys: tuple[str, ...],
    converter: Converter,
) -> Path:
    """Write the run folder that will be called ``target``. Returns its checkpoint."""
    old, new = models
    tensors: dict[str, ReleaseTensor] = {}
    holders: dict[str, OwnCheckpoint] = {}
    for key, wanted in weight_shapes(parts, new.vocab_size).items():
        holders[key] = new if key.startswith("language.") else old
        held = holders[key].tensors[key]
        expected = (converter.weight.shape[0], *held.shape[1:]) if key in keys else held.shape
        assert wanted.shape == expected, f"{key}: {expected}, and the model needs {wanted.shape}"
        tensors[key] = ReleaseTensor(wanted.shape, wanted.padded_shape, held.dtype)
    tokenizer = new.tokenizer_in(target)
    described = ModelFile(model=parts, tokenizer=tokenizer).dump()
    files: dict[str, bytes | Path] = {MODEL_NAME: described.encode()}
    files |= {name: path for name, path in new.small_files.items() if name.split("/")[0].startswith("tokenizer")}
    (folder / MODEL_NAME).write_text(described, encoding="utf-8")  # for the base: of the warm-up's recipe
    with progress_bar() as progress:
        task = progress.add_task("writing release", total=len(tensors))

        def read(key: str) -> Tensor:
            progress.advance(task)
            tensor = holders[key].weights[key]
            return convert_tensor(tensor, converter) if key in keys else tensor

        return write_release(RunFolder(folder), tensors, read, files)
