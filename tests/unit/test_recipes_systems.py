"""The systems' recipes: the published models' parameters, the papers' stages, and a table that the recipes write."""

import functools
import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from megavlm.cli import main
from megavlm.config import load_recipe
from megavlm.data.blend import BlendConfig
from megavlm.models.connectors import CONNECTORS
from megavlm.models.part import QFORMER_OUTPUT, part_of
from megavlm.models.taken import lies_in, moved
from megavlm.planning.parameters import build_whole, count_recipe_parameters, recipe_vocab_size
from megavlm.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
FOLDERS = ("llava", "vila", "mm1", "mm1_5", "points", "blip2", "minigpt4", "mplug_owl", "flamingo", "vpgtrans")
TINY = sorted(path for folder in FOLDERS for path in (EXAMPLES / folder).glob("tiny*.yaml"))


def load(name: str, *overrides: str) -> Recipe:
    return load_recipe(EXAMPLES / f"{name}.yaml", overrides, Recipe)


def count(model_class: type, config: transformers.PretrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def llama(**shape: int) -> int:
    config = transformers.LlamaConfig(tie_word_embeddings=False, **shape)
    return count(transformers.LlamaForCausalLM, config)


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def clip_large(image_size: int, num_layers: int) -> int:
    """CLIP's ViT-L/14 with so many layers, without the norm behind the last."""
    config = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
    )
    return count(transformers.CLIPVisionModel, config) - 2 * 1024


def mlp(*widths: int) -> int:
    """Biased linear layers."""
    return sum(before * after + after for before, after in itertools.pairwise(widths))


def qformer() -> int:
    """BLIP-2's Q-Former, its queries, and the linear layer to a decoder of width 4096."""
    config = transformers.Blip2QFormerConfig(encoder_hidden_size=1408)
    return count(transformers.Blip2QFormerModel, config) + 32 * 768 + mlp(768, 4096)


def abstractor() -> int:
    """mPLUG-Owl's: 6 layers of attention, gated feed-forward and four norms; queries, projection, end token."""
    attention, gated = 4 * mlp(1024, 1024), 2 * mlp(1024, 4096) + mlp(4096, 1024)
    return 6 * (attention + gated + 3 * 2 * 1024 + 2 * 4096) + 64 * 1024 + mlp(1024, 4096) + 4096


def resampler() -> int:
    """Flamingo's: 6 layers of attention with 16 heads of 96 channels; no biases but the norms'."""
    layer = 4 * 1024 * 16 * 96 + 2 * 1024 * 4096 + 3 * 2 * 1024
    return 6 * layer + 64 * 1024 + 2 * 1024 + 1024 * 2048


def blip2_vision() -> int:
    config = transformers.Blip2VisionConfig(num_hidden_layers=39, image_size=224)
    return count(transformers.Blip2VisionModel, config)


