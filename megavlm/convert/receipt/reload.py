"""Loads a Hugging Face folder with ``transformers`` alone and answers probes: ``python -P reload.py FOLDER``.

It imports nothing of this project, so that what loads here loads anywhere. ``FOLDER`` holds ``request.json`` and
``probes.safetensors``; ``answer.json`` and ``answers.safetensors`` are written beside them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

IMAGES = ("pixel_values", "visible_tiles", "tile_in_context", "tile_tags")
"""Inputs of images. All but the first are of models with cross-attention."""


def main(folder: Path) -> None:
    """Answer the request in a folder."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    inputs = load_file(folder / "probes.safetensors")
    model, info = getattr(transformers, request["architecture"]).from_pretrained(
        request["folder"],
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=request["trusts_code"],
        output_loading_info=True,
    )
    model.eval()
    answers: dict[str, Tensor] = {}
    continuations: list[list[int]] = []
    with torch.no_grad():
        for number in range(request["num_probes"]):
            tokens = inputs.get(f"tokens.{number}")
            images = {name: inputs[f"{name}.{number}"] for name in IMAGES if f"{name}.{number}" in inputs}
            if tokens is None:
                output = features(model, images["pixel_values"], request)
                continuations.append([])
            else:
                output = logits(model, tokens, images)
                continuations.append(continuation(model, tokens, images, output, request))
            answers[f"output.{number}"] = output.contiguous()
    save_file(answers, folder / "answers.safetensors")
    answer = {
        "class": type(model).__name__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "loading_info": {name: sorted(map(str, entries)) for name, entries in info.items()},
        "continuations": continuations,
        "foreign_modules": sorted({"megavlm", "megatron"} & sys.modules.keys()),
    }
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def logits(model: Any, tokens: Tensor, images: dict[str, Tensor]) -> Tensor:
    """Return ``[S, V]`` of one row of tokens ``[S]``. New tokens see the tiles that the last given one sees."""
    visible = images.get("visible_tiles")
    if visible is not None:
        new = visible[-1:].expand(len(tokens) - len(visible), 2)
        images = images | {"visible_tiles": torch.cat([visible, new])[None]}
    return model(input_ids=tokens[None], use_cache=False, **images).logits[0]


def continuation(
    model: Any, tokens: Tensor, images: dict[str, Tensor], output: Tensor, request: dict[str, Any]
) -> list[int]:
    """Return the most likely next tokens, never the placeholder of images; ``output``: the logits of ``tokens``."""
    chosen: list[int] = []
    while True:
        last = output[-1].clone()
        if request["image_token_id"] >= 0:
            last[request["image_token_id"]] = -torch.inf
        chosen.append(int(last.argmax()))
        if len(chosen) == request["num_new_tokens"]:
            return chosen
        output = logits(model, torch.cat([tokens, torch.tensor(chosen)]), images)


def features(model: Any, pixels: Tensor, request: dict[str, Any]) -> Tensor:
    """Return ``[P, D]``: what comes out of the last layer wanted of a vision encoder, or of the norm behind it."""
    encoder = getattr(model, "vision_model", model)
    states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
    output = states[request["num_vision_layers"]]
    if request["post_layernorm"]:
        norm = encoder.post_layernorm if hasattr(encoder, "post_layernorm") else encoder.layernorm
        output = norm(output)
    return output[0, int(request["drop_first"]) :]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
