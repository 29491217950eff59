"""Log records as JSON, one a line, for those who collect and search them (`cluster.logs`)."""

from __future__ import annotations

import datetime
import json
import logging
import math
import sys
from typing import Literal

log = logging.getLogger("hdnn_dist")
PLAIN = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}


def _is_told(key: str) -> bool:
    """Whether a record's attribute was given by who logs: Ray adds some of its own."""
    return key not in PLAIN and not key.startswith("_")


class JsonLines(logging.Formatter):
    """A record as `{"time": …, "level": …, "message": …}`, with its `extra` and a context.

    Args:
        context: of all records: whose they are.
    """

    def __init__(self, context: dict[str, object]) -> None:
        super().__init__()
        self.context = context

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        content = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **self.context,
            **{key: value for key, value in record.__dict__.items() if _is_told(key)},
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        for key, value in content.items():
            if isinstance(value, float) and not math.isfinite(value):
                content[key] = None  # JSON has no such numbers
        return json.dumps(content, ensure_ascii=False, default=str)


class _ToStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """The handler that `configure` puts in place."""


def configure(form: Literal["text", "json"], **context: object) -> None:
    """Have this process log in a form from now on, on stderr.

    Args:
        form: "json" logs the run's course too; "text" leaves all to Python's `logging`, which by
            itself shows warnings.
        context: put into every JSON record.
    """
    for handler in log.handlers[:]:
        if isinstance(handler, _ToStderr):
            log.removeHandler(handler)
            log.setLevel(logging.NOTSET)
            log.propagate = True
    if form == "json":
        ours = _ToStderr(sys.stderr)
        ours.setFormatter(JsonLines(context))
        log.addHandler(ours)
        log.setLevel(logging.INFO)
        log.propagate = False  # or Ray's own handlers would tell everything once more