def test_the_decoders_have_the_published_sizes() -> None:
    assert llama(vocab_size=32000, **LLAMA_7B) == 6_738_415_616
    language = llama(vocab_size=32001, **LLAMA_7B)
    for name in ("llava/llava_7b_stage2", "llava/llava_1_5_7b_stage2", "vila/vila_7b_stage1", "blip2/blip2_7b_stage2"):
        assert count_recipe_parameters(load(name))["language"] == language
    yi = llama(
        vocab_size=64000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    assert count_recipe_parameters(load("points/points_9b_sft"))["language"] == yi == 8_829_407_232


# recipe -> tokens of a tile, parameters of the encoder and of the connector, by other code than ours
SIZES = {
    "llava/llava_7b_stage1": (256, clip_large(224, 23), mlp(1024, 4096)),
    "llava/llava_1_5_7b_stage1": (576, clip_large(336, 23), mlp(1024, 4096, 4096)),
    "vila/vila_7b_stage0": (576, clip_large(336, 23), mlp(1024, 4096)),
    "points/points_9b_ocr_vit": (144, clip_large(336, 23), mlp(4096, 4096, 4096)),
    "points/points_9b_sft": (144, 2 * clip_large(336, 23), mlp(4096, 4096, 4096)),
    "blip2/blip2_7b_stage2": (32, blip2_vision(), qformer()),
    "minigpt4/minigpt4_7b_stage2": (32, blip2_vision(), qformer()),
    "vpgtrans/vpgtrans_7b_warmup": (32, blip2_vision(), qformer()),
    "mplug_owl/mplug_owl_7b_stage1": (65, clip_large(224, 24), abstractor()),
    "flamingo/flamingo_3b": (64, clip_large(224, 24), resampler()),
}


@pytest.mark.parametrize("name", SIZES)
def test_encoder_and_connector_have_the_published_sizes(name: str) -> None:
    recipe = load(name)
    counts = count_recipe_parameters(recipe)
    assert (recipe.model.tokens_per_tile, counts["vision"], counts["connector"]) == SIZES[name]


def test_lora_has_the_published_sizes() -> None:
    assert count_recipe_parameters(load("mplug_owl/mplug_owl_7b_stage2"))["lora"] == 32 * 2 * 2 * 8 * 4096
    in_attention, in_ffn = 4 * (4096 + 4096), 3 * (4096 + 11008)
    lora = count_recipe_parameters(load("llava/llava_1_5_7b_stage2_lora"))["lora"]
    assert lora == 32 * 128 * (in_attention + in_ffn)


@pytest.mark.parametrize("name", ["mm1/mm1_3b", "mm1/mm1_7b_moe", "mm1/mm1_3b_sft", "mm1_5/mm1_5_3b_sft"])
def test_mm1_gives_144_tokens_at_any_resolution(name: str) -> None:
    assert load(name).model.tokens_per_tile == 144


def test_blip2_s_first_stage_has_the_published_size() -> None:
    """The paper: 188 M. transformers' class with its text side, without encoder, and the head that writes captions."""
    config = transformers.Blip2Config(
        vision_config={"num_hidden_layers": 39, "image_size": 224},
        qformer_config={"encoder_hidden_size": 1408, "vocab_size": 30523, "use_qformer_text_input": True},
        num_query_tokens=32,
        image_text_hidden_size=256,
    )
    class_size = count(transformers.Blip2ForImageTextRetrieval, config) - blip2_vision()
    head = mlp(768, 768) + 2 * 768 + 30523
    counts = count_recipe_parameters(load("blip2/blip2_stage1"))
    # two start tokens of our own, and the temperature
    assert counts["connector"] + counts["text"] == class_size + head + 2 * 768 + 1 == 186_704_190
    assert counts["vision"] == blip2_vision()


def test_flamingo_reads_in_every_layer() -> None:
    recipe = load("flamingo/flamingo_3b")
    assert recipe.model.cross_attention_layers == tuple(range(24))
    assert recipe.model.fusion.tile_route.text_sees == "last_image"
    counts = count_recipe_parameters(recipe)
    # attention, a feed-forward layer of four times the width, two norms and two gates; the context's norm
    block = 4 * 2048**2 + 2 * 4 * 2048**2 + 2 * 2048 + 2
    assert counts["cross_attention"] == 24 * block + 2048
    assert (round(counts["cross_attention"] / 1e9, 1), round(counts["language"] / 1e9, 1)) == (1.2, 1.4)  # published
    assert recipe.training.weight_decay_scale == {"connector": 0.0}
    assert recipe.data.next_image_probability == 0.5
    every_fourth = load("flamingo/flamingo_3b", "model.language.num_layers=40", "model.fusion.every_n_layers=4")
    assert len(every_fourth.model.cross_attention_layers) == 10  # Flamingo-9B


# recipe -> trainable, batch, peak rate, warm-up, weight decay, length, schedule
STAGES = {
    "llava/llava_7b_stage1": ("connector", 128, 2e-3, 140, 0.0, 2048, "cosine"),
    "llava/llava_7b_stage2": ("connector language", 32, 2e-5, 444, 0.0, 2048, "cosine"),
    "llava/llava_1_5_7b_stage1": ("connector", 256, 1e-3, 65, 0.0, 2048, "cosine"),
    "llava/llava_1_5_7b_stage2": ("connector language", 128, 2e-5, 156, 0.0, 2048, "cosine"),
    "llava/llava_1_5_7b_stage2_lora": ("connector lora", 128, 2e-4, 156, 0.0, 2048, "cosine"),
    "vila/vila_7b_stage0": ("connector", 256, 1e-3, 70, 0.0, 2048, "cosine"),
    "vila/vila_7b_stage1": ("connector language", 1024, 5e-5, 915, 0.0, 4096, "cosine"),
    "vila/vila_7b_stage2": ("connector language", 128, 2e-5, 390, 0.0, 4096, "cosine"),
    "mm1/mm1_3b_sft": ("vision connector language", 256, 1e-5, 0, 0.0, 2048, "cosine"),
    "mm1_5/mm1_5_3b_continual": ("vision connector language", 256, 1e-5, 0, 0.0, 4096, "cosine"),
    "mm1_5/mm1_5_3b_sft": ("vision connector language", 256, 2e-5, 0, 0.0, 4096, "cosine"),
    "points/points_9b_ocr_vit": ("vision connector", 32, 2e-4, 28125, 0.0, 4096, "cosine"),
    "points/points_9b_pretrain": ("vision connector", 32, 2e-5, 938, 0.0, 4096, "cosine"),
    "points/points_9b_sft": ("connector language", 32, 2e-5, 900, 0.0, 4096, "cosine"),
    "blip2/blip2_stage1": ("vision connector text", 1680, 1e-4, 2000, 0.05, 63, "cosine"),
    "blip2/blip2_7b_stage2": ("vision connector", 1920, 1e-4, 2000, 0.05, 65, "cosine"),
    "minigpt4/minigpt4_7b_stage1": ("connector", 256, 1e-4, 5000, 0.05, 256, "cosine"),
    "minigpt4/minigpt4_7b_stage2": ("connector", 12, 3e-5, 200, 0.05, 256, "cosine"),
    "mplug_owl/mplug_owl_7b_stage1": ("vision connector", 1024, 1e-4, 2000, 0.1, 2048, "cosine"),
    "mplug_owl/mplug_owl_7b_stage2": ("lora", 256, 2e-5, 50, 1e-4, 2048, "cosine"),
    "flamingo/flamingo_3b": ("connector cross_attention", 256, 1e-4, 5000, 0.1, 256, "constant"),
    "vpgtrans/vpgtrans_7b_warmup": ("connector", 1728, 5e-4, 0, 0.05, 65, "constant"),
    "vpgtrans/vpgtrans_7b_finetune": ("connector", 1728, 1e-4, 0, 0.05, 65, "cosine"),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_those_of_the_papers(name: str) -> None:
    recipe = load(name)
    training, optimizer = recipe.training, recipe.training.optimizer
    assert STAGES[name] == (
        " ".join(training.trainable),
        training.global_batch_size,
        optimizer.lr,
        optimizer.lr_warmup_iters,
        optimizer.weight_decay,
        recipe.data.seq_length,
        optimizer.lr_decay_style,
    )


# parameters that train, in millions: three layers of one CLIP ViT-L and the MLP; linear layers behind a Q-Former
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("points/points_9b_pretrain", 37.79 + 33.56),
        ("minigpt4/minigpt4_7b_stage1", 3.15),
        ("minigpt4/minigpt4_7b_stage2", 3.15),
        ("vpgtrans/vpgtrans_7b_warmup", 3.15),
        ("vpgtrans/vpgtrans_7b_finetune", 108.31),
        ("blip2/blip2_7b_stage2", 108.31),  # and the encoder's last LayerNorm, 2,816
    ],
)
def test_modules_that_train_alone(name: str, millions: float) -> None:
    recipe = load(name)
    with build_whole(recipe, recipe_vocab_size(recipe)) as model:
        trained = sum(p.numel() for n, p in model.named_parameters() if n in recipe.training.trained)
    assert trained / 1e6 == pytest.approx(millions, abs=0.01)


