"""Small files in MNIST's format."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

COUNTS = {"train": 2500, "test": 30}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        raw = idx(array)
        (folder / name).write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    return folder
