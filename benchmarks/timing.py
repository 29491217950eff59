"""Times of several functions from one run: they take turns, and the median of each counts.

What counts, where no other clock is given, is the time of the processor, of one thread: that of the
wall on a machine that has nothing else to do, and little changed by what others do on one that has.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch

Call = Callable[[], object]


def alternated(
    calls: Mapping[str, Call],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    each: int = 1,
) -> dict[str, float]:
    """The median seconds of each call, over so many rounds in which each has its turn.

    Args:
        calls: by name.
        rounds: how many, after one that does not count.
        clock: that the seconds are of; default: the processor's.
        each: calls of a turn.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            for _ in range(each):
                call()
            times[name].append((clock() - start) / each)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def product_rate(
    n: int = 1024, rounds: int = 9, clock: Callable[[], float] = time.process_time
) -> float:
    """Floating-point operations a second of a large matrix product, as measured now."""
    A = torch.randn(n, n)
    return 2 * n**3 / alternated({"mm": lambda: A @ A}, rounds, clock)["mm"]


def machine() -> str:
    """The processor, the threads and the version of torch, in a line."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    cpu = f"{names[0]}, {len(names)} cores" if names else platform.processor()
    return f"{cpu}; {torch.get_num_threads()} thread(s); torch {torch.__version__}"
