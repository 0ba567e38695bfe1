"""Environments that break a client: each variable is named at the start, without what is secret in it."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certifi
import openai
import pytest

from gapg_rollout.oracle.connection import by_way_of, connect, post
from gapg_rollout.oracle.endpoint import Endpoint, read_endpoint
from tests.rollout.oracle_checks import KEY

pytestmark = pytest.mark.usefixtures("bare_environment")


CLOUD = "https://api.example.com/v1"


@pytest.fixture
def start_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Endpoint]:
    """`start_with(url, NAME=value)`: makes a client for that URL in that environment."""

    def make(url: str = CLOUD, **variables: str) -> Endpoint:
        for name, value in {"CLOUD_KEY": KEY, **variables}.items():
            monkeypatch.setenv(name, value)
        endpoint = read_endpoint(url, "CLOUD_KEY")
        connect(endpoint, timeout_s=5, max_bytes=1000)
        return endpoint

    return make


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", "socks5://me:hunter2@127.0.0.1:9", "ALL_PROXY=socks5://127.0.0.1:9 .*socksio"),
        ("all_proxy", "socks5h://127.0.0.1:9", "all_proxy=socks5h://127.0.0.1:9 .*socksio"),
        ("https_proxy", "socks4://127.0.0.1:9", "https_proxy=socks4://127.0.0.1:9 .*must look like"),
        ("HTTP_PROXY", "gopher://me:hunter2@h:1", "HTTP_PROXY=gopher://h:1 .*must look like"),
        ("HTTPS_PROXY", "http://me:hunter2@h:port", "HTTPS_PROXY cannot be used.*must look like"),
        ("HTTPS_PROXY", "me:hunter2", "HTTPS_PROXY cannot be used.*must look like"),
        ("HTTPS_PROXY", "http://me:hun/ter2@h:1", "HTTPS_PROXY cannot be used.*must look like"),
        ("HTTPS_PROXY", "http://[::1", "HTTPS_PROXY cannot be used"),
        ("HTTPS_PROXY", "http://", "HTTPS_PROXY=http:// cannot be used: there is no host or port"),
        ("HTTPS_PROXY", "http://h\n:1", "HTTPS_PROXY cannot be used"),
        ("HTTP_PROXY", "http://h:99999999", "HTTP_PROXY cannot be used"),
    ],
)
def test_a_proxy_that_breaks_the_client_is_named(
    start_with: Callable[..., Endpoint], name: str, value: str, message: str
) -> None:
    if "socksio" in message and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed")
    with pytest.raises(ValueError, match=message + ".*unset it") as refused:
        start_with(**{name: value})
    assert "hunter2" not in str(refused.value) and "\n" not in str(refused.value)
    assert start_with("http://127.0.0.1:1/v1", **{name: value}).on_this_machine  # no proxy is asked there
    start_with(NO_PROXY="other.example,*", **{name: value})


@pytest.mark.parametrize("value", ["http://proxy.example:3128", "proxy.example:3128", "https://me:pw@proxy.example"])
def test_a_proxy_that_works_is_taken(start_with: Callable[..., Endpoint], value: str) -> None:
    assert "HTTPS_PROXY=http" in by_way_of(
        start_with(HTTPS_PROXY=value, NO_PROXY="a.example, .b.example,::1,10.0.0.0/8")
    )
    assert "pw" not in by_way_of(start_with())
    assert by_way_of(start_with(NO_PROXY=".example.com")) == ""


@pytest.mark.parametrize("value", ["[::1", "http://[", "h:port", "a b", "fe80::1%eth0", "\x01", "::1/999", "*.*.x"])
def test_no_proxy_is_read_or_named(start_with: Callable[..., Endpoint], value: str) -> None:
    try:
        start_with(NO_PROXY=value)
    except ValueError as error:
        assert "NO_PROXY" in str(error) and "unset it" in str(error)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("SSL_CERT_FILE", lambda at: None, "No such file"),
        ("SSL_CERT_FILE", lambda at: at.write_text("no certificate"), "no certificate in it"),
        ("SSL_CERT_FILE", lambda at: at.write_text(""), "no certificate in it"),
        ("SSL_CERT_FILE", lambda at: at.mkdir(), ""),
        ("SSL_CERT_DIR", lambda at: None, "no certificates under their hashes"),
        ("SSL_CERT_DIR", lambda at: at.mkdir(), "no certificates under their hashes"),
        ("SSL_CERT_DIR", lambda at: at.write_text("x"), "no certificates under their hashes"),
    ],
)
def test_certificates_that_break_the_client_are_named(
    start_with: Callable[..., Endpoint], tmp_path: Path, name: str, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "ca")
    with pytest.raises(ValueError, match=rf"^{name}='{tmp_path}/ca' cannot be used: .*{message}.*unset it"):
        start_with(**{name: str(tmp_path / "ca")})
    start_with("http://127.0.0.1:1/v1", **{name: str(tmp_path / "ca")})


def test_certificates_that_work_are_taken(start_with: Callable[..., Endpoint], tmp_path: Path) -> None:
    (tmp_path / "0123abcd.0").write_text(Path(certifi.where()).read_text())
    start_with(SSL_CERT_DIR=f"/no/such/folder:{tmp_path}")
    endpoint = start_with(SSL_CERT_FILE=certifi.where(), SSL_CERT_DIR="/no/such/folder")  # the file wins
    assert by_way_of(endpoint, "[SSL: CERTIFICATE_VERIFY_FAILED]") == f"SSL_CERT_FILE={certifi.where()!r}"
    assert by_way_of(endpoint, "Name or service not known") == ""


def test_a_url_that_only_the_client_refuses(start_with: Callable[..., Endpoint]) -> None:
    with pytest.raises(ValueError, match=r"^base_url must look like"):
        start_with("https://api…com/v1")


def test_a_key_log_that_cannot_be_written_is_named(start_with: Callable[..., Endpoint], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SSLKEYLOGFILE='/no/such/folder/log' .*unset it"):
        start_with(SSLKEYLOGFILE="/no/such/folder/log", SSL_CERT_FILE=certifi.where())
    start_with(SSLKEYLOGFILE=str(tmp_path / "log"))


def test_what_stands_behind_a_failed_connection_is_named(start_with: Callable[..., Endpoint]) -> None:
    endpoint = start_with(HTTPS_PROXY="http://me:hunter2@127.0.0.1:9")

    async def run() -> None:
        await post(connect(endpoint, timeout_s=5, max_bytes=1000), {"model": "m", "messages": []})

    with pytest.raises(openai.APIConnectionError) as failure:
        asyncio.run(run())
    assert "by way of HTTPS_PROXY=http://127.0.0.1:9" in str(failure.value.__cause__)
    assert "hunter2" not in str(failure.value.__cause__)


def test_headers_of_openais_that_cannot_be_sent_are_named(start_with: Callable[..., Endpoint]) -> None:
    with pytest.raises(ValueError, match=r"^OPENAI_ORG_ID .*line break"):
        start_with("https://eu.api.openai.com/v1", OPENAI_ORG_ID="org\nX-More: 1")
    with pytest.raises(ValueError, match=r"^OPENAI_PROJECT_ID .*no ASCII"):
        start_with("https://api.openai.com/v1", OPENAI_ORG_ID="org-1", OPENAI_PROJECT_ID="proj…")
    start_with("https://api.openai.com/v1", OPENAI_PROJECT_ID="proj-1")
    with pytest.raises(ValueError, match=r"^OPENAI_CUSTOM_HEADERS .*unset it"):
        start_with(OPENAI_CUSTOM_HEADERS="Authorization: hunter2")
