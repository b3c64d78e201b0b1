"""Where a run stands."""

from dataclasses import dataclass


@dataclass
class Position:
    """How far a run is."""

    iteration: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Samples of the data order that are behind the run."""
