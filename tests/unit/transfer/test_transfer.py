"""VPGTrans: pairs of tokens, the converter, and what it does to each kind of connector."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from small_connectors import SMALL_CONNECTORS, small_model
from tiny_vlm import TINY
from torch import Tensor

from megavlm.checkpoint import RunFolder
from megavlm.checkpoint.release import ReleaseTensor, write_release
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.cli import main
from megavlm.config import load_recipe
from megavlm.convert.parts import EMBEDDING, ModelFile, ModelParts, weight_shapes
from megavlm.data.tokenizers import SentencePieceTokenizerConfig
from megavlm.transfer import ConverterSettings, transfer
from megavlm.transfer.converter import fit_converter
from megavlm.transfer.pair import pairs_of_captions, pairs_of_vocabularies

WORDS = [f"{first}{last}" for first in ("dog", "cat", "red", "blue", "tree", "hop", "sky") for last in "aeiouyzkmn"]
CAPTIONS = [f"{a} {b}" for a in WORDS for b in WORDS]
GREEK = ["\u03b1\u03b2", "\u03b3\u03b4", "\u03b5\u03b6"]
WIDTHS = {"source": 32, "target": 48}
MSE = ConverterSettings(loss="mse")


def train_tokenizer(path: Path, captions: list[str], vocab_size: int) -> Path:
    text = path.with_suffix(".txt")
    text.write_text("\n".join(captions), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path),
        vocab_size=vocab_size,
        control_symbols=["<|im_start|>", "<|im_end|>", "<image>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return path.with_suffix(".model")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    greek = [f"{a} {b}" for a in GREEK for b in GREEK]
    return {
        "source": train_tokenizer(folder / "source", CAPTIONS, 100),
        "target": train_tokenizer(folder / "target", CAPTIONS[::-1] + WORDS * 40, 90),
        "greek": train_tokenizer(folder / "greek", greek, 20),
    }


def model_of(side: str, tokenizer: Path, connector: dict[str, Any] | None = None, **changes: Any) -> ModelFile:
    """A small model for a tokenizer; the two sides have different widths."""
    width = WIDTHS[side]
    language = {
        **TINY["language"],
        "num_layers": 1,
        "hidden_size": width,
        "vocab_size": 110 if side == "source" else 100,
    }
    tree = {**TINY, "connector": connector or TINY["connector"], "language": language, **changes}
    return ModelFile.model_validate({"model": tree, "tokenizer": {"kind": "sentencepiece", "path": str(tokenizer)}})


def write_model(folder: Path, file: ModelFile, *, seed: int, given: dict[str, Tensor] | None = None) -> Path:
    """Write a release with drawn weights, but for those that are given."""
    language = file.model.language
    shapes = weight_shapes(file.model, language.vocab_size or 1 if language is not None else 1)
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: ReleaseTensor(one.shape, one.padded_shape, torch.float32) for key, one in shapes.items()}

    def read(key: str) -> Tensor:
        if given is not None and key in given:
            return given[key]
        return torch.randn(tensors[key].shape, generator=generator)

    write_release(RunFolder(folder), tensors, read, {"model.yaml": file.dump().encode()})
    return folder


@pytest.fixture(scope="module")
def models(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and a language model whose embeddings of shared tokens are an affine map of its own."""
    folder = tmp_path_factory.mktemp("models")
    source = write_model(folder / "source", model_of("source", tokenizers["source"]), seed=1)
    generator = torch.Generator().manual_seed(5)
    matrix, offset = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator)
    embeddings = torch.randn(100, 48, generator=generator)
    built = [SentencePieceTokenizerConfig(path=tokenizers[side]).build() for side in ("source", "target")]
    pairs = torch.cat([pairs_of_captions(CAPTIONS, *built)[0], pairs_of_vocabularies(*built)])
    embeddings[pairs[:, 1]] = CheckpointWeights(source / "release")[EMBEDDING][pairs[:, 0]] @ matrix.T + offset
    file = model_of("target", tokenizers["target"])
    alone = file.model_copy(update={"model": file.model.only("language")})
    write_model(folder / "language", alone, seed=2, given={EMBEDDING: embeddings})
    torch.save((matrix, offset), folder / "map.pt")
    return {"source": source, "language": folder / "language", "map": folder / "map.pt"}


@pytest.mark.parametrize("with_captions", [True, False])
def test_the_paired_tokens_are_the_same_text(with_captions: bool, tokenizers: dict[str, Path]) -> None:
    source, target = (SentencePieceTokenizerConfig(path=tokenizers[side]).build() for side in ("source", "target"))
    if with_captions:
        pairs, num_used = pairs_of_captions(["red dog", "dog", "x" * 9], source, target)
        lengths = [
            (len(source.encode(text, starts_text=True)), len(target.encode(text, starts_text=True)))
            for text in ("red dog", "dog", "x" * 9)
        ]
        assert num_used == sum(a == b for a, b in lengths)
        assert len(pairs) == sum(a for a, b in lengths if a == b)
    else:
        pairs = pairs_of_vocabularies(source, target)
        assert len(pairs) > 10
        for ours, theirs in pairs.tolist():
            assert source.decode([ours]) == target.decode([theirs]) != ""
        assert len(set(pairs[:, 0].tolist())) == len(set(pairs[:, 1].tolist())) == len(pairs)


