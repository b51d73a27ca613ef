"""Logging: one JSON object a line for machines, words for a terminal.

Lines leave through a bounded queue and a thread of their own: a log that nobody reads, or a full disk, loses lines, not
requests. What was lost is counted, and said as soon as there is somebody to say it to.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from app.settings import Settings
from models.errors import cut

REQUESTS = logging.getLogger("slipstream.request")
SERVER = logging.getLogger("slipstream.server")
LOGGERS = ("slipstream", "uvicorn", "asyncio", "python_multipart", "opentelemetry", "py.warnings")
"""Whose lines are written: the server's, its HTTP library's, the event loop's, those of forms, traces, and warnings."""
QUEUED_LINES = 4096
"""Lines that may wait to be written."""
LINE_CHARACTERS = 16_384
"""What is longer is cut, so that the queue is bounded in bytes too."""
FLUSH_SECONDS = 2.0


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, logger, message, and whatever was given as `extra={"facts": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{stamp}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": cut(record.getMessage(), LINE_CHARACTERS)}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-LINE_CHARACTERS:]
        return json.dumps(line, default=str)


class HumanLines(logging.Formatter):
    """Time, level, message, then the facts as key=value. What a terminal would act on is escaped."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, followed by a traceback, indented, where there is one."""
        record.message, record.asctime = record.getMessage(), self.formatTime(record, self.datefmt)
        facts = [f"{k}={v}" for k, v in getattr(record, "facts", {}).items() if v not in (None, "")]
        head = printable(cut(" ".join([self.formatMessage(record), *facts]), LINE_CHARACTERS))
        trace = self.formatException(record.exc_info)[-LINE_CHARACTERS:].splitlines() if record.exc_info else []
        return "\n".join([head, *(f"  {printable(line)}" for line in trace)])


def printable(text: str) -> str:
    """Newlines, escapes and whatever else a terminal would act on, spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Handler(logging.Handler):
    """Hands lines to a thread that writes them and never waits: a line too many, or that cannot be written, is lost."""

    def __init__(self, stream: TextIO, capacity: int = QUEUED_LINES) -> None:
        super().__init__()
        self.stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self._full = 0  # lines lost because too many waited: counted under the handler's lock
        self._failed = 0  # lines that could not be written: counted by the thread
        self._said = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Lines that were not written."""
        return self._full + self._failed

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._full += 1
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A line that cannot be made: answering requests goes before logging them."""
        self._full += 1

    def flush(self) -> None:
        """Wait until all is written, but not for long: nobody may be reading."""
        deadline = time.monotonic() + FLUSH_SECONDS
        with self._lines.all_tasks_done:
            while self._lines.unfinished_tasks and (left := deadline - time.monotonic()) > 0:
                self._lines.all_tasks_done.wait(left)

    def close(self) -> None:
        """Write what is left, and end the thread where it can be ended."""
        self.flush()
        if not self._lines.unfinished_tasks:
            self._lines.put_nowait(None)
            self._thread.join(FLUSH_SECONDS)
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(f"{line}\n")
                if (lost := self.lost) > self._said:
                    told = _record(f"{lost - self._said} log lines were lost: nobody took them in time")
                    self._write(f"{self.format(told)}\n")
                    self._said = lost
            except Exception:  # a full disk, a pipe whose reader is gone
                self._failed += 1
            finally:
                self._lines.task_done()

    def _write(self, text: str) -> None:
        """Past Python's buffers: whoever waits in them holds a lock that the interpreter needs at its end."""
        data = text.encode("utf-8", "backslashreplace")
        descriptor = self.stream.fileno()
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # a pipe that does not wait
                select.select([], [descriptor], [])


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord(SERVER.name, logging.WARNING, "", 0, text, (), None)


class _Current:
    """The handler of this process."""

    handler: Handler | None = None


def lost_lines() -> int:
    """Lines of this process's log that were not written."""
    return 0 if _Current.handler is None else _Current.handler.lost


def opened(file: Path | None) -> TextIO:
    """Where to log to. Raises OSError for a file that cannot be written."""
    return sys.stderr if file is None else file.open("a", encoding="utf-8")


def configure(settings: Settings) -> Handler:
    """Send the log of the server, its libraries and warnings to one handler; returns it. Raises OSError as `opened`."""
    stream = opened(settings.log_file)
    human = settings.log_format == "human" or (settings.log_format == "auto" and stream.isatty())
    handler = _Current.handler = Handler(stream)
    handler.setFormatter(HumanLines() if human else JsonLines())
    level = settings.log_level.upper()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True
    logging.captureWarnings(True)
    return handler
