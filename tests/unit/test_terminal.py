"""Test what standard input is decoded as."""

from __future__ import annotations

import io

import pytest

from entrypoint.terminal import read_lines
from lora_trainer.errors import ConfigError


def lines(data: bytes, encoding: str) -> list[str]:
    return list(read_lines(io.TextIOWrapper(io.BytesIO(data), encoding, "surrogateescape"), io.StringIO()))


@pytest.mark.parametrize("declared", ["utf-8", "ascii", "latin-1", "cp949"])
def test_utf_8_is_read_whatever_the_terminal_declares(declared: str) -> None:
    assert lines("안녕\n😀 카페".encode("utf-8-sig"), declared) == ["안녕\n", "😀 카페"]


def test_another_encoding_that_the_terminal_declares() -> None:
    assert lines("안녕\n".encode("cp949"), "cp949") == ["안녕\n"]
    assert lines("안녕\n".encode("euc-kr"), "euc-kr") == ["안녕\n"]


@pytest.mark.parametrize(
    ("data", "declared"),
    [
        ("안녕\n".encode("cp949"), "utf-8"),
        ("안녕\n".encode("cp949"), "ascii"),
        ("안녕\n".encode("cp949"), "latin-1"),
        ("안녕\n".encode("utf-16"), "utf-8"),
        ("안녕\n".encode("utf-16-le"), "cp949"),
        (b"caf\xe9\n", "utf-8"),
    ],
)
def test_bytes_that_are_neither(data: bytes, declared: str) -> None:
    with pytest.raises(ConfigError, match="standard input: line 2: not UTF-8"):
        lines("안녕\n".encode() + data, declared)
