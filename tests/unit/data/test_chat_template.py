"""Every template on a two-turn chat, written out by hand: ``[...]`` is a special symbol, ``{...}`` is trained."""

import pytest

from megavlm.data import Conversation, ImageRef, Message
from megavlm.data.chat_template import BOS, CHAT_TEMPLATES, EOS, Segment, Special, render, render_prompt

PICTURE = ImageRef("a.png")
TWO_TURNS = Conversation(
    (
        Message("user", (PICTURE, "\nWhat?")),
        Message("assistant", ("A cat.",)),
        Message("user", ("Sure?",)),
        Message("assistant", ("Yes.",)),
    )
)
WITH_SYSTEM = Conversation((Message("system", ("Be brief.",)), *TWO_TURNS.messages[:2]))

VICUNA = CHAT_TEMPLATES["vicuna"].default_system
OWL = (
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

EXPECTED = {
    "chatml": (
        "[<|im_start|>]user\n(image)\nWhat?[<|im_end|>]\n[<|im_start|>]assistant\n{A cat.[<|im_end|>]\n}"
        "[<|im_start|>]user\nSure?[<|im_end|>]\n[<|im_start|>]assistant\n{Yes.[<|im_end|>]\n}"
    ),
    "chatml_bos": (
        "[begin of text][<|im_start|>]user\n(image)\nWhat?[<|im_end|>]\n[<|im_start|>]assistant\n{A cat.[<|im_end|>]\n}"
        "[<|im_start|>]user\nSure?[<|im_end|>]\n[<|im_start|>]assistant\n{Yes.[<|im_end|>]\n}"
    ),
    "plain": "(image)\nWhat?\n{A cat.[end of text]}Sure?\n{Yes.[end of text]}",
    "llava_plain": "(image){A cat.[end of text]}{Yes.[end of text]}",
    "llama2": (
        "[begin of text][INST] (image)\nWhat? [/INST]{ A cat. [end of text]}"
        "[begin of text][INST] Sure? [/INST]{ Yes. [end of text]}"
    ),
    "vicuna": (
        f"[begin of text]{VICUNA} USER: (image)\nWhat? ASSISTANT:{{ A cat.[end of text]}}"
        "USER: Sure? ASSISTANT:{ Yes.[end of text]}"
    ),
    "minigpt4": (
        "[begin of text]###Human: (image) What? ###Assistant:{ A cat.###}Human: Sure? ###Assistant:{ Yes.###}"
    ),
    "mplug_owl": (
        f"[begin of text]{OWL}\nHuman: (image)\nHuman: What?\nAI:{{ A cat.[end of text]}}"
        "\nHuman: Sure?\nAI:{ Yes.[end of text]}"
    ),
}

EXPECTED_WITH_SYSTEM = {
    "chatml": (
        "[<|im_start|>]system\nBe brief.[<|im_end|>]\n"
        "[<|im_start|>]user\n(image)\nWhat?[<|im_end|>]\n[<|im_start|>]assistant\n{A cat.[<|im_end|>]\n}"
    ),
    "chatml_bos": (
        "[begin of text][<|im_start|>]system\nBe brief.[<|im_end|>]\n"
        "[<|im_start|>]user\n(image)\nWhat?[<|im_end|>]\n[<|im_start|>]assistant\n{A cat.[<|im_end|>]\n}"
    ),
    "plain": "Be brief.\n(image)\nWhat?\n{A cat.[end of text]}",
    "llava_plain": "Be brief.(image){A cat.[end of text]}",
    "llama2": ("[begin of text][INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n(image)\nWhat? [/INST]{ A cat. [end of text]}"),
    "vicuna": "[begin of text]Be brief. USER: (image)\nWhat? ASSISTANT:{ A cat.[end of text]}",
    "minigpt4": "[begin of text]Be brief.###Human: (image) What? ###Assistant:{ A cat.###}",
    "mplug_owl": "[begin of text]Be brief.\nHuman: (image)\nHuman: What?\nAI:{ A cat.[end of text]}",
}


def write(segments: list[Segment]) -> str:
    text, in_trained = "", False
    for segment in segments:
        # Each turn opens its own brackets: an answer begins where the one before it has ended its turn.
        if segment.is_trained and not in_trained:
            text += "{"
        if in_trained and not segment.is_trained:
            text += "}"
        in_trained = segment.is_trained
        content = segment.content
        if isinstance(content, Special):
            text += f"[{content.name}]"
            if in_trained and content == EOS:
                text, in_trained = text + "}", False
        else:
            text += "(image)" if isinstance(content, ImageRef) else content
    return text + ("}" if in_trained else "")


def test_the_tables_cover_every_template() -> None:
    assert EXPECTED.keys() == EXPECTED_WITH_SYSTEM.keys() == CHAT_TEMPLATES.keys()


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_training(name: str) -> None:
    assert write(render(CHAT_TEMPLATES[name], TWO_TURNS, None)) == EXPECTED[name]


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_training_with_a_system_message(name: str) -> None:
    assert write(render(CHAT_TEMPLATES[name], WITH_SYSTEM, "ignored")) == EXPECTED_WITH_SYSTEM[name]


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_the_recipe_s_system_prompt(name: str) -> None:
    without = Conversation(WITH_SYSTEM.messages[1:])
    assert write(render(CHAT_TEMPLATES[name], without, "Be brief.")) == EXPECTED_WITH_SYSTEM[name]
    empty = write(render(CHAT_TEMPLATES[name], without, ""))
    assert "Be brief" not in empty
    assert str(VICUNA) not in empty


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_a_prompt_is_what_stands_before_the_trained_answer(name: str) -> None:
    """What the model is given when it answers is what it was given in training, to the letter."""
    template = CHAT_TEMPLATES[name]
    prompt = write(render_prompt(template, TWO_TURNS, None))
    assert prompt == EXPECTED[name].rsplit("{", 1)[0].replace("{", "").replace("}", "")
    assert write(render_prompt(template, Conversation(TWO_TURNS.messages[:3]), None)) == prompt


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_specials_are_all_listed(name: str) -> None:
    written = {s.content for s in render(CHAT_TEMPLATES[name], WITH_SYSTEM, None) if isinstance(s.content, Special)}
    assert written == CHAT_TEMPLATES[name].specials
    assert written <= {BOS, EOS, Special("<|im_start|>"), Special("<|im_end|>")}


OTHER = ImageRef("b.png")


# what the user says -> the user's turn of mPLUG-Owl
@pytest.mark.parametrize(
    ("parts", "written"),
    [
        ((PICTURE, OTHER, "Same?"), "Human: (image)\nHuman: (image)\nHuman: Same?\n"),
        ((PICTURE, "\n", OTHER, " \n Same?\n"), "Human: (image)\nHuman: (image)\nHuman: Same?\n\n"),
        (("Left: ", PICTURE, "Right:\n", OTHER), "Human: Left:\nHuman: (image)\nHuman: Right:\nHuman: (image)\n"),
        ((" \n", PICTURE), "Human: (image)\n"),
        ((PICTURE, "  ", "\n", "What", " now?"), "Human: (image)\nHuman: What now?\n"),
        (("  Hi\n",), "Human:   Hi\n\n"),
    ],
)
def test_images_that_stand_apart(parts: tuple[str | ImageRef, ...], written: str) -> None:
    segments = render_prompt(CHAT_TEMPLATES["mplug_owl"], Conversation((Message("user", parts),)), None)
    assert write(segments) == f"[begin of text]{OWL}\n{written}AI:"


@pytest.mark.parametrize(("name", "text"), [("minigpt4", "###"), ("mplug_owl", ""), ("llama2", ""), ("chatml", "")])
def test_texts_that_end_an_answer(name: str, text: str) -> None:
    assert CHAT_TEMPLATES[name].stop_text == text


def test_an_image_in_an_answer_is_not_trained() -> None:
    messages = (Message("user", ("Draw.",)), Message("assistant", ("Here: ", PICTURE, " done")))
    segments = render(CHAT_TEMPLATES["chatml"], Conversation(messages), None)
    assert [s.is_trained for s in segments if s.content in ("Here: ", PICTURE, " done")] == [True, False, True]