# stages that start from another one's run -> parts, or modules of them, that come from it
CHAINS = {
    "mm1/mm1_3b_sft": {"mm1/mm1_3b": "vision connector language"},
    "mm1_5/mm1_5_3b_continual": {"mm1_5/mm1_5_3b_pretrain": "vision connector language"},
    "mm1_5/mm1_5_3b_sft": {"mm1_5/mm1_5_3b_continual": "vision connector language"},
    "points/points_9b_pretrain": {"points/points_9b_ocr_vit": "vision.encoders.1 connector.mlp"},
    "points/points_9b_sft": {"points/points_9b_pretrain": "vision connector language"},
    "points/tiny_pretrain": {"points/tiny_ocr_vit": "vision.encoders.1 connector.mlp language"},
    "points/tiny_sft_2": {"points/tiny_pretrain": "vision connector language"},
    "blip2/blip2_7b_stage2": {
        "blip2/blip2_stage1": "vision connector.queries connector.layernorm connector.layers",
    },
    "minigpt4/minigpt4_7b_stage1": {
        "blip2/blip2_7b_stage2": "vision connector.queries connector.layernorm connector.layers"
    },
    "minigpt4/minigpt4_7b_stage2": {"minigpt4/minigpt4_7b_stage1": "vision connector language"},
    "minigpt4/tiny": {"blip2/tiny": "vision connector.queries connector.layernorm connector.layers language"},
    "mplug_owl/mplug_owl_7b_stage2": {"mplug_owl/mplug_owl_7b_stage1": "vision connector language"},
    "vpgtrans/vpgtrans_7b_finetune": {"vpgtrans/vpgtrans_7b_warmup": "vision connector language"},
}


