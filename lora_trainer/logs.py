"""Configure structlog: JSON lines, or a console format on a terminal, always on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TextIO, cast

import structlog

from lora_trainer.escaping import escaped, escaped_value
from lora_trainer.redaction import redacted, redacted_value

TERMINATION_LOG: Final = Path("/dev/termination-log")
"""The file that Kubernetes reports as the container's termination message; it keeps at most 4,096 bytes."""
TERMINATION_LOG_BYTES: Final = 4096
_DEFAULT_COLUMNS: Final = 80
_INDENT: Final = " " * 4
_COLOR: Final = re.compile("\x1b\\[[0-9;]*m")
"""What the console renderer inserts; everything else that a terminal obeys is escaped before."""


def get_logger() -> structlog.stdlib.BoundLogger:
    """Return the project's logger. Context variables bind `run_id` and `blood_type` to it."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger())


def shows_colors(stream: TextIO) -> bool:
    """Return whether to write colours to `stream`: to a terminal, unless NO_COLOR or TERM=dumb says that it can't show them."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def configure(level: str, log_format: Literal["auto", "json", "console"]) -> None:
    """Route our events, and the libraries' own logging and warnings, to stderr in one format.

    Libraries log at warning level or ours, whichever is stricter: their other messages are noise, and some quote data. Drop
    tracebacks, which contain messages, and redact credentials everywhere.
    """
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    is_terminal = not as_json and sys.stderr.isatty()
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        # whoever watches a terminal knows the day, and the line has to fit
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        if is_terminal
        else structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact,
        _event_first,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(serializer=_escaped_json, ensure_ascii=False)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=shows_colors(sys.stderr), pad_event_to=24)
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
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *([] if as_json else [_escape]),
                renderer,
                _redact_line,
                # bind the real stream now: sys.stderr is redirected to the log while a run works
                *([partial(_fit_line, sys.stderr)] if is_terminal else []),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    logging.getLogger("lora_trainer").setLevel(number)
    logging.getLogger("entrypoint").setLevel(number)
    logging.captureWarnings(capture=True)


def adopt_library_loggers() -> None:
    """Remove the handlers that libraries install, so that their records go through ours.

    Call this after importing the libraries. Otherwise torch, transformers and others write lines in their own formats.
    """
    for logger in list(logging.Logger.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers.clear()
            logger.propagate = True


class _LineLog(io.TextIOBase):
    """A stream that turns each printed line into a `library_output` event at debug level."""

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
    """Redirect what libraries print to the log, so that stdout holds only results and stderr one event per line."""
    with redirect_stdout(_LineLog("stdout")), redirect_stderr(_LineLog("stderr")):
        yield


def _redact(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    # skip structlog's own keys, which start with an underscore
    return {key: value if key.startswith("_") else redacted_value(value) for key, value in event.items()}


def _escape(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape what a terminal would obey, before the renderer adds its colours."""
    return {key: escaped_value(value) for key, value in event.items()}


def _escaped_json(event: object, **options: Any) -> str:
    return escaped(json.dumps(event, **options))


def _redact_line(logger: object, method: str, line: Any) -> str:
    """Redact what only became text when the line was rendered, such as paths and exceptions."""
    return redacted(str(line))


def _fit_line(stream: TextIO, logger: object, method: str, line: Any) -> str:
    return fitted(str(line), terminal_columns(stream))


def terminal_columns(stream: TextIO) -> int:
    """Return the width of the terminal that `stream` writes to; COLUMNS overrides it."""
    if (wanted := os.environ.get("COLUMNS", "")).isdecimal() and int(wanted) > 0:
        return int(wanted)
    try:
        # 0 for a terminal that does not know
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS
    except OSError:
        return _DEFAULT_COLUMNS


def fitted(line: str, columns: int) -> str:
    """Break a log line between words so that it fits into `columns`, and indent what follows the first line.

    A word that is longer, such as a path, gets a line of its own, and the terminal breaks it: then it can still be copied whole.
    """
    from rich.cells import cell_len

    lines, free = [""], columns
    for word in line.split(" "):
        # Hangul and emoji take two columns, colours none
        width = cell_len(_COLOR.sub("", word))
        if width + 1 > free and lines[-1].strip():
            lines.append(_INDENT)
            free = columns - len(_INDENT)
            if not word:
                continue
        lines[-1] += f"{word} "
        free -= width + 1
    return "\n".join(one.rstrip(" ") for one in lines)


def _event_first(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Put timestamp, level and event first, and keep the order of the rest."""
    leading = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return {**leading, **event}


def _library_event(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Wrap a library's message in the event `library_message`."""
    record = event.get("_record")
    event["library"] = record.name if isinstance(record, logging.LogRecord) else "unknown"
    # a traceback repeats the exception's message, and the console renderer would show the variables of each frame
    raised = event.pop("exc_info", None)
    event.pop("stack_info", None)
    if isinstance(raised, tuple) and raised[0] is not None:
        event["error"] = raised[0].__qualname__
    event["message"] = str(event.pop("event"))
    event["event"] = "library_message"
    return event


def last_word(summary: dict[str, object], path: Path = TERMINATION_LOG) -> None:
    """Write `summary` to the termination log, if it exists. A failure to write must not change the exit code."""
    summary = {key: redacted_value(value) for key, value in summary.items()}
    text = _as_json(summary)
    if len(text) > TERMINATION_LOG_BYTES:
        kept = {key: value for key, value in summary.items() if key != "problems"}
        text = _as_json({**kept, "problems": ["too many to show here: see the log"]})
    try:
        if path.exists():
            path.write_bytes(text[:TERMINATION_LOG_BYTES])
    except OSError as error:
        get_logger().warning("termination_log_not_written", reason=error.strerror)


def _as_json(summary: dict[str, object]) -> bytes:
    # escape surrogates, which stand for invalid UTF-8 in file names
    return redacted(json.dumps(summary, ensure_ascii=False, default=str)).encode(errors="backslashreplace")
