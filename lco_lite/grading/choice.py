"""Which of the lettered choices does a response pick? The grader of multiple-choice tasks.

A letter counts where it is declared, in this order: the last ``\\boxed{}``, holding a letter or the words of one
choice; the last statement such as ``the answer is (B)`` or ``B is correct``; a first or last line that is a letter,
with or without its choice. Where several choices are listed, a line that begins with a letter declares nothing, nor
does a statement that goes on with the list (``Answer: A. … B. …``). A response that picks none is wrong.
"""

import re
from collections.abc import Sequence

from lco_lite.errors import UsageError
from lco_lite.grading import Grade, Item
from lco_lite.grading.equality import spell
from lco_lite.grading.math import boxed

LETTERS = "ABCDEFGHIJ"
_OPEN = r"(?i:(?:option|choice|letter)\s+)?(?:[\s*_$\"'`(\[{]|\\(?:text|math)[a-z]*\{|\\\(){0,9}"
_CLOSE = r"(?:[$)\]}*_\"'`]|\\\)){0,9}"
_ANOTHER = (  # A, B or C; (A) (B)
    r"[ \t]*(?:[,;/(]?[ \t]*(?:and|or)[ \t]+\(?[A-H]\b|[,;/][ \t]*[A-H](?:[,;/]|[ \t]+(?:and|or)\b)"
    r"|[,;/]?[ \t]*\([A-H]\))"
)
_END = (  # of a letter alone, or of one in brackets
    rf"(?!{_CLOSE}{_ANOTHER})(?:{_CLOSE}(?=[.,:;]|\s*$|\s*\(|\s+(?:because|since|as)\b|\n)|{_CLOSE}\)[*_]{{0,2}}(?=\s))"
)
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?!\s+(?:choice|option)s\b)"
    r"[^\n.]{0,40}?(?:\bis\b|:|\bas\b|\b(?:would|should|must)\s+be\b)\s{0,3})"
    rf"{_OPEN}(?:([A-J])|(?<=\()([a-j])(?=\))){_END}"
    rf"|(?<![A-Za-z])([A-J]){_CLOSE}(?i:\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b)"
)
_BARE = re.compile(rf"{_OPEN}([A-J])[.:]?{_CLOSE}[.,:\s]*")
_LINE = re.compile(rf"{_OPEN}([A-J])(?:{_CLOSE}[.:,]?\s*(?:\(.*)?|{_CLOSE}[).:]+{_CLOSE}\s*\S.*)")
_LISTED = re.compile(r"(?:^|(?<=\s))[*(\[]*([A-J])[).:](?![A-Z]\.)", re.MULTILINE)


def picked(response: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice, among as many letters as there are choices; None where the response picks none."""
    letters = LETTERS[: len(choices)]
    response = response[-20_000:]
    response = response.rpartition("</think>")[2] or response
    box = boxed(response)
    if box is not None:
        return _from_box(box, choices, letters)
    echoes = [m.span() for m in _echo(choices).finditer(response)]
    for stated in reversed(list(_STATED.finditer(response))):
        letter, at = stated[stated.lastindex or 0].upper(), stated.start(stated.lastindex or 0)
        if letter in letters and not any(start <= at < end for start, end in echoes):
            return letter
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    listed = _several_listed(response, letters)
    if len({m[1] for line in lines if (m := _BARE.fullmatch(line))}) > 1:
        return None
    matches = [(_BARE if listed else _LINE).fullmatch(line) for line in (lines[:1] + lines[-1:])]
    return next((m[1] for m in matches if m and m[1] in letters), None)


def grade_choice(response: str, item: Item) -> Grade:
    """``item.row`` has ``choices``, texts or numbers, and ``answer``, as ``answer_index`` reads them; UsageError where
    it has not."""
    if (index := answer_index(item)) is None:
        raise UsageError(
            f"grader choice: item {item.id} has no `choices` with an `answer` (letter, index or text) among them"
        )
    letter = picked(response, [str(choice) for choice in item.row["choices"]])
    if letter is None:
        return Grade(False, None, "no choice found")
    right = letter == LETTERS[index]
    return Grade(right, letter, "equal" if right else f"the answer is {LETTERS[index]}")


def answer_index(item: Item) -> int | None:
    """Which of ``item.row["choices"]`` is right: ``answer`` is its letter, its index, also as text, or its text. None
    where it is none of them, the text of several, or the index of one and the text of another."""
    choices, answer = item.row.get("choices"), item.row.get("answer")
    if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
        return None
    if isinstance(answer, str):
        said = answer.strip()
        if len(said) == 1 and said in LETTERS[: len(choices)]:
            return LETTERS.index(said)
        known = {i for i, choice in enumerate(choices) if str(choice).strip() == said}
        known |= {i for i in range(len(choices)) if str(i) == said}
        return known.pop() if len(known) == 1 else None
    is_index = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    return answer if is_index else None


def _several_listed(text: str, letters: str) -> bool:
    return len(set(_LISTED.findall(text)) & set(letters)) > 1


def _echo(choices: Sequence[str]) -> re.Pattern[str]:
    """The choices from A on, two or more, each with nothing after it but the next."""
    words = [r"\s+".join(map(re.escape, choice.split())) for choice in choices]
    items = [rf"{letter}[).:]\W{{0,9}}{text}" for letter, text in zip(LETTERS, words, strict=False)]
    more = "".join(rf"(?:\W{{1,9}}{item}" for item in items[2:]) + ")?" * (len(items) - 2)
    return re.compile(rf"{items[0]}\W{{1,9}}{items[1]}{more}(?=[.,;*]*\s*(?:$|[A-J][).:]))", re.MULTILINE)


def _from_box(box: str, choices: Sequence[str], letters: str) -> str | None:
    same = [letter for letter, choice in zip(letters, choices, strict=True) if _plain(choice) == _plain(box)]
    text = spell(box)
    if len(same) == 1 and len(_plain(box)) > 1:
        return same[0]
    if _several_listed(text, letters):
        return None
    match = _LINE.fullmatch(text if len(text.strip("()")) > 1 or same else text.upper())
    if match and match[1] in letters:
        return match[1]
    return same[0] if len(same) == 1 else None


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", spell(text)).strip().casefold()
