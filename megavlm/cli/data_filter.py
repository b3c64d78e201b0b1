"""``megavlm data filter``: perplexity, near-duplicates, caption-fusion, select."""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

from torch.distributed.run import main as torchrun

from megavlm.checkpoint import RunFolder
from megavlm.checkpoint.agreement import rank
from megavlm.cli.argument import add_verb
from megavlm.cli.ranks import add_ranks, must_start_ranks, start_ranks
from megavlm.cli.trained import find_run, loaded_run
from megavlm.config import load_recipe
from megavlm.data import Dataset
from megavlm.filters import (
    NearDuplicateSettings,
    PerplexitySettings,
    SelectionConfig,
    describe_scorer,
    filter_by_perplexity,
    filter_near_duplicates,
    open_source,
    select_datasets,
)
from megavlm.filters.caption_fusion import FUSED_NAME, FusionSettings, Stage, run_stage
from megavlm.filters.sharing import all_ranks, team_of
from megavlm.filters.writer import IMAGE_TEXT, TEXT, HuggingFaceWriter, RunWriter
from megavlm.prepare.progress_bar import ProgressBar
from megavlm.runtime.log import LOGGER, start_log
from megavlm.runtime.process import process

_STAGES = ("described", "fused")


def add_filters(parent: argparse._SubParsersAction) -> None:
    """Add the verbs."""
    data_filter = add_verb(parent, "filter", None, "choose samples or data sets; the data itself is not changed")
    verbs = data_filter.add_subparsers(dest="filter_verb", required=True, metavar="FILTER")

    verb = _add(verbs, "perplexity", _perplexity, "keep the samples whose text a model finds least surprising")
    settings = PerplexitySettings()
    verb.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="run folder, or Hugging Face folder")
    verb.add_argument("--keep", type=float, default=settings.keep_share, metavar="SHARE", help="of the samples (0.2)")
    verb.add_argument("--batch-size", type=int, default=settings.batch_size, metavar="N", help="samples at a time (8)")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the run's recipe")

    verb = _add(verbs, "near-duplicates", _near_duplicates, "leave out samples nearly the same as an earlier one")
    near = NearDuplicateSettings()
    verb.add_argument("--compare", choices=("both", "text", "image"), default=near.compared, help="(default: both)")
    verb.add_argument("--text-similarity", type=float, default=near.text_similarity, metavar="S", help="least (0.8)")
    verb.add_argument("--image-bits", type=int, default=near.image_bits, metavar="N", help="most that differ (4)")
    verb.add_argument("--permutations", type=int, default=near.num_permutations, metavar="N", help="of MinHash (128)")

    verb = _add(verbs, "caption-fusion", _caption_fusion, "fuse captions with what a model says of their images")
    fusion = FusionSettings()
    for name, what in (("caption", "describes images"), ("language", "fuses captions")):
        text = f"{what}: run folder, or Hugging Face folder"
        verb.add_argument(f"--{name}-model", type=Path, required=True, metavar="FOLDER", help=text)
    verb.add_argument("--caption-prompt", default=fusion.caption_prompt, metavar="TEXT", help="(see docs/PREPARE.md)")
    verb.add_argument(
        "--fusion-prompt", default=fusion.fusion_prompt, metavar="TEXT", help="with {raw} and {described}"
    )
    verb.add_argument("--max-new-tokens", type=int, default=fusion.max_new_tokens, metavar="N", help="of a text (128)")
    verb.add_argument("--batch-size", type=int, default=fusion.batch_size, metavar="N", help="prompts at a time (8)")
    verb.add_argument("--stage", choices=_STAGES, help="only this one (default: both, one after the other)")

    verb = add_verb(verbs, "select", _select, "choose data sets one by one, by the score that they lead to")
    verb.set_defaults(verb="data filter select")
    verb.add_argument("file", type=Path, help="start, candidates, table and command (YAML)")
    verb.add_argument("out", type=Path, help="folder for trials, choice and picture")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the file")


