"""``megavlm generate``."""

import argparse
import os
from pathlib import Path

from megavlm.cli.argument import add_run_folder, add_verb
from megavlm.cli.ranks import add_ranks, must_start_ranks, start_ranks
from megavlm.cli.trained import find_run, loaded_run
from megavlm.data import Conversation
from megavlm.inference.answer import Settings, answer_file, ask, chat, user_turn, writer
from megavlm.inference.sampling import Sampling


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "generate", _generate, "answer a prompt, a file of prompts, or a person in the terminal")
    add_run_folder(verb)
    add_ranks(verb)
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


def _generate(options: argparse.Namespace) -> None:
    _check(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    settings = Settings(options.max_new_tokens, sampling)
    checkpoint, recipe = find_run(options)
    _ = recipe.model.decoder  # raises where there is nothing that writes
    if must_start_ranks(options):
        start_ranks(recipe, options.nproc_per_node)
        return
    with loaded_run(checkpoint, recipe) as (parts, me):
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


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
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
