"""The connection to the cloud: what comes back is bounded, and what the environment breaks is named at the start."""

from __future__ import annotations

import http.cookiejar
import os
import re
import ssl
import zlib
from glob import glob
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import openai

from gapg_rollout.oracle.endpoint import Endpoint
from gapg_rollout.oracle.reply import ReplyError

HASHED = "[0-9a-f]" * 8 + ".[0-9]*"
"""The file of a certificate in a folder of them."""


class ReplyTooLarge(ReplyError):
    """The body is longer than any answer. It may have been billed; another request would be paid again."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the reply is longer than {max_bytes} bytes", billed=True, retry=False)


def most_bytes(max_tokens: int) -> int:
    """A bound on an honest reply's bytes: 64 for each token, and 4 MiB for reasoning, which no limit may stop."""
    return 2**22 + 64 * max_tokens


def connect(endpoint: Endpoint, *, timeout_s: float, max_bytes: int) -> openai.AsyncOpenAI:
    """A client for `post`: it does not retry or follow redirects, keeps no cookies and reads at most `max_bytes` of a
    body, on the wire and unpacked.

    Proxies and certificates come from the environment, but not for this machine's own servers.

    Raises:
        ValueError: A variable of the environment breaks the client; it is named, without its credentials.
    """
    _check_headers(endpoint)
    if not endpoint.on_this_machine:
        _check_proxies()
        _check_certificates()
    try:
        http_client = _Client(endpoint, max_bytes)
    except OSError as error:  # of what the environment says about TLS, this is left
        raise ValueError(f"SSLKEYLOGFILE={os.environ.get('SSLKEYLOGFILE')!r} ({error}): unset it") from None
    except Exception as error:  # each library has its own idea of NO_PROXY
        name, value = _variable("no_proxy")
        raise ValueError(f"the client cannot read {name}={value!r} ({error}): list hosts, or unset it") from None
    try:
        client = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=endpoint.secret.value,
            max_retries=0,
            timeout=timeout_s,
            http_client=http_client,
        )
    except Exception as error:  # the library's own idea of a URL
        raise ValueError(f"base_url must look like https://host/v1 ({error})") from None
    if not _is_openai(endpoint):  # what OPENAI_ORG_ID and OPENAI_PROJECT_ID say is no business of others
        client.organization = client.project = None
    return client


async def post(client: openai.AsyncOpenAI, body: dict[str, Any]) -> bytes:
    """The body of the reply to a chat request, not compressed.

    Raises:
        openai.APIError: No reply, or one with an HTTP status of failure (whose body may be cut).
        ReplyError: A redirect, a body that cannot be unpacked, or `ReplyTooLarge`.
    """
    try:
        reply = await client.chat.completions.with_raw_response.create(**body)
    except openai.APIConnectionError as error:
        if isinstance(error.__cause__, ReplyError):  # some versions of the client wrap all that its transport raises
            raise error.__cause__ from None
        raise
    return bytes(reply.http_response.content)


class _Client(openai.DefaultAsyncHttpxClient):
    """Reads whole replies, and no more of one than `max_bytes`."""

    def __init__(self, endpoint: Endpoint, max_bytes: int) -> None:
        super().__init__(
            trust_env=not endpoint.on_this_machine,
            follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
        )
        self._max_bytes = max_bytes
        self._endpoint = endpoint

    async def send(self, request: Any, **settings: Any) -> Any:
        try:
            response = await super().send(request, **{**settings, "stream": True})
        except Exception as error:
            kind: Any = type(error)  # its module depends on the client's version
            way = by_way_of(self._endpoint, str(error))
            if way and kind.__name__ in ("ConnectError", "ProxyError"):
                raise kind(f"{error}, by way of {way}", request=request) from error
            raise
        try:
            body = _unpack(await self._read(response), response.headers.get("content-encoding", ""), self._max_bytes)
        except ReplyError:
            if response.status_code < 400:
                raise
            body = b""  # the status says enough
        finally:
            await response.aclose()
        if 300 <= response.status_code < 400:
            raise _redirect(str(request.url), response.headers.get("location", ""), response.status_code)
        kept = {"retry-after", "retry-after-ms"}  # others may repeat the key, and the client logs them
        headers = {name: value for name, value in response.headers.items() if name in kept}
        return type(response)(response.status_code, headers=headers, content=body, request=request)

    async def _read(self, response: Any) -> bytes:
        """The body as it was sent; that of an error is cut where another is too large."""
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self._max_bytes:
                if response.status_code < 400:
                    raise ReplyTooLarge(self._max_bytes)
                break
        return bytes(body[: self._max_bytes])


