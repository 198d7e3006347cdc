"""Explain why a request got no answer from the store: name, port, TLS, certificate or proxy."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import BadStatusLine, RemoteDisconnected
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from lora_trainer.redaction import redacted

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError

_PROBE_TIMEOUT_S: Final = 2.0
_MAX_SHOWN: Final = 60
_NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST")
_TLS_RECORDS: Final = ("\x15\x03", "\x16\x03")
_TUNNEL_STATUS: Final = re.compile(r"Tunnel connection failed: (\d{3})")
_OTHER_AUTHORITY: Final = "set AWS_CA_BUNDLE to a file with the certificates (PEM) of the authority that signed it"
_CERTIFICATE_FAULTS: Final = {
    "certificate has expired": ("its certificate has expired", "whoever runs the store must renew it; check this machine's clock"),
    "not yet valid": ("its certificate is not valid yet", "check this machine's clock"),
    "self-signed certificate in": ("its certificate comes from a private authority", _OTHER_AUTHORITY),
    "self-signed": ("its certificate is self-signed", "set AWS_CA_BUNDLE to a file with this certificate (PEM)"),
    "ostname mismatch": ("its certificate is for another host", "use a name that the certificate has in AWS_ENDPOINT_URL"),
    "doesn't match": ("its certificate is for another host", "use a name that the certificate has in AWS_ENDPOINT_URL"),
    "IP address mismatch": ("its certificate is for another host", "use a name that the certificate has in AWS_ENDPOINT_URL"),
    "unable to get local issuer": ("this machine does not know its certificate's authority", _OTHER_AUTHORITY),
}


@dataclass(frozen=True, slots=True)
class Cause:
    """Why there is no answer."""

    got: str
    advice: str
    is_setting: bool = False
    """Whether a wrong setting causes it, which no other attempt mends."""
    may_pass: bool = True
    """Whether another attempt may help."""
    may_be_scheme: bool = False
    """Whether the port may expect HTTPS instead of HTTP, or the other way round."""


def cause_of(error: BotoCoreError) -> Cause:
    """Return the cause of botocore's `error`, one of its connection errors."""
    from botocore import exceptions as raised

    details: Mapping[str, Any] = error.kwargs
    chain = list(_causes(details.get("error")))
    url = str(details.get("endpoint_url", ""))
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or (443 if url.startswith("https") else 80)
    match error:
        case raised.ProxyConnectionError():
            return _of_proxy(redacted(str(details.get("proxy_url", ""))), chain)
        case raised.SSLError():
            return _of_tls(str(error), f"{host}:{port}")
        case raised.ConnectTimeoutError():
            return Cause(
                f"{host}:{port} accepts no connection within the time limit",
                "check the address, and the firewall, network policy and route between this machine and the store",
            )
        case raised.ReadTimeoutError():
            return Cause(
                f"{host}:{port} accepted the connection and then sent nothing",
                "check the port and the store's health",
                may_be_scheme=True,
            )
    for each in chain:
        match each:
            case socket.gaierror():
                return Cause(
                    f"the host name '{host}' does not resolve",
                    "check its spelling in AWS_ENDPOINT_URL (in a cluster: service.namespace.svc) and this machine's DNS",
                )
            case ConnectionRefusedError():
                return Cause(f"nothing listens on {host}:{port}", "check the port in AWS_ENDPOINT_URL, and whether the store runs")
            case RemoteDisconnected():
                got = "the connection was closed without an answer"
                return Cause(got, "check the port in AWS_ENDPOINT_URL, and the store's health", may_be_scheme=True)
            case BadStatusLine() if str(each).startswith(_TLS_RECORDS):
                return Cause(f"{host}:{port} speaks TLS", f"set AWS_ENDPOINT_URL=https://{urlsplit(url).netloc}", True, False)
            case BadStatusLine() if str(each).strip() and not str(each).startswith("HTTP/"):
                shown = "".join(character for character in str(each) if character.isprintable())[:_MAX_SHOWN]
                said = f"answers '{shown}'" if shown else "sends binary data"
                return Cause(f"{host}:{port} does not speak HTTP, but {said}", "check the port in AWS_ENDPOINT_URL", True, False)
    return Cause("the connection failed", "check AWS_ENDPOINT_URL, the network and the proxy", may_be_scheme=True)


def _causes(error: object) -> Iterator[object]:
    """Yield the exception and those that caused it, urllib3's wrapped ones included."""
    seen: list[object] = []
    waiting = [error]
    while waiting:
        each = waiting.pop(0)
        if not isinstance(each, BaseException) or any(each is known for known in seen):
            continue
        seen.append(each)
        yield each
        waiting += [each.__cause__, each.__context__, getattr(each, "original_error", None), *each.args]


def _of_proxy(proxy: str, chain: list[object]) -> Cause:
    where = "check HTTPS_PROXY and HTTP_PROXY, or add the store's host to NO_PROXY"
    status = _TUNNEL_STATUS.search(" ".join(str(each) for each in chain))
    if status is not None and status.group(1) == "407":
        return Cause(
            f"the proxy {proxy} demands a login (HTTP 407)",
            "put user and password in HTTPS_PROXY, or the store's host in NO_PROXY",
            True,
            False,
        )
    if status is not None:
        refused = status.group(1).startswith("4")
        return Cause(f"the proxy {proxy} does not connect to it (HTTP {status.group(1)})", where, refused, not refused)
    if any(isinstance(each, socket.gaierror) for each in chain):
        return Cause(f"the host name of the proxy {proxy} does not resolve", where)
    if any(isinstance(each, ConnectionRefusedError) for each in chain):
        return Cause(f"nothing listens at the proxy {proxy}", where)
    return Cause(f"the proxy {proxy} can't be used", where)


def _of_tls(message: str, address: str) -> Cause:
    if any(sign in message.upper().replace(" ", "_") for sign in _NOT_TLS):
        return Cause(
            f"{address} does not speak TLS", f"set AWS_ENDPOINT_URL=http://{address} if that is the store's port", True, False
        )
    if "CERTIFICATE_VERIFY_FAILED" in message or "doesn't match" in message:
        for sign, (got, advice) in _CERTIFICATE_FAULTS.items():
            if sign in message:
                is_about_time = "valid" in sign or "expired" in sign
                return Cause(f"no trusted TLS connection: {got}", advice, not is_about_time, False)
        return Cause("no trusted TLS connection: its certificate can't be verified", _OTHER_AUTHORITY, True, False)
    return Cause(
        "the TLS handshake failed", "check the port, and that https:// is right for it, in AWS_ENDPOINT_URL", may_be_scheme=True
    )


def scheme_of_port(url: str) -> str | None:
    """Ask the host of `url`, which ended our connection, what it speaks: return `http`, `https` or None if neither is certain.

    Sends one short request. A proxy is not used, so behind one the answer is None.
    """
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    if not host:
        return None
    with suppress(OSError, ValueError), socket.create_connection((host, port), _PROBE_TIMEOUT_S) as plain:
        if parts.scheme == "https":
            plain.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            return "http" if plain.recv(5) == b"HTTP/" else None
        context = ssl.create_default_context()
        # only the handshake counts here, and nothing is sent through this connection
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with context.wrap_socket(plain, server_hostname=host):
            return "https"
    return None
