"""Names of COCO's images, which VQAv2 and captions share."""

from pathlib import Path


def coco_image_folder(images: Path, split: str) -> Path:
    """``images/val2014`` where there is such a folder, else ``images`` itself."""
    return images / split if (images / split).is_dir() else images


def coco_image(folder: Path, split: str, image_id: int) -> str:
    """Path of an image: ``COCO_val2014_000000000042.jpg``; from 2017 on the number alone."""
    prefix = "" if split.endswith("2017") else f"COCO_{split}_"
    return str(folder / f"{prefix}{image_id:012d}.jpg")
