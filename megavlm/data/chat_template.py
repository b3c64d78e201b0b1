"""Chat templates as data, and the rendering of a conversation into pieces that are trained or not.

The loss mask is made here, while the text is put together; nothing is ever found again by tokenising twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.data.conversation import Conversation, ImageRef, Message


@dataclass(frozen=True)
class Special:
    """A special symbol of the vocabulary, by its spelling; or one of :data:`BOS` and :data:`EOS`."""

    name: str


BOS = Special("begin of text")
"""The tokenizer's begin-of-text token, whatever its spelling."""
EOS = Special("end of text")
"""The tokenizer's end-of-text token, whatever its spelling."""

Piece = str | Special

_WHITE_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation."""

    content: str | Special | ImageRef
    is_trained: bool
    """Whether the model learns to write it. Never true of an image."""
    turn: int = 0
    """Which turn of the conversation it belongs to."""
    weight: float = 1.0
    """Of its loss."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written. Of the assistant's turn, ``assistant_prefix`` alone is not trained."""

    user_prefix: tuple[Piece, ...]
    user_suffix: tuple[Piece, ...]
    assistant_prefix: tuple[Piece, ...]
    assistant_suffix: tuple[Piece, ...]
    """The end of the assistant's turn; trained."""
    answer_start: str = ""
    """Text before each answer that the model writes itself (a space); trained."""
    conversation_prefix: tuple[Piece, ...] = ()
    turns_prefix: tuple[Piece, ...] = ()
    """Before the first turn, behind a system message."""
    system_prefix: tuple[Piece, ...] = ()
    system_suffix: tuple[Piece, ...] = ()
    system_inside_first_user: bool = False
    """Whether the system message stands inside the first user turn."""
    default_system: str | None = None
    """System message of a conversation without one, unless the recipe names another."""
    keeps_user_text: bool = True
    """Whether the user's words are kept; otherwise only the images."""
    image_separator: str | None = None
    """What stands between an image of the user's turn and its neighbours, in place of white space; None: what the turn
    has there."""

    @property
    def specials(self) -> set[Special]:
        """Every special symbol that the template may write."""
        pieces = (
            *self.conversation_prefix,
            *self.turns_prefix,
            *self.system_prefix,
            *self.system_suffix,
            *self.user_prefix,
            *self.user_suffix,
            *self.assistant_prefix,
            *self.assistant_suffix,
        )
        return {piece for piece in pieces if isinstance(piece, Special)}

    @property
    def stop_text(self) -> str:
        """The text that ends the assistant's turn, where that is no special symbol; otherwise nothing."""
        end = next(iter(self.assistant_suffix), "")
        return end if isinstance(end, str) and end.strip() else ""


_IM_START = Special("<|im_start|>")
_IM_END = Special("<|im_end|>")


def _chatml(conversation_prefix: tuple[Piece, ...]) -> ChatTemplate:
    return ChatTemplate(
        conversation_prefix=conversation_prefix,
        system_prefix=(_IM_START, "system\n"),
        system_suffix=(_IM_END, "\n"),
        user_prefix=(_IM_START, "user\n"),
        user_suffix=(_IM_END, "\n"),
        assistant_prefix=(_IM_START, "assistant\n"),
        assistant_suffix=(_IM_END, "\n"),
    )


CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    # Qwen2 and NVLM-D 72B; Megatron-LM's `qwen2p0`.
    "chatml": _chatml(()),
    # NVLM 34B; Megatron-LM's `nvlm-yi-34b`.
    "chatml_bos": _chatml((BOS,)),
    # Text and images as they come, no roles; a line break between what is given and what is learnt.
    "plain": ChatTemplate(
        user_prefix=(), user_suffix=("\n",), assistant_prefix=(), assistant_suffix=(EOS,), system_suffix=("\n",)
    ),
    # LLaVA's `plain`, for caption pretraining: of the user only the images are kept, so prompts such as "Describe the
    # image." are not read. Ends with the end-of-text token (LLaVA: a line break) so that generation stops.
    "llava_plain": ChatTemplate(
        user_prefix=(), user_suffix=(), assistant_prefix=(), assistant_suffix=(EOS,), keeps_user_text=False
    ),
    # LLaMA 2 chat.
    "llama2": ChatTemplate(
        system_prefix=("<<SYS>>\n",),
        system_suffix=("\n<</SYS>>\n\n",),
        system_inside_first_user=True,
        user_prefix=(BOS, "[INST] "),
        user_suffix=(" [/INST]",),
        assistant_prefix=(),
        answer_start=" ",
        assistant_suffix=(" ", EOS),
    ),
    # Vicuna 1.1 and LLaVA 1.5 (LLaVA's conversation `v1`).
    "vicuna": ChatTemplate(
        conversation_prefix=(BOS,),
        system_suffix=(" ",),
        user_prefix=("USER: ",),
        user_suffix=(" ",),
        assistant_prefix=("ASSISTANT:",),
        answer_start=" ",
        assistant_suffix=(EOS,),
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    # MiniGPT-4's second stage: prompt_template and end_sym of its train_configs/minigpt4_stage2_finetune.yaml; later
    # turns as in its conversation.py. "###" stands between turns and is the only end that is learnt. Images are in
    # <Img>...</Img> (data.image_wrapper).
    "minigpt4": ChatTemplate(
        conversation_prefix=(BOS,),
        turns_prefix=("###",),
        user_prefix=("Human: ",),
        user_suffix=(" ###",),
        assistant_prefix=("Assistant:",),
        answer_start=" ",
        assistant_suffix=("###",),
        image_separator=" ",
    ),
    # mPLUG-Owl (its xgpt3_dataset.py): each image is a line of the human's own.
    "mplug_owl": ChatTemplate(
        conversation_prefix=(BOS,),
        user_prefix=("\nHuman: ",),
        user_suffix=("\n",),
        assistant_prefix=("AI:",),
        answer_start=" ",
        assistant_suffix=(EOS,),
        default_system=(
            "The following is a conversation between a curious human and AI assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        image_separator="\nHuman: ",
    ),
}


def render(template: ChatTemplate, conversation: Conversation, system_prompt: str | None) -> list[Segment]:
    """Render a whole conversation for training.

    Args:
        template: how to write it.
        conversation: what to write.
        system_prompt: system message of a conversation without one; ``None`` takes the template's, ``""`` means none.

    Returns:
        The pieces in order. Trained are the assistant's text and the end of its turns; of a document, all text and its
        end.
    """
    segments = _fixed(template.conversation_prefix)
    if conversation.is_document:
        return segments + _document(conversation)
    system, turns = _split_system(template, conversation, system_prompt)
    if system is not None and not template.system_inside_first_user:
        segments += _system(template, system)
        system = None
    segments += _fixed(template.turns_prefix)
    for turn, message in enumerate(turns):
        if message.role == "user":
            segments += _user(template, message, system)
            system = None
        else:
            segments += _fixed(template.assistant_prefix)
            segments += _answer(template, message, turn)
    return segments


def render_prompt(template: ChatTemplate, conversation: Conversation, system_prompt: str | None) -> list[Segment]:
    """Render what the model is given to answer: everything before the last assistant turn, and the turn's prefix.

    A conversation that ends with the user is rendered whole. Of a document everything up to its last image is given,
    or nothing if it has none. Nothing is trained.
    """
    if conversation.is_document:
        segments = _fixed(template.conversation_prefix) + _document(conversation)
        images = [number for number, segment in enumerate(segments) if isinstance(segment.content, ImageRef)]
        stop = images[-1] + 1 if images else len(template.conversation_prefix)
        return [Segment(segment.content, False) for segment in segments[:stop]]
    messages = conversation.messages
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    segments = render(template, Conversation(messages), system_prompt) + _fixed(template.assistant_prefix)
    return [Segment(segment.content, False) for segment in segments]


def _split_system(
    template: ChatTemplate, conversation: Conversation, system_prompt: str | None
) -> tuple[Message | None, tuple[Message, ...]]:
    messages = conversation.messages
    if messages[0].role == "system":
        return messages[0], messages[1:]
    text = template.default_system if system_prompt is None else system_prompt
    return (Message("system", (text,)) if text else None), messages


def _system(template: ChatTemplate, system: Message) -> list[Segment]:
    content = [Segment(part, False) for part in system.parts]
    return _fixed(template.system_prefix) + content + _fixed(template.system_suffix)


def _user(template: ChatTemplate, message: Message, system: Message | None) -> list[Segment]:
    inside = _system(template, system) if system is not None else []
    parts = message.parts if template.image_separator is None else _separated(message.parts, template.image_separator)
    content = [Segment(part, False) for part in parts if template.keeps_user_text or isinstance(part, ImageRef)]
    return _fixed(template.user_prefix) + inside + content + _fixed(template.user_suffix)


def _separated(parts: Sequence[str | ImageRef], separator: str) -> list[str | ImageRef]:
    """Texts and images with ``separator`` on both sides of each image, in place of the white space there."""
    laid: list[str | ImageRef] = []
    for part in parts:
        last = laid[-1] if laid else None
        if isinstance(part, str) and isinstance(last, str):
            laid[-1] = last + part
            continue
        if isinstance(part, str) and isinstance(last, ImageRef):
            part = part.lstrip(_WHITE_SPACE)
        elif isinstance(part, ImageRef) and isinstance(last, str):
            laid[-1:] = [last.rstrip(_WHITE_SPACE)] if last.strip(_WHITE_SPACE) else []
        if part != "":
            laid += [separator, part] if laid and (isinstance(part, ImageRef) or isinstance(last, ImageRef)) else [part]
    return laid


def _answer(template: ChatTemplate, message: Message, turn: int) -> list[Segment]:
    return _trained((template.answer_start, *message.parts, *template.assistant_suffix), message, turn)


def _document(conversation: Conversation) -> list[Segment]:
    (message,) = conversation.messages
    return _trained((*message.parts, EOS), message, 0)


def _trained(pieces: Sequence[Piece | ImageRef], message: Message, turn: int) -> list[Segment]:
    is_trained = message.weight > 0.0
    return [
        Segment(piece, is_trained and not isinstance(piece, ImageRef), turn, message.weight)
        for piece in pieces
        if piece != ""
    ]


def _fixed(pieces: tuple[Piece, ...]) -> list[Segment]:
    return [Segment(piece, False) for piece in pieces]
