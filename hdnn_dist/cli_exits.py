"""How a command ends: its exit code, an error in one line, Ctrl-C.

Exit codes: 0 done; 1 the job failed while running; 2 something the user can mend; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from hdnn_dist.errors import HdnnError, UserError, on_a_line


def report_error(error: HdnnError | OSError) -> int:
    """Print an error; its exit code, 2 also for a name too long for a file."""
    said = str(error)
    if isinstance(error, OSError):  # a full disk has no file name
        said = ": ".join(str(part) for part in (error.filename, error.strerror) if part) or said
        said = on_a_line(said)
    print(f"error: {said}", file=sys.stderr)
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return 2 if too_long or isinstance(error, UserError) else 1


@contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
    """Ctrl-C ends the process until `tidy_up_from_here`: half an import fails in odd ways."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tidy_up_from_here() -> None:
    """From here on there are actors and files to tidy up: Ctrl-C is an exception again."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def interrupt_sets(stop: threading.Event) -> Iterator[threading.Event]:
    """Ctrl-C asks for an end in good order; a second one does not wait for it."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        os.write(2, b"saving a checkpoint; Ctrl-C again ends at once\n")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class Interruptible(TyperGroup):
    """Says so when Ctrl-C ends a command: typer itself would exit without a word."""

    def invoke(self, ctx: Any) -> Any:  # noqa: D102
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
