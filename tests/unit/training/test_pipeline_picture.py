"""The picture of a step before and after its micro-batches are put in order."""

from pathlib import Path

from PIL import Image

from megavlm.data import MicroBatchCost
from megavlm.training.pipeline_picture import draw_pipeline

# Texts, images of one tile or a few, and an image of six tiles and a thumbnail, as a blend deals them out.
MIXED = [
    MicroBatchCost(float(vision), float(text))
    for vision, text in [(14, 30), (0, 45), (14, 38), (4, 26), (0, 47), (0, 31), (4, 42), (14, 29)]
]


def test_a_mixed_step_waits_less(tmp_path: Path) -> None:
    before, after = draw_pipeline(tmp_path / "pipeline.png", MIXED, 4)
    assert after < before - 0.02
    assert Image.open(tmp_path / "pipeline.png").size[0] > 800
