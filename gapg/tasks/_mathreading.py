"""One way of writing for what people write in many: answers and golds in ASCII and LaTeX, plain numbers as values.

`reading` is applied to gold and answer alike, before anything is compared. It changes the notation and never a value;
what it does not know it leaves as it is. Its patterns take linear time in practice, since a model wrote the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

MAX_DIGITS = 400
"""A longer number is no plain number."""
NOISE = Fraction(1, 10**13)
"""Relative error of decimals that a program computed: 0.30000000000000004 is 0.3."""
APPROXIMATE = Fraction(1, 10**6)
"""Relative error up to which a decimal stands for a number that no decimal can write, such as 1/3 or a root of 2."""

# --- unicode ---

_COMMANDS = {
    **{"∞": "infty", "≤": "le", "≥": "ge", "⩽": "le", "⩾": "ge", "≠": "ne", "≈": "approx", "±": "pm", "∓": "mp"},
    **{"×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "∗": "cdot", "÷": "div", "∪": "cup", "∩": "cap"},
    **{"∈": "in", "∉": "notin", "∅": "emptyset", "∖": "setminus", "⊂": "subset", "⊆": "subseteq", "→": "to"},
    **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda"},
    **{"μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ϕ": "phi", "ω": "omega"},
}
_UNICODE = str.maketrans(
    {char: f"\\{name} " for char, name in _COMMANDS.items()}
    | {char: f"\\mathbb{{{letter}}}" for char, letter in zip("ℝℤℚℕℂ", "RZQNC", strict=True)}
    | dict.fromkeys("−–—‒―‐‑⁃", "-")
    | dict.fromkeys("“”„", '"')
    | dict.fromkeys("‘’‚", "'")
    | dict.fromkeys("⁄∕", "/")
    | dict.fromkeys("°º˚∘", "^\\circ ")
    | {"٫": ".", "٬": ",", "∶": ":"}
)
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_SUPERSCRIPT = re.compile("[⁰¹²³ⁱ⁴-ⁿ]+")
_SUBSCRIPT = re.compile("[₀-₎]+")


def _ascii(text: str) -> str:
    """`2⅔` as `2\\frac{2}{3}`, `x²` as `x^{2}`, `１２` and `١٢` as `12`, `π` as `\\pi`; letters of alphabets stay."""
    text = _VULGAR.sub(lambda found: "\\frac{{{}}}{{{}}}".format(*_compatible(found[0]).split("⁄")), text)
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{_compatible(found[0])}}}", text)
    text = _SUBSCRIPT.sub(lambda found: f"_{{{_compatible(found[0])}}}", text)
    # Before and after: the compatible form of º is o, and that of ℃ holds a °. The root signs have none.
    text = _compatible(text.translate(_UNICODE)).translate(_UNICODE)
    return "".join(str(unicodedata.decimal(char, char)) for char in text if unicodedata.category(char) != "Cf")


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


# --- brackets: boxes and roots ---

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_CONCLUSION = re.compile(r"(?:\banswer(?: is)?(?:: ?| )|#### )([^\n$]{1,100})\Z", re.IGNORECASE)
_BRACKET = re.compile(r"\\.|[{}()]", re.DOTALL)
_UNBRACED = re.compile(r"[^\s$]*")
_WRITTEN_ROOT = re.compile(r"\\sqrt(?=\s*\()|(?<![\\A-Za-z])sqrt(?=\s*[\d({])")
_ROOTS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
_MAX_ROOTS = 100
_RADICAND = re.compile(r"-?\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+(?:\[\d\])?")


def conclusion(text: str) -> str:
    """What the last box holds; else what the last line says the answer is, where that is no words and no `$…$`."""
    if (boxed := last_box(text)) is not None:
        return boxed
    said = _CONCLUSION.search(text)
    return said[1] if said and not _WORD.search(said[1]) else text


def last_box(text: str) -> str | None:
    """What the last `\\boxed` or `\\fbox` holds, to the end if it is open."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":
        bare = _UNBRACED.match(text, start)
        return bare[0].rstrip(".,;") if bare else ""
    return text[start + 1 : _closing(text, start)].strip()


