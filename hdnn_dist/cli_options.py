"""Arguments and options that several commands have, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdnn_dist.errors import UserError

if TYPE_CHECKING:
    from hdnn_dist.job import Job

SpecArgument = Annotated[
    Path | None, typer.Argument(metavar="SPEC", help="YAML file; default: the embedded job.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. training.epochs=3. Repeats."),
]
Resume = Annotated[str | None, typer.Option(metavar="RUN", help="Continue this run instead.")]
DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the MNIST files, or of a table's (data.dir)."),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster to join; default: cluster.address, then $RAY_ADDRESS, "
        "then a Ray of its own.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Profile = Annotated[
    int,
    typer.Option(
        min=0,
        max=1000,
        metavar="STEPS",
        help="Write RUN/trace.json, which tells for so many steps who did what when.",
    ),
]


def load_job(spec: Path | None, overrides: Sequence[str]) -> Job:
    """The job of a SPEC with overrides."""
    from hdnn_dist.reader import read_spec

    written, source = read_spec(spec, overrides)  # a bad spec is refused before torch is imported
    from hdnn_dist.job import Job

    return Job.of(written, base=spec.parent if spec else None, source=source)


def changes_of(overrides: Sequence[str] | None, data_dir: Path | None) -> list[str]:
    """Those of --set and then that of --data-dir, absolute as actors work elsewhere."""
    folder = [] if data_dir is None else [f"data.dir={json.dumps(str(data_dir.absolute()))}"]
    return [*(overrides or ()), *folder]


def refuse_beside_resume(resume: str | None, spec: Path | None, run: str | None) -> None:
    """A run that goes on has its SPEC and its place already."""
    if resume is not None and (spec is not None or run is not None):
        other = "a SPEC" if spec is not None else "--run"
        raise UserError(
            f"{other} is given with --resume, but a run goes on with its own spec in its own place",
            f"leave {'SPEC' if spec is not None else '--run'} out, or train without --resume",
        )
