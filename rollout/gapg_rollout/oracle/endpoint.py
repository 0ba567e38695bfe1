"""Where the cloud is, and the key that opens it: checked before anything is sent, and never shown."""

from __future__ import annotations

import base64
import html
import ipaddress
import json
import os
import re
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from urllib.parse import quote, urlsplit

LOOPBACK_KEY = "EMPTY"
"""What is sent where no key is needed; it is no secret."""

EDGE, MIDDLE = 6, 8
"""Characters of a key's begin or end, and of its middle, that give it away; fewer are chance."""
_MASK = re.compile(r"[*•…#]+|\.{2,}|x{4,}")  # in sk-ab***yz
_ESCAPE = re.compile(r"\\+u([0-9a-fA-F]{4})|(?:\\+x|%)([0-9a-fA-F]{2})|&#x([0-9a-fA-F]{1,5});|&#(\d{1,6});")
_FOLDED = str.maketrans(string.ascii_uppercase, string.ascii_lowercase, "\\")


class Secret:
    """A key and the name of the environment variable that holds it. It is never shown: not by repr, not by str."""

    def __init__(self, value: str, name: str) -> None:
        self.value = value
        self.name = name

    def __repr__(self) -> str:
        return f"[{self.name}]"

    def clean(self, text: str) -> str:
        """The text with "[NAME]" for the key, its escaped and encoded forms, and pieces of them. Clean, then cut.

        A piece is `EDGE` characters of the key's begin or end, `MIDDLE` of what lies between, or what a server leaves
        of it around a mask (sk-ab***yz). A key shorter than `MIDDLE` is found as a whole word only.
        """
        if self.value in ("", LOOPBACK_KEY):
            return text
        plain = _ESCAPE.sub(_escaped, text).encode(errors="replace").decode()
        hidden = self._hide(plain)
        return self._hide(text) if hidden == plain else hidden  # a key may be escaped character by character

    def _hide(self, text: str) -> str:
        kept = [i for i, char in enumerate(text) if char != "\\"]  # quotes may be escaped any number of times
        folded = _fold(text)
        hidden = bytearray(len(text))
        for start, end in self._words(folded) if len(_fold(self.value)) < MIDDLE else self._traces(folded):
            hidden[kept[start] : kept[end - 1] + 1] = b"\1" * (kept[end - 1] + 1 - kept[start])
        runs = groupby(range(len(text)), key=hidden.__getitem__)
        return "".join(repr(self) if hide else "".join(text[i] for i in run) for hide, run in runs)

    def _words(self, folded: str) -> Iterator[tuple[int, int]]:
        """Where a short key stands as a word of its own."""
        for form in self._forms:
            for found in re.finditer(rf"(?<![a-z0-9]){re.escape(form)}(?![a-z0-9])", folded):
                yield found.span()

    def _traces(self, folded: str) -> Iterator[tuple[int, int]]:
        """Where pieces of a long key stand, and masks with what they left of it."""
        for size, pieces in self._pieces.items():
            for start in range(len(folded) - size + 1):
                if folded[start : start + size] in pieces:
                    yield start, start + size
        key = _fold(self.value)
        for mask in _MASK.finditer(folded):
            start, end = mask.span()
            head = next((n for n in range(len(key), 1, -1) if folded.endswith(key[:n], 0, start)), 0)
            tail = next((n for n in range(len(key), 1, -1) if folded.startswith(key[-n:], end)), 0)
            if head or tail:
                yield start - head, end + tail

    @cached_property
    def _forms(self) -> set[str]:
        """How the key may stand in a text, folded."""
        key = self.value
        raw = key.encode(errors="surrogatepass")
        strict = "".join(f"u{ord(char):04x}" if char in "<>&'\"" else char for char in key)  # JSON for web pages
        coded = {key, repr(key)[1:-1], json.dumps(key)[1:-1], strict, html.escape(key), quote(raw), quote(raw, safe="")}
        coded |= {repr(raw)[2:-1], raw.hex()}
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            for before in range(3):  # in base64 a character depends on where it stands: "user:KEY", "Bearer KEY"
                whole = (before + len(raw)) // 3 * 3
                coded.add(encode((b"\0" * before + raw)[:whole]).decode()[(before * 8 + 5) // 6 :])
        return {_fold(form) for form in coded} - {""}

    @cached_property
    def _pieces(self) -> dict[int, set[str]]:
        """Pieces of the forms that are hidden wherever they stand, by length."""
        forms = [form for form in self._forms if len(form) >= EDGE]
        edges = {piece for form in forms for piece in (form[:EDGE], form[-EDGE:])}
        middles = {form[i : i + MIDDLE] for form in forms for i in range(len(form) - MIDDLE + 1)}
        return {EDGE: edges, MIDDLE: middles}


def _escaped(found: re.Match[str]) -> str:
    hexadecimal = found[1] or found[2] or found[3]
    return chr(int(hexadecimal, 16) if hexadecimal else int(found[4]))


def _fold(text: str) -> str:
    """The text in lower case and without backslashes; all else keeps its length, which str.lower may change."""
    return text.translate(_FOLDED)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go. `url` has no trailing slash; it may be shown and stored. `on_this_machine`: nobody else can
    read what is sent, and no proxy is asked."""

    url: str
    secret: Secret
    on_this_machine: bool


def check_url(base_url: str) -> str:
    """The endpoint without trailing slashes, as it may be shown, stored and cached.

    Raises:
        ValueError: It is no URL of an API, or holds what must not be stored; the message does not repeat it.
    """
    if any(not char.isprintable() or char.isspace() for char in base_url):
        raise ValueError("base_url must not hold blanks, line breaks or invisible characters")
    if "@" in base_url.partition("://")[2].partition("/")[0]:
        raise ValueError("base_url must not hold credentials (user:password@): the key belongs into the environment")
    if "?" in base_url or "#" in base_url or "\\" in base_url:
        raise ValueError("base_url must end with its path: nothing after a ?, a # or a backslash can be sent or kept")
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
        known = parts.scheme in ("http", "https") and bool(host) and bool((host or "").encode("idna"))
    except ValueError:  # UnicodeError too
        raise ValueError("base_url must look like https://host/v1, and its host or port is none") from None
    if not known or not base_url.lower().startswith(f"{parts.scheme}://"):
        raise ValueError("base_url must look like https://host/v1: it begins with http:// or https:// and a host")
    if port == 0:
        raise ValueError("base_url must look like https://host/v1, and there is no port 0")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError("base_url must end before /chat/completions, which is added to it (most end in /v1)")
    return base_url.rstrip("/")


def check_api_key_env(name: str) -> str:
    """The name, if it is one of an environment variable.

    Raises:
        ValueError: It is none, or looks like the key itself; the message does not repeat it.
    """
    lower, upper = any(map(str.islower, name)), any(map(str.isupper, name))
    digit = any(map(str.isdigit, name))
    like_a_key = len(name) >= 20 and ((lower and (upper or digit)) or (upper and digit and "_" not in name))
    if like_a_key or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            "api_key_env must be the NAME of an environment variable in capital letters, such as OPENAI_API_KEY. "
            "A key does not belong here: export it under that name"
        )
    return name


def read_endpoint(base_url: str, api_key_env: str) -> Endpoint:
    """The endpoint with its key from the environment; `LOOPBACK_KEY` where none is needed.

    Raises:
        ValueError: The URL, the name or the key is unusable, a key is missing, or it would be sent in clear text. No
            message shows the key or a part of it.
    """
    url, name = check_url(base_url), check_api_key_env(api_key_env)
    parts = urlsplit(url)
    host = parts.hostname or ""
    on_this_machine = is_this_machine(host)
    key = _read_key(name)
    if key and parts.scheme == "http" and not on_this_machine:
        raise ValueError(
            f"base_url {url} would send the key in {name} to {host} unencrypted. Use https://, or a tunnel (ssh -L "
            f"8000:localhost:PORT {host}, then http://localhost:8000/v1); if the server needs no key, unset {name} or "
            f"name a variable that is not set with api_key_env"
        )
    if not key and parts.scheme == "https" and not on_this_machine:
        raise ValueError(
            f"no key for {host}: the environment variable {name} is not set. "
            f"Set it (export {name}=...), or name another variable with api_key_env"
        )
    return Endpoint(url, Secret(key or LOOPBACK_KEY, name), on_this_machine)


def is_this_machine(host: str) -> bool:
    """Whether the host of a URL is this machine, by its name or number alone: nothing is looked up."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.removesuffix(".") == "localhost"
    mapped = getattr(address, "ipv4_mapped", None) or address
    # 0.0.0.0 is what servers print that listen everywhere; as a target it is this machine
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _read_key(name: str) -> str:
    """The key in that variable, "" if there is none. ValueError if no header can carry it."""
    key = os.environ.get(name, "").strip(" \t\r\n")
    problem = ""
    if re.match(r"bearer[\s:=]", key, re.IGNORECASE):
        problem = "begins with 'Bearer': the client adds that word itself"
    elif key.startswith((f"{name}=", "export ")):
        problem = "begins with the variable's own name"
    elif key.strip("'\"`") != key:
        problem = "stands in quotes, which are part of it"
    else:
        odd = next((char for char in key if not "!" <= char <= "~"), None)
        if odd is not None:
            problem = f"holds {_describe(odd)}"
    if problem:
        raise ValueError(f"the key in the environment variable {name} {problem}: set {name} to the bare key")
    return key


def _describe(char: str) -> str:
    if char in "\r\n\v\f\x85\u2028\u2029":
        return "a line break"
    if char in " \t":
        return "a blank"
    if unicodedata.category(char) == "Cc":
        return f"a control character (U+{ord(char):04X})"
    return f"a character that is not ASCII (U+{ord(char):04X} {unicodedata.name(char, 'NO TEXT')})"