def _closing(text: str, opening: int) -> int:
    """Where the bracket is closed that opens at `opening`; the text's length where it is not. `\\{` is a sign."""
    opens, depth = text[opening], 0
    closes = {"{": "}", "(": ")"}[opens]
    for found in _BRACKET.finditer(text, opening):
        depth += (found[0] == opens) - (found[0] == closes)
        if depth == 0:
            return found.start()
    return len(text)


def _roots(text: str) -> str:
    """`√2`, `√(2)` and `sqrt(2)` as `\\sqrt{2}`, the last first, so that what a root holds is written already."""
    text = _WRITTEN_ROOT.sub("√", text)
    for _ in range(_MAX_ROOTS):
        at = max(map(text.rfind, _ROOTS))
        if at < 0:
            break
        start = at + 1 + len(text[at + 1 :]) - len(text[at + 1 :].lstrip())
        if text[start : start + 1] in ("(", "{"):
            end = _closing(text, start)
            inner, rest = text[start + 1 : end], text[end + 1 :]
        else:
            found = _RADICAND.match(text, start)
            end = found.end() if found else start
            while text[end : end + 1] == "{":  # a command's arguments
                end = _closing(text, end) + 1
            inner, rest = text[start:end], text[end:]
        text = f"{text[:at]}{_ROOTS[text[at]]}{{{inner}}}{rest}"
    return text


# --- numbers ---

_BASE = re.compile(r"N_\{(\w+(?:\.\w+)?)b\d+\}")
_BASE_NAMES = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9},
    **{"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16},
}


def _digits(found: re.Match[str]) -> str:
    """`1.5e3` as `1500`."""
    return format(Decimal(found[0]), "f")


def _repeating(found: re.Match[str]) -> str:
    """`0.1\\overline{6}` as `\\frac{15}{90}`."""
    whole, fixed, repeated = found.groups()
    shift = 10 ** len(repeated)
    top = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return f"\\frac{{{top}}}{{{10 ** len(fixed) * (shift - 1)}}}"


def _mixed(found: re.Match[str]) -> str:
    """`2 2/3` and `2\\frac{2}{3}` as `\\frac{8}{3}`. With an improper fraction it is a product, or two numbers."""
    written, over, under = found.groups()
    whole, top, bottom = int(written.replace(",", "")), int(over), int(under)
    if top < bottom:
        return f"\\frac{{{top + whole * bottom}}}{{{bottom}}}"
    return f"{whole} \\cdot \\frac{{{over}}}{{{under}}}" if "\\frac" in found[0] else found[0]


def _based(found: re.Match[str]) -> str:
    """`1011_2` as the symbol `N_{1011b2}`: a number in a base is equal to no other way of writing its value."""
    digits, name = (part for part in found.groups() if part is not None)
    base = int(name) if name.isdecimal() else _BASE_NAMES.get(name.lower(), 0)
    # letters alone are digits only where they are digits of that base: `A_{16}`, and not `P_2`
    if not 2 <= base <= 36 or not (
        digits[0].isdecimal() or all(int(digit, 36) < base for digit in digits.replace(".", ""))
    ):
        return found[0]
    return f"N_{{{re.sub('^0+(?=[0-9A-Z])', '', digits.upper())}b{base}}}"


_PREFIXES = {"x": 16, "o": 8, "b": 2}
_START = r"(?<![\w.^}/)\\])"
_INTEGER = r"(\d{1,3}(?:,\d{3}){1,5}|\d{1,15})"
_IN_BASE = r"((?:[0-9A-Z]|[a-f](?=[0-9A-Za-z]))[0-9A-Za-z]{0,60}(?:\.[0-9A-Za-z]{1,60})?)"
_TEXT_BASE = r"\\(?:text|mathrm) ?\{ ?(?:base[ -]?)?(\w{1,8}) ?\}"
_FRACTION = r"\\[dtc]?frac *(?:\{ *(\d{1,15}) *\}|(\d)) *(?:\{ *(\d{1,15}) *\}|(\d))"

