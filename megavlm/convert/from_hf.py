"""From a Hugging Face folder to a checkpoint of ours, one tensor at a time: the model is nowhere in memory."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megavlm.checkpoint import RunFolder
from megavlm.checkpoint.folder import RELEASE
from megavlm.checkpoint.release import write_release
from megavlm.config import dump_recipe, load_recipe, validate
from megavlm.convert.carried import CARRIED_NAME, write_carried
from megavlm.convert.families import family_of
from megavlm.convert.incoming import Incoming
from megavlm.convert.parts import MODEL_NAME, RECIPE_NAME, ModelFile, ModelParts
from megavlm.convert.processor import PROCESSOR_FILES
from megavlm.convert.read_hf import PublishedFolder, read_json
from megavlm.convert.recipe_of.values import Tree
from megavlm.convert.staging import progress_bar, staged
from megavlm.data.tokenizers import HuggingFaceTokenizerConfig
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER

PUBLISHED = "published"
"""Folder inside the checkpoint with the JSON files of the model that it was made from."""
CARRIED_FILES = ("config.json", "generation_config.json", *PROCESSOR_FILES)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_FOR_TRAINING = ("moe_aux_loss_coeff",)
"""What config.json says and a recipe may change: the weights are the same."""


def import_folder(source: Path, target: Path, recipe: Recipe | None = None, overrides: Sequence[str] = ()) -> Path:
    """Make a run folder with ``release/`` and ``model.yaml`` from a Hugging Face folder.

    Args:
        source: ``config.json`` and safetensors files.
        target: the run folder; must not exist.
        recipe: the model that the weights are for; every difference to ``config.json`` is an error. None: the model
            is what ``config.json`` says.
        overrides: ``model.part.field=value`` on top of ``config.json`` if there is no recipe. They can say what
            ``config.json`` leaves open (``model.vision.select_layer``) and raise ``model.language.vocab_size``.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: the folder is damaged or of another kind, or does not fit the recipe; nothing is left behind.
    """
    model, incoming, files = open_folder(source, target, recipe, overrides)
    with staged(target) as folder:
        (folder / MODEL_NAME).write_text(model.dump(), encoding="utf-8")
        with progress_bar() as progress:
            task = progress.add_task(f"reading {source.name}", total=len(incoming.tensors))

            def read(key: str) -> Tensor:
                progress.advance(task)
                return incoming.read(key)

            if incoming.carried:
                carried = folder / Path(CARRIED_NAME).name
                write_carried(carried, incoming.carried, incoming.read_carried)
                files[CARRIED_NAME] = carried
            written = write_release(RunFolder(folder), incoming.tensors, read, files)
            if incoming.carried:
                carried.unlink()
    LOGGER.info("%s: %d tensors of %s", target / written.name, len(incoming.tensors), ", ".join(model.model.names))
    if incoming.carried:
        LOGGER.info("%d that the model has no use for are carried in %s", len(incoming.carried), CARRIED_NAME)
    return target / written.name


def open_folder(
    source: Path, target: Path, recipe: Recipe | None = None, overrides: Sequence[str] = ()
) -> tuple[ModelFile, Incoming, dict[str, bytes | Path]]:
    """Say what :func:`import_folder` would write, from the headers of the files alone.

    Args:
        source, target, recipe, overrides: as there.

    Returns:
        The model, its weights, and the small files of the checkpoint by their names.

    Raises:
        ValueError: as there.
    """
    published = PublishedFolder(source)
    family = family_of(published.config)
    stated = family.read(published.config)
    model = _describe(stated, source, recipe, overrides)
    if recipe is None and "language" in stated:
        model = model.model_copy(update={"tokenizer": _tokenizer(published, target)})
    _check_same(stated, model.model, source)
    incoming = Incoming(published, family, model.model, _vocab_size(stated, model, source))
    return model, incoming, _files(source, model, recipe)


@dataclass(frozen=True)
class _Difference:
    name: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.name}={self.ours!r}, and config.json says {self.theirs!r}"


def _describe(stated: Mapping[str, Tree], source: Path, recipe: Recipe | None, overrides: Sequence[str]) -> ModelFile:
    """The parts that the folder holds, as the recipe has them, or as config.json and the overrides say."""
    if recipe is not None:
        whole = ModelParts.of(recipe.model)
        names = [*stated, "fusion"] if len(stated) > 1 else list(stated)
        return ModelFile(model=whole.only(*names), tokenizer=recipe.tokenizer)
    tree: dict[str, Any] = {name: {key: v for key, v in part.items() if v is not None} for name, part in stated.items()}
    if len(stated) > 1:
        tree.setdefault("fusion", {"kind": "decoder_only"})
    model = validate({"model": tree}, ModelFile, str(source / "config.json"))
    if not overrides:
        return model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_NAME
        path.write_text(model.dump(), encoding="utf-8")
        return load_recipe(path, overrides, ModelFile)


def _check_same(stated: Mapping[str, Tree], parts: ModelParts, source: Path) -> None:
    """Compare every stated value with the model's. The vocabulary is looked at by :func:`_vocab_size`.

    Raises:
        ValueError: names each that differs, with both values.
    """
    differences = []
    for part, fields in stated.items():
        config = getattr(parts, part)
        kind = fields.get("kind", config.kind)
        if config.kind != kind:
            differences.append(_Difference(f"model.{part}.kind", config.kind, kind))
            continue
        for name, theirs in fields.items():
            ours = _resolved(part, name, parts)
            if isinstance(theirs, Mapping):  # of the experts
                differences += [
                    _Difference(f"model.{part}.{name}.{inner}", found, value)
                    for inner, value in theirs.items()
                    if inner not in _FOR_TRAINING and (found := getattr(ours, inner, None)) != value
                ]
            elif ours != theirs and name != "vocab_size":
                differences.append(_Difference(f"model.{part}.{name}", ours, theirs))
    if differences:
        raise ValueError(
            f"{source}: holds another model than the recipe's: {'; '.join(map(str, differences))}. Change the recipe, "
            "or take other weights."
        )


def _resolved(part: str, name: str, parts: ModelParts) -> Any:
    """A field's value, or what it stands for where it is left open."""
    config = getattr(parts, part)
    value = getattr(config, name)
    if value is None and name == "every_n_layers":
        return config.interval(parts.whole().decoder.num_layers)
    if value is None and name == "num_query_groups":
        return config.num_attention_heads
    if value is None and name == "kv_channels":
        return config.hidden_size // config.num_attention_heads
    if value is None and (part, name) == ("connector", "ffn_hidden_size") and config.num_layers == 2:
        return parts.whole().decoder.hidden_size
    return value


