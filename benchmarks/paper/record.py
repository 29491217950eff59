"""Tables whose cells take minutes each: what a file has is kept, what it lacks is run.

    python benchmarks/paper/two_d.py --jobs 2      # go on where an earlier call stopped

The JSON file holds the settings and the cells, the Markdown file beside it the table made of them;
both are written anew after every cell.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

from hdnn_dist.checkpoint import write_text
from hdnn_dist.errors import UserError

Cells = dict[str, Any]
Compute = Callable[[str, Namespace], Any]
RESULTS = Path(__file__).parent / "results"


def count(text: str) -> int:
    """A whole number above zero, as argparse has it."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} given; give a number above 0")
    return value


def add_options(parser: ArgumentParser) -> None:
    """`--out` and `--jobs`."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--jobs", type=count, default=1, help="cells that run at once")


def fill(
    parser: ArgumentParser,
    options: Namespace,
    name: str,
    settings: Mapping[str, Any],
    keys: Iterable[str],
    compute: Compute,
    table: Callable[[Mapping[str, Any]], str],
) -> Cells:
    """Run the cells that `name.json` lacks, and write it and `name.md`.

    Args:
        parser: refuses a file whose settings differ.
        options: what it parsed.
        name: of the files.
        settings: all that a cell's content depends on, beside its key.
        keys: of the cells.
        compute: a cell's content, of its key and the options; a module's function, as `--jobs`
            sends it to other processes.
        table: all cells as Markdown.
    """
    file = options.out / f"{name}.json"
    settings = json.loads(json.dumps(settings))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text()) if file.exists() else None
    except (OSError, ValueError) as error:
        parser.error(f"{file}: {error}: give another --out")
    record = found or {"settings": settings, "cells": {}}
    if record["settings"] != settings:
        parser.error(f"{file} has {record['settings']}, not {settings}: give another --out")
    cells: Cells = record["cells"]
    missing = [key for key in keys if key not in cells]

    def write_table() -> str:
        text = f"{_caption(settings)}\n\n{table(cells)}"
        write_text(file.with_suffix(".md"), text)
        return text

    try:
        for key, value in _computed(missing, partial(_one_thread, compute, options), options.jobs):
            cells[key] = value
            write_text(file, json.dumps(record, indent=1) + "\n")
            write_table()
            print(f"{key}: {value}", flush=True)
    except UserError as error:
        parser.error(str(error))
    print(write_table())
    return cells


def _caption(settings: Mapping[str, Any]) -> str:
    """The settings in a line."""

    def said(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {v}" for k, v in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return "; ".join(f"{key} {said(value)}" for key, value in settings.items()).replace("_", " ")


def chosen(options: Namespace, *names: str) -> dict[str, Any]:
    """Options by name."""
    return {name: getattr(options, name) for name in names}


def grid(
    models: Sequence[str],
    depths: Iterable[int],
    seeds: Callable[[str, int], Sequence[float] | None],
    form: str = ".1f",
) -> list[str]:
    """The lines of a table: a row a depth, a column a model; "-": not run."""
    lines = ["| layers | " + " | ".join(models) + " |", "|---:|" + "---|" * len(models)]
    for n in sorted(depths):
        row = [seeds(model, n) for model in models]
        lines.append(f"| {n} | " + " | ".join(spread(r, form) if r else "-" for r in row) + " |")
    return [*lines, ""]


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard deviation, and in brackets the worst."""
    return f"{mean(values):{form}} ± {pstdev(values):{form}} ({min(values):{form}})"


def _one_thread(compute: Compute, options: Namespace, key: str) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are small
    try:
        return compute(key, options)
    finally:
        torch.set_num_threads(threads)


def _computed(
    keys: Sequence[str], compute: Callable[[str], Any], jobs: int
) -> Iterator[tuple[str, Any]]:
    if jobs == 1:
        yield from ((key, compute(key)) for key in keys)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = {pool.submit(compute, key): key for key in keys}
        for future in as_completed(futures):
            yield futures[future], future.result()