@functools.cache
def shapes_of(name: str) -> dict[str, torch.Size]:
    recipe = load(name)
    vocab_size = recipe.model.language.vocab_size or 300
    with build_whole(recipe, vocab_size) as model:
        return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CHAINS)
def test_a_stage_starts_from_the_one_before(name: str) -> None:
    """The run folder is that of the stage before, and what is taken of it has all its names and shapes here."""
    recipe = load(name)
    shapes = shapes_of(name)
    for earlier_name, parts in CHAINS[name].items():
        earlier = load(earlier_name)
        (source,) = (s for s in recipe.checkpoint.pretrained_checkpoint if s.path == earlier.checkpoint.save)
        held = shapes_of(earlier_name)
        names = source.take or {part: part for part in {part_of(key) for key in held} & {part_of(k) for k in shapes}}
        taken = {key: moved(key, names) for key in shapes if moved(key, names) is not None}
        fresh = [key for key, there in taken.items() if there not in held]
        assert all(key.startswith(QFORMER_OUTPUT) and key in recipe.training.trained for key in fresh)
        came = {key: held[str(there)] for key, there in taken.items() if key not in fresh}
        assert came == {key: shapes[key] for key in came}
        assert {there for there in taken.values() if there in held} == {
            key for key in held if any(lies_in(key, there) for there in names.values())
        }
        expected = parts.split()
        assert all(any(lies_in(key, part) for part in expected) for key in came)
        assert all(any(lies_in(key, part) for key in came) for part in expected)


def test_what_no_stage_before_has_trains() -> None:
    """MiniGPT-4's linear layer and mPLUG-Owl's LoRA start fresh."""
    for name, fresh in (
        ("minigpt4/minigpt4_7b_stage1", "connector.projection"),
        ("mplug_owl/mplug_owl_7b_stage2", "lora"),
    ):
        recipe = load(name)
        keys = [key for key in shapes_of(name) if lies_in(key, fresh)]
        assert keys
        assert all(key in recipe.training.trained for key in keys)


@pytest.mark.parametrize(
    ("name", "template", "wrapper"),
    [
        ("minigpt4/minigpt4_7b_stage1", "llava_plain", "none"),
        ("minigpt4/minigpt4_7b_stage2", "minigpt4", "minigpt4"),
        ("mplug_owl/mplug_owl_7b_stage1", "llava_plain", "none"),
        ("mplug_owl/mplug_owl_7b_stage2", "mplug_owl", "none"),
        ("points/points_9b_sft", "chatml", "none"),
        ("llava/llava_1_5_7b_stage2", "vicuna", "none"),
    ],
)
def test_chat_formats_are_those_of_the_papers(name: str, template: str, wrapper: str) -> None:
    data = load(name).data
    assert (data.chat_template, data.image_wrapper) == (template, wrapper)


