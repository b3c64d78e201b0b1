"""Every recipe in examples/ is valid, and the full-size ones have the parameter counts of the published models."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from megavlm.batch import TileRoute
from megavlm.build import check_run
from megavlm.config import load_recipe
from megavlm.data.tilings import DynamicTilingConfig
from megavlm.models.taken import PretrainedConfig
from megavlm.planning.parameters import count_recipe_parameters
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


def sets_train_iters(path: Path) -> bool:
    """Whether the file, or one that it inherits from, is a stage of training; the others are only inherited from."""
    tree = yaml.safe_load(path.read_text())
    inherits = "base" in tree and sets_train_iters(path.parent / tree["base"])
    return inherits or "train_iters" in tree.get("training", {})


RECIPES = sorted(path for path in EXAMPLES.rglob("*.yaml") if sets_train_iters(path))
FULL_SIZE_WORLD = {
    f"nvlm_{kind}_{size}_{stage}": world_size
    for kind in "dxh"
    for size in ("34b", "72b")
    for stage, world_size in (("pretrain", 64), ("sft", 128))
} | {f"mm1_{size}": 64 for size in ("3b", "3b_moe", "7b", "7b_moe")}


def load(path: Path, *overrides: str) -> Recipe:
    """Validate a recipe; those that leave their start to the command line get one."""
    return load_recipe(path, overrides, Recipe)


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {*FULL_SIZE_WORLD, "tiny", "tiny_x", "tiny_h"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_recipe_is_valid_and_its_layout_fits(path: Path) -> None:
    recipe = load(path)
    # a step of these is one micro-batch
    small_world = 1 if path.parent.name == "comparisons" or path.stem.startswith("real") else 2
    check_run(recipe, world_size=FULL_SIZE_WORLD.get(path.stem, small_world))


def count_on_meta(model_class: type, config: transformers.PretrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def test_nvlm_d_72b_has_the_published_size() -> None:
    counts = count_recipe_parameters(load(EXAMPLES / "nvlm/nvlm_d_72b_sft.yaml"))
    qwen2_72b = transformers.Qwen2Config(
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    assert counts["language"] == count_on_meta(transformers.Qwen2ForCausalLM, qwen2_72b) == 72_706_203_648
    # two linear layers 12800 -> 29568 -> 8192 without bias (the paper's 620.7 M), and the LayerNorm before them
    assert counts["connector"] == 12800 * 29568 + 29568 * 8192 + 2 * 12800
    assert round((counts["connector"] - 2 * 12800) / 1e6, 1) == 620.7
    assert counts["vision"] == internvit_6b()


def test_nvlm_d_34b_has_the_published_size() -> None:
    counts = count_recipe_parameters(load(EXAMPLES / "nvlm/nvlm_d_34b_sft.yaml"))
    yi_34b = transformers.LlamaConfig(
        vocab_size=64000,
        hidden_size=7168,
        intermediate_size=20480,
        num_hidden_layers=60,
        num_attention_heads=56,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    assert counts["language"] == count_on_meta(transformers.LlamaForCausalLM, yi_34b)
    assert round((counts["connector"] - 2 * 12800) / 1e6, 1) == 408.9
    assert counts["vision"] == internvit_6b()


def internvit_6b() -> int:
    """Parameters of InternViT-6B-448px, by transformers' class of the same architecture."""
    config = transformers.InternVLVisionConfig(
        hidden_size=3200,
        intermediate_size=12800,
        num_hidden_layers=45,
        num_attention_heads=25,
        image_size=[448, 448],
        patch_size=[14, 14],
        use_qk_norm=True,
        attention_bias=False,
        norm_type="rms_norm",
        use_mask_token=False,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
    )
    return count_on_meta(transformers.InternVLVisionModel, config)


