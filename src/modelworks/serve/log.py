"""What the server writes down: one JSON object per line, with figures and names, and never what was said or a key."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

import orjson

from modelworks.spec.errors import InputError


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, logger, message, and the fields that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # Where it happened, and not what it said: an exception's text can hold what a request held.
            line["error"] = record.exc_info[0].__name__
            trace, places = record.exc_info[2], []
            while trace is not None:
                places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
                trace = trace.tb_next
            line["at"] = places
        return orjson.dumps(line, default=str).decode()


def log_to(target: str) -> None:
    """Write our own loggers' lines to a file, or to standard error if it is ``-``.

    Raises
    ------
    InputError
        If the file can't be written.
    """
    try:
        handler = logging.StreamHandler(sys.stderr) if target == "-" else logging.FileHandler(target, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--log {target} can't be written: {error.strerror}") from None
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("modelworks")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