_NOTATION: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # `\[…\]` around all of it, and blanks
    (r"\A\s*\\[(\[]((?:(?!\\[()\[\]])[^$])*)\\[)\]][\s.]*\Z", r"\1"),
    (r"\\!\s*", ""),
    (r"(?<!\\)\\(?:[,;:> ]|q?quad(?![A-Za-z]))|~(?!=)", " "),
    (r"\\(?:left|right) *(?=[()])", ""),
    (r"^(\$?)([-+]) +(?=[\d\\(])", r"\1\2"),
    # percent, powers, digits that repeat
    (r"(?<=[\d)}$]) {0,3}(?:\\(?:text|mbox|mathrm) ?\{ ?per ?cent ?\}|per ?cent\b)", r"\\%"),
    (r"(?<=[\w)}])(?:\*\*| \*\* )(?=[-\d(])", "^"),
    (r"\*\*|`|</?(?:[bip]|(?!answer)[A-Za-z]{2,12})>", ""),  # Markdown and HTML
    (r"(?<![\w.])(\d{0,40})\.(\d{0,40})\\overline ?\{(\d{1,40})\}", _repeating),
    # functions and constants without their backslash
    (r"(?<![\\A-Za-z{])(pi(?![A-Za-z])|(?:ln|log|sin|cos|tan)(?= ?[_(\d\\]| [a-z]\b))", r"\\\1"),
    # numbers in a base
    (r"(?<=_\{)\\(?:text|mathrm) ?\{ ?base ?\} ?(?=\d)", ""),
    (r"(?<![\w.])0([xXoObB])([\dA-Fa-f]{1,60})(?!\w)", lambda x: f"{x[2].upper()}_{_PREFIXES[x[1].lower()]}"),
    (r"\\(?:text|math)(?:rm|bf)?\{([0-9A-F]+)\}(?=\w*_)", r"\1"),
    (rf"(?<![\w.\\])(?:{_IN_BASE}|\( ?{_IN_BASE} ?\)) ?_ ?(?:(\d\d?)(?!\d)|\{{ ?\(?(\w{{1,8}})\)? ?\}})", _based),
    (rf"(?<![\w.\\])(?:{_IN_BASE}|\( ?{_IN_BASE} ?\)) ?_ ?(?:\{{ ?{_TEXT_BASE} ?\}}|{_TEXT_BASE})", _based),
    (r"(?<![\w.\\])(\d[0-9A-Za-z]{0,60}) ?(?:\((?:in )?base[ -](\w{1,8})\)|(?:in )?base[ -](\w{1,8}))", _based),
    # numbers of several parts
    (r"(?<![\w.^])(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})[eE][-+]?\d{1,3}(?!\w|\.\d)", _digits),
    (r"(?<=\d)\{,\}(?=\d)", ","),
    (_FRACTION, lambda found: "\\frac{{{}}}{{{}}}".format(*(part for part in found.groups() if part))),
    (rf"{_START}{_INTEGER} *\\frac\{{(\d{{1,15}})\}}\{{(\d{{1,15}})\}}", _mixed),
    (rf"{_START}{_INTEGER} {{1,3}}(\d{{1,15}}) ?/ ?(\d{{1,15}})(?!\d|\.\d|[A-Za-z/(])", _mixed),
    (r"(?<![\w.,^])\d{1,3}(?: \d{3}){1,9}(?![\d/]|[.,]\d{3}\b)", lambda found: found[0].replace(" ", "")),
    # what the LaTeX grammar would take for a mixed number
    (rf"{_START}(\d{{1,400}}|\(\d{{1,400}}\)) *\((?=[ \d./]{{1,40}}\))", r"\1 \\cdot ("),
    (r"^\$?\d{1,400}(?: +\d{1,400})+\$?$", lambda found: re.sub(" +", ", ", found[0])),
    # an equation the wrong way round
    (r"^\$?((?:[-+*/^\d.(){} ]|\\frac|\\sqrt|\\pi)*\d(?:[-+*/^(){} ]|\\pi)*)= ?([A-Za-z])[ .$]*$", r"\2 = \1"),
]
_RULES = [(re.compile(pattern), written) for pattern, written in _NOTATION]


def reading(text: str) -> str:
    """The conclusion of a text in one notation: unicode as LaTeX in ASCII, numbers each in one form.

    Mixed numbers are fractions (`2 2/3` is `\\frac{8}{3}`), e-notation is written out, a number in a base is a symbol.
    """
    text = conclusion(text)
    return _apply(_roots(text if text.isascii() else _ascii(text)))


