"""What the grader of mathematics reads, beside math-verify, and what each of its rules saves (docs/evaluation.md).

    LCO_LITE_DATA=FOLDER python benchmarks/graders.py            # a quarter of an hour; --json for machines

Three collections: the pairs of other graders' tests; GSM8K's published solutions with other endings, right and wrong;
MATH's gold answers in other spellings, right, and changed, wrong. A rule is left out, and the answers
that are then lost or let in are counted.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from lco_lite.files import read_jsonl
from lco_lite.grading import equality, math
from tests.grading.test_endings import STYLES

PAIRS = ("grader_math_verify", "grader_hendrycks_math", "grader_rasbt_ch03")
NEVER = re.compile(r"(?!)")


class Case(NamedTuple):
    collection: str
    response: str
    gold: str
    right: bool


def main(
    endings: Annotated[int, typer.Option(help="GSM8K solutions for each ending.")] = 6,
    golds: Annotated[int, typer.Option(help="Gold answers of MATH.")] = 400,
    peer: Annotated[bool, typer.Option(help="Run math-verify alone, too.")] = True,
    rules: Annotated[bool, typer.Option(help="Leave out one rule after the other.")] = True,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    cases = [*pairs(), *gsm8k(endings), *spellings(golds)]
    verdicts = [ours(case) for case in cases]
    agree = {"ours": agreement(cases, verdicts)}
    if peer:
        agree["math-verify"] = agreement(cases, [math_verify(case) for case in cases])
    saved = {}
    for name, (module, attribute, without) in rules_left_out().items() if rules else ():
        kept = getattr(module, attribute)
        setattr(module, attribute, without)
        saved[name] = difference(cases, verdicts, [ours(case) for case in cases])
        setattr(module, attribute, kept)
        if not as_json:
            typer.echo(f"{name:60} {saved[name]}")
    if as_json:
        return typer.echo(json.dumps({"agreement": agree, "rules": saved}))
    for name, table in agree.items():
        typer.echo(f"{name:60} {table}")


def ours(case: Case) -> bool:
    return math.grade_answer(case.response, case.gold).right


def math_verify(case: Case) -> bool:
    from math_verify import parse, verify

    logging.disable(logging.WARNING)
    gold = case.gold if "$" in case.gold or "\\boxed" in case.gold else f"${case.gold}$"
    return bool(verify(parse(gold), parse(case.response)))


def agreement(cases: list[Case], verdicts: list[bool]) -> dict[str, str]:
    """Collection -> right answers found, wrong ones let in."""
    table = {}
    for name in dict.fromkeys(case.collection for case in cases):
        of = {kind: [v for c, v in zip(cases, verdicts, strict=True) if (c.collection, c.right) == (name, kind)]
              for kind in (True, False)}  # fmt: skip
        found = f"{sum(of[True])} of {len(of[True])} right answers"
        table[name] = f"{found}, {sum(of[False])} of {len(of[False])} wrong ones let in"
    return table


def difference(cases: list[Case], before: list[bool], after: list[bool]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for case, x, y in zip(cases, before, after, strict=True):
        if x != y:
            kind = f"{case.collection} {'lost' if x and case.right else 'let in' if not case.right else 'found'}"
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def rules_left_out() -> dict[str, tuple[Any, str, Any]]:
    """Name -> (module, attribute, what stands in for it)."""
    rewrites = equality._REWRITES
    left_out: dict[str, tuple[Any, str, Any]] = {
        f"spelling: {rule[0]}": (equality, "_REWRITES", [r for r in rewrites if r is not rule]) for rule in rewrites
    }
    for module, names in {
        equality: "_UNIT _PLAIN_UNIT _CONJUNCTION _RATIO _POWER _FRACTION _REPEATING _DECIMAL_COMMA _IN_BASE _ASSIGNED "
        "_FUNCTION _OPTION",
        math: "_EMPTY_BOX _FINAL _STATEMENT _NO_PROSE _ALIGNED",
    }.items():
        left_out |= {name: (module, name, NEVER) for name in names.split()}
    stand_ins: dict[str, tuple[Any, Callable[..., Any]]] = {
        "_collection": (equality, lambda text: None),
        "_equal_words": (equality, lambda answer, gold: None),
        "_equation_for_zero": (equality, lambda answer, gold: False),
        "_quantity": (equality, lambda text: None),
        "_joins": (math, lambda gap, by_words=False: False),
        "_joined_spans": (math, lambda sentence, first: math._content(first)),
        "_percent": (math, lambda text, at: ""),
        "_bare": (math, lambda line: None),
    }
    left_out |= {name: (module, name, stand_in) for name, (module, stand_in) in stand_ins.items()}
    return left_out | {"_LABEL": (math, "_LABEL", re.compile("")), "_UNICODE": (equality, "_UNICODE", {})}


# the collections


def rows(name: str) -> list[dict[str, Any]]:
    return read_jsonl(Path(os.environ["LCO_LITE_DATA"]) / f"{name}.jsonl")


def pairs() -> Iterator[Case]:
    for row in (row for name in PAIRS for row in rows(name)):
        yield Case("pairs", row["pred"] or "", row["gold"] or "", bool(row["expected"]))


def gsm8k(n: int) -> Iterator[Case]:
    """``n`` solutions for each ending, one in three of them with an answer above 999."""
    drawn, solutions = random.Random(0), [row["answer"].partition("\n#### ")[::2] for row in rows("gsm8k_train")]
    large = [one for one in solutions if len(one[1]) > 3]
    for style in STYLES:
        for working, gold in drawn.sample(solutions, n - n // 3) + drawn.sample(large, n // 3):
            value, working = int(gold.replace(",", "")), re.sub(r"<<.*?>>", "", working)
            number = f"{value:,}" if drawn.random() < 0.5 else str(value)
            wrong = drawn.choice([value + 1, -value or 1, 10 * value or 1])
            yield Case("gsm8k", f"{working}\n{style.format(n=number)}", gold, True)
            yield Case("gsm8k", f"{working}\n{style.format(n=wrong)}", gold, False)


RESPELT: dict[str, Callable[[str], str]] = {
    "as it is": lambda g: g,
    "dfrac": lambda g: g.replace(r"\frac", r"\dfrac"),
    "no left": lambda g: g.replace(r"\left", "").replace(r"\right", ""),
    "no unit": lambda g: re.sub(r"\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", "", g) or g,
    "no degrees": lambda g: re.sub(r"\^\{?\\circ\}?$", "", g),
    "degrees": lambda g: re.sub(r"\^\{?\\circ\}?$", " degrees", g),
    "no percent": lambda g: re.sub(r"\\?%$", "", g),
    "no dollar": lambda g: g.replace(r"\$", ""),
    "comma": lambda g: re.sub(r"^(\d{1,3})(\d{3})$", r"\1,\2", g),
    "latex comma": lambda g: re.sub(r"^(\d{1,3})(\d{3})$", r"\1{,}\2", g),
    "thin space": lambda g: re.sub(r"^(\d{1,3})(\d{3})$", r"\1\\,\2", g),
    "no comma": lambda g: re.sub(r",\\!|\{,\}|\\,", "", g) if re.fullmatch(r"[\d,{}!\\]+", g) else g,
    "unicode": lambda g: re.sub(r"\\pi(?![a-z])", "π", re.sub(r"\\infty", "∞", re.sub(r"\\cup(?![a-z])", "∪", g))),
    "name": lambda g: f"x={g}" if re.fullmatch(r"-?[\d.]+", g) else g,
    "dollars": lambda g: f"${g}$",
    "text": lambda g: rf"\text{{{g}}}" if re.fullmatch(r"-?\d+|\w+", g) else g,
    "no text": lambda g: re.sub(r"^\\text(?:bf)?\{([^{}]*)\}$", r"\1", g),
    "base": lambda g: re.sub(r"_\{?(\d+)\}?$", r"_{\1}", g),
    "matrix": lambda g: g.replace("pmatrix", "bmatrix"),
    "sqrt": lambda g: re.sub(r"\\sqrt\{(\w+)\}", r"sqrt(\1)", g),
    "pi": lambda g: re.sub(r"\\pi(?![a-zA-Z])", "pi", g),
    "decimal": lambda g: f"{int(m[1]) / int(m[2]):g}" if (m := re.fullmatch(r"\\frac\{(\d)\}\{(2|4|5|8)\}", g)) else g,
    "mixed": lambda g: re.sub(r"^(\d+) ?\\frac\{(\d+)\}\{(\d+)\}$", r"\1 \2/\3", g),
    "unit": lambda g: g + r"\text{ cm}^2" if re.fullmatch(r"-?\d+", g) else g,
    "plain unit": lambda g: f"{g} square units" if re.fullmatch(r"-?\d+", g) else g,
    "unit letter": lambda g: f"{g}m" if re.fullmatch(r"\d+", g) else g,
    "set": lambda g: rf"\{{{g}\}}" if re.fullmatch(r"-?\d+(, ?-?\d+)+", g) else g,
    "and": lambda g: re.sub(r"^(-?\d+), ?(-?\d+)$", r"\1 and \2", g),
    "or": lambda g: re.sub(r"^(-?\d+), ?(-?\d+)$", r"x=\1 \\text{ or } x=\2", g),
    "ordinal": lambda g: g + r"^{\mathrm{th}}" if re.fullmatch(r"[4-9]|1\d", g) else g,
}


def spellings(n: int) -> Iterator[Case]:
    solutions = [row["solution"] for name in ("math_train", "math_test_minus_math500") for row in rows(name)]
    golds = list(dict.fromkeys(box for solution in solutions if (box := math.boxed(solution))))
    chosen = random.Random(0).sample(golds, n)
    for gold, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        for answer in dict.fromkeys(respell(gold) for respell in RESPELT.values()):
            yield Case("math", rf"\boxed{{{answer}}}", gold, True)
        for answer in [other, *mutated(gold)]:
            yield Case("math", rf"\boxed{{{answer}}}", gold, False)


def mutated(gold: str) -> Iterator[str]:
    """Near it, and wrong: another number, a set for a point, a closed interval for an open one, the other order."""
    if number := re.search(r"\d+", gold):
        yield gold[: number.start()] + str(int(number[0]) + 1) + gold[number.end() :]
    if re.fullmatch(r"\([^()]*,[^()]*\)", gold):
        yield rf"\{{{gold[1:-1]}\}}"
        yield f"[{gold[1:-1]}]"
        first, _, rest = gold[1:-1].partition(",")
        if first.strip() != rest.strip() and "," not in rest:
            yield f"({rest}, {first})"


if __name__ == "__main__":
    typer.run(main)
