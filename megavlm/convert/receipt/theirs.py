"""The Hugging Face side's answers, from a process that knows ``transformers`` and nothing of this project."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors.torch import load_file, save_file

from megavlm.convert.own_layout import ARCHITECTURE, foreign_code
from megavlm.convert.receipt.output import Answers
from megavlm.convert.receipt.pair import Pair
from megavlm.convert.receipt.probe import Probes
from megavlm.models.vision.dual import DualConfig

_PROGRAM = Path(__file__).with_name("reload.py")
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Reload:
    """How ``transformers`` loaded the folder."""

    class_name: str
    versions: dict[str, str]
    loading_info: dict[str, list[str]]
    """What it said: names that are missing, unexpected, of another shape, and so on; empty lists if all is well."""

    def faults(self, pair: Pair) -> list[str]:
        """What it complained of. An imported folder may hold what the weight map says that nobody needs."""
        found = []
        for kind, names in self.loading_info.items():
            allowed = kind == "unexpected_keys" and pair.is_import
            counted = [
                name for name in names if not (allowed and pair.table.is_unused(pair.table.in_table_spelling(name)))
            ]
            if counted:
                found.append(f"{self.class_name}: {kind.replace('_', ' ')}: {', '.join(counted[:8])}")
        return found


class ReloadError(ValueError):
    """``transformers`` cannot load the folder, or fails on the inputs."""


def why_not_asked(pair: Pair) -> str | None:
    """Why ``transformers`` cannot be asked; None if it can.

    What comes with a folder's own code is never run, unless that is MegaVLM's own, byte for byte.
    """
    if pair.architecture == ARCHITECTURE:
        foreign = foreign_code(pair.published.path, pair.published.config)
        return f"{foreign[0]}, and other code is not run" if foreign else None
    return None if hasattr(transformers, pair.architecture) else f"no class of {pair.architecture} without remote code"


def ask_theirs(pair: Pair, probes: Probes, num_new_tokens: int) -> tuple[Reload, Answers]:
    """Load the published folder in a fresh process, in float32, and run the probes.

    Raises:
        ReloadError: the process failed; ends with its last line.
    """
    vision = pair.parts.vision
    assert not isinstance(vision, DualConfig), "no published folder holds one"
    request = {
        "folder": str(pair.published.path.absolute()),
        "architecture": "AutoModelForImageTextToText" if pair.architecture == ARCHITECTURE else pair.architecture,
        "trusts_code": pair.architecture == ARCHITECTURE,  # it was compared with ours
        "num_probes": len(probes.probes),
        "num_new_tokens": num_new_tokens,
        "image_token_id": probes.image_token_id,
        "num_vision_layers": None if vision is None else vision.num_layers_built,
        "drop_first": vision is not None and vision.has_class_token and not vision.keep_class_token,
        "post_layernorm": getattr(vision, "post_layernorm", False),
    }
    inputs = {f"tokens.{number}": probe.tokens for number, probe in enumerate(probes.probes) if probe.tokens.numel()}
    for number, probe in enumerate(probes.probes):
        if probe.tiles.shape[0]:
            inputs[f"pixel_values.{number}"] = probe.pixel_values.contiguous()
        if probe.expansion is not None and pair.architecture == ARCHITECTURE:
            inputs[f"visible_tiles.{number}"] = probe.expansion.visible_tiles
            inputs[f"tile_in_context.{number}"] = probe.expansion.tile_context != 0
            inputs[f"tile_tags.{number}"] = probe.expansion.tile_tags
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        save_file(inputs, folder / "probes.safetensors")
        result = subprocess.run(
            [sys.executable, "-P", str(_PROGRAM), name],  # -P: the files beside it are not modules of its own
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
            check=False,
        )
        if result.returncode:
            lines = result.stdout.strip().splitlines() or [f"exit code {result.returncode}"]
            raise ReloadError(f"transformers' {pair.architecture} fails on {pair.published.path}: {lines[-1]}")
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        outputs = load_file(folder / "answers.safetensors")
    assert not answer["foreign_modules"], answer["foreign_modules"]
    versions = {package: answer[package] for package in ("transformers", "torch")}
    reload = Reload(answer["class"], versions, answer["loading_info"])
    return reload, Answers([outputs[f"output.{n}"] for n in range(len(outputs))], answer["continuations"])
