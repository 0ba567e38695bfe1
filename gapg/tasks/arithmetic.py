"""Countdown's arithmetic: every way to compute with some numbers, and an exact evaluator that never calls `eval`."""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

OPERATORS = "+-*"
MAX_TOKENS = 64
"""Longest expression the evaluator reads. It also bounds the recursion and every value."""

_TOKEN = re.compile(r"\s*([0-9]{1,9}|[-+*/()])")
_COMPUTE: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_TYPOGRAPHY = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "[": "(", "]": ")"})


class TooLarge(ValueError):
    """The expression has more than `MAX_TOKENS` tokens: refused unread."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One way to compute with all numbers: `8 * 3 = 24 ; 24 + 15 = 39`, as an expression `( 8 * 3 ) + 15`."""

    value: int
    steps: str
    expression: str


# A value on the way, and the expression that made it.
_Item = tuple[int, str]


def _apply(a: _Item, b: _Item, sign: str, max_value: int) -> tuple[_Item, str] | None:
    """The larger number goes first, so a computation has one spelling, which a small model learns faster."""
    (x, left), (y, right) = (a, b) if a[0] >= b[0] else (b, a)
    if sign == "*" and y == 1:  # a step that changes nothing
        return None
    value = x + y if sign == "+" else x - y if sign == "-" else x * y
    if not 1 <= value <= max_value:
        return None
    return (value, f"( {left} {sign} {right} )"), f"{x} {sign} {y} = {value}"


def _walk(items: tuple[_Item, ...], steps: tuple[str, ...], max_value: int) -> Iterator[Trace]:
    if len(items) == 1:
        value, expression = items[0]
        yield Trace(value, " ; ".join(steps), expression[2:-2])  # without the outermost parentheses
        return
    for i in range(len(items)):
        for j in range(i + 1, len(items)):
            rest = items[:i] + items[i + 1 : j] + items[j + 1 :]
            for sign in OPERATORS:
                if made := _apply(items[i], items[j], sign, max_value):
                    yield from _walk((*rest, made[0]), (*steps, made[1]), max_value)


def traces(numbers: Sequence[int], max_value: int) -> tuple[Trace, ...]:
    """Every computation that uses each number once, all values in 1..max_value, without repeats, in a fixed order."""
    start = tuple((n, str(n)) for n in numbers)
    return tuple(dict.fromkeys(_walk(start, (), max_value)))


def random_trace(numbers: Sequence[int], max_value: int, rng: random.Random) -> Trace | None:
    """One random computation; None when it left 1..max_value."""
    items, steps = [(n, str(n)) for n in numbers], []
    while len(items) > 1:
        a, b = (items.pop(rng.randrange(len(items))) for _ in range(2))
        made = _apply(a, b, rng.choice(OPERATORS), max_value)
        if made is None:
            return None
        items.append(made[0])
        steps.append(made[1])
    return Trace(items[0][0], " ; ".join(steps), items[0][1][2:-2])


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of + - * / and parentheses, and the numbers it uses, sorted.

    No unary signs and no powers. Raises TooLarge above the size limit, ValueError on anything else that is no
    expression, division by zero included.
    """
    if len(text) > 16 * MAX_TOKENS:
        raise TooLarge(f"{len(text)} characters")
    tokens = _tokenize(text.translate(_TYPOGRAPHY).strip())
    try:
        # blanks between, so that no two tokens make another; int, because Python reads no 08
        tree = ast.parse(" ".join(str(int(t)) if t.isdigit() else t for t in tokens), mode="eval")
    except SyntaxError as error:
        raise ValueError(error.msg) from None
    return _value(tree.body), sorted(int(t) for t in tokens if t.isdigit())


def _tokenize(text: str) -> list[str]:
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"unexpected {text[at : at + 8]!r}")
        tokens.append(match[1])
        at = match.end()
        if len(tokens) > MAX_TOKENS:
            raise TooLarge(f"more than {MAX_TOKENS} tokens")
    return tokens


def _value(node: ast.expr) -> Fraction:
    """Of a syntax tree, which Python's parser only reads. Of its nodes, nothing but these is known here."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in _COMPUTE:
        raise ValueError(f"unexpected {type(node).__name__}")
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Div) and right == 0:
        raise ValueError("division by zero")
    return _COMPUTE[type(node.op)](left, right)
