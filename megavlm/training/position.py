"""Where a run stands."""

from dataclasses import dataclass


@dataclass
class Position:
    """How far a run is."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Rows of all global batches so far: samples, where they are not packed."""
