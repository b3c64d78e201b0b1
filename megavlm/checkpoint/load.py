"""Loads a checkpoint into an engine of any layout, or says in one sentence why not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint import Metadata

from megavlm.checkpoint import match
from megavlm.checkpoint.agreement import agreed, from_rank_0, rank
from megavlm.checkpoint.folder import TRACKER_NAME, RunFolder, iteration_of
from megavlm.checkpoint.layout import CheckpointInfo, Layout, put_back_empty_moments, read_info
from megavlm.checkpoint.manifest import MANIFEST_NAME, find_damage
from megavlm.checkpoint.pickles import METADATA_NAME, check_objects, read_metadata, weights_only
from megavlm.checkpoint.rng import reseed_from, restore_rng
from megavlm.checkpoint.taking import ask, in_model, offered
from megavlm.checkpoint.writer import EXTRA_NAME, rng_name
from megavlm.engines import MegatronEngine
from megavlm.models.part import QFORMER_OUTPUT, part_of
from megavlm.runtime.log import LOGGER, warn_once


@dataclass(frozen=True)
class Loaded:
    """What came with the weights. The same on every rank."""

    path: Path
    """The checkpoint's folder."""
    iteration: int
    """Steps done when it was saved; 0 for a release."""
    extra: dict[str, Any]
    """What was given to :func:`megavlm.checkpoint.save_checkpoint`; empty in other programs' checkpoints."""
    missing: tuple[str, ...]
    """Keys of weights that it did not hold: they are as they were. Empty unless that was allowed."""
    filled: tuple[str, ...]
    """Keys, in the model, of the weights that it did hold."""
    unexpected: tuple[str, ...]
    """Keys of weights that the model does not have. Empty unless that was allowed."""


def load_checkpoint(
    path: RunFolder | Path | str,
    engine: MegatronEngine,
    *,
    with_optimizer: bool,
    verify: bool = True,
    allow_missing: Sequence[str] = (),
    allow_missing_parts: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    take: Mapping[str, str] | None = None,
) -> Loaded:
    """Load a checkpoint into the engine's model, and to resume a run also its optimizer and random numbers. Collective.

    Args:
        path: a run folder, of which the newest complete checkpoint is taken, or the folder of one checkpoint.
        engine: with the model wrapped, and the optimizer built if there is to be one.
        with_optimizer: True resumes: optimizer and random number generators too. False takes the weights only, and
            the optimizer, if there is one, starts from them.
        verify: compare every file with the manifest first. False saves reading everything twice, and is the only way
            to load checkpoints of other programs, which have no manifest.
        allow_missing: how keys begin that the checkpoint need not hold (``("connector.",)``). Weights only.
        allow_missing_parts: parts of the model (``megavlm.models.part.PARTS``) of which the checkpoint need not hold
            anything; of part of a part it must hold all. If ``text`` is among them, a checkpoint of BLIP-2's first
            stage may have that part without the model having it, and need not hold the layer behind the Q-Former.
            Weights only.
        allow_unexpected: how keys begin that the model need not have. Weights only.
        take: load these alone: name of a part or module in the model -> its name in the checkpoint, which must hold all
            of it and nothing else of that name (:class:`megavlm.models.taken.PretrainedConfig`). Weights only.

    Raises:
        ValueError: there is no checkpoint, it is damaged or not to be trusted, or does not fit. One sentence that names
            the file or the key and says what to do; the same on every rank.
    """
    assert not (with_optimizer and (allow_missing or allow_missing_parts or allow_unexpected or take)), (
        "a run resumes whole or not at all"
    )
    folder = from_rank_0(f"looking for checkpoints in {path}", lambda: _find(path))
    if verify:
        _verify(folder)
    metadata, info, extra = _read_descriptions(folder)
    if with_optimizer and not match.has_optimizer(metadata):
        raise ValueError(
            f"{folder}: holds weights only, so a run cannot be resumed from it. Start a new one from its weights "
            "(checkpoint.pretrained_checkpoint)."
        )
    state = engine.sharded_state_dict(with_optimizer=with_optimizer, is_loading=True)
    absent = match.absent_parts(metadata)
    is_first_stage = "text" in set(allow_missing_parts) - absent
    if take is not None:
        metadata, state, absent = offered(metadata, take, folder), ask(state, take), set()
    mismatch = match.compare(state, metadata, info, folder)
    match.check_allowed(
        mismatch,
        folder,
        allow_missing=lambda key: (
            key.startswith(tuple(allow_missing))
            or part_of(key) in absent.intersection(allow_missing_parts)
            or (is_first_stage and key.startswith(QFORMER_OUTPUT))
        ),
        allow_unexpected=lambda key: (
            key.startswith(tuple(allow_unexpected)) or (is_first_stage and part_of(key) == "text")
        ),
    )
    _say_mismatch(mismatch, folder)
    _load_tensors(folder, engine, state, metadata, with_optimizer=with_optimizer)
    if with_optimizer:
        _restore_rng(folder, info)
    LOGGER.info("loaded %s (%s)", folder, "weights, optimizer and random numbers" if with_optimizer else "weights")
    iteration = info.iteration if info else iteration_of(folder)
    filled = mismatch.common if take is None else in_model(mismatch.common, take)
    return Loaded(folder, iteration, extra, mismatch.missing, filled, mismatch.unexpected)


