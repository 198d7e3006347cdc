"""Test the fault-injecting proxy: faults match their description and frequency, and other requests pass unchanged."""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from fault_proxy import Asked, Fault, FaultProxy

pytestmark = pytest.mark.integration

DATA = bytes(range(256)) * 16


def client_for(url: str) -> Any:
    """Return an S3 client that never retries."""
    config = Config(retries={"total_max_attempts": 1}, read_timeout=300, s3={"addressing_style": "path"})
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=config)


def raw(proxy: FaultProxy, method: str, path: str, body: bytes = b"", timeout_s: float = 300) -> tuple[int, bytes]:
    """Send one request without a library's retries or checks."""
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=timeout_s)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_everything_passes_unharmed(s3_server: Any, bucket: str) -> None:
    large = os.urandom(3 * 2**20)
    with FaultProxy(s3_server.endpoint_url, share=0) as proxy:
        client = client_for(proxy.url)
        for key, data in (("한글/a b+c", DATA), ("empty", b""), ("large", large)):
            client.put_object(Bucket=bucket, Key=key, Body=data, Metadata={"m": "1"}, ChecksumAlgorithm="SHA256")
            got = client.get_object(Bucket=bucket, Key=key)
            assert got["Body"].read() == data
            assert got["Metadata"] == {"m": "1"}
            assert client.head_object(Bucket=bucket, Key=key)["ContentLength"] == len(data)
        assert client.get_object(Bucket=bucket, Key="large", Range="bytes=5-9")["Body"].read() == large[5:10]
        assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 3
        client.delete_object(Bucket=bucket, Key="empty")
        assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 2
    assert proxy.requests == 13
    assert proxy.faults.total() == 0


def test_signed_headers_arrive_as_they_were_sent() -> None:
    """The signature covers the `Host` header, which names the proxy, so a server that verifies it must receive that name."""
    received = bytearray()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        FaultProxy(f"http://127.0.0.1:{server.getsockname()[1]}", share=0) as proxy,
    ):
        asker = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=300)
        asker.request("PUT", "/b/k%20?x=%2F", b"data", {"Authorization": "AWS4-HMAC-SHA256 x", "Expect": "100-continue"})
        accepted, _ = server.accept()
        with accepted:
            while not received.endswith(b"data"):
                received += accepted.recv(4096)
            accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert asker.getresponse().status == 200
        asker.close()
    head = received.decode().lower()
    assert head.startswith("put /b/k%20?x=%2f http/1.1\r\n")
    assert f"host: {urlsplit(proxy.url).netloc}\r\n" in head
    assert "authorization: aws4-hmac-sha256 x\r\n" in head


@pytest.mark.parametrize(
    ("kind", "status", "code"), [(Fault.THROTTLED, 503, b"SlowDown"), (Fault.SERVER_ERROR, 500, b"InternalError")]
)
def test_refused(s3_server: Any, bucket: str, kind: Fault, status: int, code: bytes) -> None:
    with FaultProxy(s3_server.endpoint_url, share=1, kinds=[kind], at_most=1) as proxy:
        got, body = raw(proxy, "PUT", f"/{bucket}/x", DATA)
        assert (got, code in body) == (status, True)
        assert raw(proxy, "GET", f"/{bucket}/x")[0] == 404, "it never reached the server"


@pytest.mark.parametrize(("kind", "done"), [(Fault.RESET_BEFORE, 404), (Fault.RESET_AFTER, 200)])
def test_reset(s3_server: Any, bucket: str, kind: Fault, done: int) -> None:
    with FaultProxy(s3_server.endpoint_url, share=1, kinds=[kind], at_most=1) as proxy:
        with pytest.raises(ConnectionResetError):
            raw(proxy, "PUT", f"/{bucket}/x", DATA)
        assert raw(proxy, "GET", f"/{bucket}/x")[0] == done


@pytest.mark.parametrize(("kind", "raised"), [(Fault.STALLED, TimeoutError), (Fault.TRUNCATED, http.client.HTTPException)])
def test_answer_that_ends_early(s3_server: Any, bucket: str, kind: Fault, raised: type[Exception]) -> None:
    timeout_s = 1 if kind == Fault.STALLED else 300
    with FaultProxy(s3_server.endpoint_url, share=1, kinds=[kind], at_most=2) as proxy:
        with pytest.raises((raised, ConnectionError)):
            raw(proxy, "PUT", f"/{bucket}/x", DATA, timeout_s)
        with pytest.raises(raised) as caught:
            raw(proxy, "GET", f"/{bucket}/x", timeout_s=timeout_s)
        if kind == Fault.TRUNCATED:
            assert isinstance(caught.value, http.client.IncompleteRead)
            assert caught.value.partial == DATA[: len(DATA) // 2]
        assert raw(proxy, "GET", f"/{bucket}/x") == (200, DATA)


def test_wrong_bytes_are_an_objects_only(s3_server: Any, bucket: str) -> None:
    with FaultProxy(s3_server.endpoint_url, share=1, kinds=[Fault.WRONG_BYTES]) as proxy:
        client_for(s3_server.endpoint_url).put_object(Bucket=bucket, Key="x", Body=DATA)
        _, listing = raw(proxy, "GET", f"/{bucket}?list-type=2")
        assert b"<Key>x</Key>" in listing
        assert raw(proxy, "HEAD", f"/{bucket}/x")[0] == 200
        assert proxy.faults.total() == 0
        _, first = raw(proxy, "GET", f"/{bucket}/x")
        _, second = raw(proxy, "GET", f"/{bucket}/x")
        for got in (first, second):
            assert sum((one ^ other).bit_count() for one, other in zip(got, DATA, strict=True)) == 1
        assert first != second
        with pytest.raises(ClientError, match="BadDigest"):
            client_for(proxy.url).put_object(Bucket=bucket, Key="y", Body=DATA, ChecksumAlgorithm="SHA256")
        assert proxy.faults == {Fault.WRONG_BYTES: 3}


def test_share_is_of_requests_even_on_one_connection(s3_server: Any, bucket: str) -> None:
    drawn: list[list[int]] = []
    for _ in range(2):
        with FaultProxy(s3_server.endpoint_url, share=0.2, seed=7, kinds=[Fault.THROTTLED]) as proxy:
            connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=300)
            statuses = []
            for _ in range(200):
                connection.request("HEAD", f"/{bucket}")
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
            connection.close()
        assert set(statuses) == {200, 503}
        assert proxy.requests == 200
        assert 20 <= statuses.count(503) == proxy.faults[Fault.THROTTLED] <= 60
        drawn.append(statuses)
    assert drawn[0] == drawn[1], "the same seed, the same faults"


@pytest.mark.parametrize(("only", "hit"), [(lambda asked: asked.method == "PUT", 1), (lambda _: False, 0)])
def test_only_some_requests(s3_server: Any, bucket: str, only: Callable[[Asked], bool], hit: int) -> None:
    with FaultProxy(s3_server.endpoint_url, share=1, kinds=[Fault.THROTTLED], only=only) as proxy:
        raw(proxy, "PUT", f"/{bucket}/x", DATA)
        raw(proxy, "GET", f"/{bucket}/x")
    assert proxy.faults.total() == hit
