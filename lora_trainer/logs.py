"""structlog set up once, by the entrypoint: JSON lines off a terminal, a console format on it, always on stderr."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Final, Literal, cast

import structlog

from lora_trainer.redaction import redacted_value

TERMINATION_LOG: Final = Path("/dev/termination-log")
"""What Kubernetes shows as the container's last word; at most 4,096 bytes are kept."""
TERMINATION_LOG_BYTES: Final = 4096


def get_logger() -> structlog.stdlib.BoundLogger:
    """The project's logger; `run_id` and `blood_type` are bound through context variables."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger())


def configure(level: str, log_format: Literal["auto", "json", "console"]) -> None:
    """Route our events, and the libraries' own logging and warnings, to stderr in one format.

    Libraries speak at warning level and above only, or at ours if that is stricter: their chatter is theirs,
    and some of it quotes data. Tracebacks are left out, since they hold messages, and a credential is, wherever it turns up.
    """
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact,
        _event_first,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared[:-2], _library_event, _redact, _event_first],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    logging.getLogger("lora_trainer").setLevel(number)
    logging.getLogger("entrypoint").setLevel(number)
    logging.captureWarnings(capture=True)


def adopt_library_loggers() -> None:
    """Take the handlers off loggers that libraries set up for themselves, so that their records come through ours.

    Called after the libraries are imported: torch, transformers and others write lines of their own format.
    """
    for logger in list(logging.Logger.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers.clear()
            logger.propagate = True


class _LineLog(io.TextIOBase):
    """A stream for libraries that print: each line becomes a `library_output` event at debug level."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            get_logger().debug("library_output", stream=self._stream, message=line)
        return len(text)


@contextmanager
def libraries_print_to_the_log() -> Iterator[None]:
    """Keep standard output for results and standard error for one event a line, whatever a library prints."""
    with redirect_stdout(_LineLog("stdout")), redirect_stderr(_LineLog("stderr")):
        yield


def _redact(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    # keys with an underscore are structlog's own
    return {key: value if key.startswith("_") else redacted_value(value) for key, value in event.items()}


def _event_first(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """When, how bad and what stand first in a line; the rest follows as it was given."""
    leading = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return {**leading, **event}


def _library_event(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """A library's message under a snake_case event of its own."""
    record = event.get("_record")
    event["library"] = record.name if isinstance(record, logging.LogRecord) else "unknown"
    # a traceback ends in a message, and the console would show the variables of each frame
    raised = event.pop("exc_info", None)
    event.pop("stack_info", None)
    if isinstance(raised, tuple) and raised[0] is not None:
        event["error"] = raised[0].__qualname__
    event["message"] = str(event.pop("event"))
    event["event"] = "library_message"
    return event


def last_word(summary: dict[str, object], path: Path = TERMINATION_LOG) -> None:
    """Write `summary` to the termination log where there is one; losing it must not change the exit code."""
    summary = {key: redacted_value(value) for key, value in summary.items()}
    # backslashes: a file name of the user's may hold bytes that are no UTF-8
    text = json.dumps(summary, ensure_ascii=False).encode(errors="backslashreplace")
    if len(text) > TERMINATION_LOG_BYTES:
        kept = {key: value for key, value in summary.items() if key != "problems"}
        text = json.dumps({**kept, "problems": ["too many to show here: see the log"]}).encode()
    try:
        if path.exists():
            path.write_bytes(text[:TERMINATION_LOG_BYTES])
    except OSError as error:
        get_logger().warning("termination_log_not_written", reason=error.strerror)
