"""Words of a caption, near enough to the Penn Treebank tokeniser that coco-caption runs in Java.

Source: tylin/coco-caption, pycocoevalcap/tokenizer/ptbtokenizer.py (Stanford CoreNLP 3.4.1, lower-cased, punctuation
tokens dropped). Alike: "don't" is "do n't", "dog's" is "dog 's"; hyphenated words, 1,000, 3.5, 10:30 and "u.s." are one
token; $, % and & are tokens; quotes, periods, commas, dashes and the like vanish.

Different, for want of Java:

- "cannot", "gonna", "wanna" stay one word (Stanford: "can not", "gon na").
- Of abbreviations only single letters with periods keep them ("u.s."); "mr." and "st." lose theirs.
- Brackets vanish. coco-caption's list names them in capitals (-LRB-), and its option lower-cases tokens first.
- Web addresses, emoticons, fractions and dates are cut at every mark.
"""

import re

# straight and curly quotes, dashes and the ellipsis, written by number since the source is ASCII
_DROPPED = frozenset("'\"`.,;:?!-()[]{}" + "\u2018\u2019\u201c\u201d\u2013\u2014\u2026")
_CLITIC = re.compile(r"(?<=[^\W\d_])(n't|'(?:s|m|d|re|ve|ll))\b")
_TOKEN = re.compile(
    r"n't|'(?:s|m|d|re|ve|ll)\b"  # cut off before
    r"|(?:\b[a-z]\.){2,}"  # u.s.
    r"|\d+(?:[.,:]\d+)+"  # 1,000  3.5  10:30
    r"|\w+(?:-\w+)*"  # dog  t-shirt
    r"|[^\w\s]"  # one mark
)


def split_caption(caption: str) -> list[str]:
    """Cut a caption into lower-case words, punctuation left out."""
    text = _CLITIC.sub(r" \1", caption.lower().replace("\u2019", "'"))
    return [token for token in _TOKEN.findall(text) if token not in _DROPPED]