def test_least_squares_finds_a_map_that_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    source, matrix, offset = (torch.randn(shape, generator=generator) for shape in ((90, 12), (20, 12), (20,)))
    pairs = torch.arange(90).repeat(2, 1).T
    converter, fit = fit_converter(source, source @ matrix.T + offset, pairs, MSE, bias=True)
    assert converter.bias is not None
    # worst difference measured: 1.2e-6
    torch.testing.assert_close(converter.weight, matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(converter.bias, offset, rtol=0, atol=1e-5)
    assert fit.num_distinct == 90
    assert fit.held_out_cosine == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_cosine_turns_embeddings_the_right_way(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    source, matrix = torch.randn(400, 8, generator=generator), torch.randn(16, 8, generator=generator)
    pairs = torch.arange(400).repeat(2, 1).T
    settings = ConverterSettings(lr=1.0, batch_size=50, epochs=20)
    converter, fit = fit_converter(source, source @ matrix.T, pairs, settings, bias=bias)
    assert (converter.bias is not None) == bias
    assert fit.held_out_cosine is not None
    assert fit.held_out_cosine > 0.98  # measured 0.997 and more; a fresh map has about 0
    again, _ = fit_converter(source, source @ matrix.T, pairs, settings, bias=bias)
    assert torch.equal(again.weight, converter.weight)


def test_the_connector_gives_what_it_gave_through_the_converter(models: dict[str, Path], tmp_path: Path) -> None:
    made = transfer(models["source"], models["language"], tmp_path / "out", MSE)
    old, new = (CheckpointWeights(path) for path in (models["source"] / "release", made.checkpoint))
    language = CheckpointWeights(models["language"] / "release")
    assert made.converted == ("connector.linear_fc2.weight",)  # without a bias: NVLM's
    # The language model's embeddings are matrix @ e + offset of ours; without a bias the offset is only fitted, so the
    # merged weight is compared with what the converter's own fit gives.
    assert new["connector.linear_fc2.weight"].shape == (48, 64)
    for key in new:
        if key.startswith("language."):
            assert torch.equal(new[key], language[key])
        elif key not in made.converted:
            assert torch.equal(new[key], old[key])
    file = load_recipe(made.checkpoint / "model.yaml", [], ModelFile)
    assert file.model.whole().language.hidden_size == 48
    assert file.model.connector == TINY_CONNECTOR
    assert weight_shapes(file.model, 100).keys() == set(new)
    assert json.loads((tmp_path / "out/transfer.json").read_text())["fit"]["num_distinct"] == made.fit.num_distinct


TINY_CONNECTOR = ModelParts.model_validate(TINY).connector


@pytest.mark.parametrize("kind", SMALL_CONNECTORS)
def test_each_kind_of_connector(
    kind: str, tokenizers: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    small = small_model(kind, TINY)
    file = model_of("source", tokenizers["source"], small["connector"], vision=small["vision"])
    source = write_model(tmp_path / "source", file, seed=3)
    if kind == "c_abstractor":  # its MLP is of the language model's width inside
        with pytest.raises(ValueError, match=r"kind='c_abstractor': connector\.mlp\.1\.weight is inside it"):
            transfer(source, models["language"], tmp_path / "out", MSE)
        return
    made = transfer(source, models["language"], tmp_path / "out", MSE)
    old, new = CheckpointWeights(source / "release"), CheckpointWeights(made.checkpoint)
    for key in made.converted:
        assert old.template(key).shape[0] == 32
        assert new.template(key).shape == (48, *old.template(key).shape[1:])
    assert all(
        torch.equal(old[key], new[key]) for key in old if key.startswith("connector") and key not in made.converted
    )
    matrices = [key for key in made.converted if old.template(key).dim() == 2]
    assert len(matrices) == 1


def test_no_shared_tokens(tokenizers: dict[str, Path], models: dict[str, Path], tmp_path: Path) -> None:
    file = model_of("target", tokenizers["greek"])
    greek = write_model(tmp_path / "greek", file.model_copy(update={"model": file.model.only("language")}), seed=4)
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(GREEK), encoding="utf-8")
    with pytest.raises(ValueError, match=r"share no tokens"):
        fit_converter(torch.ones(3, 2), torch.ones(3, 2), torch.empty(0, 2, dtype=torch.int64), MSE, bias=True)
    with pytest.raises(ValueError, match=r"share no tokens"):
        transfer(models["source"], greek, tmp_path / "out", MSE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "language", "message"),
    [
        ("language", "language", r"source=.*language: holds language, and a transfer needs a whole model"),
        ("source", "vision", r"language=.*vision: holds vision and no language model"),
        ("cross", "language", r"model\.fusion\.kind='cross_attention' has weights inside"),
        ("none", "language", r"source=.*none: holds no checkpoint"),
    ],
)
def test_what_cannot_be_transferred(
    source: str, language: str, message: str, models: dict[str, Path], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    file = model_of("source", tokenizers["source"])
    write_model(tmp_path / "vision", file.model_copy(update={"model": file.model.only("vision")}), seed=1)
    fusion = {"kind": "cross_attention", "every_n_layers": 1}
    connector = {"kind": "mlp", "num_layers": 1}
    write_model(tmp_path / "cross", model_of("source", tokenizers["source"], connector, fusion=fusion), seed=1)
    paths = {**models, **{name: tmp_path / name for name in ("vision", "cross", "none")}}
    with pytest.raises(ValueError, match=message):
        transfer(paths[source], paths[language], tmp_path / "out", MSE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"--batch-size=0: must be at least 1"),
        ({"epochs": 0}, r"--epochs=0: must be at least 1"),
        ({"lr": 0.0}, r"--lr=0: must be above 0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConverterSettings(**settings)


def test_captions_must_hold_text(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, message in (("empty.txt", "holds no text"), ("none.txt", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            transfer(models["source"], models["language"], tmp_path / "out", MSE, captions=tmp_path / name)


def test_the_command(
    models: dict[str, Path], tokenizers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tokenizers["source"].with_name("captions.txt")
    arguments = [models["source"], models["language"], tmp_path / "out", "--captions", captions, "--loss", "mse"]
    main(["transfer", *map(str, arguments)])
    assert json.loads((tmp_path / "out/transfer.json").read_text())["captions"] == str(captions)


def test_weight_and_bias_are_the_maps_own(models: dict[str, Path], tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """With at least as many pairs as the embeddings are wide, least squares has one solution: the map that is there."""
    connector = {"kind": "mlp", "bias": True, "num_layers": 2}
    source = write_model(
        tmp_path / "source",
        model_of("source", tokenizers["source"], connector),
        seed=7,
        given={EMBEDDING: CheckpointWeights(models["source"] / "release")[EMBEDDING]},
    )
    made = transfer(source, models["language"], tmp_path / "out", MSE)
    assert made.fit.num_distinct > 33, "fewer pairs would not determine 32 columns and an offset"
    assert set(made.converted) == {"connector.linear_fc2.weight", "connector.linear_fc2.bias"}
    matrix, offset = torch.load(models["map"])
    old, new = CheckpointWeights(source / "release"), CheckpointWeights(made.checkpoint)
    weight, bias = old["connector.linear_fc2.weight"], old["connector.linear_fc2.bias"]
    # worst differences measured are below 1e-4 of numbers up to 60
    torch.testing.assert_close(new["connector.linear_fc2.weight"], matrix @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(new["connector.linear_fc2.bias"], matrix @ bias + offset, rtol=1e-4, atol=1e-3)
    # the inner width was the source's language model's, and is a number of its own now
    connector_of = load_recipe(made.checkpoint / "model.yaml", [], ModelFile).model.connector
    assert getattr(connector_of, "ffn_hidden_size", None) == 32


@pytest.mark.parametrize("which", ["source", "language"])
def test_damage_is_found(which: str, models: dict[str, Path], tmp_path: Path) -> None:
    damaged = {**models, which: tmp_path / which}
    shutil.copytree(models[which], damaged[which])
    weights = sorted((damaged[which] / "release").glob("*.distcp"))[0]
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=weights.name):
        transfer(damaged["source"], damaged["language"], tmp_path / "out", MSE)


def test_embeddings_that_are_not_finite(models: dict[str, Path], tokenizers: dict[str, Path], tmp_path: Path) -> None:
    embedding = torch.zeros(100, 48)
    embedding[3, 4] = float("nan")
    file = model_of("target", tokenizers["target"])
    alone = file.model_copy(update={"model": file.model.only("language")})
    broken = write_model(tmp_path / "broken", alone, seed=2, given={EMBEDDING: embedding})
    with pytest.raises(ValueError, match=r"broken: language\.embedding\S+ holds numbers that are not finite"):
        transfer(models["source"], broken, tmp_path / "out", MSE)


def test_a_tokenizer_with_more_tokens_than_the_embedding(
    models: dict[str, Path], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    file = model_of("target", tokenizers["target"])
    assert file.model.language is not None
    language = file.model.language.model_copy(update={"vocab_size": 20})
    alone = file.model_copy(update={"model": ModelParts(language=language)})
    small = write_model(tmp_path / "small", alone, seed=2)
    with pytest.raises(ValueError, match="vocab_size=20"):
        transfer(models["source"], small, tmp_path / "out", MSE)
