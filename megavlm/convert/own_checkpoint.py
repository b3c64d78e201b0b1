"""A checkpoint of ours, opened to make another of it: its model as data, checked weights, small files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.dist_checkpointing.core import CONFIG_FNAME

from megavlm.checkpoint import RunFolder, find_checkpoint
from megavlm.checkpoint.folder import RELEASE
from megavlm.checkpoint.layout import LAYOUT_NAME
from megavlm.checkpoint.manifest import MANIFEST_NAME
from megavlm.checkpoint.pickles import COMMON_NAME, METADATA_NAME
from megavlm.checkpoint.release import ReleaseTensor
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.checkpoint.writer import EXTRA_NAME
from megavlm.config import dump_recipe
from megavlm.convert.parts import EMBEDDING, MODEL_NAME, RECIPE_NAME, ModelFile, check_weights, read_model
from megavlm.data import TokenizerConfig
from megavlm.recipe import Recipe

# Written anew, or belonging to a run's step and not to its weights.
_NOT_COPIED = {
    MANIFEST_NAME,
    LAYOUT_NAME,
    METADATA_NAME,
    COMMON_NAME,
    EXTRA_NAME,
    CONFIG_FNAME,
    MODEL_NAME,
    RECIPE_NAME,
}


@dataclass(frozen=True)
class OwnCheckpoint:
    """What a checkpoint holds. Nothing of its weights is in memory."""

    source: Path
    """What was asked for: a run folder or the checkpoint itself."""
    path: Path
    """The checkpoint's folder."""
    model: ModelFile
    recipe: Recipe | None
    """Of the run that trained it; None for one that was imported."""
    weights: CheckpointWeights
    tensors: dict[str, ReleaseTensor]
    """Checkpoint key of each of the model's weights -> what it is."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding not counted; 1 where there is no language model."""
        return self.tensors[EMBEDDING].shape[0] if EMBEDDING in self.tensors else 1

    @property
    def small_files(self) -> dict[str, Path]:
        """Name -> path of the files that go with the weights: the tokenizer's, a published model's."""
        return small_files(self.path)

    def tokenizer_in(self, target: Path) -> TokenizerConfig | None:
        """The tokenizer of the release in a run folder that gets :attr:`small_files`; None if there is none.

        A path inside the checkpoint becomes that of the copy; any other stays.
        """
        return tokenizer_of_copy(self.model.tokenizer, self.path, target / RELEASE)

    def description_in(self, target: Path) -> dict[str, bytes]:
        """``model.yaml`` or ``recipe.yaml`` of a release of the same model in a run folder."""
        tokenizer = self.tokenizer_in(target)
        if self.recipe is None:
            return {MODEL_NAME: self.model.model_copy(update={"tokenizer": tokenizer}).dump().encode()}
        saved = self.recipe.checkpoint.model_copy(update={"save": target.absolute()})
        return {
            RECIPE_NAME: dump_recipe(
                self.recipe.model_copy(update={"tokenizer": tokenizer, "checkpoint": saved})
            ).encode()
        }


def open_checkpoint(source: Path, overrides: Sequence[str] = ()) -> OwnCheckpoint:
    """Verify a checkpoint, and compare its weights with what it says of its model.

    Args:
        source: a run folder, of which the newest checkpoint is taken, or the folder of one checkpoint.
        overrides: changes to what it says, as on the command line.

    Raises:
        ValueError: there is none, it is damaged, or a tensor is missing, left over or of another shape; names it.
    """
    path = find_checkpoint(RunFolder(source))
    if path is None:
        raise ValueError(f"source={source}: holds no checkpoint. Give a run folder, or convert the model to one first.")
    model, recipe = read_model(path, overrides)
    weights = CheckpointWeights(path)
    remedy = "What it says of its model is not of these weights: take the folder anew."
    return OwnCheckpoint(
        source, path, model, recipe, weights, check_weights(weights, model.model, remedy, strange=("lora",))
    )


def small_files(checkpoint: Path) -> dict[str, Path]:
    """Name -> path of the files of a checkpoint that go with its weights: the tokenizer's, a published model's."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and path.suffix != ".distcp" and name not in _NOT_COPIED and not name.startswith("rng/"):
            files[name] = path
    return files


def tokenizer_of_copy(tokenizer: TokenizerConfig | None, checkpoint: Path, copy: Path) -> TokenizerConfig | None:
    """A tokenizer as it is where a checkpoint's :func:`small_files` were copied to; one from elsewhere stays."""
    if tokenizer is None or not tokenizer.path.absolute().is_relative_to(checkpoint.absolute()):
        return tokenizer
    inside = tokenizer.path.absolute().relative_to(checkpoint.absolute())
    return tokenizer.model_copy(update={"path": copy.absolute() / inside})