@dataclass(frozen=True)
class Size:
    """What the size of a model's cross-attention and connector follows from."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    every_n_layers: int
    num_query_groups: int = 8

    @property
    def cross_attention(self) -> int:
        """Parameters of one layer: norm, query, key and value, output, gate."""
        width = self.hidden_size
        channels = width // self.num_attention_heads
        return width + width * width + width * 2 * self.num_query_groups * channels + width * width + 1


SIZES = {"72b": Size(8192, 29568, 80, 64, 8), "34b": Size(7168, 20480, 60, 56, 6)}
SHUFFLED = 4 * 3200  # width of four patches of InternViT-6B side by side


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("size", SIZES)
def test_nvlm_x_and_h_are_nvlm_d_with_cross_attention(size: str, stage: str) -> None:
    shape = SIZES[size]
    recipes = {kind: load(EXAMPLES / f"nvlm/nvlm_{kind}_{size}_{stage}.yaml") for kind in "dxh"}
    counts = {kind: count_recipe_parameters(recipe) for kind, recipe in recipes.items()}
    layers = tuple(range(0, shape.num_layers, shape.every_n_layers))
    assert len(layers) == 10
    assert recipes["d"].model.cross_attention_layers == ()
    assert counts["d"]["cross_attention"] == 0
    two_layers = SHUFFLED * shape.ffn_hidden_size + shape.ffn_hidden_size * shape.hidden_size
    connectors = {"d": two_layers, "x": SHUFFLED * shape.hidden_size, "h": two_layers}
    for kind, recipe in recipes.items():
        assert counts[kind]["vision"] == counts["d"]["vision"]
        assert counts[kind]["language"] == counts["d"]["language"]
        assert counts[kind]["connector"] == connectors[kind] + 2 * SHUFFLED  # and its LayerNorm
        if kind != "d":
            assert recipe.model.cross_attention_layers == layers
            assert counts[kind]["cross_attention"] == 10 * shape.cross_attention + shape.hidden_size
    # the paper's figure for the one layer of NVLM-X
    assert round(connectors["x"] / 1e6, 1) == {"72b": 104.9, "34b": 91.8}[size]


@pytest.mark.parametrize("kind", ["x", "h"])
def test_the_tiny_models_have_all_parts(kind: str) -> None:
    model = load(EXAMPLES / f"nvlm/tiny_{kind}.yaml").model
    assert model.cross_attention_layers == (0, 2)
    assert model.language == load(EXAMPLES / "nvlm/tiny.yaml").model.language


ROUTES = {
    "d": TileRoute(context_tiles="none"),
    "x": TileRoute(context_tiles="all", context_tags="text"),
    "h": TileRoute(context_tiles="regular", context_tags="add"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ROUTES)
def test_where_the_tiles_go(kind: str, size: str) -> None:
    for stage in ("pretrain", "sft"):
        recipe = load(EXAMPLES / f"nvlm/nvlm_{kind}_{size}_{stage}.yaml")
        assert recipe.model.fusion.tile_route == ROUTES[kind]
        assert recipe.data.thumbnail_tag == {"72b": "<tile_global_thumbnail>", "34b": "<tile_global>"}[size]


# The tables of arXiv 2409.11402. For X they name only the cross-attention layers, to which the recipes count the
# connector, which would stay random otherwise. The pretraining of D and X takes a single tile, which needs no tag.
# trainable, batch, lr, min_lr, warm-up, betas, weight decay, clip, seq_length, tiles, tags, PP, steps
TABLE_10 = {
    "d": ("connector", 2048, 1e-4, 2.5e-5, 500, (0.9, 0.95), 0.1, 10.0, 512, 1, "none", 1, 20_000),
    "x": ("connector cross_attention", 2048, 1e-4, 1e-5, 1000, (0.9, 0.95), 0.05, 1.0, 512, 1, "none", 1, 20_000),
    "h": ("connector cross_attention", 2048, 1e-4, 1e-5, 1000, (0.9, 0.98), 0.05, 1.0, 512, 6, "1d", 1, 20_000),
}
ALL_BUT_VISION = "connector cross_attention language"
TABLE_11 = {
    ("d", "34b"): ("connector language", 128, 2e-6, 2.5e-7, 1000, (0.9, 0.98), 0.1, 10.0, 3200, 6, "1d", 4, 40_000),
    ("d", "72b"): ("connector language", 128, 2e-6, 2.5e-7, 1000, (0.9, 0.98), 0.1, 10.0, 3200, 6, "1d", 4, 40_000),
    ("x", "34b"): (ALL_BUT_VISION, 512, 1e-5, 1e-6, 500, (0.9, 0.98), 0.05, 1.0, 1024, 6, "1d", 1, 20_000),
    ("x", "72b"): (ALL_BUT_VISION, 256, 1e-5, 1e-7, 500, (0.9, 0.98), 0.05, 1.0, 1024, 6, "1d", 1, 20_000),
    ("h", "34b"): (ALL_BUT_VISION, 256, 1e-5, 1e-7, 1000, (0.9, 0.98), 0.05, 1.0, 1280, 6, "1d", 1, 40_000),
    ("h", "72b"): (ALL_BUT_VISION, 256, 1e-5, 1e-7, 1000, (0.9, 0.98), 0.05, 1.0, 1280, 6, "1d", 1, 40_000),
}


@pytest.mark.parametrize(("kind", "size"), TABLE_11)
def test_stages_are_those_of_the_tables(kind: str, size: str) -> None:
    folders = [Path(f"runs/nvlm_{kind}_{size}/{stage}") for stage in ("pretrain", "sft")]
    pretrain, sft = (load(EXAMPLES / f"nvlm/nvlm_{kind}_{size}_{folder.name}.yaml") for folder in folders)
    assert row_of_table(pretrain) == TABLE_10[kind]
    assert row_of_table(sft) == TABLE_11[kind, size]
    assert (pretrain.checkpoint.save, pretrain.checkpoint.pretrained_checkpoint) == (folders[0], [])
    assert (sft.checkpoint.save, sft.checkpoint.pretrained_checkpoint) == (
        folders[1],
        [PretrainedConfig(path=folders[0])],
    )
    assert pretrain.engine.tensor_model_parallel_size == sft.engine.tensor_model_parallel_size == 8
    assert pretrain.training.optimizer.lr_decay_style == sft.training.optimizer.lr_decay_style == "cosine"


def row_of_table(recipe: Recipe) -> tuple[object, ...]:
    training, optimizer = recipe.training, recipe.training.optimizer
    assert isinstance(recipe.data.tiling, DynamicTilingConfig)
    return (
        " ".join(training.trainable),
        training.global_batch_size,
        optimizer.lr,
        optimizer.min_lr,
        optimizer.lr_warmup_iters,
        (optimizer.adam_beta1, optimizer.adam_beta2),
        optimizer.weight_decay,
        optimizer.clip_grad,
        recipe.data.seq_length,
        recipe.data.tiling.max_tiles,
        recipe.data.tile_tags,
        recipe.engine.pipeline_model_parallel_size,
        training.train_iters,
    )


@pytest.mark.parametrize("kind", ["x", "h"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.trainable=[connector]"],
            r"training\.trainable=\['connector'\]: the cross-attention of model\.fusion\.kind=\w+ starts untrained",
        ),
        (["model.fusion.first_layer=80"], r"model\.fusion\.first_layer=80: the language model has 80 layers, counted"),
        (["model.fusion.every_n_layers=0"], r"model\.fusion\.every_n_layers=0: .*greater than 0"),
        (["model.fusion.text_sees=last_tile"], r"model\.fusion\.text_sees='last_tile'"),
        (["model.fusion.every_n_layer=4"], r"model\.fusion\.every_n_layer=4: unknown key\. .*'every_n_layers'"),
    ],
)
def test_wrong_cross_attention_is_named(kind: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(EXAMPLES / f"nvlm/nvlm_{kind}_72b_pretrain.yaml", *overrides)


def test_cross_attention_may_stay_as_it_was_trained() -> None:
    path, language_only = EXAMPLES / "nvlm/nvlm_x_72b_sft.yaml", "training.trainable=[language]"
    assert load(path, language_only).training.trainable == ["language"]
    with pytest.raises(ValueError, match=r"training\.trainable=\['language'\]: the cross-attention of"):
        load(path, language_only, "checkpoint.pretrained_checkpoint=null")


@pytest.mark.parametrize("first_layer", [79, 7])
def test_the_first_cross_attention_layer_may_be_any(first_layer: int) -> None:
    recipe = load(EXAMPLES / "nvlm/nvlm_h_72b_sft.yaml", f"model.fusion.first_layer={first_layer}")
    assert recipe.model.cross_attention_layers == tuple(range(first_layer, 80, 8))


def test_nothing_trains_without_cross_attention() -> None:
    with pytest.raises(ValueError, match=r"training\.trainable=\['cross_attention'\]: .*kind=decoder_only has none"):
        load(EXAMPLES / "nvlm/nvlm_d_72b_sft.yaml", "training.trainable=[cross_attention]")


def test_a_sequence_shorter_than_a_tile_fits_only_where_no_tile_stands_among_the_tokens() -> None:
    assert load(EXAMPLES / "nvlm/nvlm_x_72b_sft.yaml", "data.seq_length=200").data.seq_length == 200
    with pytest.raises(ValueError, match=r"data\.seq_length=200: holds no whole tile.*256 tokens"):
        load(EXAMPLES / "nvlm/nvlm_h_72b_sft.yaml", "data.seq_length=200")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.seq_length=200"], r"data\.seq_length=200: holds no whole tile.*256 tokens"),
        (["training.optimizer.min_lr=1"], r"training\.optimizer\.min_lr=1\.0: is above lr=2e-06"),
        (["training.optimizer.lr_warmup_iters=40000"], r"lr_warmup_iters=40000: the warm-up is not over"),
        (["training.trainable=[]"], r"training\.trainable=\[\]: .*at least 1 item"),
        (["training.trainable=[visoin]"], r"training\.trainable\.0='visoin'"),
        (["engine.recompute_granularity=selective"], r"engine\.recompute_method='uniform': only means something with"),
        (["engine.recompute_method=null"], r"engine\.recompute_granularity='full': needs recompute_method"),
        (["model.language.num_query_groups=7"], r"num_attention_heads=64: is not a multiple of num_query_groups=7"),
        (["model.language.num_attention_heads=63", "model.language.num_query_groups=7"], r"hidden_size=8192: is not"),
        (["data.chat_template=chatlm"], "data.chat_template='chatlm'"),
    ],
)
def test_what_does_not_fit_together_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(EXAMPLES / "nvlm/nvlm_d_72b_sft.yaml", *overrides)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["engine.tensor_model_parallel_size=3"], 12, "not a multiple of tensor_model_parallel_size=3"),
        (["engine.pipeline_model_parallel_size=3"], 24, "num_layers=80: is no multiple of pipeline_model_parallel"),
        ([], 33, "world_size=33: is no multiple of"),
        (["training.global_batch_size=130"], 128, "global_batch_size=130: is no multiple of"),
        (["engine.tensor_model_parallel_size=1"], 4, "sequence_parallel=True"),
        (
            ["engine.pipeline_model_parallel_size=1", "engine.virtual_pipeline_model_parallel_size=2"],
            8,
            "needs pipeline stages to interleave",
        ),
    ],
)
def test_impossible_layouts_are_named(overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(load(EXAMPLES / "nvlm/nvlm_d_72b_sft.yaml", *overrides), world_size)