def find_checkpoint(path: RunFolder | Path | str) -> Path | None:
    """Return the folder that :func:`load_checkpoint` would load; None where there is none. Collective."""

    def find() -> Path | None:
        run_folder = _run_folder(path)
        return None if run_folder.newest() is None and not _is_checkpoint(run_folder.path) else _find(path)

    return from_rank_0(f"looking for checkpoints in {path}", find)


def find_to_resume(folder: RunFolder, *, verify: bool = True, fall_back: bool = False) -> Path | None:
    """Return the checkpoint that a run goes on from, compared with its manifest; None where there is none. Collective.

    Args:
        folder: of the run.
        verify: compare its files with the manifest, so that :func:`load_checkpoint` need not. False: just take it.
        fall_back: if the newest is damaged, set it aside (``iter_0000100.damaged-<token>``) with a warning, and take
            the newest that is not. If none is intact, nothing is touched.

    Raises:
        ValueError: the newest is damaged and may not, or cannot, be passed over; the same on every rank.
    """
    newest = find_checkpoint(folder)
    damage = find_damage(newest) if newest is not None and verify else None
    if newest is None or damage is None:
        return newest
    older, intact = _look_for_intact(newest)
    if intact is None or iteration_of(intact) == 0 or not fall_back:
        raise ValueError(_say_what_is_intact(newest, damage, older, intact))
    passed_over = [newest, *older[: older.index(intact)]]
    steps = [iteration_of(path) for path in passed_over]
    places = from_rank_0(f"setting {newest} aside", lambda: folder.set_aside(steps, iteration_of(intact)))
    for path, place in zip(passed_over, places, strict=True):
        why = damage if path == newest else f"{path}: is damaged too."
        warn_once(f"{why} It is {place.name} now, and the run goes on from {intact.name} (checkpoint.fall_back).")
    return intact


def _run_folder(path: RunFolder | Path | str) -> RunFolder:
    return path if isinstance(path, RunFolder) else RunFolder(path)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG_FNAME).exists() or (folder / METADATA_NAME).exists() or (folder / MANIFEST_NAME).exists()


def _find(path: RunFolder | Path | str) -> Path:
    """The checkpoint that a path means. On rank 0."""
    run_folder = _run_folder(path)
    if _is_checkpoint(run_folder.path):
        return run_folder.path
    newest = run_folder.newest()
    if newest is None:
        state = "holds no checkpoint (no iter_<step> and no release)" if run_folder.path.is_dir() else "is not a folder"
        raise ValueError(f"{run_folder.path}: {state}. Check the path.")
    named = run_folder.read_tracker()
    if named is not None and named != newest:
        warn_once(
            f"{run_folder.path / TRACKER_NAME} says {named}, but the newest checkpoint is {newest}: taking {newest}"
        )
    return run_folder.checkpoint(newest)


def _verify(folder: Path) -> None:
    """Compare with the manifest; if that fails, say which older checkpoint could be taken instead. Collective."""
    damage = find_damage(folder)
    if damage is not None:
        raise ValueError(_say_what_is_intact(folder, damage, *_look_for_intact(folder)))


