"""Our chat templates as Jinja, which is what ``transformers`` reads."""

import json
import re
from collections.abc import Callable, Sequence

from megavlm.data.chat_template import ChatTemplate, Piece, Special

# A message's content is a text, or a list of parts; both as transformers and OpenAI spell them.
_PARTS = """\
{%- macro parts(content, keeps_text) -%}
{%- if content is string -%}
{%- if keeps_text -%}{{ content }}{%- endif -%}
{%- else -%}
{%- for part in content -%}
{%- if part.type in ['image', 'image_url'] -%}{{ @image }}{%- elif keeps_text -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
# The user's turn where images stand apart from their neighbours. \ufdd0 stands around texts that come from
# published_code/text_megavlm.py.
_SEPARATED = """\
{%- macro separated(content, keeps_text) -%}
{%- if content is string -%}
{{ content }}
{%- else -%}
{%- set laid = namespace(text='', last='') -%}
{%- for part in content -%}
{%- if part.type in ['image', 'image_url'] -%}
{%- if laid.last == 'text' -%}{%- set laid.text = laid.text.rstrip(' \\t\\r\\n\\ufdd0') -%}{%- endif -%}
{%- if laid.text != '' -%}{%- set laid.text = laid.text ~ @separator -%}{%- endif -%}
{%- set laid.text = laid.text ~ @image -%}
{%- set laid.last = 'image' -%}
{%- else -%}
{%- set text = part.text.lstrip(' \\t\\r\\n\\ufdd0') if laid.last == 'image' else part.text -%}
{%- if text != '' -%}
{%- if laid.last == 'image' -%}{%- set laid.text = laid.text ~ @separator -%}{%- endif -%}
{%- set laid.text = laid.text ~ text -%}
{%- set laid.last = 'text' -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{{ laid.text }}
{%- endif -%}
{%- endmacro -%}
"""
_SYSTEM = """\
{%- set turns = messages -%}
{%- set system = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set turns = messages[1:] -%}
{%- set system = parts(messages[0].content, true) -%}
{%- endif -%}
{%- if system == '' -%}{%- set system = @default_system -%}{%- endif -%}
{%- if system != '' -%}{%- set system = @system_prefix ~ system ~ @system_suffix -%}{%- endif -%}
"""
_BEGINNING = "{{ @conversation_prefix }}"
_SYSTEM_FIRST = "{{ system }}"
_TURNS_PREFIX = "{{ @turns_prefix }}"
_TURNS = """\
{%- for message in turns -%}
{%- if message.role == ('assistant' if loop.index0 % 2 else 'user') -%}
{%- if message.role == 'user' -%}
{{ @user_prefix }}@inside{{ @user_parts(message.content, @keeps_text) }}{{ @user_suffix }}
{%- else -%}
{{ @assistant_prefix }}{{ @answer_start }}{{ parts(message.content, true) }}{{ @assistant_suffix }}
{%- endif -%}
{%- else -%}
{{ raise_exception('user and assistant take turns, and the user begins') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ @assistant_prefix }}{%- endif -%}
"""
_INSIDE = "{%- if loop.first -%}{{ system }}{%- endif -%}"


def chat_jinja(
    template: ChatTemplate, spell: Callable[[Special], str], image_token: str, system_prompt: str | None
) -> str:
    """Write a template as Jinja.

    Args:
        template: what to write.
        spell: the spelling of a special symbol.
        image_token: what stands for an image.
        system_prompt: system message of a conversation without one; None: the template's own, ``""``: none.
    """

    def literal(pieces: Sequence[Piece]) -> str:
        return _quoted("".join(spell(piece) if isinstance(piece, Special) else piece for piece in pieces))

    default_system = template.default_system if system_prompt is None else system_prompt
    values = {
        "@image": _quoted(image_token),
        "@default_system": _quoted(default_system or ""),
        "@keeps_text": "true" if template.keeps_user_text else "false",
        "@answer_start": _quoted(template.answer_start),
        "@inside": _INSIDE if template.system_inside_first_user else "",
        "@user_parts": "parts" if template.image_separator is None else "separated",
        "@separator": _quoted(template.image_separator or ""),
        "@conversation_prefix": literal(template.conversation_prefix),
        "@turns_prefix": literal(template.turns_prefix),
        "@system_prefix": literal(template.system_prefix),
        "@system_suffix": literal(template.system_suffix),
        "@user_prefix": literal(template.user_prefix),
        "@user_suffix": literal(template.user_suffix),
        "@assistant_prefix": literal(template.assistant_prefix),
        "@assistant_suffix": literal(template.assistant_suffix),
    }
    head = "" if template.system_inside_first_user else _SYSTEM_FIRST
    head += _TURNS_PREFIX if template.turns_prefix else ""
    macros = _PARTS + (_SEPARATED if template.image_separator is not None else "")
    source = macros + _SYSTEM + _BEGINNING + head + "\n" + _TURNS.rstrip("\n")
    return re.sub("@[a-z_]+", lambda match: values[match[0]], source)


def _quoted(text: str) -> str:
    """A text as Jinja's literal, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)
