"""The ``megavlm`` command.

Each verb is one function here; a recipe and ``key.path=value`` overrides say the rest. ``--nproc-per-node N`` starts N
ranks on this machine; under torchrun or srun the verb is one of the ranks.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from megavlm import __version__
from megavlm.benchmark.child import RunError
from megavlm.benchmark.compare import compare
from megavlm.benchmark.speed import measure_speed, print_speed, write_speed
from megavlm.build import Parts, build_parts, build_processor, check_run
from megavlm.checkpoint import RunFolder, load_checkpoint
from megavlm.config import dump_recipe, load_recipe
from megavlm.convert.folder import convert_folder
from megavlm.convert.to_hf import DTYPES
from megavlm.data import Conversation
from megavlm.evaluation.benchmarks import BENCHMARKS
from megavlm.evaluation.evaluate import evaluate, write_evaluation
from megavlm.evaluation.metrics import METRICS
from megavlm.evaluation.picture import draw_samples
from megavlm.evaluation.plan import EvaluationOptions, plan_evaluation
from megavlm.evaluation.table import print_answers, print_score, write_markdown
from megavlm.inference.answer import Settings, answer_file, ask, chat, user_turn, writer
from megavlm.inference.sampling import Sampling
from megavlm.planning.table import print_plan
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER, quiet_third_parties, start_log
from megavlm.runtime.process import Process, process
from megavlm.training.loop import train

FOR_GENERATION = ("engine.sequence_parallel=false", "engine.virtual_pipeline_model_parallel_size=null")
"""What a layout may not have where tokens are generated one at a time."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with 0, with 1 after an error, or with 2 when the command line is wrong.

    What a user can mend ends in one line; ``MEGAVLM_TRACEBACK=1`` shows where it was raised.
    """
    options = _parse(arguments)
    quiet_third_parties()
    try:
        options.run(options)
    except ValueError as error:
        if os.environ.get("MEGAVLM_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        sys.exit(f"{where}megavlm {options.verb}: error: {error}")
    except ChildFailedError as error:
        sys.exit(max(1, error.get_first_failure()[1].exitcode))  # the ranks have said why
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Overrides may stand anywhere after the recipe, between options too."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if text.startswith("-") or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megavlm", description="Trains vision-language models on megatron-core.")
    parser.add_argument("--version", action="version", version=f"megavlm {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = _add_verb(verbs, "train", _train, "run (or resume) one stage of training")
    _add_recipe(verb)
    _add_ranks(verb)
    verb.add_argument("--dry-run", action="store_true", help="check and print the resolved recipe, train nothing")

    _add_eval(_add_verb(verbs, "eval", _eval, "answer the held-out questions of a run, or a benchmark's, and score"))

    verb = _add_verb(verbs, "generate", _generate, "answer a prompt, a file of prompts, or a person in the terminal")
    verb.add_argument("folder", type=Path, help="run folder with a checkpoint")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the run's recipe")
    _add_ranks(verb)
    verb.add_argument("--prompt", help="what to answer; without it and --jsonl a chat begins")
    verb.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="image before the prompt; may repeat"
    )
    verb.add_argument("--jsonl", type=Path, help="file of conversations to answer, one a line, as for training")
    verb.add_argument("--output", type=Path, help="where the answers to --jsonl go; must not exist")
    verb.add_argument("--batch-size", type=int, default=8, help="prompts of --jsonl at a time on each rank")
    verb.add_argument("--max-new-tokens", type=int, default=256, help="most tokens of an answer")
    verb.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    verb.add_argument("--top-k", type=int, help="draw from so many of the most likely tokens")
    verb.add_argument("--top-p", type=float, help="draw from the most likely tokens of this probability")
    verb.add_argument("--seed", type=int, default=0, help="of the draws")

    verb = _add_verb(verbs, "plan", _plan, "count a recipe's parameters and operations, without memory for them")
    _add_recipe(verb)

    _add_convert(_add_verb(verbs, "convert", _convert, "make a run folder of a Hugging Face folder, or the other way"))

    _add_bench(_add_verb(verbs, "bench", None, "time a recipe, or compare variants of recipes"))
    return parser


def _add_eval(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", type=Path, help="run folder with a checkpoint")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the run's recipe")
    _add_ranks(verb)
    verb.add_argument("--benchmark", choices=sorted(BENCHMARKS), help="default: the recipe's held-out conversations")
    verb.add_argument("--data", type=Path, metavar="FILE", help="the benchmark's questions")
    verb.add_argument("--annotations", type=Path, metavar="FILE", help="its answers, if they are a file of their own")
    verb.add_argument("--images", type=Path, metavar="FOLDER", help="where its images are (default: --data's folder)")
    verb.add_argument("--split", help="part of it: val2014 in names of COCO's images, validation in MMMU's")
    verb.add_argument("--metric", choices=sorted(METRICS), help="default: the benchmark's own")
    verb.add_argument("--prompt-suffix", metavar="TEXT", help="instruction behind each question (default: the usual)")
    verb.add_argument("--limit", type=int, help="most questions (default: all)")
    verb.add_argument("--batch-size", type=int, default=32, help="questions at a time on each rank")
    verb.add_argument("--max-new-tokens", type=int, help="most tokens of an answer (default: the benchmark's, or 32)")
    verb.add_argument("--output", type=Path, metavar="FOLDER", help="for results; goes on with the answers in it")
    verb.add_argument("--show", type=int, default=8, help="questions to print")


def _add_convert(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "source", type=Path, help="Hugging Face folder (config.json, *.safetensors), run folder, checkpoint"
    )
    verb.add_argument("target", type=Path, help="the folder to make: a run folder, or a Hugging Face folder")
    verb.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, or to config.json's model"
    )
    verb.add_argument("--recipe", type=Path, help="from Hugging Face: the recipe of the model (default: config.json's)")
    verb.add_argument("--part", choices=("language", "vision"), help="to Hugging Face: this part alone")
    verb.add_argument("--max-shard-size", metavar="SIZE", help="to Hugging Face: most bytes of a file (default: 2GB)")
    verb.add_argument(
        "--dtype", choices=sorted(DTYPES), help="to Hugging Face: type of the weights (default: as saved)"
    )


def _add_bench(bench: argparse.ArgumentParser) -> None:
    verbs = bench.add_subparsers(dest="bench_verb", required=True, metavar="WHAT")

    verb = _add_verb(verbs, "speed", _bench_speed, "time some training steps of a recipe; save nothing")
    verb.set_defaults(verb="bench speed")
    _add_recipe(verb)
    _add_ranks(verb)
    verb.add_argument("--steps", type=int, default=5, help="steps that are timed")
    verb.add_argument("--warmup-steps", type=int, default=2, help="steps before them")
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")

    verb = _add_verb(verbs, "compare", _bench_compare, "train, evaluate and time variants of recipes, in one table")
    verb.set_defaults(verb="bench compare")
    verb.add_argument("file", type=Path, help="the comparison: stages, variants, seeds, save (YAML)")
    verb.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="model.*, data.*, training.* and other parts of a recipe: for every stage of every variant, above the "
        "variant's own; save, seeds, speed.rounds and other keys of the comparison: for the comparison",
    )
    _add_ranks(verb)
    verb.add_argument("--quiet", action="store_true", help="send the runs' output to output.txt in their folders")


def _add_verb(verbs: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    verb.set_defaults(run=run)
    return verb


def _add_recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", type=Path, help="recipe file")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to it, e.g. training.seed=7")


def _add_ranks(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--nproc-per-node", type=int, default=1, metavar="N", help="start N ranks on this machine (default: 1)"
    )


def _train(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    if options.dry_run:
        check_run(recipe, _world_size(options))
        print(dump_recipe(recipe), end="")
        return
    _make_run_folder(recipe.checkpoint.save)
    if _must_start_ranks(options):
        _start_ranks(recipe, options.nproc_per_node)
        return
    with process(timeout_minutes=recipe.engine.distributed_timeout_minutes) as me:
        start_log(me.rank, recipe.checkpoint.save / "log.txt")
        train(recipe, me)


def _eval(options: argparse.Namespace) -> None:
    checkpoint, recipe = _find_run(options)
    asked = EvaluationOptions(**{field.name: getattr(options, field.name) for field in fields(EvaluationOptions)})
    plan = plan_evaluation(asked, checkpoint, recipe)
    if _must_start_ranks(options):
        _start_ranks(recipe, options.nproc_per_node)
        return
    with _loaded(checkpoint, recipe) as (parts, me):
        evaluation = evaluate(parts, plan)
        if me.rank == 0:
            print_answers(evaluation.answers, most=options.show)
            print_score(evaluation)
            results = write_evaluation(plan.output, evaluation)
            table = write_markdown(plan.output, evaluation)
            draw_samples(plan.output / "samples.png", evaluation.answers, parts.processor)
            LOGGER.info("answers: %s, table: %s, picture: %s", results, table, plan.output / "samples.png")


def _generate(options: argparse.Namespace) -> None:
    if options.prompt is not None and options.jsonl is not None:
        raise ValueError("--prompt and --jsonl: are two ways to ask. Give one of them.")
    if (options.jsonl is None) != (options.output is None):
        raise ValueError(f"--jsonl={options.jsonl}, --output={options.output}: belong together. Give both or none.")
    if options.image and options.prompt is None:
        raise ValueError(f"--image={options.image[0]}: belongs to --prompt. In a chat, write /image PATH.")
    if options.output is not None and options.output.exists() and "RANK" not in os.environ:
        raise ValueError(f"--output={options.output}: exists. Delete it or choose another name.")
    if options.max_new_tokens < 1 or options.batch_size < 1:
        raise ValueError(
            f"--max-new-tokens={options.max_new_tokens}, --batch-size={options.batch_size}: must be at least 1."
        )
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    settings = Settings(options.max_new_tokens, sampling)
    checkpoint, recipe = _find_run(options)
    if _must_start_ranks(options):
        _start_ranks(recipe, options.nproc_per_node)
        return
    with _loaded(checkpoint, recipe) as (parts, me):
        is_first = me.rank == 0
        if options.jsonl is not None:
            answer_file(
                parts, options.jsonl, options.output, settings, batch_size=options.batch_size, is_writer=is_first
            )
        elif options.prompt is not None:
            turn = user_turn(options.prompt, options.image)
            ask(parts, Conversation((turn,)), settings, writer(is_first))
            writer(is_first)("\n")
        else:
            chat(parts, settings, is_reader=is_first)


def _find_run(options: argparse.Namespace) -> tuple[Path, Recipe]:
    """The newest checkpoint of a run folder, and its recipe for generation."""
    folder = RunFolder(options.folder)
    newest = folder.newest()
    if newest is None:
        raise ValueError(f"folder={options.folder}: holds no checkpoint. Give the run folder of a trained stage.")
    checkpoint = folder.checkpoint(newest)
    return checkpoint, load_recipe(checkpoint / "recipe.yaml", [*options.overrides, *FOR_GENERATION], Recipe)


@contextlib.contextmanager
def _loaded(checkpoint: Path, recipe: Recipe) -> Iterator[tuple[Parts, Process]]:
    """This rank's part of a trained model, ready to answer."""
    with process(timeout_minutes=recipe.engine.distributed_timeout_minutes) as me:
        start_log(me.rank, checkpoint.parent / "log.txt")
        parts = build_parts(recipe, world_size=me.world_size)
        parts.engine.wrap(parts.build_chunks(), training=False)
        load_checkpoint(checkpoint, parts.engine, with_optimizer=False, verify=recipe.checkpoint.verify)
        yield parts, me


