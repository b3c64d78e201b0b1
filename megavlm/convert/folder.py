"""The ``convert`` verb: what the source is decides the direction."""

from collections.abc import Sequence
from pathlib import Path

from megavlm.config import load_recipe
from megavlm.convert.from_hf import import_folder
from megavlm.convert.lora import export_adapter
from megavlm.convert.read_hf import CONFIG_NAME
from megavlm.convert.to_hf import export_folder
from megavlm.convert.write_hf import parse_size
from megavlm.recipe import Recipe

LORA = "lora"
"""The part that is written as an adapter."""


def convert_folder(
    source: Path,
    target: Path,
    overrides: Sequence[str] = (),
    *,
    recipe: Path | None = None,
    part: str | None = None,
    architecture: str | None = None,
    max_shard_size: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Convert a Hugging Face folder to a run folder, or a run folder or a checkpoint to a Hugging Face folder.

    Args:
        source: a folder with ``config.json`` is Hugging Face's; any other must hold a checkpoint.
        target: the folder to make; must not exist.
        overrides: see :func:`import_folder` and :func:`export_folder`; with ``recipe`` they change the recipe.
        recipe: from Hugging Face: file of the recipe that the weights are for.
        part: to Hugging Face: ``language`` or ``vision`` alone, or ``lora`` as an adapter folder of ``peft``.
        architecture: to Hugging Face: class to write for; None: the best.
        max_shard_size: to Hugging Face: most bytes of a file, as ``2GB`` (the default).
        dtype: to Hugging Face: ``bf16`` or ``fp32``; None: as saved.

    Returns:
        What was made: the checkpoint, or the Hugging Face folder.

    Raises:
        ValueError: see there; or an option belongs to the other direction.
    """
    is_published = (source / CONFIG_NAME).exists()
    to_hf = {"part": part, "architecture": architecture, "max-shard-size": max_shard_size, "dtype": dtype}
    for name, value in (to_hf if is_published else {"recipe": recipe}).items():
        if value is not None:
            way, has = ("to", "has a") if is_published else ("from", "has no")
            raise ValueError(f"--{name}={value}: is for the way {way} Hugging Face, and {source} {has} {CONFIG_NAME}.")
    if is_published and recipe is not None:
        return import_folder(source, target, load_recipe(recipe, overrides, Recipe))
    if is_published:
        return import_folder(source, target, overrides=overrides)
    if part == LORA:
        for name in ("architecture", "max-shard-size", "dtype"):
            if to_hf[name] is not None:
                raise ValueError(f"--{name}={to_hf[name]}: is not for an adapter (--part=lora). Leave it out.")
        return export_adapter(source, target)
    size = parse_size(max_shard_size or "2GB")
    return export_folder(
        source, target, overrides, part=part, architecture=architecture, max_shard_bytes=size, dtype=dtype
    )