def _look_for_intact(folder: Path) -> tuple[list[Path], Path | None]:
    """The checkpoints older than one, newest first, and the first of them that is not damaged. Collective."""
    older: list[Path] = from_rank_0(f"looking for checkpoints in {folder.parent}", lambda: _older(folder))
    return older, next((other for other in older if find_damage(other) is None), None)


def _say_what_is_intact(folder: Path, damage: str, older: list[Path], intact: Path | None) -> str:
    if intact is not None:
        return f"{damage} {intact.name} is intact: move {folder.name} out of {folder.parent} to go on from it."
    if older:
        return f"{damage} The {len(older)} older checkpoint(s) in {folder.parent} are damaged too."
    return f"{damage} {folder.parent} holds no older one."


def _older(folder: Path) -> list[Path]:
    run_folder = RunFolder(folder.parent)
    siblings = [run_folder.checkpoint(iteration) for iteration in run_folder.checkpoints()]
    return siblings[: siblings.index(folder)][::-1] if folder in siblings else []


def _read_descriptions(folder: Path) -> tuple[Metadata, CheckpointInfo | None, dict[str, Any]]:
    """Read what a checkpoint says of itself, and look through its pickles. Collective."""
    metadata, info, extra = Metadata({}), None, {}
    with agreed(f"reading {folder}"):
        backend = _read_json(folder / CONFIG_FNAME).get("sharded_backend")
        if backend != "torch_dist":
            raise ValueError(f"{folder / CONFIG_FNAME}: sharded_backend={backend!r} cannot be read. Use torch_dist.")
        metadata = read_metadata(folder)
        check_objects(folder, metadata)
        info = read_info(folder)
        extra = _read_json(folder / EXTRA_NAME) if (folder / EXTRA_NAME).exists() else {}
    return metadata, info, extra


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Choose another checkpoint.") from None
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error}). Choose another checkpoint.") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not a mapping. Choose another checkpoint.")
    return tree


def _say_mismatch(mismatch: match.Mismatch, folder: Path) -> None:
    if mismatch.missing:
        shown = match.shown(mismatch.missing)
        LOGGER.info("%s holds no weights for %d keys, which keep theirs: %s", folder, len(mismatch.missing), shown)
    if mismatch.unexpected:
        shown = match.shown(mismatch.unexpected)
        LOGGER.info("%s: %d of its keys are not in the model: %s", folder, len(mismatch.unexpected), shown)
    if mismatch.num_extra_states:
        LOGGER.info("%s: %d extra states of layers are on one side only", folder, mismatch.num_extra_states)


def _load_tensors(
    folder: Path, engine: MegatronEngine, state: dict[str, Any], metadata: Metadata, *, with_optimizer: bool
) -> None:
    with agreed(f"loading {folder}"), weights_only():
        strategy = get_default_load_sharded_strategy(str(folder))
        if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            strategy = FullyParallelLoadStrategyWrapper(strategy, group)
        loaded = dist_checkpointing.load(match.without_missing(state, metadata), str(folder), strategy)
        # a pipeline stage may have only parts that the checkpoint lacks
        loaded = {name: {} for name in state} | loaded
        if with_optimizer:
            put_back_empty_moments(state, loaded)
        engine.load_state_dict(loaded, with_optimizer=with_optimizer)


def _restore_rng(folder: Path, info: CheckpointInfo | None) -> None:
    """Put the random number generators back, or start them anew where the ranks are not the same ones. Collective."""
    if info is None:
        LOGGER.info("%s: another program's random number generators are not restored", folder)
        return
    now = Layout.of_this_run()
    path = folder / rng_name(rank() if now == info.layout else 0)
    with agreed(f"reading {path}"):
        data = path.read_bytes()
        if now == info.layout:
            restore_rng(json.loads(data))
            return
        seed = reseed_from(data)
    changes = ", ".join(
        f"{name} was {before}, is {after}"
        for (name, before), after in zip(asdict(info.layout).items(), asdict(now).values(), strict=True)
        if before != after
    )
    LOGGER.info("random numbers (dropout) go on from a new seed, %d: %s", seed, changes)
