"""The two folders of a conversion that is looked at: which is whose, and what model both hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavlm.checkpoint import RunFolder, find_checkpoint
from megavlm.checkpoint.folder import RELEASE
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.convert.families import FAMILIES, family_of
from megavlm.convert.parts import ModelParts, read_model
from megavlm.convert.read_hf import CONFIG_NAME, PublishedFolder
from megavlm.convert.weight_map import WeightMap


@dataclass(frozen=True)
class Pair:
    """A published folder, and a checkpoint that was made of it or that it was made of."""

    source: Path
    target: Path
    is_import: bool
    """Whether the source is the published folder."""
    architecture: str
    """The first of ``config.json``'s that is known."""
    parts: ModelParts
    """Those that the published folder holds."""
    table: WeightMap
    published: PublishedFolder
    weights: CheckpointWeights
    """The checkpoint's."""

    @property
    def checkpoint(self) -> Path:
        """Our side's folder."""
        return self.weights.folder

    @property
    def direction(self) -> str:
        """In words."""
        return "from Hugging Face" if self.is_import else "to Hugging Face"


def find_pair(source: Path, target: Path, overrides: Sequence[str] = ()) -> Pair:
    """Read what both folders say of themselves.

    Args:
        source: what was converted.
        target: what was made of it.
        overrides: to Hugging Face: changes to the checkpoint's recipe that were converted with. From Hugging Face they
            are in the target's ``model.yaml``.

    Raises:
        ValueError: one of the folders is missing, damaged or of another kind.
    """
    is_import = (source / CONFIG_NAME).exists()
    published = PublishedFolder(source if is_import else target)
    checkpoint = _find_checkpoint(target) if is_import else _find_checkpoint(source)
    family = family_of(published.config)
    stated = family.read(published.config)
    names = [*stated, "fusion"] if len(stated) > 1 else list(stated)
    parts = read_model(checkpoint, () if is_import else overrides)[0].model.only(*names)
    lacking = [name for name in stated if getattr(parts, name) is None]
    if lacking:
        raise ValueError(
            f"{checkpoint}: has no {', '.join(lacking)}, and {published.path} has. They are not of one model; "
            "check the paths."
        )
    architecture = next(name for name in published.config["architectures"] if name in FAMILIES)
    weights = CheckpointWeights(checkpoint)
    return Pair(source, target, is_import, architecture, parts, family.weight_map(parts), published, weights)


def _find_checkpoint(path: Path) -> Path:
    """The checkpoint of a run folder: what was imported, or the newest."""
    found = find_checkpoint(path / RELEASE if (path / RELEASE).is_dir() else RunFolder(path))
    if found is None:
        raise ValueError(f"{path}: holds no checkpoint and no {CONFIG_NAME}. Check the path.")
    return found
