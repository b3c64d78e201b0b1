"""``megavlm upcycle``."""

import argparse
from pathlib import Path

from megavlm.cli.argument import add_verb
from megavlm.cli.without_cuda import restart_without_cuda
from megavlm.runtime.log import LOGGER, start_log
from megavlm.upcycle import Upcycled, UpcycleSettings, upcycle_folder


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "upcycle", _upcycle, "make a mixture of experts of a dense language model")
    verb.add_argument("dense", type=Path, help="run folder, checkpoint, or Hugging Face folder")
    verb.add_argument("target", type=Path, metavar="out", help="the run folder to make")
    verb.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, e.g. model.language.moe.moe_..."
    )
    verb.add_argument("--num-experts", type=int, required=True, metavar="N", help="experts of a layer, shards counted")
    verb.add_argument("--top-k", type=int, default=2, metavar="K", help="experts of a token, shards counted (2)")
    verb.add_argument("--every", type=int, metavar="N", help="one layer in N gets experts (1)")
    verb.add_argument("--first", type=int, metavar="LAYER", help="the first that does, counted from 0 (0)")
    verb.add_argument("--layers", type=_layers, metavar="A,B,...", help="the layers that do, instead")
    verb.add_argument(
        "--granularity", type=int, default=1, metavar="G", help="cut each dense layer into G experts; K a multiple (1)"
    )
    verb.add_argument("--noise", type=float, default=0.0, metavar="STD", help="added to every expert's weights (0)")
    verb.add_argument("--router-std", type=float, metavar="STD", help="of the router (the model's init_method_std)")
    verb.add_argument("--pre-softmax", action="store_true", help="softmax over all experts, before the choice")
    verb.add_argument("--topk-scaling", type=float, metavar="F", help="factor on the weights; with --pre-softmax")
    verb.add_argument("--seed", type=int, default=1234, help="of router and noise (1234)")
    verb.add_argument(
        "--optimizer",
        choices=("fresh", "carried"),
        default="fresh",
        help="fresh: weights that other runs start from; carried: the dense run goes on, with its moments",
    )
    verb.add_argument("--no-probe", action="store_true", help="do not compare the logits of both models")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers, as 1,3,5") from None


def _upcycle(options: argparse.Namespace) -> None:
    restart_without_cuda()
    start_log()
    if options.layers is not None and (options.every, options.first) != (None, None):
        raise ValueError(f"--layers={','.join(map(str, options.layers))}: says it all. Leave --every and --first out.")
    settings = UpcycleSettings(
        num_experts=options.num_experts,
        top_k=options.top_k,
        every=1 if options.every is None else options.every,
        first=options.first or 0,
        layers=options.layers,
        granularity=options.granularity,
        noise=options.noise,
        router_std=options.router_std,
        pre_softmax=options.pre_softmax,
        topk_scaling=options.topk_scaling,
        seed=options.seed,
    )
    made = upcycle_folder(
        options.dense,
        options.target,
        settings,
        options.overrides,
        optimizer=options.optimizer,
        probe=not options.no_probe,
    )
    _say(made, settings)


def _say(made: Upcycled, settings: UpcycleSettings) -> None:
    layers, moe = made.language.layers_with_experts, made.language.moe
    assert moe is not None
    LOGGER.info(
        "%s: %d experts, top %d, in %d of %d layers (%s); second matrices times %g",
        made.checkpoint,
        moe.num_moe_experts,
        moe.moe_router_topk,
        len(layers),
        made.language.num_layers,
        ", ".join(map(str, layers)),
        settings.fc2_scale,
    )
    for reason in made.reasons_not_exact:
        LOGGER.info("not equal to the dense model: %s", reason)
    if not made.reasons_not_exact:
        LOGGER.info("equal to the dense model at the start, up to rounding of float32")
    for row in made.rows:
        LOGGER.info(
            "%s: logits differ by at most %.3g, %.3g of the largest (%.3g)",
            row.name,
            row.max_abs,
            row.max_rel,
            row.max_logit,
        )
    if not made.rows:
        LOGGER.info("differences were not measured")
