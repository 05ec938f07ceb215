"""One spelling of an answer, so that most right answers are equal as strings."""

import re

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "°": r"^\circ ",
        "\u00a0": " ",
        "\u202f": " ",
    }
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\{\s*,\s*\}\s*(?=\d{3})|(?<=\d),\s*\\!\s*(?=\d{3})", ""),  # thousands as LaTeX writes them
        (r"(?<=\d)(?:\\[,;: ]|\s)\s*(?=\d{3}(?!\d))", ""),
        (r"\\left\s*\.|\\right\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
        (r"\\q?quad", " "),
        (r"(?<!\\)\\[!,;:>\s]|~|\$|\\[()\[\]]|\*\*", " "),
        (r"^\s*(?:\\approx|≈|=)", ""),
        (r"(?<=\d)\s*\^?\s*\{?\s*(?:th|st|nd|rd)\s*\}?\s*$", ""),  # ordinals
        (r"√\s*\(([^()]*)\)|√\s*(\d+|[a-z])", r"\\sqrt{\1\2}"),
        (r"(?<=[\d.])[eE]([-+]?\d{1,3})(?![\d.])", r" \\times 10^{\1}"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\(?:lt|less)(?![a-z])", "<"),
        (r"\\(?:gt|greater)(?![a-z])", ">"),
        (r"\\leq(?:slant)?(?![a-z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![a-z])|>=", r"\\ge "),
        (r"\\neq(?![a-z])|!=", r"\\ne "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|(?<=[\d}])\s*\\?(?:text|mathrm)?\{?\s*degrees?\s*\}?", ""),
        (r"\\?%|(?<=[\d}\s])(?:percent(?:age)?|pct)\b", "%"),
    ]
]
_WRAPPED = r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|hbox|math(?:rm|bf|it|sf)|operatorname|bf)\s*\{([^{}]*)\}"
_UNIT_LETTERS = "AaCFghJKLmNsVW"
_CONJUNCTION = re.compile(r"(?<![A-Za-z\\])(?:,\s*)?(?:and|or)(?![a-z])")
_UNIT = re.compile(_WRAPPED + r"(?:\s*\^\s*\{?\s*-?\d+\s*\}?)?")
_PLAIN_UNIT = re.compile(
    r"(?<=[\d})])(?:\s+(?!sqrt|pi\b|sin|cos|tan|log|ln|mod)(?:[A-Za-z]{2,})(?:[\s./]+[A-Za-z]+)*"
    r"|(?:cm|mm|km|kg|mg|ml|mph|ft|hrs?|min|cents?|units?)|\s+[mgs])(?:\s*\^\s*\{?\d\}?|[²³])?\s*$"
)


def spell(answer: str) -> str:
    """One spelling: layout, units, degree and currency signs go; fractions and relations are written alike."""
    text = answer.translate(_UNICODE).replace(r"\$", "")
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _unwrap(text.strip())
    text = _CONJUNCTION.sub(",", text)
    text = _PLAIN_UNIT.sub("", text.rstrip(" .,;"))
    return re.sub(r"\s+", " ", text).rstrip(" .,;").lstrip(" ,;")


def _unwrap(text: str) -> str:
    r"""``\text{...}`` becomes its content where it is an answer or a joint, and goes where it names a unit."""

    def replace(match: re.Match[str]) -> str:
        content = match[1].strip(" ~")
        named_before = text[: match.start()].strip()
        joint = _CONJUNCTION.fullmatch(content)
        letter = len(content) == 1 and content not in _UNIT_LETTERS
        if joint or not named_before or letter or not re.match(r"[A-Za-z°]", content):
            return f" {content} "
        return " "

    return _UNIT.sub(replace, text)
