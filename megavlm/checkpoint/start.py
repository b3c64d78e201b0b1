"""Fills a fresh model from the checkpoints of others: each weight from one of them, or fresh and in training."""

from collections.abc import Sequence

from megavlm.checkpoint import match
from megavlm.checkpoint.load import load_checkpoint
from megavlm.engines import MegatronEngine
from megavlm.models.part import PARTS, Trainable, part_of
from megavlm.models.taken import PretrainedConfig
from megavlm.runtime.log import LOGGER


def start_from(
    engine: MegatronEngine, sources: Sequence[PretrainedConfig], trained: Trainable, *, verify: bool = True
) -> None:
    """Load the weights that a fresh run starts from. Collective.

    Args:
        engine: with the model wrapped, its weights fresh.
        sources: run folders, and what is taken of each.
        trained: what trains. What none of the checkpoints holds stays fresh, and must be among it.
        verify: compare every file with its manifest first.

    Raises:
        ValueError: a checkpoint does not fit, two hold the same weights, or weights that none holds would stay as they
            were drawn. The same on every rank.
    """
    unfilled = match.weights_of(engine.sharded_state_dict(with_optimizer=False))
    source_of: dict[str, PretrainedConfig] = {}
    for source in sources:
        loaded = load_checkpoint(
            source.path, engine, with_optimizer=False, verify=verify, allow_missing_parts=PARTS, take=source.take
        )
        if twice := [key for key in loaded.filled if key in source_of]:
            raise ValueError(
                f"checkpoint.pretrained_checkpoint: {source_of[twice[0]].path} and {source.path} both give "
                f"{len(twice)} weights ({match.shown(twice)}). Name what to take of each: {{path: {source.path}, take: "
                "[...]}."
            )
        source_of |= dict.fromkeys(loaded.filled, source)
        unfilled.difference_update(loaded.filled)
        taken = ", ".join(f"{here} from its {there}" for here, there in (source.take or {}).items())
        LOGGER.info("starting from the weights of %s%s", source.path, f": {taken}" if taken else "")
    _check_unfilled(unfilled, set(source_of), sources, trained)


def _check_unfilled(
    unfilled: set[str], filled: set[str], sources: Sequence[PretrainedConfig], trained: Trainable
) -> None:
    """Refuse weights that nothing has filled and that do not train."""
    if frozen := sorted(key for key in unfilled if key not in trained):
        whole = {part_of(key) for key in frozen} - {part_of(key) for key in filled}
        named = sorted(whole) + [key for key in frozen if part_of(key) not in whole]
        raise ValueError(
            f"training.trainable={sorted(trained.parts)}: {', '.join(str(source.path) for source in sources)} holds no "
            f"{match.shown(named)}, so that would stay untrained in whole or in part. Add it to what trains, or give "
            "weights for it (checkpoint.pretrained_checkpoint)."
        )
    if unfilled:
        fresh = sorted(unfilled)
        LOGGER.info("%d weights are in none of the checkpoints and start fresh: %s", len(fresh), match.shown(fresh))
