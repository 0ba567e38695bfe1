"""Verdicts on the ways of writing an answer: gold and answer are read alike, exact numbers compared exactly."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapg.judge import oracle_score
from gapg.tasks._mathreading import reading, value
from gapg.tasks.base import Prompt, Verdict
from gapg.tasks.mathcheck import MathChecker
from gapg_rollout.records import OracleAnswer

C, W = Verdict.CORRECT, Verdict.WRONG


@pytest.fixture(scope="module")
def checker():
    checker = MathChecker(workers=1)
    yield checker
    checker.close()


# Each row: ways of writing one thing, and what it is not.
SAME = {
    "a mixed number": (
        ["8/3", "2 2/3", r"2\frac{2}{3}", r"2 \tfrac23", "2⅔", r"2\,\dfrac{2}{3}", "２ ２／３", "2 2⁄3", "2+2/3"],
        ["2*2/3", r"2 \cdot 2/3", "4/3", "-2 2/3", "2 1/3", "22/3", "2.67"],
    ),
    "a negative mixed number": (["-8/3", "-2 2/3", r"-2\frac{2}{3}", "−2⅔", "– 2 2/3"], ["8/3", "-4/3", "2 2/3"]),
    "a product with a fraction": (["4/3", r"2 \cdot \frac{2}{3}", "2*2/3", "2 × 2/3", "2(2/3)"], ["2 2/3"]),
    "a large mixed number": (["1,234 1/2", "1234.5", r"1{,}234\frac12", "2469/2"], ["1234 1/3", "1,469/2"]),
    "a product in parentheses": (["6", "2(3)", r"2 \cdot 3", "2·3"], ["2 4", "5", "23"]),
    "a number in base 2": (
        [
            "1011_2",
            "1011_{2}",
            "(1011)_2",
            "01011_2",
            r"1011_{\text{two}}",
            r"1011_\text{two}",
            "1011₂",
            "1011 (base 2)",
        ],
        ["1011_3", "11_{10}", "11", "1012_2", "-1011_2", "1011_{16}", "10110_2"],
    ),
    "a prefix": (["1F_{16}", "0x1F", "0x1f"], ["0x1E", "0b1F", "31", "1F_{17}"]),
    "a prefix of two": (["1011_2", "0b1011", r"1011_{\text{base } 2}"], ["0o1011", "0b1010"]),
    "a number in base 16": (
        ["1A_{16}", "1a_{16}", "1A₁₆", r"1\text{A}_{16}", "1A base 16"],
        ["1B_{16}", "26", "1A_{15}"],
    ),
    "letters in base 16": (["FF_{16}", "ff_{16}", "ff₁₆", "0xFf"], ["FE_{16}", "ff_{17}", "255"]),
    "a time": (["3 pm", "3 p.m.", "3 PM", "3pm"], ["3 am", "3 a.m.", "4 pm"]),
    "a subscript": (["x_1", "x_{1}", "x₁"], ["x_2", "x", "1"]),
    "a root": (
        [r"\sqrt{2}", "√2", "√(2)", "√ 2", "sqrt(2)", r"\sqrt2", "2^{1/2}", "√(1+1)"],
        ["√3", "2", "1.4142", "∛2"],
    ),
    "roots in roots": ([r"\sqrt{2+\sqrt{3}}", "√(2+√3)", "sqrt(2 + sqrt(3))"], ["√(2+√2)", "√2+√3"]),
    "a root and more": ([r"\frac{\sqrt{2}}{2} + 3\sqrt{13}", "√2/2 + 3√13"], ["√2/2 + 3√3"]),
    "a higher root": (["2", "∛8", "∜16", r"\sqrt[3]{8}"], ["√8"]),
    "a fraction sign": (["7/8", "⅞", "0.875", r"\frac78", r"\frac{7}8"], ["⅝", "8/7"]),
    "infinity": ([r"(-\infty, 2)", "(−∞, 2)", r"\left(-\infty, 2\right)", "x < 2"], ["(-∞, 2]", "(2, ∞)", "x > 2"]),
    "pi": ([r"12\pi", "12π", "12 π", "12𝜋"], ["12", "π", "37.7"]),
    "names without a backslash": ([r"\frac{\pi}{2} + \ln 2", "pi/2 + ln(2)", "ln 2 + 0.5π"], ["pi/2", "p/2 + ln 2"]),
    "a logarithm": ([r"\log_2 3", "log_2(3)", "log₂ 3"], [r"\log_3 2", "log_2 4"]),
    "a factorial": (["120", "5!", "$5!$"], ["5", "6!"]),
    "an inequality": ([r"x \le 3", "x ≤ 3", "x <= 3", r"x \leq 3", r"3 \ge x"], ["x ≥ 3", "x < 3"]),
    "a union": ([r"(0,9) \cup (9,36)", "(0,9) ∪ (9,36)"], ["(0,9) ∩ (9,36)", "(0,36)"]),
    "minus signs": (["-5", "−5", "–5", "—5", "－5", "- 5"], ["5"]),
    "powers": ([r"x^{10} + 2^{-1}", "x¹⁰ + 2⁻¹", "x¹⁰ + ½"], ["x^{10} + 2^1"]),
    "digits of all scripts": (["123", "１２３", "١٢٣", "१२३", "1\u200b23"], ["132"]),
    "groups of three": (
        [
            "1234567",
            "1,234,567",
            "1 234 567",
            "1\u00a0234\u202f567",
            r"1\,234\,567",
            "1{,}234{,}567",
            r"1,\!234,\! 567",
        ],
        ["1,234", "1.234567"],
    ),
    "degrees": ([r"90^\circ", "90°", "90º", "90", "90 degrees"], ["91°"]),
    "plus or minus": ([r"1 \pm \sqrt{19}", "1 ± √19"], [r"1 + \sqrt{19}"]),
    "a large power of ten": (
        ["10^{22}", "1e22", "1E+22", "10²²", "10^22", r"1.0 \times 10^{22}", "10 × 10^{21}", "1" + "0" * 22],
        ["10^{22}+1", "1e21", "1" + "0" * 21 + "1", "9e999999999", "1e23"],
    ),
    "a small number": (
        ["0.00005", "5e-5", "5E-05", ".00005", r"5 \times 10^{-5}", "5 × 10⁻⁵", "1/20000", "0.005%"],
        ["0.00004", "0", "0.00005001", "5e-4"],
    ),
    "a very small number": (["10^{-20}", "1e-20"], [r"2 \cdot 10^{-20}", "0", "2e-20", r"\frac{1}{10^{21}}"]),
    "percent": ([r"50\%", "50%", "50 percent", "50 per cent", "５０％", r"50\text{ percent}"], ["5%", "50.5%", "500"]),
    "a percentage with a fraction": ([r"12.5\%", "12 1/2%", "12½ percent"], ["12%", "12.5001%"]),
    "a fraction, exactly": (["1/3", r"\frac{2}{6}", "3^{-1}", "0.333333", "33.333333%"], ["0.333", "0.33", "33.3%"]),
    "fractions of integers": (["123456789/1000000"], ["123456789/1000001", r"\frac{123456788}{1000000}"]),
    "an endless fraction in a tuple": ([r"(1/3, \frac23)", "(0.3333333, 0.66666667)"], ["(0.33, 0.67)"]),
    "a rounded decimal": (["6366.1977", "6366.197724"], ["6366.1978", "6366.1"]),
    "a decimal": (["0.5", "1/2"], ["0.5000001", "0.50001"]),
    "money": (["1234567.89", "$1,234,567.89"], ["1234567.88", "1234567", "1234568"]),
    "a surd, exactly": ([r"\sqrt{2}", r"\frac{2}{\sqrt{2}}"], [r"\frac{99}{70}", r"\frac{665857}{470832}"]),
    "almost one": ([r"1 - \frac{1}{2^{50}}", r"\frac{2^{50}-1}{2^{50}}"], ["1", r"1 - \frac{1}{2^{51}}"]),
    "many digits": (["123456789.1", "123,456,789.10"], ["123456789.2", "123456789"]),
    "what floats make of it": (["0.30000000000000004", "0.3", "3/10"], ["0.3000001"]),
    "a quotient of floats": (["66.66666666666667", "200/3"], ["66.67", "66.666"]),
    "an equation": (["x = 5", r"\[ x = 5 \].", "5 = x", "x=5."], ["x = 6", "y = 5"]),
    "an equation with a root": (["x = √2", "x = 1.41421356", r"$x=\sqrt{2}$"], ["x = 1.41", "y = √2"]),
    "a mixed coefficient": ([r"\frac{5}{2}x", "2 1/2 x", "2½x", "2.5x"], ["x", r"\frac{5}{2x}"]),
    "a sign in front": (["-3/2", "-(1 1/2)", "- 1½"], ["3/2", "-1/2"]),
    "a tuple": ([r"\left( 2\frac{2}{3}, √2 \right)", r"(8/3, \sqrt{2})"], [r"(\sqrt{2}, 8/3)", "(4/3, √2)"]),
    "what algebra must show": ([r"\cot x", r"\frac{1}{\tan x}"], [r"\tan x"]),
    "repeating digits": ([r"0.1\overline{6}", "1/6"], ["0.16", r"0.\overline{16}"]),
    "a number among words": (
        ["5", "5 cm²", "5 km/h", "5 m/s", "**5**", "`5`", "<b>5</b>", "=> 5", "5 apples"],
        ["x + 5", "5/x", "≥ 5", "> 5", "5 or 6", "5<x", "5!", "minus 5", "5 squared", "ln 5", "5 x", "5 pi"],
    ),
    "a word": ([r"\text{Evelyn}", "Evelyn", "“Evelyn”"], ["Carla"]),
    "a choice": ([r"\text{(C)}", "(C)", "C"], ["D", "(D)"]),
}


@pytest.mark.parametrize("kind", SAME)
def test_ways_of_writing(checker, kind):
    ways, others = SAME[kind]
    for gold in ways:  # the first as gold of all, and as an answer to all
        answers = [*(ways if gold == ways[0] else ways[:1]), *others]
        found = dict(zip(answers, checker.check(gold, answers), strict=True))
        assert found == {answer: W if answer in others else C for answer in answers}, gold


# In one direction: the gold says more than the answer, or was computed.
ACCEPTED = [
    ("1011_2", "1011"),
    ("4210_{5}", "The answer is 4210_5."),
    ("50\\%", "0.5"),
    ("0.5", "50%"),
    ("50", "50%"),
    ("12.5", "12.5%"),
    ("8/3", "The answer is 2 2/3."),
    ("5/2", "2 1/2 hours"),
    (r"\sqrt{2}", "1.41421356"),
    ("3.14159265", r"\pi"),
    (r"\frac{20000}{\pi}", "6366.1977"),
    ("5", r"5\text{ cm}"),
    ("12.5", "$12.50"),
    ("5", "x = 5"),
]


@pytest.mark.parametrize(("gold", "answer"), ACCEPTED)
def test_what_is_accepted_beside(checker, gold, answer):
    assert checker.check(gold, [answer]) == checker.check(answer, [gold]) == [C]


BOXES = [
    (r"First \boxed{3}. Wait, that is wrong. Final: \boxed{4}", "4", "3"),
    (r"$\boxed{3}$ or $\boxed{4}$", "4", "3"),
    (r"\boxed{3} \boxed{4}", "4", "3"),
    (r"\boxed{3}, and then \fbox{4}", "4", "3"),
    (r"Thus $\boxed 4$ of 7.", "4", "7"),
    (r"It is \boxed{\frac{1}{2}}, half of 1.", "1/2", "1"),
    (r"\boxed{\boxed{\frac{\sqrt{2}}{2}}}", r"\frac{1}{\sqrt{2}}", "2"),
    ("\\boxed{\n2⅔\n}", "8/3", "4/3"),
    (r"\boxed{x = 4}", "4", "5"),
    (r"\boxed{1,-2}", "-2, 1", "1"),
    (r"So \boxed{4", "4", "5"),
    (r"It is \boxed{\left\{ 4 \right.} and so on", r"\left\{ 4 \right.", "5"),
    (r"\boxed{\{1, 4\}}, so 5.", r"\{4, 1\}", "5"),
    (r"So \boxed{}, which is 4", "5", "4"),
]


@pytest.mark.parametrize(("reply", "right", "wrong"), BOXES)
def test_the_last_box_counts(checker, reply, right, wrong):
    assert checker.check(wrong, [reply]) == [W]
    assert "{}" in reply or checker.check(right, [reply]) == [C]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("<think>Perhaps <answer>3</answer>, or \\boxed{3}? No.</think>\nThe result is \\boxed{4}.", 1.0),
        ("<think>Perhaps <answer>4</answer>, or \\boxed{4}? No.</think>\nThe result is \\boxed{5}.", 0.0),
        ("The prompt opened this: 4? \\boxed{4}</think>\\boxed{5}", 0.0),
        ("<think>I guess \\boxed{4}, but let me check", 0.0),
        ("\\boxed{5}\n<answer> \\boxed{4} </answer> (and not \\boxed{6})", 1.0),
        ("So 2 + 2 = 4. The final answer is $4$. I hope it is correct.", 1.0),
        ("So 2 + 2 = 4. The final answer is 5.", 0.0),
        ("They cost $2 + $2 = <<2+2=4>>$4, not $5.\n#### 4", 1.0),
        ("<ANSWER>4</ANSWER>", 1.0),
        ("<answer>4", 0.0),
    ],
)
def test_replies_of_a_cloud_model(checker, reply, score):
    class OneProblem:
        def verify(self, prompt, answers):
            return checker.check(prompt.answer, answers)

    assert oracle_score(OneProblem(), Prompt("p", "2 + 2?", "4", "maths"), [OracleAnswer(reply)]) == score


numbers = st.fractions(-(10**9), 10**9, max_denominator=40) | st.integers(-(10**30), 10**30).map(Fraction)


def written(number: Fraction) -> list[str]:
    """Some ways of writing it, each exact."""
    top, bottom, sign = abs(number.numerator), number.denominator, "-" if number < 0 else ""
    ways = [
        f"{sign}{top}/{bottom}",
        f"{sign}\\frac{{{top}}}{{{bottom}}}",
        f"−{top} / {bottom}" if sign else f"{top}/{bottom}",
    ]
    if bottom == 1:
        ways += [f"{sign}{top}", f"{sign}{top:,}", f"{sign}{top}.0", f"${sign}{top}$", f"{sign}{top}e0"]
    elif top > bottom:
        ways += [
            f"{sign}{top // bottom} {top % bottom}/{bottom}",
            f"{sign}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}",
        ]
    return ways


@given(numbers)
def test_plain_numbers_are_read_as_what_they_are(number):
    for text in written(number):
        found = value(reading(text))
        assert found is not None and found.number == number and not found.percent, text


@given(numbers, numbers, st.data())
@settings(max_examples=60)
def test_plain_numbers_are_equal_when_they_are(checker, a, b, data):
    b = data.draw(st.sampled_from([a, b, -a, a + 1, a + Fraction(1, 7)]))
    x, y = (data.draw(st.sampled_from(written(number))) for number in (a, b))
    assert checker.check(x, [y]) == checker.check(y, [x]) == [C if a == b else W], (x, y)


pieces = st.sampled_from(
    [*"0123 4567.,/-+*^_{}()$%eEx√∛⅔²₂°π–１٣\n", "\\frac", "\\sqrt", "\\text{", "base 2", "\\boxed{", "1,000"]
)


@given(st.lists(pieces | st.characters(), max_size=30).map("".join))
@settings(max_examples=200)
def test_reading_takes_any_text_and_changes_no_number_that_is_read(text):
    once = reading(text)
    assert value(once) is None or value(reading(once)) == value(once)


@pytest.mark.parametrize(
    "unit",
    ["√", "√(", "1 ", "1 1/", "1,000", "\\frac", "1_", "(1", "\\boxed{", " ", "1e", "answer ", "\\! ", "**", "1 (1"],
)
@pytest.mark.timeout(60)  # 0.2 s where the time grows as the length does; minutes where it grows as its square
def test_reading_ends_on_hostile_text(unit):
    reading((unit * 200_000)[:200_000])
