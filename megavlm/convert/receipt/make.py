"""Makes a receipt: compares tensors, asks both sides, collects what does not hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from megavlm.convert.own_layout import ARCHITECTURE
from megavlm.convert.parts import EMBEDDING
from megavlm.convert.receipt.document import Receipt
from megavlm.convert.receipt.ours import ask_ours
from megavlm.convert.receipt.output import NUM_NEW_TOKENS, OutputRow, compare_outputs
from megavlm.convert.receipt.pair import Pair, find_pair
from megavlm.convert.receipt.probe import Probes, make_probes
from megavlm.convert.receipt.tensor import TensorRow, compare_tensors
from megavlm.convert.receipt.theirs import Reload, ReloadError, ask_theirs, why_not_asked


def make_receipt(source: Path, target: Path, overrides: Sequence[str] = ()) -> Receipt:
    """Compare what was converted with what came out, and write the receipt into the target folder.

    The model is in memory twice in float32, but not at the same time: the other side's is in a process that has ended.
    Call it in a process without a process group.

    Args:
        source: what was converted: a Hugging Face folder, or a run folder or a checkpoint.
        target: what was made of it.
        overrides: those that it was converted with.

    Returns:
        The receipt, which holds or not (:meth:`Receipt.require`).

    Raises:
        ValueError: a folder is missing, damaged or of another kind, so that nothing can be compared.
    """
    pair = find_pair(source, target, overrides)
    rows, unmapped = compare_tensors(pair)
    faults = [fault for row in rows if (fault := row.fault) is not None]
    faults += [f"{one.name} ({one.side}): {one.reason}" for one in unmapped if one.is_fault]
    problem = next((row.problem for row in rows if row.problem), None)
    unasked = why_not_asked(pair)
    if unasked is not None:
        said = _Said(not_compared=[f"logits not compared: {unasked}"])
    elif problem is not None:
        said = _Said(not_compared=[f"logits not compared: the tensors do not fit ({problem})"])
    else:
        said = _ask_both(pair, rows)
    receipt = Receipt(
        source=source,
        target=target,
        direction=pair.direction,
        architecture=pair.architecture,
        parts=pair.parts.names,
        tensors=rows,
        unmapped=unmapped,
        reload=said.reload,
        outputs=said.outputs,
        not_compared=said.not_compared,
        faults=faults + said.faults,
    )
    receipt.write()
    return receipt


@dataclass(frozen=True)
class _Said:
    """What came of asking both sides."""

    reload: Reload | None = None
    outputs: list[OutputRow] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def _ask_both(pair: Pair, rows: Sequence[TensorRow]) -> _Said:
    """Run the same inputs through both sides, one after the other."""
    probes = _probes(pair)
    try:
        reload, theirs = ask_theirs(pair, probes, NUM_NEW_TOKENS)
    except ReloadError as error:
        return _Said(not_compared=probes.not_compared, faults=[str(error)])
    num_rows = pair.weights.template(EMBEDDING).shape[0] if pair.parts.language is not None else 0
    dtypes = {row.key: getattr(torch, row.dtype) for row in rows}
    ours = ask_ours(pair, probes, num_rows, dtypes, NUM_NEW_TOKENS)
    outputs = compare_outputs(probes.probes, theirs, ours)
    faults = reload.faults(pair) + [fault for row in outputs for fault in row.faults]
    return _Said(reload, outputs, probes.not_compared, faults)


def _probes(pair: Pair) -> Probes:
    vocab_size = 0
    if pair.parts.language is not None:
        name = pair.table.find(EMBEDDING)[1][0]
        spellings = {pair.table.in_table_spelling(given): given for given in pair.published}
        vocab_size = pair.published.templates[spellings[name]].shape[0]
    image_token_id = -1
    if pair.parts.is_whole:
        config = pair.published.config
        stated = config.get("image_token_id", config.get("image_token_index"))  # the second is LLaVA's name
        if stated is None and pair.architecture != ARCHITECTURE:
            stated = getattr(transformers, pair.architecture).config_class().image_token_id
        image_token_id = -1 if stated is None else int(stated)
    return make_probes(pair, vocab_size, image_token_id)
