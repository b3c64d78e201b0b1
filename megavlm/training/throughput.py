"""How much a run computes: operations per second of a device, in its log line."""

from collections.abc import Callable, Sequence

from megavlm.batch import Batch
from megavlm.build import Parts
from megavlm.engines import MegatronEngine
from megavlm.engines.feed import is_reader
from megavlm.planning.flops import count_flops


class Throughput:
    """Adds up operations of steps. Every rank calls the same methods at the same time."""

    def __init__(self, engine: MegatronEngine, count: Callable[[Batch], int], num_devices: int) -> None:
        """Begin to count.

        Args:
            engine: adds up over the data-parallel ranks.
            count: operations of a micro-batch, forward and backward, of the whole model; right on ranks that read data.
            num_devices: ranks of the run.
        """
        self._engine = engine
        self._count = count
        self._num_devices = num_devices
        self._num_operations = 0

    def add(self, batches: Sequence[Batch]) -> None:
        """Take in a step's micro-batches of this rank."""
        self._num_operations += sum(map(self._count, batches))

    def take(self, seconds: float) -> float:
        """TFLOP/s of a device over the steps since the last call, which took so long together. Right on ranks that read
        data, the one that writes the log among them."""
        [total] = self._engine.sum_over_replicas([float(self._num_operations)])
        self._num_operations = 0
        return total / seconds / self._num_devices / 1e12


def throughput_of(parts: Parts, num_devices: int) -> Throughput | None:
    """What tells the throughput of a run; None where ``logging.log_throughput`` does not ask for it."""
    recipe = parts.recipe
    if not recipe.logging.log_throughput:
        return None

    def count(batch: Batch) -> int:
        if not is_reader():  # other ranks have no tiles
            return 0
        flops = count_flops(
            recipe.model, batch, vocab_size=parts.tokenizer.vocab_size, trainable=recipe.training.trained
        )
        return flops.total

    return Throughput(parts.engine, count, num_devices)
