"""Take some parts of a trained model, to start others from: its vision encoder and language model, for instance.

    python examples/comparisons/take_parts.py runs/comparisons/start runs/comparisons/parts vision language

The new run folder holds a release of these parts alone. A recipe that names it under
``checkpoint.pretrained_checkpoint`` starts with them; what it does not hold starts fresh.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megavlm.checkpoint import RunFolder
from megavlm.checkpoint.release import write_release
from megavlm.convert.own_checkpoint import open_checkpoint
from megavlm.convert.parts import MODEL_NAME, ModelFile
from megavlm.convert.staging import staged
from megavlm.models.part import part_of


def take_parts(source: Path, target: Path, names: Sequence[str]) -> Path:
    """Write a release of some parts of a model.

    Args:
        source: run folder or checkpoint of the model.
        target: the run folder to make.
        names: of the parts: vision, connector, language.

    Returns:
        The checkpoint.

    Raises:
        ValueError: the source is damaged or lacks a part, or the target exists.
    """
    if target.exists():
        raise ValueError(f"target={target}: exists already. Choose another, or remove it.")
    checkpoint = open_checkpoint(source)
    held = checkpoint.model.model
    if absent := sorted(set(names) - set(held.names)):
        raise ValueError(f"parts={absent[0]}: {source} holds {', '.join(held.names)}. Choose among them.")
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if part_of(key) in names}
    described = ModelFile(model=held.only(*names), tokenizer=checkpoint.tokenizer_in(target)).dump()
    with staged(target) as folder:
        files: dict[str, bytes | Path] = {MODEL_NAME: described.encode(), **checkpoint.small_files}
        written = write_release(RunFolder(folder), tensors, lambda key: checkpoint.weights[key], files)
    return target / written.name


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and take the parts."""
    parser = argparse.ArgumentParser(description="Take some parts of a trained model.")
    parser.add_argument("source", type=Path, help="run folder or checkpoint")
    parser.add_argument("target", type=Path, help="run folder to make")
    parser.add_argument("parts", nargs="+", choices=("vision", "connector", "language"))
    options = parser.parse_args(arguments)
    try:
        print(take_parts(options.source, options.target, options.parts))
    except ValueError as error:
        sys.exit(f"take_parts: error: {error}")


if __name__ == "__main__":
    main()
