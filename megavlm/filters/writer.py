"""Models that write a text when they are asked: trained runs, and Hugging Face folders as transformers runs them.

Both are given conversations that end with the user, and write greedily.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from megavlm.build import Parts
from megavlm.data import Conversation, ImageRef, Message, SampleError
from megavlm.data.image import ImageError, load_image
from megavlm.inference.generate import generate

IMAGE_TEXT, TEXT = "image-text-to-text", "text"


class Written(str):
    """A text that a model wrote."""


class Problem(str):
    """Why there is none."""


class Writer(Protocol):
    """A model."""

    def write(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[Written | Problem]:
        """Answer each prompt, in order."""


class RunWriter:
    """A trained run of this project."""

    def __init__(self, parts: Parts) -> None:
        """Take a wrapped model. All ranks of a replica call :meth:`write` together."""
        self._parts = parts

    def write(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[Written | Problem]:
        """See :class:`Writer`."""
        answers: list[Written | Problem] = []
        samples = []
        for prompt in prompts:
            try:
                samples.append(self._parts.processor.prompt("prompt", prompt).sample)
            except SampleError as error:
                answers.append(Problem(f"{error.skipped.reason}: {error.skipped.message}"))
            else:
                answers.append(Written())
        ids = iter(generate(self._parts, samples, max_new_tokens=max_new_tokens) if samples else [])
        return [
            answer if isinstance(answer, Problem) else Written(self._parts.tokenizer.decode(next(ids)).strip())
            for answer in answers
        ]


class HuggingFaceWriter:
    """A folder with ``config.json``, weights and tokenizer or processor. No code of the folder is executed."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Load it.

        Args:
            folder: local; nothing is downloaded.
            kind: :data:`IMAGE_TEXT`, or :data:`TEXT` for a language model.

        Raises:
            ValueError: the folder cannot be loaded as that.
        """
        self._has_images = kind == IMAGE_TEXT
        model_class = (
            transformers.AutoModelForImageTextToText if self._has_images else transformers.AutoModelForCausalLM
        )
        try:
            loader = transformers.AutoProcessor if self._has_images else transformers.AutoTokenizer
            self._processor: Any = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._model: Any = model_class.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"model={folder}: transformers cannot load it as {kind} ({first}). Check the folder."
            ) from None
        self._model = self._model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()

    def write(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[Written | Problem]:
        """See :class:`Writer`. One prompt at a time: what stands beside it changes nothing."""
        return [self._write(prompt, max_new_tokens) for prompt in prompts]

    def _write(self, prompt: Conversation, max_new_tokens: int) -> Written | Problem:
        try:
            messages = [self._message(message) for message in prompt.messages]
        except ImageError as error:
            return Problem(f"{error.reason}: {error.message}")
        if getattr(self._processor, "chat_template", None):
            inputs = self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:  # a model that was not tuned to chats goes on with the text
            text = "\n".join(message.text for message in prompt.messages)
            images = [load_image(image.source) for image in prompt.images]
            inputs = self._processor(text=text, **({"images": images} if images else {}), return_tensors="pt")
        inputs = inputs.to(self._model.device)
        with torch.no_grad():
            ids = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return Written(self._processor.decode(new, skip_special_tokens=True).strip())

    def _message(self, message: Message) -> dict[str, Any]:
        if not self._has_images:
            return {"role": message.role, "content": message.text}
        parts = [
            {"type": "image", "image": load_image(part.source)}
            if isinstance(part, ImageRef)
            else {"type": "text", "text": part}
            for part in message.parts
        ]
        return {"role": message.role, "content": parts}