def _plan(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    print_plan(recipe)


def _convert(options: argparse.Namespace) -> None:
    if torch.cuda.is_available():  # shapes come from a model on the meta device, which megatron-core gives no CUDA
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        os.execve(sys.executable, [sys.executable, "-m", "megavlm", *sys.argv[1:]], environment)
    start_log()
    convert_folder(
        options.source,
        options.target,
        options.overrides,
        recipe=options.recipe,
        part=options.part,
        max_shard_size=options.max_shard_size,
        dtype=options.dtype,
    )


def _bench_speed(options: argparse.Namespace) -> None:
    for name, value, least in (("steps", options.steps, 1), ("warmup-steps", options.warmup_steps, 0)):
        if value < least:
            raise ValueError(f"--{name}={value}: must be at least {least}.")
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    if _must_start_ranks(options):
        _start_ranks(recipe, options.nproc_per_node)
        return
    with process(timeout_minutes=recipe.engine.distributed_timeout_minutes) as me:
        start_log(me.rank)
        speed = measure_speed(recipe, me, num_steps=options.steps, num_warmup_steps=options.warmup_steps)
        if me.rank == 0:
            print_speed(speed)
            if options.json is not None:
                write_speed(speed, options.json)


def _bench_compare(options: argparse.Namespace) -> None:
    if options.nproc_per_node < 1:
        raise ValueError(f"--nproc-per-node={options.nproc_per_node}: must be at least 1.")
    try:
        compare(options.file, options.overrides, num_ranks=options.nproc_per_node, is_quiet=options.quiet)
    except RunError as error:
        print(f"megavlm {options.verb}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _make_run_folder(path: Path) -> None:
    """Make the run folder, or say now that it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"checkpoint.save={path}: cannot be made ({error.strerror}). Choose another folder.") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"checkpoint.save={path}: may not be written to. Choose another folder.")


def _world_size(options: argparse.Namespace) -> int:
    return int(os.environ.get("WORLD_SIZE", options.nproc_per_node))


def _must_start_ranks(options: argparse.Namespace) -> bool:
    if options.nproc_per_node < 1:
        raise ValueError(f"--nproc-per-node={options.nproc_per_node}: must be at least 1.")
    return options.nproc_per_node > 1 and "RANK" not in os.environ


def _start_ranks(recipe: Recipe, num_ranks: int) -> None:
    """Run this same command line under torchrun, which gives every rank its number and ends all if one fails.

    What can be checked without ranks is checked first: one error instead of one from each of them.
    """
    check_run(recipe, num_ranks)
    build_processor(recipe)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    torchrun(["--standalone", "--nproc-per-node", str(num_ranks), "-m", "megavlm", *sys.argv[1:]])
