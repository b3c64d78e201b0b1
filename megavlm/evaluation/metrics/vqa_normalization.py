"""Spelling of short answers made uniform, as the evaluation of VQAv2 does it.

Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py at a013f00; its rules in words:
visualqa.org/evaluation.html. Quirks that decide about scores are kept and named below. One is not: the script removes
at most 32 periods (it passes a flag where ``re.sub`` takes a count), here all go.
"""

import re

_ARTICLES = ("a", "an", "the")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}

# Apostrophe, colon and period are not among them: "girl's" and "2:50" keep theirs, periods have a rule of their own.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Contractions that get back one forgotten apostrophe. Those whose bare form is another word are left out by the
# script as well: its, were, well, shell, wed, lets, shes. Capitals ("Im") stand in its table but are never reached.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:position] + word[position + 1 :]: word
    for word in _CONTRACTED.split()
    for position, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the script has this one the wrong way round


def normalize_answer(answer: str) -> str:
    """Apply VQAv2's rules: punctuation, then case, number words, articles and contractions.

    - A punctuation mark becomes a blank; it vanishes where it, anywhere in the answer, stands beside a blank, and all
      marks vanish where the answer has a comma between digits. So "t-shirt" is "t shirt", "a - b" is "b", "1,000" is
      "1000".
    - A period vanishes unless a digit follows.
    - "none" and "zero" to "ten" become digits; "a", "an", "the" vanish; a contraction gets its apostrophe.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    words = [_DIGITS.get(word, word) for word in _drop_punctuation(answer).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _drop_punctuation(answer: str) -> str:
    has_thousands = re.search(r"\d,\d", answer) is not None
    dropped = answer
    for mark in _PUNCTUATION:
        # looked for in the answer as given: marks already replaced by blanks do not make others vanish
        vanishes = has_thousands or f"{mark} " in answer or f" {mark}" in answer
        dropped = dropped.replace(mark, "" if vanishes else " ")
    return re.sub(r"\.(?!\d)", "", dropped)
