"""Which answers count as equal: one table of those that do, one of those that do not."""

import subprocess
import sys
import threading

import pytest

from lco_lite.grading.math import compare, grade_answer

EQUAL = [  # (answer, gold)
    ("x=5", "5"),
    ("5", "x=5"),
    (r"\frac{3}{2}", "1.5"),
    ("1.5", r"\frac32"),
    ("2x+3", "y = 2x + 3"),
    ("y=2x+3", "y = 2x + 3"),
    ("f(t)=2t+1", "f(x)=2x+1"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"),
    (r"1+\sqrt{19},1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"5\text{ cents}", "5"),
    ("5.4", r"5.4 \text{ cents}"),
    (r"\$18.90", "18.9"),
    ("137.5", r"137 \frac{1}{2}"),
    ("C", r"\text{(C)}"),
    ("(C)", r"\text{(C)}"),
    (r"\text{(C) Plane}", r"\text{(C)}"),
    ("C. Plane", r"\text{(C)}"),
    ("evelyn", r"\text{Evelyn}"),
    (r"\textbf{Evelyn}", r"\text{Evelyn}"),
    ("0", "0"),
    ("0.0", "0"),
    ("-0", "0"),
    ("90", r"90^\circ"),
    (r"90^{\circ}", r"90^\circ"),
    ("90 degrees", r"90^\circ"),
    (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}"),
    ("864", r"864 \mbox{ inches}^2"),
    (r"864\text{ in}^2", r"864 \mbox{ inches}^2"),
    ("864 square inches", r"864 \mbox{ inches}^2"),
    ("864 in^2", r"864 \mbox{ inches}^2"),
    ("10080", r"10,\!080"),
    ("10,080", r"10,\!080"),
    (r"6.72\times 10^{-5}", ".0000672"),
    ("6.72e-5", ".0000672"),
    ("4210_5", "4210_{5}"),
    (r"\begin{bmatrix} -2 \\ -14 \\ -7 \end{bmatrix}", r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}"),
    (r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
    ("-2,1", "1,-2"),
    (r"\{1,-2\}", "1,-2"),
    ("x=1, x=-2", "1,-2"),
    (r"x=1 \text{ or } x=-2", "1,-2"),
    ("1 and -2", "1,-2"),
    ("9a/20+11/20", r"\frac{11+9a}{20}"),
    ("q-p", "-(p-q)"),
    ("-q+p", "p - q"),
    (r"\frac{1}{4}", "0.25"),
    (r"25\%", "25"),
    ("25", r"25\%"),
    (".25", r"25\%"),
    (r"12\pi", r"12 \pi"),
    ("12π", r"12\pi"),
    (r"\dfrac{\sqrt{21}}{5}", r"\frac{\sqrt{21}}{5}"),
    ("sqrt(21)/5", r"\frac{\sqrt{21}}{5}"),
    ("3√13", r"3\sqrt{13}"),
    (r"6-5\mathrm{i}", "6 - 5i"),
    ("(3, π/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\left(3,\pi/2\right)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("m+n=116", "116"),
    (r"\text{Area} = 5", "5"),
    ("2 + 3 = 5", "5"),
    ("18 dollars", "18"),
    (r"\$18", "18"),
    (r"18 \text{ dollars per day}", "18"),
    ("x^3 + 3x - 6", "x^3+3x-6"),
    ("5^{th}", "5"),
    (r"5\text{th}", "5"),
    ("72 clips", "72"),
    (r"\approx 5", "5"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\text{3}", "3"),
    ("{3}", "3"),
    ("3.", "3"),
    ("+3", "3"),
    ("(3)", "3"),
    ("**3**", "3"),
    (r"\mathbf{3}", "3"),
    (r"3\,000", "3000"),
    ("3 000", "3000"),
    (r"(2,+\infty)", r"(2,\infty)"),
    (r"(2,\infty)", r"(2, \infty)"),
    ("2^{10}", "1024"),
    (r"\frac{2}{1005}", "2/1005"),
    (r"\frac{5}{13}\approx 0.385", r"\frac{5}{13}"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    ("1:2", "1:2"),
    ("1/2", "1:2"),
    ("10:30", r"10\!:\!30"),
    (r"5\text{ m}", "5"),
    (r"5\text{ m}^2", "5"),
    (r"5 \mathrm{~m/s}", "5"),
    ("5 m", "5"),
    (r"12\text{ cm}", "12"),
    ("2ab", "2ab"),
    ("2ba", "2ab"),
    ("e", r"\text{E}"),
    (r"\frac{\pi}{4}\text{ radians}", r"\frac{\pi}{4}"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    ("3!", "6"),
    (r"\binom{5}{2}", "10"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"5\frac12", "5.5"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\emptyset", r"\emptyset"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    (r"[1,2)\cup(2,3]", r"[1,2) \cup (2,3]"),
    ("288pi", r"288\pi"),
    ("4e+7p", "7p+4e"),
    ("4 sqrt(5)", r"4\sqrt{5}"),
    (r"12^{\mathrm{th}}", "12"),
    (r"\varnothing", r"\emptyset"),
    ("∅", r"\emptyset"),
    ("€18", "18"),
    ("18 €", "18"),
    ("18m", "18"),
    ("18 l", "18"),
    ("3,5", "3.5"),  # no list answers a decimal
    ("11 2/3", r"11\frac{2}{3}"),
    ("16-7=9; 9*2=18", "18"),
    ("9 x 2 = 1,018", "1018"),
    ("80,000*1.5=120,000", "120000"),
    ("52_8", "52_{8}"),
    ("(52)_8", "52_8"),
    ("52", "52_8"),  # the question says in which base
    ("52_8", "52"),
    ("AB_{16}", r"\text{AB}_{16}"),
    ("100, 200", "100,200"),
    ("0, 5", "0,5"),
    ("x = 1; y = 2", "x = 1, y = 2"),
]
DIFFERENT = [
    ("0", "1"),
    ("", "0"),
    ("52_7", "52_8"),
    (r"\frac{2}{2^{98}}", r"\frac{1}{2^{98}}"),
    ("53", "52_8"),
    ("101_2", "5"),
    ("32, 349", "32349"),
    ("3, 5", "3.5"),
    ("9*2=19", "18"),
    ("x-2=18", "20"),
    ("5m", "5x"),
    ("2", "2s"),  # a variable, where gold has it
    ("1,234", "1.234"),
    ("12pi", "12"),
    ("1 1/2", r"\frac{11}{2}"),
    ("18, 19", "18"),
    ("- -4", "4x"),
    ("2", "52_8"),
    ("-5", "5"),
    (r"\pm 5", "5"),
    ("5", r"\pm 5"),
    ("(1,2)", "[1,2]"),
    ("(2,1)", "(1,2)"),
    ("q-p", "p-q"),
    ("east", "west"),
    ("D", r"\text{(C)}"),
    ("CD", r"\text{(C)}"),
    ("cos x", r"\cot x"),
    ("x=5,x=6", "x=5"),
    ("0.333", r"\frac{1}{3}"),
    ("10.8", r"3\sqrt{13}"),
    ("x^2-4=0", "0"),
    ("2ab", "2"),
    ("2", "2ab"),
    ("1", "1,-2"),
    ("1,-2,3", "1,-2"),
    ("12", "1 2"),
    ("1,2", "12"),
    ("1.2", "1,2"),
    ("100", "1,00"),
    ("x", "5"),
    (r"\frac{1}{0}", "0"),
    ("nan", "0"),
    ("i", "1"),
    ("not east", "east"),
    (r"2\sqrt{3}", r"\sqrt{11}"),
    ("x<2", "x>2"),
    (r"(2,\infty)", r"[2,\infty)"),
    ("y=2x", "y=-2x"),
    ("2x", "y=-2x"),
    ("5 or 6", "5"),
    ("Evelyn, Angela", r"\text{Evelyn}"),
    (r"\text{Angela}", r"\text{Evelyn}"),
    ("0.5", "50"),
    ("a", "b"),
    ("5x", "5"),
    (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"x \geq 1", r"x \leq 1"),
    ("x=5", "y=5"),
    (r"\sqrt{x^2}", "-x"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_answers_count_as_right(answer, gold):
    assert compare(answer, gold)[0]


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_answers_count_as_wrong(answer, gold):
    assert not compare(answer, gold)[0]


def test_zero_is_right_where_zero_is_asked_for():
    assert grade_answer(r"so there is none: \boxed{0}", "0").right


def test_gold_may_be_a_solution_that_boxes_its_answer():
    assert grade_answer("The answer is 7.", r"We add and find $\boxed{7}$.").right


WORKED_OUT = [
    ("26000", "26000"),
    ("26,000", "26000"),
    (r"x = 26000", "26000"),
    (r"2\cdot 13000 = 26000", "26000"),
    ("m + n = 116", "116"),
    (r"P(X = 2) = \frac{1}{2}", r"\frac12"),
    (r"\frac{5}{13} \approx 0.385", r"\frac{5}{13}"),
    ("1,000/3", r"\frac{1000}{3}"),
    (r"26000\text{ m}", "26000"),
    (r"2.6 \times 10^4", "26000"),
    (r"\frac{2}{3}", r"\frac{4}{6}"),
    (r"-\frac{2}{3}", r"-2/3"),
    (r"1\frac{1}{2}", "1.5"),
    ("0.5", r"\frac{1}{2}"),
    (r"50\%", "50"),
    ("10^3", "10^3"),
    (r"\frac{4}{6}", r"\frac{4}{6}"),
    ("40_9", "40_9"),
    (r"\sqrt{8}", r"2\sqrt{2}"),  # gold is no plain number
    ("(x+1)^2", "x^2+2x+1"),
]
TO_WORK_OUT = [
    ("513^2 - 487^2", "26000"),
    ("5!", "120"),
    ("2^{10}", "1024"),
    ("10^3", "1000"),
    (r"\frac{4}{6}", r"\frac{2}{3}"),
    (r"\frac{6}{3}", "2"),
    (r"\sqrt{16}", "4"),
    (r"\binom{5}{2}", "10"),
    ("2+3", "5"),
    (r"\sqrt{25}", "x=5"),
    ("x = 2+3", "5"),
    (r"\omega^3 = 1", "1"),
    ("58_9 - 18_9", "40_9"),
]


@pytest.mark.parametrize(("answer", "gold"), WORKED_OUT)
def test_a_number_that_is_worked_out_is_right(answer, gold):
    assert compare(answer, gold, evaluated=True)[0]


@pytest.mark.parametrize(("answer", "gold"), TO_WORK_OUT)
def test_a_formula_where_a_number_is_asked_for_earns_nothing_where_answers_are_to_be_worked_out(answer, gold):
    assert compare(answer, gold)[0], "it is equal"
    assert compare(answer, gold, evaluated=True) == (False, "equal, but not worked out")


def test_numbers_alone_are_a_sequence_and_in_a_box_or_after_words_solutions():
    assert not grade_answer("10, 4, -2", "4, 10, -2").right
    assert grade_answer("4.0, 10, -2", "4, 10, -2").right
    for response in (r"\boxed{10, 4, -2}", "The answer is 10, 4, -2.", "$10, 4, -2$", "So x is one of\n10, 4, -2"):
        assert grade_answer(response, "4, 10, -2").right, response
    assert grade_answer("1,018", "1018").right and grade_answer("1,018", "1,018").right


def test_boxes_that_words_connect_are_one_list_where_gold_is_a_list():
    response = r"One root is \boxed{9}, and the other root is \boxed{-1}."
    assert grade_answer(response, "-1, 9").right
    assert not grade_answer(response, "9").right
    assert grade_answer(r"First \boxed{9} apples, then \boxed{11} in all.", "11").right
    assert not grade_answer(r"\boxed{9} is wrong, so \boxed{-1}", "-1, 9").right


def test_grade_names_what_it_found_and_why():
    found = grade_answer(r"\boxed{\frac{2}{4}}", "1/2")
    assert (found.right, found.extracted, found.why) == (True, r"\frac{2}{4}", "equal")
    assert grade_answer("no idea what to do about this", "1").why == "no answer found"


@pytest.mark.parametrize("answer", ["1.2.3/4", r"\frac{1.2.3}{4}", ".../4"])
def test_a_numeral_with_two_points_is_wrong_and_raises_nothing(answer):
    assert not grade_answer(rf"\boxed{{{answer}}}", "4").right


def test_numbers_need_no_second_process():
    code = (
        "import subprocess; subprocess.Popen = None\n"
        "from lco_lite.grading.math import grade_answer as g\n"
        "print(g(r'\\boxed{72}', '72').right, g(r'\\boxed{71}', '72').right, g(r'\\boxed{(1,2)}', '(1, 2.0)').right)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False", "True"]


def test_formulas_are_graded_in_any_thread():
    verdicts = []

    def grade() -> None:
        verdicts.append(grade_answer(r"\boxed{2\sqrt2}", r"\sqrt{8}").right)

    threads = [threading.Thread(target=grade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 4


def test_a_worker_process_that_was_killed_is_replaced():
    from lco_lite.grading import symbolic

    assert symbolic.equal(r"2\sqrt{2}", r"\sqrt{8}")
    symbolic._worker._started.process.kill()
    symbolic._worker._started.process.wait()
    assert symbolic.equal(r"2\sqrt{2}", r"\sqrt{8}")