def test_rates_of_parts() -> None:
    """LLaVA-1.5's connector beside LoRA has 2e-5, POINTS' MLP beside the encoder 2e-5."""
    for name in ("llava/llava_1_5_7b_stage2_lora", "points/points_9b_ocr_vit"):
        training = load(name).training
        assert training.optimizer.lr * training.lr_scale["connector"] == pytest.approx(2e-5)


# recipe -> share of each source
SHARES = {
    "mm1/mm1_3b": {"captions": 0.45, "interleaved": 0.45, "text": 0.1},
    "mm1_5/mm1_5_3b_pretrain": {"captions": 0.5, "interleaved": 0.1, "text": 0.4},
    "minigpt4/minigpt4_7b_stage1": {"laion": 115 / 129, "cc_sbu": 14 / 129},
    "vpgtrans/vpgtrans_7b_finetune": {"coco": 0.1, "visual_genome": 0.2, "laion_coco": 0.7},
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_sources(name: str) -> None:
    train = load(name).data.train
    assert isinstance(train, BlendConfig)
    weights = {source.shown_name: source.weight or 0.0 for source in train.sources}
    shares = {source: weight / sum(weights.values()) for source, weight in weights.items()}
    assert shares == pytest.approx(SHARES[name])


def test_mm1_5_mixture_of_all() -> None:
    """What the groups and their members come to: the published overall mixture, in per cent."""
    train = load("mm1_5/mm1_5_3b_sft").data.train
    assert isinstance(train, BlendConfig)
    assert train.groups == {"single_image": 0.8, "multi_image": 0.1, "text": 0.1}
    singles = {source.shown_name: source.weight or 0.0 for source in train.sources if source.group == "single_image"}
    assert sum(singles.values()) == pytest.approx(80.0)
    assert (singles["text_rich"], singles["refer_ground"], singles["general"]) == (37.2, 22.5, 11.3)


@pytest.mark.parametrize("path", TINY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_tiny_recipes_stand_the_dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", str(path), "--dry-run"])
    assert "data/quickstart" in capsys.readouterr().out
    assert 100_000 < count_recipe_parameters(load_recipe(path, [], Recipe), 300).total() < 2_000_000


def test_every_connector_has_a_tiny_recipe() -> None:
    shown = {load_recipe(path, [], Recipe).model.connector.kind for path in TINY}
    assert shown == set(CONNECTORS)


def test_every_folder_has_what_it_needs() -> None:
    for folder in FOLDERS:
        names = {path.name for path in (EXAMPLES / folder).iterdir()}
        assert "README.md" in names
        assert any(name.startswith("tiny") for name in names), folder
        readme = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
        for word in readme.split():
            path = word.strip("`,.:;()")
            if path.startswith("examples/"):
                assert (REPOSITORY / path).exists(), f"{folder}/README.md names {path}"


def systems_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("systems_table", REPOSITORY / "tools/systems_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return systems_table()


def test_the_table_is_what_the_recipes_say(tool: ModuleType) -> None:
    tool.main(["--check"])


def test_a_table_that_says_something_else_is_found(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(tool.README.read_text(encoding="utf-8").replace("576 tokens", "577 tokens"), encoding="utf-8")
    monkeypatch.setattr(tool, "README", readme)
    with pytest.raises(SystemExit, match="is not what the recipes say"):
        tool.main(["--check"])
    tool.main([])
    tool.main(["--check"])
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks"):
        tool.main([])


def test_the_table_has_every_system(tool: ModuleType) -> None:
    assert {system.folder for system in tool.SYSTEMS} >= {*FOLDERS, "nvlm"}
    named = {(system.folder, stage) for system in tool.SYSTEMS for stage in system.stages}
    for folder in FOLDERS:
        for path in (EXAMPLES / folder).glob("*_stage*.yaml"):
            assert (folder, path.stem) in named or path.stem.startswith(("tiny", "real")), path
