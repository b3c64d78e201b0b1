"""Every recipe in examples/ is valid, and the full-size ones have the parameter counts of the published models."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml

from megavlm.build import check_run
from megavlm.config import load_recipe
from megavlm.planning.parameters import count_recipe_parameters
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(
    path for path in EXAMPLES.rglob("*.yaml") if "train_iters" in yaml.safe_load(path.read_text()).get("training", {})
)
FULL_SIZE_WORLD = {"nvlm_d_72b_pretrain": 64, "nvlm_d_72b_sft": 128, "nvlm_d_34b_pretrain": 64, "nvlm_d_34b_sft": 128}


def load(path: Path, *overrides: str) -> Recipe:
    """Validate a recipe; those that leave their start to the command line get one."""
    return load_recipe(path, overrides, Recipe)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_recipe_is_valid_and_its_layout_fits(path: Path) -> None:
    recipe = load(path)
    check_run(recipe, world_size=FULL_SIZE_WORLD.get(path.stem, 2))


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
