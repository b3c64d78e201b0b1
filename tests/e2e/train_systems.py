"""In one process: trains every small recipe of the systems for two steps, and makes a transfer and a soup between.

    python train_systems.py DATASET RUNS

Prints ``trained NAME`` for each recipe.
"""

import json
import sys
from pathlib import Path

from megavlm.cli import main as megavlm
from megavlm.config import load_recipe
from megavlm.recipe import Recipe
from megavlm.runtime.log import start_log
from megavlm.runtime.process import process
from megavlm.soup import SoupSettings, make_soup
from megavlm.training.loop import train
from megavlm.transfer import ConverterSettings, transfer

EXAMPLES = Path(__file__).parents[2] / "examples"
# what needs what another has made comes behind it
NAMES = (
    "llava/tiny",
    "vila/tiny",
    "mm1/tiny_c_abstractor",
    "mm1/tiny_average_pooling",
    "mm1/tiny_attention_pooling",
    "mm1_5/tiny",
    "points/tiny_ocr_vit",
    "points/tiny_pretrain",
    "points/tiny_sft",
    "points/tiny_sft_2",
    "blip2/tiny",
    "blip2/tiny_stage1",
    "blip2/tiny_stage2",
    "minigpt4/tiny",
    "mplug_owl/tiny",
    "mplug_owl/tiny_lora",
    "flamingo/tiny",
    "vpgtrans/tiny_source",
    "vpgtrans/tiny_target",
    "vpgtrans/tiny_warmup",
    "vpgtrans/tiny_finetune",
)


def run(name: str, dataset: Path, runs: Path, *overrides: str) -> None:
    """Train a recipe for two steps, its runs and those it starts from under ``runs``."""
    recipe = load_recipe(EXAMPLES / f"{name}.yaml", [], Recipe)
    sources = [source.model_dump(mode="json", exclude_none=True) for source in recipe.checkpoint.pretrained_checkpoint]
    started_from = [{**source, "path": str(runs / source["path"])} for source in sources]
    changes = [
        f"tokenizer.path={dataset / 'tokenizer.model'}",
        f"data.train={{kind: jsonl, path: {dataset / 'train.jsonl'}}}",
        "data.valid=null",
        "training.train_iters=2",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
        "training.optimizer.lr_warmup_iters=0",
        f"checkpoint.save={runs / recipe.checkpoint.save}",
        f"checkpoint.pretrained_checkpoint={json.dumps(started_from)}",
        "logging.tensorboard=false",
        "logging.log_interval=1",
        *overrides,
    ]
    with process(timeout_minutes=1) as me:
        train(load_recipe(EXAMPLES / f"{name}.yaml", changes, Recipe), me)
    print(f"trained {name}", flush=True)


def write_pairs(dataset: Path) -> Path:
    """The rows that have one image, in a file of their own."""
    rows = (dataset / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = dataset / "pairs.jsonl"
    path.write_text("".join(row for row in rows if isinstance(json.loads(row).get("image"), str)), encoding="utf-8")
    return path


def main() -> None:
    """See the top of the file."""
    dataset, runs = map(Path, sys.argv[1:])
    start_log()
    pairs = f"{{kind: jsonl, path: {write_pairs(dataset)}}}"
    for name in NAMES:
        if name == "blip2/tiny_stage1":
            run(name, dataset, runs, f"data.train={pairs}")
            megavlm(["eval", str(runs / "runs/blip2_tiny/stage1"), f"data.valid={pairs}"])
            continue
        if name == "vpgtrans/tiny_warmup":
            folder = runs / "runs/vpgtrans_tiny"
            settings = ConverterSettings(loss="mse")
            transfer(folder / "source", folder / "target", folder / "transferred", settings)
        if name == "points/tiny_pretrain":
            run("points/tiny_ocr_vit", dataset, runs, f"checkpoint.save={runs / 'runs/points_tiny/general'}")
        run(name, dataset, runs)
    points = runs / "runs/points_tiny"
    make_soup([points / "sft", points / "sft_2"], points / "soup", SoupSettings())


if __name__ == "__main__":
    main()
