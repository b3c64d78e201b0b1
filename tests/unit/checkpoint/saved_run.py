"""What the run of these tests' checkpoints does, in a module that ranks can import by its name."""

from pathlib import Path

import checkpoint_model

from megavlm.checkpoint import save_checkpoint

FILES = {"recipe.yaml": "a: 1\n", "tokenizer/vocab.bin": b"\x00\x01"}


def save_some(folder: Path) -> None:
    engine = checkpoint_model.build(language=checkpoint_model.SMALLEST)
    for step in (1, 2):
        checkpoint_model.train(engine, step, 1)
        save_checkpoint(folder, step, engine, {"consumed_samples": 4 * step}, FILES)
