"""Fills a fresh model from the checkpoints of others: each weight from one of them, or fresh and in training."""

from collections.abc import Sequence
from pathlib import Path

from megavlm.checkpoint import match
from megavlm.checkpoint.load import load_checkpoint
from megavlm.engines import MegatronEngine
from megavlm.models.part import PARTS, Trainable, part_of
from megavlm.models.taken import PretrainedConfig
from megavlm.runtime.log import LOGGER


def start_from(
    engine: MegatronEngine, sources: Sequence[Path | PretrainedConfig], trained: Trainable, *, verify: bool = True
) -> None:
    """Load the weights that a fresh run starts from. Collective.

    Args:
        engine: with the model wrapped, its weights fresh.
        sources: run folders, loaded in turn: whole, or what is taken of them.
        trained: what trains. What none of the checkpoints holds stays fresh, and must be among it.
        verify: compare every file with its manifest first.

    Raises:
        ValueError: a checkpoint does not fit, two hold the same weights, or weights that none holds would stay as they
            were drawn. The same on every rank.
    """
    unfilled = match.weights_of(engine.sharded_state_dict(with_optimizer=False))
    origin: dict[str, Path] = {}
    for source in sources:
        path, names = (source, None) if isinstance(source, Path) else (source.path, source.names)
        loaded = load_checkpoint(
            path, engine, with_optimizer=False, verify=verify, allow_missing_parts=PARTS, take=names
        )
        if twice := [key for key in loaded.filled if key in origin]:
            raise ValueError(
                f"checkpoint.pretrained_checkpoint: {origin[twice[0]]} and {path} both hold {len(twice)} weights "
                f"({match.shown(twice)}). Name what to take of each: {{path: {path}, take: [...]}}."
            )
        origin |= dict.fromkeys(loaded.filled, path)
        unfilled -= set(loaded.filled)
        taken = "" if names is None else ", ".join(f"{here} = its {there}" for here, there in names.items()) + " of "
        LOGGER.info("starting from the weights of %s%s", taken, path)
    _check_unfilled(unfilled, set(origin), sources, trained)


def _check_unfilled(
    unfilled: set[str], filled: set[str], sources: Sequence[Path | PretrainedConfig], trained: Trainable
) -> None:
    """Refuse weights that nothing has filled and that do not train."""
    if frozen := sorted(key for key in unfilled if key not in trained):
        whole = {part_of(key) for key in frozen} - {part_of(key) for key in filled}
        named = sorted(whole) + [key for key in frozen if part_of(key) not in whole]
        raise ValueError(
            f"training.trainable={sorted(trained.parts)}: "
            f"{', '.join(str(source if isinstance(source, Path) else source.path) for source in sources)} holds no "
            f"{match.shown(named)}, so that would stay untrained in whole or in part. Add it to what trains, or give "
            "weights for it."
        )
    if unfilled:
        fresh = sorted(unfilled)
        LOGGER.info("%d weights are in none of the checkpoints and start fresh: %s", len(fresh), match.shown(fresh))
