"""``megavlm eval``."""

import argparse
from dataclasses import fields
from pathlib import Path

from megavlm.cli.argument import add_run_folder, add_verb
from megavlm.cli.ranks import add_ranks, must_start_ranks, start_ranks
from megavlm.cli.trained import find_run, loaded_run
from megavlm.evaluation.benchmarks import BENCHMARKS
from megavlm.evaluation.evaluate import evaluate, write_evaluation
from megavlm.evaluation.metrics import METRICS
from megavlm.evaluation.picture import draw_samples
from megavlm.evaluation.plan import EvaluationOptions, model_settings, plan_evaluation
from megavlm.evaluation.retrieval import print_retrieval, retrieve, write_retrieval
from megavlm.evaluation.table import print_answers, print_score, write_markdown
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    text = "answer the held-out questions of a run, or a benchmark's, and score"
    verb = add_verb(verbs, "eval", _eval, text)
    add_run_folder(verb)
    add_ranks(verb)
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


def _eval(options: argparse.Namespace) -> None:
    checkpoint, recipe = find_run(options)
    asked = EvaluationOptions(**{field.name: getattr(options, field.name) for field in fields(EvaluationOptions)})
    if recipe.model.learns_from_pairs:
        _retrieve(options, asked, checkpoint, recipe)
        return
    plan = plan_evaluation(asked, checkpoint, recipe)
    if must_start_ranks(options):
        start_ranks(recipe, options.nproc_per_node)
        return
    with loaded_run(checkpoint, recipe) as (parts, me):
        evaluation = evaluate(parts, plan)
        if me.rank == 0:
            print_answers(evaluation.answers, most=options.show)
            print_score(evaluation)
            results = write_evaluation(plan.output, evaluation)
            table = write_markdown(plan.output, evaluation)
            draw_samples(plan.output / "samples.png", evaluation.answers, parts.processor)
            LOGGER.info("answers: %s, table: %s, picture: %s", results, table, plan.output / "samples.png")


def _retrieve(options: argparse.Namespace, asked: EvaluationOptions, checkpoint: Path, recipe: Recipe) -> None:
    """Judge a run of BLIP-2's first stage, which answers no questions, by how images and captions find each other."""
    if asked.benchmark is not None or asked.max_new_tokens is not None:
        raise ValueError(
            f"--benchmark={asked.benchmark}, --max-new-tokens={asked.max_new_tokens}: model.language.kind="
            f"{recipe.model.language.kind!r} writes no answers; its held-out images and captions are compared. Leave "
            "both out."
        )
    if must_start_ranks(options):
        start_ranks(recipe, options.nproc_per_node)
        return
    with loaded_run(checkpoint, recipe) as (parts, me):
        retrieval = retrieve(parts, limit=asked.limit, batch_size=asked.batch_size)
        if me.rank == 0:
            print_retrieval(retrieval)
            path = write_retrieval(asked.output or checkpoint.parent, retrieval, model_settings(checkpoint, recipe))
            LOGGER.info("recalls: %s", path)
