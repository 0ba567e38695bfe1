"""The process in which math-verify meets text a model wrote. Run as a script by `mathcheck`, never imported by it.

math-verify reads LaTeX with a grammar, but plain expressions (`1/2`) and numbers go through sympy's `parse_expr`, which
is Python's `eval`. Its regexes let only digits, blanks and operators through today; here it does not depend on them:
both entries to `parse_expr` are replaced by `read_expression`, which walks a syntax tree of numbers and operators and
knows no names. The rest of the defence bounds what is left, the arithmetic itself: `9^9^9^9` can take all memory or
never end. So this process has limits on memory, CPU time per answer and file size, no environment to leak, one line
of JSON in and one word out, and a parent that kills it.

Both texts are brought into one notation first (`_mathreading.py`), and math-verify's comparison of numbers is replaced
by `equal_numbers`.

A line `{"gold": …, "answer": …, "seconds": …}` on stdin is answered by `correct`, `wrong`, `limit` (memory, depth) or
`timeout` (CPU time) on stdout.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import logging
import os
import re
import resource
import signal
import sys
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import math_verify
import math_verify.grader
import math_verify.parser
import sympy
import sympy.parsing.sympy_parser
import sympy.physics.units  # sympy's simplify imports it, and that takes the `parse_expr` which is replaced here
from math_verify.grader import get_pct_val


def _beside(name: str) -> ModuleType:
    """A module of this folder by its path: the package, which loads torch, is not imported here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notation = _beside("_mathreading")

MAX_DIGITS = 400
"""A longer number in a plain expression is refused."""
MAX_BLOCK = 400
"""A longer text is taken for a whole reply, in which math-verify looks for the answer, not for an expression."""

DIGITS_COMPARED = 40

_NUMBERS = re.compile(r"\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_ALGEBRA = re.compile(
    r"[\\^_{‰]|\d[A-Za-z]\b|\d [ixyz]\b|\d ?/ ?[A-Za-z]\b|(?:^|[\s(=+*-])(?!m/s)[A-Za-z] ?[-+*/]|[-+*] ?[A-Za-z]\b"
    r"|\A[^A-Za-z]*\d ?!|\b(?:minus|negative|not|half|squared|cubed|ln|log|sin|cos|tan|pi)\b"
)
"""Signs that a number in a text is not all that the text says."""
_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_CLOCK = re.compile(r"(?<=\d) ?([ap])\.? ?m\b\.?", re.IGNORECASE)
_UNIT_POWER = re.compile(r"(?<=\d)( m| ?[a-z]{2,})\^ ?\{?[23]\}?\Z")
_BOUND = re.compile(r"<|(?<![-=])>|\\(?:[lg]eq?|neq?|[lg]t)(?![A-Za-z])")
_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: lambda a, b: sympy.Add(a, b, evaluate=False),
    ast.Sub: lambda a, b: sympy.Add(a, sympy.Mul(-1, b, evaluate=False), evaluate=False),
    ast.Mult: lambda a, b: sympy.Mul(a, b, evaluate=False),
    ast.Div: lambda a, b: sympy.Mul(a, sympy.Pow(b, -1, evaluate=False), evaluate=False),
    ast.Pow: lambda a, b: sympy.Pow(a, b, evaluate=False),
}


def read_expression(text: str, *_: object, **__: object) -> sympy.Expr:
    """In place of sympy's `parse_expr`: numbers, + - * / ** and parentheses. Raises SyntaxError on all else."""
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, text.strip())
    except (ValueError, MemoryError, RecursionError) as error:
        raise SyntaxError(str(error)) from None


def _build(node: ast.expr, text: str) -> sympy.Expr:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        digits = ast.get_source_segment(text, node) or ""
        if len(digits) > MAX_DIGITS:
            raise SyntaxError("a number that is too long")
        return sympy.Integer(node.value) if type(node.value) is int else sympy.Float(digits)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _build(node.operand, text)
        return value if isinstance(node.op, ast.UAdd) else -value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_build(node.left, text), _build(node.right, text))
    raise SyntaxError(f"{type(node).__name__} is no arithmetic")


def equal_numbers(a: Any, b: Any, *precision: int) -> bool:
    """In place of math-verify's comparison of numbers, which rounds to six decimals, so that 0.0000001 is 0.

    Exact numbers are equal when they are: fractions by value, surds to 40 digits. A decimal number may differ by the
    noise of a computation, and stands for a number near it that no decimal can write: 1/3, a root.
    """
    if isinstance(a, sympy.MatrixBase | sympy.MatrixExpr) and isinstance(b, sympy.MatrixBase | sympy.MatrixExpr):
        return bool(_equal_matrices(a, b, *precision))
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return False  # left to sympy's algebra
    return _near(a, b) or _near(get_pct_val(a, a), get_pct_val(b, b))  # 50% is 0.5, and 50