def _add(verbs: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    verb = add_verb(verbs, name, run, text)
    verb.set_defaults(verb=f"data filter {name}")
    verb.add_argument("source", type=Path, help="folder of shards, or a .jsonl or .json file")
    verb.add_argument(
        "out", type=Path, help="folder for scores, what is kept, and a report; goes on with what is there"
    )
    verb.add_argument(
        "--image-root", type=Path, metavar="FOLDER", help="where a file's images begin (default: beside it)"
    )
    add_ranks(verb)
    return verb


def _perplexity(options: argparse.Namespace) -> None:
    settings = PerplexitySettings(options.keep, options.batch_size)
    settings.check()
    dataset = open_source(options.source, options.image_root)
    folder = _run_folder(options.model, options.out)
    checkpoint, recipe = find_run(argparse.Namespace(folder=folder, overrides=options.overrides))
    if must_start_ranks(options):
        start_ranks(recipe, options.nproc_per_node)
        return
    with loaded_run(checkpoint, recipe) as (parts, me), ProgressBar("samples", is_shown=me.rank == 0) as bar:
        scorer = describe_scorer(checkpoint, recipe)
        kept = filter_by_perplexity(parts, dataset, options.out, settings, scorer, bar.show)
        LOGGER.info("%s: %d of %d samples kept", options.out, len(kept), len(dataset))


def _run_folder(model: Path, out: Path) -> Path:
    """The run folder of a model; one of a Hugging Face folder is made inside the filter's folder."""
    if RunFolder(model).newest() is not None or not (model / "config.json").is_file():
        return model
    made = out / "model"
    if not made.exists() and "RANK" not in os.environ:
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megavlm", "convert", str(model), str(made)]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"--model={model}: cannot be converted; why stands above. Convert it with a recipe first.")
    return made


def _near_duplicates(options: argparse.Namespace) -> None:
    settings = NearDuplicateSettings(options.compare, options.text_similarity, options.image_bits, options.permutations)
    settings.check()
    dataset = open_source(options.source, options.image_root)
    if must_start_ranks(options):
        _start_plain_ranks(options.nproc_per_node)
        return
    with process() as me, ProgressBar("samples", is_shown=me.rank == 0) as bar:
        start_log(me.rank)
        kept = filter_near_duplicates(dataset, options.out, settings, bar.show)
        LOGGER.info("%s: %d of %d samples kept", options.out, len(kept), len(dataset))


def _start_plain_ranks(num_ranks: int) -> None:
    """Run this same command line as so many ranks, which hold no model."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torchrun(["--standalone", "--nproc-per-node", str(num_ranks), "-m", "megavlm", *sys.argv[1:]])


def _caption_fusion(options: argparse.Namespace) -> None:
    settings = FusionSettings(options.caption_prompt, options.fusion_prompt, options.max_new_tokens, options.batch_size)
    settings.check()
    if options.stage is None:  # a process for each model: neither finds the other's memory in use
        for name in _STAGES:
            code = subprocess.run(
                [sys.executable, "-m", "megavlm", *sys.argv[1:], "--stage", name], check=False
            ).returncode
            if code:
                sys.exit(code)
        return
    dataset = open_source(options.source, options.image_root)
    model = options.caption_model if options.stage == "described" else options.language_model
    if RunFolder(model).newest() is None:
        if must_start_ranks(options):
            _start_plain_ranks(options.nproc_per_node)
            return
        with process() as me:
            start_log(me.rank)
            kind = IMAGE_TEXT if options.stage == "described" else TEXT
            stage = Stage(options.stage, str(model), HuggingFaceWriter(model, kind), all_ranks())
            _fuse(options, dataset, settings, stage)
        return
    checkpoint, recipe = find_run(argparse.Namespace(folder=model, overrides=[]))
    if must_start_ranks(options):
        start_ranks(recipe, options.nproc_per_node)
        return
    with loaded_run(checkpoint, recipe) as (parts, _):
        _fuse(options, dataset, settings, Stage(options.stage, str(checkpoint), RunWriter(parts), team_of(parts)))


def _fuse(options: argparse.Namespace, dataset: Dataset, settings: FusionSettings, stage: Stage) -> None:
    with ProgressBar(stage.name, is_shown=rank() == 0) as bar:
        done = run_stage(dataset, options.out, settings, stage, bar.show)
    if stage.name == "fused":
        LOGGER.info("%s: %d of %d captions fused", options.out / FUSED_NAME, done, len(dataset))
    else:
        LOGGER.info("%s: %d of %d images described", options.out, done, len(dataset))


def _select(options: argparse.Namespace) -> None:
    start_log()
    config = load_recipe(options.file, options.overrides, SelectionConfig)
    chosen = select_datasets(config, options.out, lambda text: LOGGER.info("%s", text))
    LOGGER.info("%s: chosen: %s", options.out, ", ".join(chosen))
