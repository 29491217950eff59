"""Tables whose cells take minutes each: what a file has is kept, what it lacks is run.

    python benchmarks/paper/two_d.py --jobs 2      # go on where an earlier call stopped

The JSON file holds the settings and the cells, the Markdown file beside it the table made of them;
both are written anew after every cell.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

Cells = dict[str, Any]
Compute = Callable[[str, Namespace], Any]
RESULTS = Path(__file__).parent / "results"


def add_options(parser: ArgumentParser) -> None:
    """`--out` and `--jobs`."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at once")


def fill(
    parser: ArgumentParser,
    options: Namespace,
    name: str,
    settings: Sequence[str],
    keys: Iterable[str],
    compute: Compute,
    table: Callable[[Mapping[str, Any]], str],
) -> Cells:
    """Run the cells that `name.json` lacks, and write it and `name.md`.

    Args:
        parser: refuses a file whose settings differ.
        options: what it parsed.
        name: of the files.
        settings: names of the options that a cell's content depends on.
        keys: of the cells.
        compute: a cell's content, of its key and the options; a module's function, as `--jobs`
            sends it to other processes.
        table: all cells as Markdown.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{name}.json"
    wanted = json.loads(json.dumps({key: getattr(options, key) for key in settings}))
    record = json.loads(file.read_text()) if file.exists() else {"settings": wanted, "cells": {}}
    if record["settings"] != wanted:
        parser.error(f"{file} has {record['settings']}, not {wanted}: give another --out")
    cells: Cells = record["cells"]
    missing = [key for key in keys if key not in cells]
    for key, value in _computed(missing, partial(_one_thread, compute, options), options.jobs):
        cells[key] = value
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{key}: {value}", flush=True)
    text = table(cells)
    (options.out / f"{name}.md").write_text(text)
    print(text)
    return cells


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
