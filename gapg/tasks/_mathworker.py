"""The process in which math-verify meets text a model wrote. Run as a script by `mathcheck`, never imported by it.

math-verify reads LaTeX with a grammar, but plain expressions (`1/2`) and numbers go through sympy's `parse_expr`, which
is Python's `eval`. Its regexes let only digits, blanks and operators through today; here it does not depend on them:
both entries to `parse_expr` are replaced by `read_expression`, which walks a syntax tree of numbers and operators and
knows no names. The rest of the defence bounds what is left, the arithmetic itself: `9^9^9^9` can take all memory or
never end. So this process has limits on memory, CPU time per answer and file size, no environment to leak, one line
of JSON in and one word out, and a parent that kills it.

A line `{"gold": …, "answer": …}` on stdin is answered by `correct`, `wrong` or `limit` on stdout.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType
from typing import Any

import math_verify
import math_verify.parser
import sympy
import sympy.parsing.sympy_parser

MAX_DIGITS = 400
"""A longer number in a plain expression is refused."""
MAX_BLOCK = 400
"""A longer text is taken for a whole reply, in which math-verify looks for the answer, not for an expression."""

_NUMBER = re.compile(r"[-+]?[$€£]?\s*(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.?\d+)?\s*\\?%?\.?")
_DIGITS = re.compile(r"\d[\d,]*(?:\.\d+)?")
_ALGEBRA = re.compile(r"[\\^_{]|\d[A-Za-z]\b")
_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: lambda a, b: sympy.Add(a, b, evaluate=False),
    ast.Sub: lambda a, b: sympy.Add(a, sympy.Mul(-1, b, evaluate=False), evaluate=False),
    ast.Mult: lambda a, b: sympy.Mul(a, b, evaluate=False),
    ast.Div: lambda a, b: sympy.Mul(a, sympy.Pow(b, -1, evaluate=False), evaluate=False),
    ast.Pow: lambda a, b: sympy.Pow(a, b, evaluate=False),
}


class Deadline(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


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


def _readings(text: str, plain: bool) -> list[Any]:
    """What math-verify finds in a text: an expression and the text it came from.

    Its LaTeX rules need a `$…$` or `\\boxed{…}` around, which an answer block seldom has, so a short text is read as
    LaTeX first. Only where a plain number is expected and the text holds just one (`72 dollars`) is that one taken:
    picking a number out of several would find a 1 in `8n^2 + 4n + 1`.
    """
    text = text.replace("\\$", "").replace("\\!", "")  # a currency sign and a thin space, which it fails to read
    lone = plain and len(_DIGITS.findall(text)) == 1 and not _ALGEBRA.search(text)
    if len(text) > MAX_BLOCK or "\n" in text or "\\boxed" in text or "$" in text[1:]:
        forms = [text]
    else:
        forms = [text, f"${text}$"] if lone else [f"${text}$", text]
    found: list[Any] = []
    for form in forms:
        found = math_verify.parse(form, parsing_timeout=None, raise_on_error=True) or found
        if found and not isinstance(found[0], str):
            break
    return found


@lru_cache(maxsize=16)
def _gold_readings(gold: str, plain: bool) -> list[Any]:
    return _readings(gold, plain)


def judge(gold: str, answer: str) -> str:
    """The verdict's word; `limit` when memory or recursion ran out (time is the caller's)."""
    plain = _NUMBER.fullmatch(gold.strip()) is not None
    verdict = "wrong"
    try:
        golds, found = _gold_readings(gold, plain), _readings(answer, plain)
    except (MemoryError, RecursionError):
        return "limit"
    except Exception:  # math-verify raises of all kinds on text that is no mathematics
        return "correct" if gold.strip() == answer.strip() else "wrong"
    for expected, got in ((g, f) for g in golds for f in found):
        try:
            if math_verify.verify(expected, got, timeout_seconds=None, raise_on_error=True):
                return "correct"
        except (MemoryError, RecursionError):
            verdict = "limit"
        except Exception:
            continue
    return verdict


def _expire(_: int, __: FrameType | None) -> None:
    raise Deadline


def _requests() -> Iterator[tuple[str, str]]:
    for line in sys.stdin:
        request = json.loads(line)
        yield request["gold"], request["answer"]


def main(seconds: float, memory_bytes: int) -> None:
    """Answers requests until stdin closes."""
    logging.disable(logging.CRITICAL)
    for module in (sympy.parsing.sympy_parser, math_verify.parser):
        module.parse_expr = read_expression
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _expire)
    judge("1/2", "\\frac{1}{2}")  # compiles regexes and the grammar's tables, on nobody's time
    print("ready", flush=True)
    for gold, answer in _requests():
        # CPU time, so that a busy machine changes no verdict. The timer ends Python code; the limit ends this process
        # where a C call would not return, even when the parent is gone and nobody is left to kill it.
        cpu_limit = int(time.process_time() + 2 * seconds) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, resource.RLIM_INFINITY))
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            word = judge(gold, answer)
        except Deadline:
            word = "limit"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(word, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
