"""Servers that answer like something else than the expected store: other S3 implementations, consoles, gateways, other protocols.

    with OddStore(s3_server.endpoint_url, always(answer(200, PAGE, "text/html"))) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)

An `OddStore` forwards what its function does not answer to a real S3 server.
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fault_proxy import Answer, Asked, FaultProxy


@dataclass(frozen=True)
class Request:
    """A request, as an odd store sees it."""

    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""

    @property
    def is_write(self) -> bool:
        return self.method in ("PUT", "POST")

    @property
    def is_listing(self) -> bool:
        return "list-type=2" in self.path


Odd = Callable[[Request, Callable[[], Answer]], Answer]
"""Answers a request. The second argument asks the real store."""


class OddStore(FaultProxy):
    """A proxy that leaves the choice of each answer to a function, and keeps the requests."""

    def __init__(self, upstream_url: str, odd: Odd) -> None:
        super().__init__(upstream_url, share=0)
        self._odd = odd
        self.seen: list[Request] = []

    def __enter__(self) -> OddStore:
        super().__enter__()
        return self

    def forward(self, asked: Asked, headers: list[tuple[str, str]], body: bytes) -> Answer:
        request = Request(asked.method, asked.path, {name.lower(): value for name, value in headers})
        self.seen.append(request)
        return self._odd(request, lambda: super(OddStore, self).forward(asked, headers, body))


def answer(status: int, body: bytes = b"", content_type: str = "application/xml", **headers: str) -> Answer:
    """Return an answer; `_` in the names of headers stands for `-`."""
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return Answer(status, "Odd", [("Content-Type", content_type), ("Content-Length", str(len(body))), *named], body)


def error(status: int, code: str, message: str = "", **headers: str) -> Answer:
    """Return an error as S3 describes it."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return answer(status, body.encode(), **headers)


def always(given: Answer) -> Odd:
    """Return a store that gives the same answer to everything."""
    return lambda _request, _ask: given


def writes(given: Answer) -> Odd:
    """Return a store that refuses writes."""
    return lambda request, ask: given if request.is_write else ask()


def refuses_header(name: str, given: Answer, *, method: str = "PUT") -> Odd:
    """Return a store that refuses requests with the header `name`."""
    return lambda request, ask: given if request.method == method and name in request.headers else ask()


PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Who are you?</body></html>"


# -- servers that speak no HTTP, or that speak TLS


class RawServer:
    """A TCP server on loopback that treats each connection with a function."""

    def __init__(self, treat: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> None:
        self._treat = treat
        self._context = context
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self.port: int = self._listening.getsockname()[1]

    def __enter__(self) -> RawServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # shutdown() wakes accept(), which close() does not
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(20)
            try:
                if self._context is None:
                    self._treat(connection)
                else:
                    with self._context.wrap_socket(connection, server_side=True) as secured:
                        self._treat(secured)
            except OSError:
                # the client has had enough
                pass


def says(data: bytes, *, listens_first: bool = True) -> Callable[[socket.socket], None]:
    """Return a server that sends `data` and closes the connection."""

    def treat(connection: socket.socket) -> None:
        if listens_first:
            connection.recv(2**16)
        connection.sendall(data)

    return treat


def silent(connection: socket.socket) -> None:
    """Accept the connection and say nothing until the client closes it."""
    while connection.recv(2**16):
        pass


@dataclass
class Certificate:
    """A certificate for 127.0.0.1, written with its key to a folder."""

    folder: Path
    valid_days: tuple[int, int] = (-1, 10)
    """First and last day, counted from today."""
    host: str = "127.0.0.1"
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.host)])
        now = datetime.datetime.now(datetime.UTC)
        first, last = (now + datetime.timedelta(days=days) for days in self.valid_days)
        try:
            named: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(self.host))
        except ValueError:
            named = x509.DNSName(self.host)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(first)
            .not_valid_after(last)
            .add_extension(x509.SubjectAlternativeName([named]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        self.file = self.folder / "certificate.pem"
        self.file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        self._key_file = self.folder / "key.pem"
        self._key_file.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )

    def context(self) -> ssl.SSLContext:
        """Return the server's side of TLS with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file, self._key_file)
        return context
