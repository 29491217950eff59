"""MNIST's four IDX files: finding, downloading, reading them a chunk at a time."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from hdnn_dist.errors import DataError
from hdnn_dist.spec import DataSpec

Part = Literal["train", "test"]
Content = Literal["images", "labels"]
Array = npt.NDArray[Any]

SAMPLES: dict[Part, int] = {"train": 60000, "test": 10000}
IMAGE = (28, 28)
# Name and MD5 of the decompressed content.
FILES: dict[tuple[Part, Content], tuple[str, str]] = {
    ("train", "images"): ("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
    ("train", "labels"): ("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
    ("test", "images"): ("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
    ("test", "labels"): ("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
TIMEOUT = 20.0  # seconds without a byte from a mirror
CHUNK = 1024  # samples read at a time
FOLDER = (
    "(plain or .gz) in one folder and name it with data.dir in the spec, --data-dir or $HDNN_DATA"
)
PLACE = f"place {', '.join(stem for stem, _ in FILES.values())} {FOLDER}"


def cache_folder() -> Path:
    """Where downloaded MNIST files are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hdnn_dist" / "mnist"


def locate_mnist(spec: DataSpec) -> Path:
    """The folder with the four files: ``spec.dir``, else ``$HDNN_DATA``, else the cache.

    A folder that was named is the only one looked in.

    Raises:
        DataError: a file is not there.
    """
    folder, named = _folder(spec)
    missing = [stem for stem, _ in FILES.values() if _find(folder, stem) is None]
    if missing:
        problem = f"{named or 'the cache'} {folder} has no {', '.join(missing)}"
        raise DataError(problem, f"place all four files {FOLDER}")
    return folder


def ensure_available(spec: DataSpec, progress: bool = False) -> Path | None:
    """See that the data can be loaded; MNIST is downloaded to the cache if no folder was named.

    A download is verified and then put in place by renaming. Files that lie there already need
    only the right form, so that MNIST-shaped sets can be used; their headers are checked.

    Args:
        spec: the data set.
        progress: show a progress bar on the terminal (on stderr).

    Returns:
        The folder of the MNIST files; None for the sets that need none.

    Raises:
        DataError: files are missing from the named folder or damaged, or no mirror gave them.
    """
    if spec.name != "mnist":
        return None
    folder, named = _folder(spec)
    missing = {key: file for key, file in FILES.items() if _find(folder, file[0]) is None}
    if missing and not named:
        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        bar = Progress(*columns, console=Console(stderr=True), disable=not progress)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with bar, tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as partial:
                for key, (stem, md5) in missing.items():
                    _download(f"{stem}.gz", md5, _length(*key), Path(partial), bar)
                    os.replace(Path(partial, f"{stem}.gz"), folder / f"{stem}.gz")
        except OSError as error:
            raise DataError(f"cannot write the cache {folder}: {error}", PLACE) from error
    folder = locate_mnist(spec)
    for part, content in FILES:
        list(read_mnist(folder, part, content, 0))
    return folder


def _folder(spec: DataSpec) -> tuple[Path, str | None]:
    for named, value in (("data.dir", spec.dir), ("$HDNN_DATA", os.environ.get("HDNN_DATA"))):
        if value:
            return Path(os.path.expanduser(value)), named
    return cache_folder(), None


def _find(folder: Path, stem: str) -> Path | None:
    spellings = (stem, stem.replace("-idx", ".idx"))
    paths = (folder / f"{name}{gz}" for gz in ("", ".gz") for name in spellings)
    return next((path for path in paths if os.path.isfile(path)), None)


def _shape(part: Part, content: Content) -> tuple[int, ...]:
    return (SAMPLES[part], *(IMAGE if content == "images" else ()))


def _length(part: Part, content: Content) -> int:
    shape = _shape(part, content)
    return 4 + 4 * len(shape) + math.prod(shape)


def read_mnist(folder: Path, part: Part, content: Content, n: int) -> Iterator[Array]:
    """The first n samples in chunks (b, bytes a sample); never reads past what is expected."""
    path = _find(folder, FILES[part, content][0])
    assert path is not None, "locate_mnist has seen it"
    mend = "replace it by an intact copy (in the cache: delete it, and it is downloaded again)"
    shape = _shape(part, content)
    size = math.prod(shape[1:])
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > 2 * _length(part, content) + (1 << 20):
                raise DataError(f"{path} is larger than a file of {content} can be", mend)
            # By content, not by name: browsers unpack a .gz and keep its name.
            zipped = file.peek(2)[:2] == b"\x1f\x8b"
            stream = gzip.GzipFile(fileobj=file) if zipped else file
            magic, given = stream.read(4), stream.read(4 * len(shape))
            if magic != bytes((0, 0, 8, len(shape))) or len(given) < 4 * len(shape):
                raise DataError(f"{path} is not an IDX file of {content}", mend)
            found = struct.unpack(f">{len(shape)}I", given)
            if found != shape:
                raise DataError(
                    f"{path} announces {content} of shape {found}, expected {shape}",
                    "use the full set, and data.train_samples and data.test_samples to use less",
                )
            for start in range(0, n, CHUNK):
                wanted = min(CHUNK, n - start) * size
                block = stream.read(wanted)
                if len(block) < wanted:
                    raise DataError(f"{path} is cut short", mend)
                yield np.frombuffer(block, np.uint8).reshape(-1, size)
            if n == shape[0] and stream.read(1):
                raise DataError(f"{path} goes on after its last sample", mend)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", mend) from error


def _download(name: str, md5: str, length: int, folder: Path, bar: Progress) -> None:
    """Fetch one file from the first mirror that has it intact."""
    task = bar.add_task(name)
    failures = []
    for mirror in MIRRORS:
        bar.reset(task)
        try:
            with (
                urlopen(mirror + name, timeout=TIMEOUT) as answer,
                open(folder / name, "wb") as file,
            ):
                bar.update(task, total=int(answer.headers.get("Content-Length", 0)) or None)
                # Packed it is smaller than unpacked: more than that is not our file.
                while file.tell() < length and (block := answer.read(1 << 16)):
                    file.write(block)
                    bar.advance(task, len(block))
            if _md5(folder / name, length) == md5:
                return
            failures.append(f"{mirror}: the content is not that of {name}")
        except (OSError, HTTPException, EOFError, ValueError, zlib.error) as error:
            failures.append(f"{mirror}: {error}")
    raise DataError(f"cannot download {name} ({'; '.join(failures)})", f"try again, or {PLACE}")


def _md5(path: Path, length: int) -> str:
    """MD5 of the unpacked content, read no further than one byte past its length."""
    digest, left = hashlib.md5(usedforsecurity=False), length + 1
    with gzip.open(path) as stream:
        while left and (block := stream.read(min(left, 1 << 16))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
