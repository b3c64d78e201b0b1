"""Whole folders: what is made starts where the dense model is, under every layout, and trains on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dense_run import MODELS, go_on, recipe_of, train_dense
from harness import run_ranks
from tiny_vlm import TINY
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import load_recipe
from megavlm.convert.parts import ModelFile
from megavlm.recipe import Recipe
from megavlm.upcycle import UpcycleSettings, upcycle_folder
from megavlm.upcycle.expert import ExpertWeights

PLAIN = UpcycleSettings(num_experts=4, every=2, first=1)
GRANULAR = UpcycleSettings(num_experts=8, granularity=2, top_k=4, layers=(0, 3))
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, EP2),
    "tp2": (2, TP2_SP),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2_ep2": (2, {**TP2_SP, **EP2, "expert_tensor_parallel_size": 1}),
}


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense run of each fusion."""
    folder = tmp_path_factory.mktemp("dense")
    for kind, model in MODELS.items():
        run_ranks(train_dense, 1, folder / kind, model, {})
    return {kind: folder / kind for kind in MODELS}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of four layers, in bfloat16."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        vocab_size=60,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def with_moe(model: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    return {**model, "language": load_recipe(checkpoint / "model.yaml", (), ModelFile).model.language.model_dump()}


@pytest.mark.parametrize("settings", [PLAIN, GRANULAR], ids=["plain", "granular"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_model_starts_equal(
    dense: dict[str, Path], kind: str, settings: UpcycleSettings, tmp_path: Path
) -> None:
    made = upcycle_folder(dense[kind], tmp_path / "moe", settings)
    assert made.checkpoint == tmp_path / "moe" / "release"
    assert not made.reasons_not_exact
    assert [row.name.split()[0] for row in made.rows] == ["text", "text", "image"]
    # Worst seen: 4.7e-7.
    assert max(row.max_rel for row in made.rows) < 5e-6
    recipe = load_recipe(made.checkpoint / "recipe.yaml", (), Recipe)
    assert recipe.model.language == made.language
    assert recipe.model.language.model_copy(update={"moe": None}) == recipe_of(MODELS[kind], dense[kind]).model.language
    assert load_recipe(tmp_path / "moe" / "model.yaml", (), ModelFile).model.language == made.language
    assert (made.checkpoint / "tokenizer" / "vocab.txt").read_text() == "a b"
    assert not (made.checkpoint / "rng").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_from_the_dense_loss_under_every_layout(dense: dict[str, Path], layout: str, tmp_path: Path) -> None:
    made = upcycle_folder(dense["D"], tmp_path / "moe", GRANULAR, probe=False)
    assert not made.rows
    world_size, engine = LAYOUTS[layout]
    expected, *_ = run_ranks(go_on, 1, dense["D"], TINY, {}, False, 0)[0]
    loss, losses, iteration, _ = run_ranks(
        go_on, world_size, made.checkpoint, with_moe(TINY, made.checkpoint), engine, False, 2
    )[0]
    assert iteration == 0
    # Worst seen: 5.1e-8 relative.
    assert loss == pytest.approx(expected, rel=2e-6)
    assert losses[0] == pytest.approx(expected, rel=2e-6)
    assert losses[1] != losses[0]


def test_a_language_model_of_hugging_face(llama: Path, tmp_path: Path) -> None:
    settings = UpcycleSettings(num_experts=8, granularity=4, top_k=4, every=2)
    made = upcycle_folder(llama, tmp_path / "moe", settings, ["model.language.moe.moe_aux_loss_coeff=0.5"])
    assert [row.name for row in made.rows] == ["text of 32 tokens", "text of 24 tokens"]
    assert not made.reasons_not_exact
    # Worst seen: 7.8e-7.
    assert max(row.max_rel for row in made.rows) < 5e-6
    tree = yaml.safe_load((tmp_path / "moe" / "model.yaml").read_text())
    moe = tree["model"]["language"]["moe"]
    assert (moe["moe_layer_freq"], moe["moe_ffn_hidden_size"], moe["moe_aux_loss_coeff"]) == (2, 12, 0.5)
    weights = CheckpointWeights(made.checkpoint)
    assert {weights.template(key).dtype for key in weights} == {torch.bfloat16}
    assert (made.checkpoint / "published" / "config.json").is_file()


@pytest.mark.parametrize(
    "settings",
    [
        UpcycleSettings(num_experts=4, pre_softmax=True),
        UpcycleSettings(num_experts=8, granularity=4),
        UpcycleSettings(num_experts=4, noise=0.01),
        UpcycleSettings(num_experts=6, granularity=3, top_k=3),
    ],
    ids=["pre_softmax", "part_of_a_group", "noise", "rounded"],
)
def test_what_cannot_be_exact_is_said_and_measured(llama: Path, settings: UpcycleSettings, tmp_path: Path) -> None:
    made = upcycle_folder(llama, tmp_path / "moe", settings)
    assert len(made.reasons_not_exact) == 1
    assert max(row.max_abs for row in made.rows) > 1e-3


def test_an_error_of_the_program_is_found_and_nothing_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ExpertWeights.make_experts
    monkeypatch.setattr(ExpertWeights, "make_experts", lambda self, key, dense: make(self, key, dense * 1.01))
    with pytest.raises(ValueError, match=r"text of 32 tokens: the upcycled logits differ .* may by 0\.0001"):
        upcycle_folder(llama, tmp_path / "moe", PLAIN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        (UpcycleSettings(num_experts=1), (), r"num_moe_experts=1: Input should be greater than or equal to 2"),
        (UpcycleSettings(num_experts=4, top_k=5), (), r"moe_router_topk=5: there are only num_moe_experts=4"),
        (UpcycleSettings(num_experts=4, top_k=1), (), r"moe_router_topk=1: a softmax over one chosen expert"),
        (UpcycleSettings(num_experts=4, topk_scaling=2.0), (), r"moe_router_topk_scaling_factor=2\.0: only means"),
        (UpcycleSettings(num_experts=5, granularity=5), (), r"--granularity=5: does not divide .*ffn_hidden_size=48"),
        (UpcycleSettings(num_experts=4, layers=(4,)), (), r"--layers=4: \[4\] are not among the 4"),
        (PLAIN, ("model.language.moe.num_moe_experts=8",), r"num_moe_experts=8: the weights .* with --num-experts"),
        (PLAIN, ("model.language.moe.nonsense=8",), r"model\.language\.moe\.nonsense=8: unknown key"),
        (PLAIN, ("model.language.ffn_hidden_size=96",), r"ffn_hidden_size=96, and config\.json says 48"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    llama: Path, settings: UpcycleSettings, overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle_folder(llama, tmp_path / "moe", settings, overrides)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_do_not_fit(llama: Path, dense: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"target=.*there: exists already"):
        upcycle_folder(llama, tmp_path / "there", PLAIN)
    with pytest.raises(ValueError, match=r"source=.*nowhere: holds neither a config\.json nor a checkpoint"):
        upcycle_folder(tmp_path / "nowhere", tmp_path / "moe", PLAIN)
    upcycle_folder(llama, tmp_path / "moe", PLAIN, probe=False)
    with pytest.raises(ValueError, match=r"has 4 experts in 2 layers already"):
        upcycle_folder(tmp_path / "moe", tmp_path / "more", PLAIN)
    with pytest.raises(ValueError, match=r"--optimizer=carried: a Hugging Face folder holds no optimizer"):
        upcycle_folder(llama, tmp_path / "more", PLAIN, optimizer="carried")
    with pytest.raises(ValueError, match=r"\d+ tensors are not in the model, first language\.decoder\.layers\.3"):
        upcycle_folder(dense["D"], tmp_path / "more", PLAIN, ["model.language.num_layers=3"])
    with pytest.raises(ValueError, match=r"does not hold language\.decoder\.layers\.4"):
        upcycle_folder(dense["D"], tmp_path / "more", PLAIN, ["model.language.num_layers=5"])
    assert {path.name for path in tmp_path.iterdir()} == {"there", "moe"}


def test_a_vision_encoder_alone_has_nothing_to_upcycle(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"source=.*hf: holds vision and no language model"):
        upcycle_folder(tmp_path / "hf", tmp_path / "moe", PLAIN)
