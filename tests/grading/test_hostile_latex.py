"""Answers made to break a grader: endless computations, deep nesting, broken LaTeX, strange characters."""

import random
import time

from lco_lite.grading import symbolic
from lco_lite.grading.math import grade_answer

BOMBS = [
    r"9^{9^{9^{9}}}",
    r"10^{10^{10}}!",
    r"100000000!",
    r"(((10!)!)!)!",
    r"2^{2^{2^{2^{2^{2}}}}}",
    r"(x+1)^{100000}",
    r"(x+y+z)^{400}",
    r"x^{100000000}-1",
    r"1e999999999",
    r"1.5 \times 10^{999999999}",
    r"\sum_{n=1}^{10^{10}} \frac{1}{n^{n}}",
    r"\prod_{n=1}^{100000000} n",
    r"\int_0^\infty e^{-x^{x^{x}}} \sin(x^x) dx",
    r"\lim_{x \to 0} \frac{\sin(\tan x) - \tan(\sin x)}{x^{7}}",
    r"\int \sqrt{\tan x} \, dx",
    r"\sqrt[1000000]{2^{1000001}}",
    r"\binom{1000000000}{500000000}",
    r"\begin{pmatrix} x & 1 \\ 1 & x \end{pmatrix}^{1000}",
    r"\sin^{1000}(x) + \cos^{1000}(x)",
    r"x^5 - 4x + 2 = 0",
    r"\{x : x^{7} + x + 1 < 0\}",
    r"\log_{0}(0)",
    r"\frac{1}{0}",
    r"0^{-1}",
    r"\infty - \infty",
    r"__import__('os').system('true')",
    r"\input{/etc/passwd}",
    "7" * 5_000,
    "7" * 499,
    "1," * 240,
    "(" * 240 + ")" * 240,
    "{" * 400,
    "}" * 400,
    r"\frac{" * 60,
    r"\frac{1}{" * 40 + "x" + "}" * 40,
    r"\sqrt{" * 60 + "2" + "}" * 60,
    r"\sin(" * 80 + "x" + ")" * 80,
    "x" + "^{x" * 80 + "}" * 80,
    "-" * 400 + "1",
    "1" + "+1" * 240,
    r"\left(" * 60,
    r"\text{" * 60,
    r"\boxed{" * 3_000,
    "answer is " * 2_000,
    "$" * 2_000,
    "#### " * 2_000,
    "a" * 20_000,
    "1.1" * 5_000,
    r"\[" * 5_000,
    r"\(x" * 5_000,
    "$x" * 5_000 + "\n",
    "\x00\ud800\u202e\u0660\U0001f600",
    "٣٤",
    "²³¹",
    "Ⅷ",
    "",
]
PIECES = r"""
0 1 2 7 42 -3 .5 1,000 3.14 x y z e i + - * / ^ _ = < > ! % $ & \\ , ; : ( ) [ ] { } \{ \} | ' \% \$ \pi \infty \le \ne
\in \cup \pm \frac{1}{2} \frac12 \sqrt{2} \sqrt[3]{x} \sin \cos \log \ln \sum_{n=1}^{9} \int_0^1 dx \lim \to
\binom{5}{2} \text{ \begin{pmatrix} \end{pmatrix} \text{and} cm \mathbb{R} \left( \right) \overline{3} ^\circ \cdot
\times \mod \boxed{ \undefined \\boxed answer is ####
"""


GOLDS = [
    r"\frac{1}{2}",
    r"3\sqrt{13}",
    "x^2+1",
    r"(2,\infty)",
    "0",
    r"\text{Evelyn}",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
]


def hostile_answers(count: int, seed: int) -> list[str]:
    """``count`` answers: the bombs, every second one boxed, then random strings of LaTeX pieces."""
    rng, pieces = random.Random(seed), [*PIECES.split(), "\n", " "]
    answers = [rf"\boxed{{{bomb}}}" if i % 2 else bomb for i, bomb in enumerate(BOMBS)]
    while len(answers) < count:
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))
        answers.append(rf"The answer is \boxed{{{text}}}." if rng.random() < 0.7 else text)
    return answers[:count]


def test_a_thousand_hostile_answers_are_graded_in_time_and_without_an_error(monkeypatch):
    monkeypatch.setattr(symbolic, "SECONDS", 0.5)
    slowest = 0.0
    for i, answer in enumerate(hostile_answers(1_000, seed=0)):
        start = time.monotonic()
        grade = grade_answer(answer, GOLDS[i % len(GOLDS)])
        slowest = max(slowest, time.monotonic() - start)
        assert grade.right in (True, False) and grade.why
    assert slowest < 5.0


def test_a_computation_without_end_stops_within_the_limit_and_the_next_one_is_answered():
    assert grade_answer("x^2", "x*x").right  # the process runs by now
    start = time.monotonic()
    assert grade_answer(r"\boxed{9^{9^{9^{9}}}}", r"3\sqrt{13}").why == "too long or too large to compare"
    assert time.monotonic() - start < 5.0
    assert grade_answer(r"\boxed{\sqrt{117}}", r"3\sqrt{13}").right


def test_every_comparison_after_one_that_was_stopped_is_answered(monkeypatch):
    monkeypatch.setattr(symbolic, "SECONDS", 2.0)
    for _ in range(2):
        assert symbolic.equal(r"9^{9^{9^{9}}}", r"3\sqrt{13}") is None
        assert symbolic.equal(r"\sqrt{117}", r"3\sqrt{13}") is True
