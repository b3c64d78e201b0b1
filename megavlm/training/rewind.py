"""Tells a spike of the loss, and puts a run back to its newest checkpoint without giving it the same data again."""

from collections.abc import Sequence
from pathlib import Path

from megavlm.batch import Batch
from megavlm.build import Parts
from megavlm.checkpoint import find_checkpoint, load_checkpoint
from megavlm.runtime.activity import ACTIVITY, Phase
from megavlm.runtime.log import LOGGER
from megavlm.training.position import Position
from megavlm.training.report import Report
from megavlm.training.spikes import Spike, SpikeWatch, name_samples


def tell_spike(parts: Parts, report: Report, spike: Spike, batches: Sequence[Batch]) -> list[str]:
    """Say what happened and name the samples of the step. Collective.

    Args:
        parts: of the run.
        report: gets all samples.
        spike: what happened.
        batches: this rank's micro-batches of the step.

    Returns:
        Keys of the samples of the step, on all ranks.
    """
    keys = [key for batch in batches for key in batch.keys]
    samples = [key for replica in parts.engine.gather_over_replicas(keys) for key in replica]
    LOGGER.warning("%s; its samples: %s", spike.text(), name_samples(samples))
    report.write_point({"iteration": spike.iteration, **_described(spike, samples)})
    return samples


def go_back(
    parts: Parts, report: Report, position: Position, watch: SpikeWatch, spike: Spike, samples: Sequence[str]
) -> bool:
    """Put the run back to its newest checkpoint. The data stays where it is, past the spike. Collective.

    Args:
        parts: of the run.
        report: forgets the steps after the checkpoint.
        position: of the run; its iteration becomes the checkpoint's.
        watch: counts the rewind.
        spike: why.
        samples: of the step that stood out.

    Returns:
        Whether there was a checkpoint.

    Raises:
        ValueError: the run was put back too often, or the checkpoint is damaged.
    """
    recipe = parts.recipe
    checkpoint: Path | None = find_checkpoint(recipe.checkpoint.save)
    if checkpoint is None:
        LOGGER.warning("there is no checkpoint to go back to yet: the run goes on without step %d", spike.iteration)
        return False
    watch.check_may_go_back(spike)
    ACTIVITY.begin(Phase.LOADING)
    loaded = load_checkpoint(checkpoint, parts.engine, with_optimizer=True, verify=recipe.checkpoint.verify)
    watch.go_back(loaded.extra.get("loss_spike"))
    report.go_back(loaded.iteration)
    report.write_point({"iteration": loaded.iteration, "rewind from": spike.iteration, **_described(spike, samples)})
    LOGGER.warning(
        "rewind %d: back after step %d, and on past the %d samples of the %d steps since then",
        watch.num_rewinds,
        loaded.iteration,
        position.consumed_samples - loaded.extra["consumed_samples"],
        position.iteration - loaded.iteration,
    )
    position.iteration = loaded.iteration
    return True


def _described(spike: Spike, samples: Sequence[str]) -> dict[str, object]:
    return {"spike": {"loss": spike.loss, "median": spike.median, "samples": list(samples)}}
