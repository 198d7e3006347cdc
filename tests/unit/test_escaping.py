"""Test that nothing a terminal would obey reaches it, from any file, model or message."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_trainer import logs
from lora_trainer.data.records import Reply
from lora_trainer.escaping import escaped, one_line
from lora_trainer.run.terminal_chat import print_reply

HOSTILE = "\x1b]0;pwn\x07\x1b[31mRED \x9b2J \u202etxet\u202c \u2066x\u2069 \x7f \u200b \ufeff \x00"
OBEYED = [
    *map(chr, range(0x09)),
    *map(chr, range(0x0B, 0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u202a\u202e\u2066\u2069\u200e\u2028",
]


def is_plain(text: str) -> bool:
    return not set(text) & set(OBEYED)


@given(st.text(alphabet=st.characters(codec=None)))
def test_nothing_that_a_terminal_obeys_is_left_and_everything_can_be_encoded(text: str) -> None:
    shown = escaped(text)
    assert is_plain(shown)
    shown.encode("utf-8")
    assert "\n" not in one_line(text)
    assert escaped(shown) == shown


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_json_stays_the_same_json(text: str) -> None:
    document = json.dumps({"text": text}, ensure_ascii=False, indent=2)
    assert json.loads(escaped(document)) == {"text": text}


def test_what_people_write_stays() -> None:
    for text in ("가나다 ㅋㅋ 👨\u200d👩\u200d👧 ❤️ 🏳️\u200d🌈", "tab\tand\nline", "naïve – “quoted” …"):
        assert escaped(text) == text
    assert one_line("a\nb\tc", 3) == "a\\u000ab…"


@pytest.mark.parametrize("raw", [False, True])
def test_a_reply_is_printed_escaped(raw: bool) -> None:
    out = io.StringIO()
    text = json.dumps({"text": f"응 {HOSTILE[9:]}", "emotion": "smile"}, ensure_ascii=False)
    reply = Reply.model_construct(text=json.loads(text)["text"], emotion="smile")
    print_reply(Console(file=out, force_terminal=False, width=200), "A 다정", text, reply, raw=raw)
    printed = out.getvalue()
    assert is_plain(printed)
    assert "\\u202etxet" in printed
    assert "\\u009b2J" in printed
    if raw:
        assert json.loads(printed) == json.loads(text)


@pytest.fixture
def log_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.usefixtures("log_restored")
def test_a_log_line_is_escaped(capsys: pytest.CaptureFixture[str], form: str) -> None:
    logs.configure("info", form)  # type: ignore[arg-type]
    logging.getLogger("somewhere").error("library says %s", HOSTILE)
    structlog.get_logger("lora_trainer").error("seen", problem=HOSTILE, nested={"problems": [HOSTILE, (HOSTILE,)]})
    lines = capsys.readouterr().err
    assert is_plain(lines)
    assert "\\u202etxet" in lines
    if form == "json":
        assert json.loads(lines.splitlines()[1])["nested"]["problems"] == [HOSTILE, [HOSTILE]]
