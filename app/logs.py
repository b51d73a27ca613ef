"""Logging: one JSON object a line for machines, words for a terminal. A full disk loses lines, not requests."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

from app.settings import Settings

REQUESTS = logging.getLogger("slipstream.request")
SERVER = logging.getLogger("slipstream.server")


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, logger, message, and whatever was given as `extra={"facts": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{stamp}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": record.getMessage()} | getattr(record, "facts", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class HumanLines(logging.Formatter):
    """Time, level, message, then the facts as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, followed by a traceback where there is one."""
        head, _, rest = super().format(record).partition("\n")
        facts = " ".join(f"{k}={v}" for k, v in getattr(record, "facts", {}).items() if v not in (None, ""))
        return "\n".join(part for part in (f"{head} {facts}".rstrip(), rest) if part)


class Handler(logging.StreamHandler[TextIO]):
    """Writes lines; one that cannot be written (a full disk, a closed pipe) is lost without a word."""

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Count the loss: answering requests goes before logging them."""
        self.lost += 1


def configure(settings: Settings) -> Handler:
    """Send the log of the server, of uvicorn and of warnings to one handler; returns it."""
    stream = sys.stderr if settings.log_file is None else settings.log_file.open("a", encoding="utf-8")
    human = settings.log_format == "human" or (settings.log_format == "auto" and stream.isatty())
    handler = Handler(stream)
    handler.setFormatter(HumanLines() if human else JsonLines())
    level = settings.log_level.upper()
    for name in ("slipstream", "uvicorn", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True
    logging.captureWarnings(True)
    return handler