def _vocab_size(stated: Mapping[str, Tree], model: ModelFile, source: Path) -> int | None:
    """Tokens of the model; None without a language model. Says what becomes of the vocabulary.

    Raises:
        ValueError: the folder has more.
    """
    if model.model.language is None:
        return None
    held = int(stated["language"]["vocab_size"])
    tokenizer = model.tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizerConfig) and not tokenizer.path.exists():
        tokenizer = tokenizer.model_copy(update={"path": source})  # where it is before it is copied
    is_asked = tokenizer is not None and (model.model.language.vocab_size is None or tokenizer.path.exists())
    num_tokens = tokenizer.build().vocab_size if tokenizer is not None and is_asked else None
    wanted = model.model.language.vocab_size or num_tokens
    assert wanted is not None, "without a recipe config.json gives it, and with one there is a tokenizer"
    if wanted < held:
        raise ValueError(
            f"model.language.vocab_size={model.model.language.vocab_size}: gives {wanted} tokens, and the folder's "
            f"vocabulary has {held}, of which none is cut off. Set it to {held} or more."
        )
    if num_tokens is not None and num_tokens > wanted:
        LOGGER.warning(
            "model.language.vocab_size=%d: the tokenizer has %d tokens, image token included. To train with it, "
            "convert again with model.language.vocab_size=%d",
            wanted,
            num_tokens,
            num_tokens,
        )
    if wanted > held:
        LOGGER.info(
            "vocabulary: %d of the %d rows are new (the folder has %d); they start as the mean of the others",
            wanted - held,
            wanted,
            held,
        )
    return wanted


def _tokenizer(published: PublishedFolder, target: Path) -> HuggingFaceTokenizerConfig | None:
    """The tokenizer that comes with the folder, under the path it will have; says if the vocabulary has no room."""
    if not (published.path / "tokenizer.json").is_file():
        return None
    added = read_json(published.path / "tokenizer.json").get("added_tokens") or []
    image_id = published.config.get("image_token_id", published.config.get("image_token_index"))
    image_token = next((entry["content"] for entry in added if entry["id"] == image_id), "<image>")
    return HuggingFaceTokenizerConfig(path=target.absolute() / RELEASE / "tokenizer", image_token=image_token)


def _files(source: Path, model: ModelFile, recipe: Recipe | None) -> dict[str, bytes | Path]:
    """The small files of the checkpoint."""
    files: dict[str, bytes | Path] = {MODEL_NAME: model.dump().encode()}
    if recipe is not None:
        files[RECIPE_NAME] = dump_recipe(recipe).encode()
    for name in CARRIED_FILES:
        if (source / name).is_file():
            files[f"{PUBLISHED}/{name}"] = source / name
    for name in TOKENIZER_FILES:
        if model.model.language is not None and (source / name).is_file():
            files[f"tokenizer/{name}"] = source / name
    return files
