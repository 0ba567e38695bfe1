"""Which addresses and keys are taken, and that the key is in no text that is shown."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapg_rollout.oracle.endpoint import LOOPBACK_KEY, Secret, check_api_key_env, check_url, read_endpoint
from tests.rollout.oracle_checks import KEY

PRINTABLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\"), min_size=8)


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1", "http://127.0.0.1:8000/v1", "http://[::1]:8/v1", "HTTPS://h/v1", "https://h",
        "https://h./openai/v1", "https://münchen.example/v1", "http://my_host:8000/v1", "https://h/a@b/v1",
    ],
)  # fmt: skip
def test_a_url_is_taken_without_its_last_slash(url: str) -> None:
    assert check_url(url) == check_url(url + "/") == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hunter2", "begins with http"),
        ("hunter2:8000", "begins with http"),
        ("ftp://hunter2/v1", "begins with http"),
        ("https:hunter2", "begins with http"),
        ("https:///hunter2", "a host"),
        ("https://", "a host"),
        ("", "a host"),
        ("https://me:hunter2@h/v1", "credentials"),
        ("https://hunter2@h/v1", "credentials"),
        ("https://me:hunt/er2@h/v1", "host or port"),
        ("http://127.0.0.1\\@hunter2", "credentials"),
        ("https://h/v1?api-key=hunter2", "nothing after a \\?"),
        ("https://h/v1?", "nothing after a \\?"),
        ("https://h/v1#hunter2", "nothing after a \\?"),
        ("https://h/v1\nhunter2", "line breaks"),
        (" https://h/hunter2", "blanks"),
        ("https://h\u200b/hunter2", "invisible"),
        ("https://h\ufeff/v1", "invisible"),
        ("https://h:hunter2/v1", "host or port"),
        ("https://h:99999/v1", "host or port"),
        ("https://h:0/v1", "port 0"),
        ("https://[::1/v1", "host or port"),
        ("https://a..b/v1", "host or port"),
        ("https://h/v1/chat/completions", "end before /chat/completions"),
    ],
)
def test_another_url_is_refused_and_not_repeated(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^base_url .*{message}") as refused:
        check_url(url)
    assert "hunter2" not in str(refused.value) and "\n" not in str(refused.value)


@given(st.text(max_size=30).map(lambda text: "https://" + text) | st.text(max_size=30))
def test_whatever_the_url_is_it_is_taken_or_refused(url: str) -> None:
    try:
        assert check_url(check_url(url)) == check_url(url)
    except ValueError as error:
        assert str(error).startswith("base_url ")


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "my_key", "_K", "AZURE_OPENAI_KEY_2_OF_TEAM_B"])
def test_the_name_of_a_variable(name: str) -> None:
    assert check_api_key_env(name) == name


@pytest.mark.parametrize(
    "name",
    [KEY, "sk-x", "gsk_abcdefghij0123456789", "hf_abcdefghIJKLMNOPabcd", "AKIAIOSFODNN7EXAMPLE0",
     "a0b1c2d3e4f5a6b7c8d9e0f1a2b3c4d5", "", "A B", "1KEY", "KEY\n", "$KEY"],
)  # fmt: skip
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(ValueError, match="must be the NAME of an environment variable") as refused:
        check_api_key_env(name)
    assert len(name) < 4 or name not in str(refused.value)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost.", "127.0.0.1", "127.8.9.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_this_machine_gets_a_key_in_clear_text(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_KEY", KEY)
    endpoint = read_endpoint(f"http://{host}:8000/v1", "CLOUD_KEY")
    assert endpoint.on_this_machine and endpoint.secret.value == KEY
    monkeypatch.delenv("CLOUD_KEY")
    assert read_endpoint(f"http://{host}/v1", "CLOUD_KEY").secret.value == LOOPBACK_KEY


@pytest.mark.parametrize(
    "host",
    ["api.example.com", "192.168.1.7", "10.0.0.1", "[fe80::1]", "127.0.0.1.nip.io", "localhost.example.com", "127.1"],
)
def test_another_machine_gets_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_KEY", KEY)
    with pytest.raises(ValueError, match=r"send the key in CLOUD_KEY .*unencrypted.*https://.*tunnel.*unset CLOUD_KEY"):
        read_endpoint(f"http://{host}:8000/v1", "CLOUD_KEY")
    assert read_endpoint(f"https://{host}:8000/v1", "CLOUD_KEY").secret.value == KEY
    monkeypatch.setenv("CLOUD_KEY", " ")
    keyless = read_endpoint(f"http://{host}:8000/v1/", "CLOUD_KEY")
    assert (keyless.url, keyless.secret.value, keyless.on_this_machine) == (f"http://{host}:8000/v1", "EMPTY", False)
    with pytest.raises(ValueError, match=r"CLOUD_KEY is not set.*export CLOUD_KEY="):
        read_endpoint(f"https://{host}/v1", "CLOUD_KEY")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{KEY}\n{KEY}", "a line break"), (f"{KEY}\r{KEY}", "a line break"), (f"{KEY}\x85x", "a line break"),
        (f"{KEY} x", "a blank"), (f"{KEY}\tx", "a blank"), (f"{KEY}\x1bx", r"a control character \(U\+001B\)"),
        (f"{KEY}\u2026", "HORIZONTAL ELLIPSIS"), (f"\u201c{KEY}\u201d", "QUOTATION MARK"), (f"\ufeff{KEY}", r"U\+FEFF"),
        (f"\xa0{KEY}", "NO-BREAK SPACE"), (f"{KEY}\udcff", r"U\+DCFF"), (f"{KEY}é", "E WITH ACUTE"),
        (f"'{KEY}'", "quotes"), (f'"{KEY}', "quotes"), (f"Bearer {KEY}", "'Bearer'"), (f"CLOUD_KEY={KEY}", "own name"),
    ],
)  # fmt: skip
def test_a_key_that_no_header_can_carry_is_refused_at_the_start(
    key: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_KEY", key)
    for url in ("https://h/v1", "http://h/v1", "http://localhost/v1"):
        with pytest.raises(ValueError, match=f"the key in the environment variable CLOUD_KEY .*{message}") as refused:
            read_endpoint(url, "CLOUD_KEY")
        assert not any(KEY[i : i + 4] in str(refused.value) for i in range(len(KEY) - 3))


def test_blanks_around_a_key_are_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_KEY", f" {KEY}\r\n")
    endpoint = read_endpoint("https://h/v1", "CLOUD_KEY")
    assert endpoint.secret.value == KEY
    assert KEY not in f"{endpoint!r} {endpoint} {endpoint.secret} {endpoint.secret!r}"


def forms(key: str) -> list[str]:
    """How servers, clients and loggers write a key."""
    raw = key.encode()
    return [
        key, repr(key)[1:-1], json.dumps(key)[1:-1], json.dumps(json.dumps(key))[3:-3], json.dumps({"k": key}),
        json.dumps(key).replace("/", "\\/"), repr(json.dumps(key)), html.escape(key), quote(key), quote(key, safe=""),
        quote(key, safe="").lower(), key.upper(), repr(raw), raw.hex(), key.encode("unicode_escape").decode(),
    ]  # fmt: skip


@given(PRINTABLE, st.text(max_size=20), st.text(max_size=20), st.data())
def test_no_form_and_no_piece_of_the_key_is_shown(key: str, before: str, after: str, data: st.DataObject) -> None:
    secret = Secret(key, "K")
    for form in forms(key):
        assert form not in secret.clean(before + form + after) or len(form) < 8 or form in "[K]"
    begin = data.draw(st.integers(6, len(key)))
    for piece in (key[:begin], key[-begin:]):
        assert "[K]" in secret.clean(before + piece)
    if len(key) > 12:
        start = data.draw(st.integers(0, len(key) - 9))
        assert key[start : start + 8] not in secret.clean(before + key[start : start + 9] + after)


@pytest.mark.parametrize("before", ["", "u:", "me:", "user:", "Bearer "])
def test_base64_hides_nothing(before: str) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        cleaned = Secret(KEY, "K").clean("Basic " + encode(f"{before}{KEY}".encode()).decode())
        assert "[K]" in cleaned and len(cleaned) < 6 + 3 + 16


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (f"Incorrect API key provided: {KEY}.", "Incorrect API key provided: [K]."),
        ("provided: sk-proj-********************UvWx. See", "provided: [K]. See"),
        ("provided: sk-p...Wx.", "provided: [K]."),
        ("ends in ***UvWx", "ends in [K]"),
        ("key sk-p\u2026", "key [K]"),
        ("key sk-pXXXXXXXXUvWx", "key [K]"),
        (f"cut here: {KEY[:9]}", "cut here: [K]"),
        (f"{KEY[5:]} is no key", "[K] is no key"),
        ("nothing of it ... **at all**, sk is short", "nothing of it ... **at all**, sk is short"),
        ("every character: " + "".join(f"\\u{ord(c):04x}" for c in KEY), "every character: [K]"),
        ("every character: " + "".join(f"%{ord(c):02X}" for c in KEY), "every character: [K]"),
        ("every character: " + "".join(f"&#{ord(c)};" for c in KEY), "every character: [K]"),
        ("no key: \\u0041 100%25 &#65;", "no key: \\u0041 100%25 &#65;"),
    ],
)
def test_what_servers_say_of_a_key(text: str, cleaned: str) -> None:
    assert Secret(KEY, "K").clean(text) == cleaned


def test_a_short_key_is_hidden_as_a_word_and_no_key_never() -> None:
    assert Secret("test", "K").clean("the latest 'test' of test.") == "the latest '[K]' of [K]."
    assert Secret(LOOPBACK_KEY, "K").clean("EMPTY is no key") == "EMPTY is no key"


def test_a_key_that_was_never_checked_is_hidden_too() -> None:
    for key in ("sk-one\nsk-two", "sk-one\u2026", 'sk-"one"\\two'):
        for form in (key, repr(key)[1:-1], json.dumps(key)[1:-1], repr(repr(key))):
            assert "one" not in Secret(key, "K").clean(f"Illegal header value {form}")