def _unpack(body: bytes, encodings: str, max_bytes: int) -> bytes:
    """What servers compress although they were asked not to, bounded before it is in memory."""
    for encoding in reversed([name.strip().lower() for name in encodings.split(",")]):
        if encoding in ("", "identity"):
            continue
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise ReplyError(f"the reply is compressed ({encoding[:20]}), unasked", billed=True, retry=False)
        try:
            unpacking = zlib.decompressobj(wbits=47)  # gzip or zlib, by its header
            body = unpacking.decompress(body, max_bytes + 1)
        except zlib.error as error:
            raise ReplyError(f"the reply cannot be unpacked ({error})", billed=True, retry=True) from None
        if len(body) > max_bytes:
            raise ReplyTooLarge(max_bytes)
    return body


def _redirect(url: str, location: str, status: int) -> ReplyError:
    try:
        parts = urlsplit(urljoin(url, location))
        port = f":{parts.port}" if parts.port else ""
        where = f"to {parts.scheme}://{parts.hostname}{port}" if location and parts.hostname else "without saying where"
    except ValueError:
        where = "to what is no URL"
    words = f"the server redirects (HTTP {status}) {where}; redirects are not followed: set base_url to the API itself"
    return ReplyError(words, billed=False, retry=False, code=str(status))


def by_way_of(endpoint: Endpoint, error: str = "") -> str:
    """What the environment says about the way to this endpoint, as it may be shown: "HTTPS_PROXY=http://proxy:3128";
    its certificates too if the error is about them."""
    if endpoint.on_this_machine:
        return ""
    parts, proxies, ways = urlsplit(endpoint.url), getproxies(), []
    scheme = next((s for s in (parts.scheme, "all") if proxies.get(s)), "")
    if scheme and not proxy_bypass(parts.hostname or ""):
        ways.append(_shown(f"{scheme}_proxy"))
    if "certificate" in error.lower():
        name = _certificates()
        ways.append(
            f"{name}={os.environ[name]!r}" if name else "the system's certificates (SSL_CERT_FILE names others)"
        )
    return ", ".join(ways)


def _is_openai(endpoint: Endpoint) -> bool:
    return f".{urlsplit(endpoint.url).hostname}".endswith(".openai.com")


def _check_headers(endpoint: Endpoint) -> None:
    """The client makes headers of these variables by itself."""
    if os.environ.get("OPENAI_CUSTOM_HEADERS", "").strip():
        raise ValueError("OPENAI_CUSTOM_HEADERS would change every request, its key included: unset it")
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        if _is_openai(endpoint) and not re.fullmatch(r"[!-~]*", os.environ.get(name, "")):
            raise ValueError(f"{name} holds what no header can carry (a blank, a line break, no ASCII): set it anew")


def _check_proxies() -> None:
    proxies = getproxies()
    if "*" in (host.strip() for host in proxies.get("no", "").split(",")):
        return
    for scheme in ("http", "https", "all"):
        value = proxies.get(scheme)
        if not value:
            continue
        url = value if "://" in value else f"http://{value}"
        try:
            parts = urlsplit(url)
            openai.DefaultAsyncHttpxClient(trust_env=False, verify=False, proxy=url)
            problem = "" if parts.hostname and parts.port != 0 else "there is no host or port in it"
        except ImportError:
            problem = "a SOCKS proxy needs the package socksio (pip install socksio), or use an http:// proxy"
        except Exception:  # its words may hold the proxy's password
            problem = "it must look like http://host:port"
        if problem:
            raise ValueError(f"{_shown(f'{scheme}_proxy')} cannot be used: {problem}, or unset it")


def _certificates() -> str:
    """The variable that says which certificates are trusted, "" if none is set."""
    return next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "")


def _check_certificates() -> None:
    name = _certificates()
    value = os.environ.get(name, "")
    problem = ""
    if name == "SSL_CERT_FILE":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cafile=value)
            problem = "" if context.cert_store_stats()["x509"] else "there is no certificate in it"
        except (OSError, ValueError) as error:
            not_one = isinstance(error, ssl.SSLError)
            problem = "there is no certificate in it" if not_one else str(getattr(error, "strerror", error))
    elif name and not any(glob(HASHED, root_dir=folder) for folder in value.split(os.pathsep)):
        problem = "it holds no certificates under their hashes, as `openssl rehash` names them"
    if problem:
        raise ValueError(f"{name}={value!r} cannot be used: {problem}. Point it at certificates, or unset it")


def _variable(lower: str) -> tuple[str, str]:
    """(name, value) of a variable that is read in any case; the lower one wins."""
    names = sorted((name for name in os.environ if name.lower() == lower and os.environ[name]), reverse=True)
    name = lower if lower in names else names[0] if names else lower.upper()
    return name, os.environ.get(name, "")


def _shown(lower: str) -> str:
    """A proxy's variable without its user and password; the bare name where they cannot be told from the rest."""
    name, value = _variable(lower)
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return name
    clear = re.fullmatch(r"[!-~]+", value) and "@" not in parts.path + parts.query + parts.fragment
    return f"{name}={parts.scheme}://{parts.hostname or ''}{port}" if clear else name