_NAMED = re.compile(r"\$?([A-Za-z]|\\[a-z]+) *= *([^=$]+)\$?")


def without_name(a: str, b: str) -> tuple[str, str]:
    """Two readings without the name that both give to what they say, as `x = 5` does."""
    x, y = _NAMED.fullmatch(a), _NAMED.fullmatch(b)
    return (x[2], y[2]) if x and y and x[1] == y[1] else (a, b)


def has_base(text: str) -> bool:
    """Whether a reading holds a number in a base."""
    return _BASE.search(text) is not None


def is_based(text: str) -> bool:
    """Whether a reading is a number in a base and nothing else."""
    return _BASE.fullmatch(text.removeprefix("-")) is not None


def without_base(text: str) -> str:
    """A reading with its numbers in a base as their digits alone, as many answers and data sets write them."""
    return _apply(_BASE.sub(r"\1", text))


def _apply(text: str) -> str:
    for pattern, written in _RULES:
        text = pattern.sub(written, text)
    return text.strip().rstrip(" .")


# --- values ---

_DRESS = re.compile(r"\\?\$|\\[()\[\]]|[€£¥₹]")
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_POWER_OF_TEN = rf"(?:({_DECIMAL}) *(?:\\times|\\cdot|[x*]) *)?10 *\^ *[{{(]?([-+]?\d{{1,3}})[)}}]?"
_VALUE = re.compile(
    rf"([-+]?) *(?:({_DECIMAL})(?: ?/ ?({_DECIMAL}))?|\\frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}|{_POWER_OF_TEN})"
    r" *(\\?%)?"
)


@dataclass(frozen=True, slots=True)
class Value:
    """A plain number, exactly. decimal: no integer, written with a point. percent: a sign follows `number`."""

    number: Fraction
    decimal: bool = False
    percent: bool = False

    def equals(self, other: Value) -> bool:
        """As `equal` has it. A percent sign may be left out: 50% is 0.5, and 50."""
        decimal = self.decimal or other.decimal
        if self.percent == other.percent:
            return equal(self.number, other.number, decimal)
        percent, plain = (self, other) if self.percent else (other, self)
        return any(equal(number, plain.number, decimal) for number in (percent.number, percent.number / 100))


def equal(a: Fraction, b: Fraction, decimal: bool) -> bool:
    """Whether two numbers are the same. decimal: one of them was written, or computed, with a point.

    Exactly then too, but for the noise of a computation, unless one may be the other rounded: near it, and the other
    is endless (1/3), or has more digits where this one has six or more.
    """
    if not decimal or a.denominator == b.denominator == 1:
        return a == b
    if near(a, b, NOISE) or not near(a, b, APPROXIMATE):
        return near(a, b, NOISE)
    places = [_places(number) for number in (a, b)]
    if None in places or 0 in places:
        return 0 not in places
    return 2 * abs(a - b) <= Fraction(1, 10 ** min(filter(None, places))) <= min(abs(a), abs(b)) / 10**5


def _places(number: Fraction) -> int | None:
    """How many digits it has after the point; None where they never end."""
    bound = number.denominator.bit_length()
    return next((n for n in range(bound) if 10**n % number.denominator == 0), None)


def near(a: Fraction, b: Fraction, tolerance: Fraction) -> bool:
    """Whether two numbers differ by no more than a part of the larger: exact where the tolerance is 0."""
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def value(text: str) -> Value | None:
    """The number that all of a reading is: integer, decimal, fraction, power of ten, percentage or sum of money."""
    found = _VALUE.fullmatch(_DRESS.sub("", text).strip()) if len(text) <= MAX_DIGITS else None
    if found is None:
        return None
    sign, whole, below, over, under, times, exponent, percent = found.groups()
    top, bottom = whole or over or times or "1", below or under or "1"
    if not (divisor := Fraction(bottom.replace(",", ""))):
        return None
    number = Fraction(top.replace(",", "")) / divisor * Fraction(10) ** int(exponent or 0)
    is_decimal = "." in top + bottom and number.denominator != 1
    return Value(-number if sign == "-" else number, is_decimal, percent is not None)
