"""Write the table of systems in examples/README.md from the recipes themselves, so that it cannot say anything else.

python tools/systems_table.py          writes it
python tools/systems_table.py --check  fails if the file says something else
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import megavlm.runtime  # noqa: F401  settles the device before megatron.core is imported
from megavlm.config import Config, load_recipe
from megavlm.data.blend import BlendConfig
from megavlm.models.config import VLMConfig
from megavlm.models.vision.dual import DualConfig
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
README = EXAMPLES / "README.md"
BEGIN, END = "<!-- the table is written by tools/systems_table.py -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class System:
    """A row of the table: a published model, and its stages in order."""

    name: str
    folder: str
    stages: tuple[str, ...]
    """Recipes in the folder, without ``.yaml``."""
    missing: str = ""
    """What of the paper is not there."""

    def recipes(self) -> list[Recipe]:
        """The stages' recipes."""
        return [load_recipe(EXAMPLES / self.folder / f"{stage}.yaml", [], Recipe) for stage in self.stages]


SYSTEMS = (
    System("LLaVA 7B", "llava", ("llava_7b_stage1", "llava_7b_stage2")),
    System("LLaVA-1.5 7B", "llava", ("llava_1_5_7b_stage1", "llava_1_5_7b_stage2")),
    System("LLaVA-1.5 7B, LoRA", "llava", ("llava_1_5_7b_stage1", "llava_1_5_7b_stage2_lora")),
    System("VILA 7B", "vila", ("vila_7b_stage0", "vila_7b_stage1", "vila_7b_stage2")),
    System("MM1 3B", "mm1", ("mm1_3b", "mm1_3b_sft"), "AdaFactor"),
    System("MM1 3B-MoE", "mm1", ("mm1_3b_moe",)),
    System("MM1 7B-MoE", "mm1", ("mm1_7b_moe",)),
    System("MM1.5 3B", "mm1_5", ("mm1_5_3b_pretrain", "mm1_5_3b_continual", "mm1_5_3b_sft"), "AdaFactor"),
    System("POINTS 9B", "points", ("points_9b_ocr_vit", "points_9b_pretrain", "points_9b_sft")),
    System("BLIP-2", "blip2", ("blip2_stage1", "blip2_7b_stage2"), "OPT and Flan-T5"),
    System(
        "MiniGPT-4 7B",
        "minigpt4",
        ("minigpt4_7b_stage1", "minigpt4_7b_stage2"),
        "a Q-Former that was trained in front of Flan-T5 (here: a Llama)",
    ),
    System("mPLUG-Owl 7B", "mplug_owl", ("mplug_owl_7b_stage1", "mplug_owl_7b_stage2")),
    System(
        "Flamingo 3B",
        "flamingo",
        ("flamingo_3b",),
        "NFNet, and the width of the resampler behind it; video; weights of data sets in the loss (here: shares of the "
        "samples)",
    ),
    System(
        "VPGTrans",
        "vpgtrans",
        ("vpgtrans_7b_warmup", "vpgtrans_7b_finetune"),
        "OPT and Flan-T5",
    ),
    System("NVLM-D 72B", "nvlm", ("nvlm_d_72b_pretrain", "nvlm_d_72b_sft")),
    System("NVLM-X 72B", "nvlm", ("nvlm_x_72b_pretrain", "nvlm_x_72b_sft")),
    System("NVLM-H 72B", "nvlm", ("nvlm_h_72b_pretrain", "nvlm_h_72b_sft")),
)

COLUMNS = (
    "system",
    "vision",
    "connector",
    "fusion",
    "language model",
    "tiling",
    "stages: what trains",
    "data",
    "missing",
)


def row(system: System) -> tuple[str, ...]:
    """Return a system's cells; what differs between its stages is told in their order."""
    recipes = system.recipes()
    models = [recipe.model for recipe in recipes]
    return (
        f"[{system.name}]({system.folder}/)",
        _in_turn(_vision(model) for model in models),
        _in_turn(_connector(model) for model in models),
        _in_turn(_fusion(model) for model in models),
        _in_turn(_language(model) for model in models),
        _in_turn(_tiling(recipe) for recipe in recipes),
        "; ".join(f"{number}: {_stage(recipe)}" for number, recipe in enumerate(recipes, start=1)),
        _in_turn(_data(recipe) for recipe in recipes),
        system.missing or "-",
    )


def _in_turn(texts: Iterable[str]) -> str:
    """Join what the stages say, each run of equal texts once."""
    return " -> ".join(text for text, _ in itertools.groupby(texts))


def _vision(model: VLMConfig) -> str:
    vision = model.vision
    shown = []
    for encoder in vision.encoders:
        kept = encoder.num_layers + encoder.select_layer + 1
        shown.append(f"{encoder.kind} {encoder.image_size}/{encoder.patch_size}, {kept} x {encoder.hidden_size}")
    alike = len(set(shown)) == 1
    text = f"{len(shown)} of {shown[0]}" if len(shown) > 1 and alike else " + ".join(shown)
    return f"{text}, {vision.combine}d" if isinstance(vision, DualConfig) else text


def _connector(model: VLMConfig) -> str:
    return f"{model.connector.kind}, {model.tokens_per_tile} tokens a tile"


def _fusion(model: VLMConfig) -> str:
    layers = model.cross_attention_layers
    text = model.fusion.kind + (f", {len(layers)} of {model.decoder.num_layers} layers" if layers else "")
    return text + (", each with a feed-forward layer" if model.gated_feed_forward is not None else "")


def _language(model: VLMConfig) -> str:
    if model.learns_from_pairs:
        return "none"
    language = model.decoder
    text = f"{language.num_layers} x {language.hidden_size}"
    if language.moe is not None:
        text += f", {language.moe.num_moe_experts} experts in {len(language.layers_with_experts)} layers"
    return text if language.lora is None else f"{text}, LoRA r {language.lora.r}"


def _tiling(recipe: Recipe) -> str:
    """The kind, and the most tiles of an image with its thumbnail or overview."""
    tiling = recipe.data.tiling
    built = tiling.build(recipe.model.vision.image_size)
    return f"{tiling.kind}, {built.max_tiles} tile{'s' if built.max_tiles > 1 else ''}"


def _stage(recipe: Recipe) -> str:
    training = recipe.training
    within = training.trained.within
    parts = [f"{part} ({', '.join(within[part])})" if part in within else part for part in training.trainable]
    scaled = "".join(f", {part} x {factor:g}" for part, factor in training.lr_scale.items())
    return (
        f"{' + '.join(parts)}, {training.train_iters:,} x {training.global_batch_size:,}, "
        f"lr {training.optimizer.lr:.3g}{scaled}"
    )


def _data(recipe: Recipe) -> str:
    train = recipe.data.train
    if isinstance(train, BlendConfig):
        return "blend of " + ", ".join(source.shown_name for source in train.sources)
    assert isinstance(train, Config)
    name = Path(str(getattr(train, "path", train.name))).name
    return name.removesuffix(".jsonl").removesuffix(".json")


def table() -> str:
    """Return the table, with its marks."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row(system))} |" for system in SYSTEMS]
    return "\n".join([BEGIN, *lines, END])


def with_table(text: str) -> str:
    """Return a text with the table where its marks are.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README}: lacks {BEGIN!r} or {END!r}. Put both where the table belongs.")
    return before + table() + after


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table, or compare it."""
    parser = argparse.ArgumentParser(description="Write the table of systems in examples/README.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is what the recipes say")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    written = with_table(text)
    if options.check and written != text:
        sys.exit(f"{README}: is not what the recipes say. Run python tools/systems_table.py.")
    if not options.check:
        README.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