def _near(a: sympy.Expr, b: sympy.Expr) -> bool:
    decimal = a.has(sympy.Float) or b.has(sympy.Float)
    a, b = (x.xreplace({f: sympy.Rational(str(f)) for f in x.atoms(sympy.Float)}).doit() for x in (a, b))
    if a.is_Rational and b.is_Rational:
        return bool(notation.equal(*(Fraction(int(x.p), int(x.q)) for x in (a, b)), decimal))
    a, b = (sympy.N(x, DIGITS_COMPARED) for x in (a, b))
    if not (a.is_finite and b.is_finite):
        return bool(a == b)
    tolerance = notation.APPROXIMATE if decimal else Fraction(1, 10 ** (DIGITS_COMPARED - 5))
    return bool(notation.near(a, b, sympy.Rational(tolerance)))


# Each of the two looks the other up in math-verify's module, where the elements of sets and matrices are compared too.
_equal_matrices = math_verify.grader.sympy_numeric_eq
math_verify.grader.sympy_numeric_eq = equal_numbers


def _readings(text: str, plain: bool) -> list[Any]:
    """What math-verify finds in a text: an expression and the text it came from.

    Its LaTeX rules need a `$…$` around, which an answer block seldom has, so a short text is read as LaTeX first. Only
    where a plain number is expected is the one number of a text taken (`72 dollars`).
    """
    if _BOUND.match(text):
        return []  # `> 5` is not 5
    text = text.replace("\\$", "")  # a currency sign, which it fails to read
    lone = _with_one_number(text) if plain else None
    if len(text) > MAX_BLOCK or "\n" in text or "$" in text[1:]:
        forms = [text]
    else:
        forms = [f"${text}$", text] if lone is None else [lone, f"${lone}$"]
    found: list[Any] = []
    for form in forms:
        found = math_verify.parse(form, parsing_timeout=None, raise_on_error=True) or found
        if found and not isinstance(found[0], str):
            break
    return found


def _with_one_number(text: str) -> str | None:
    """The text if it holds just one number and no algebra: to pick one would find a 1 in `8n^2 + 4n + 1`."""
    text = _UNIT_POWER.sub(r"\1", _FRACTION.sub(r"\1/\2", text))
    return text if len(_NUMBERS.findall(text)) == 1 and not (_ALGEBRA.search(text) or _BOUND.search(text)) else None


@lru_cache(maxsize=16)
def _gold_readings(gold: str, plain: bool) -> list[Any]:
    return _readings(gold, plain)


def judge(gold: str, answer: str) -> str:
    """The verdict's word; `limit` when memory or recursion ran out (time is the caller's).

    Both are brought into one notation. What is the same then is right, two plain numbers are compared as such, and
    math-verify decides on the rest.
    """
    gold, answer = notation.without_name(notation.reading(gold), notation.reading(answer))
    if notation.has_base(gold) != notation.has_base(answer):  # one of them leaves the base out
        gold, answer = notation.without_base(gold), notation.without_base(answer)
    gold, answer = (_CLOCK.sub(lambda found: f" {found[1].lower()}m", text) for text in (gold, answer))
    if gold == answer:
        return "correct" if gold else "wrong"
    if notation.is_based(gold) and notation.is_based(answer):
        return "wrong"
    if len({found[1] for found in map(_CLOCK.search, (gold, answer)) if found}) == 2:
        return "wrong"  # `3 am` is not `3 pm`
    expected, got = notation.value(gold), notation.value(answer)
    if expected is not None and got is not None:
        return "correct" if expected.equals(got) else "wrong"
    plain = expected is not None or got is not None
    try:
        return _compare(_gold_readings(gold, plain), _readings(answer, plain))
    except (MemoryError, RecursionError):
        return "limit"
    except Exception:  # math-verify raises of all kinds on text that is no mathematics
        return "wrong"


def _compare(golds: list[Any], found: list[Any]) -> str:
    if golds and found and not isinstance(golds[0], str) and not isinstance(found[0], str):
        golds, found = golds[:1], found[:1]  # the texts that follow are for what could not be read
    verdict = "wrong"
    for expected, got in itertools.product(golds, found):
        try:
            if math_verify.verify(
                expected, got, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
            ):
                return "correct"
        except (MemoryError, RecursionError):
            verdict = "limit"
        except Exception:
            continue
    return verdict


_ENDINGS = {1: "limit", -signal.SIGPROF: "timeout", -signal.SIGABRT: "limit", -signal.SIGSEGV: "limit"}
"""The word for an answer by the exit code of the process that it ended."""


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        # CPU time, so that a busy machine changes no verdict. Nobody handles the signal, so the kernel ends this
        # process, in a C call that would not return too, and even when the parent is gone.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        word = judge(request["gold"], request["answer"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(word, flush=True)


def main(memory_bytes: int) -> None:
    """Answers requests in a fork of this process, and in another when an answer ended that one, until stdin closes.

    A fork takes milliseconds, where a new process would take longer to import math-verify than most answers may take.
    """
    logging.disable(logging.CRITICAL)
    for module in (sympy.parsing.sympy_parser, math_verify.parser):
        module.parse_expr = read_expression
    if sys.platform != "darwin":  # which knows no such limit; there an answer may take what memory there is
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    judge("x + 1/2", "\\frac{1}{2} + y")  # compiles regexes and the grammar's tables, on nobody's time
    print("ready", flush=True)
    while child := os.fork():
        word = _ENDINGS.get(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if word is None:  # stdin closed, or somebody killed it: then the parent sees this process end
            return
        print(word, flush=True)
    _serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
