"""Every error that hdnn_dist raises on purpose.

::

    HdnnError
    ├── UserError (ValueError)      something the user can mend; the command line exits with 2
    │   ├── SpecError               a value in the YAML spec or in ``--set``; knows its place
    │   ├── DataError               data files that are missing, damaged or do not fit the agents
    │   ├── CheckpointError         a run directory or checkpoint that cannot be used
    │   │   └── DamagedError        files of a checkpoint that are missing or not as written
    │   ├── StorageError            a path or URL that cannot be reached, read or written
    │   └── PlacementError          the cluster cannot hold the job
    └── RunError (RuntimeError)     the job failed while running; the command line exits with 1
        ├── AgreementError          the actors do not hold the same topology and plan
        └── LostError               actors died, stopped or lost their network; others may go on
            └── TransportError      a message could not be sent or received

A message says what was given, what was expected and how to mend it. Our own bugs are
``AssertionError``s and are never caught.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice

LONGEST = 1000  # characters of a problem, a mend or a place, which may hold any of a user's values
NAMED = 5  # examples that a line names


class HdnnError(Exception):
    """Root of the tree above."""


class UserError(HdnnError, ValueError):
    """Something the user can mend.

    Args:
        problem: what was given and what was expected.
        mend: how to put it right, as an instruction.
    """

    def __init__(self, problem: str, mend: str) -> None:
        self.problem = on_a_line(problem)
        self.mend = on_a_line(mend)
        super().__init__(problem, mend)  # as given, so that it travels between processes whole

    def __str__(self) -> str:
        return f"{self.problem}; {self.mend}"


class SpecError(UserError):
    """A value in a spec is wrong.

    Args:
        loc: path of the value in the spec, e.g. ``("topology", "edges", 3)``.
        problem, mend: as in `UserError`.
        where: the place in the file (``"ring.yaml:7"``) where it is known.
    """

    def __init__(
        self, loc: Sequence[str | int], problem: str, mend: str, where: str | None = None
    ) -> None:
        super().__init__(problem, mend)
        self.loc = tuple(loc)
        self.where = where
        self.args = (self.loc, problem, mend, where)

    def __str__(self) -> str:
        path = ".".join(str(part) for part in self.loc)
        place = ": ".join(on_a_line(part) for part in (self.where, path) if part)
        return f"{place}: {self.problem}; {self.mend}" if place else super().__str__()


class DataError(UserError):
    """Data files are missing, damaged, or do not fit the agents."""


class CheckpointError(UserError):
    """A run directory or checkpoint cannot be used."""


class DamagedError(CheckpointError):
    """Files of a checkpoint are missing or not as they were written; one before it may be good."""


class StorageError(UserError):
    """A path or URL cannot be reached, read or written: a disk is full, a network down."""


class PlacementError(UserError):
    """The cluster cannot hold the job."""


class RunError(HdnnError, RuntimeError):
    """The job failed while it was running."""


class AgreementError(RunError):
    """The actors do not hold the same topology and plan."""


class LostError(RunError):
    """Actors died, stopped or lost their network: the job can go on from a checkpoint.

    Args:
        message: what happened.
        agents: names of all agents that were lost, where they are known.
    """

    def __init__(self, message: str, agents: Sequence[str] = ()) -> None:
        super().__init__(message, agents)  # as given, so that it travels between processes whole
        self.message, self.agents = message, tuple(agents)

    def __str__(self) -> str:
        return self.message


class TransportError(LostError):
    """A message could not be sent or received; names the agents and the round."""


def on_a_line(text: str) -> str:
    """The text without its middle where it is long, and without line breaks and control codes."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def did_you_mean(given: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The mend for a name that is not among `known`: the nearest, else `otherwise` or the list."""
    names = list(islice(known, 10_000))  # some 10 µs each
    folded = {name.casefold(): name for name in names}
    if len(given) <= LONGEST and (near := difflib.get_close_matches(given.casefold(), folded, n=1)):
        return f"did you mean {folded[near[0]]!r}?"
    return otherwise or f"use one of {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"


def few(items: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    shown = list(items)
    more = len(shown) - NAMED
    return ", ".join(shown[:NAMED]) + (f" and {more} more" if more > 0 else "")
