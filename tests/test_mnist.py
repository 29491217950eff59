"""MNIST: files good and bad, and their download."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from hdnn_dist import mnist
from hdnn_dist.data import load_features, load_labels
from hdnn_dist.errors import DataError
from hdnn_dist.spec import DataSpec
from tests.mnist_files import idx, write

MNIST = DataSpec(name="mnist")
REAL = os.environ.get("HDNN_DATA", "")


def at(folder: Path | str) -> DataSpec:
    return DataSpec(name="mnist", dir=str(folder))


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HDNN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("joint", ["-", "."])
def test_streamed_columns_are_those_of_a_whole_read(
    suffix: str, joint: str, small: dict[str, np.ndarray], tmp_path: Path
) -> None:
    named = {stem.replace("-idx", f"{joint}idx") + suffix: a for stem, a in small.items()}
    there = at(write(tmp_path / "set", named))
    columns = [700, 3, 3, 28]
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = small[f"{prefix}-images-idx3-ubyte"].reshape(-1, 784)
        expected = (images[:, columns] / 255 - 0.1307) / 0.3081
        x = load_features(there, part, columns)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, expected.astype(np.float32))
        np.testing.assert_array_equal(
            load_labels(there, part), small[f"{prefix}-labels-idx1-ubyte"]
        )


def test_a_gz_that_was_unpacked_but_kept_its_name_is_read(
    folder: Path, small: dict[str, np.ndarray]
) -> None:
    labels = folder / "train-labels-idx1-ubyte"
    labels.rename(f"{labels}.gz")
    expected = small["train-labels-idx1-ubyte"]
    np.testing.assert_array_equal(load_labels(at(folder), "train"), expected)


def test_memory_is_that_of_the_columns(tmp_path: Path) -> None:
    """60000 images are 47 MB; an agent with 49 pixels holds 12 MB and a few chunks."""
    for (part, content), (stem, _) in mnist.FILES.items():
        n = mnist.SAMPLES[part]
        dims = (n, 28, 28) if content == "images" else (n,)
        with open(tmp_path / stem, "wb") as file:
            file.write(struct.pack(f">HBB{len(dims)}I", 0, 8, len(dims), *dims))
            file.truncate(file.tell() + int(np.prod(dims)))
    tracemalloc.start()
    x = load_features(at(tmp_path), "train", range(49))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.nbytes == 60000 * 49 * 4
    assert peak < x.nbytes + 4e6


def test_named_folder_is_the_only_one_searched(
    folder: Path, small: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"cache.*has no train-images.*data\.dir.*HDNN_DATA"):
        mnist.locate_mnist(MNIST)
    cache = write(tmp_path / "cache" / "hdnn_dist" / "mnist", small)
    assert mnist.locate_mnist(MNIST) == cache
    monkeypatch.setenv("HDNN_DATA", str(folder))
    assert mnist.locate_mnist(MNIST) == folder
    with pytest.raises(DataError) as error:
        mnist.locate_mnist(at("/nowhere"))
    assert str(error.value).count("train-images") == 1
    assert "place all four files" in str(error.value)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"\$HDNN_DATA .*has no t10k-labels-idx1-ubyte;"):
        mnist.locate_mnist(MNIST)
    with pytest.raises(DataError, match=r"data\.dir /nowhere has no train-images"):
        mnist.ensure_available(at("/nowhere"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "not an IDX file"),
        (lambda raw: raw[:10], "not an IDX file"),
        (lambda raw: b"\0\0\x0d\3" + raw[4:], "not an IDX file"),
        (lambda raw: b"\0\0\x08\1" + raw[4:], "not an IDX file"),
        (lambda raw: raw[:4] + struct.pack(">I", 2**32 - 1) + raw[8:], r"\(4294967295, 28, 28\)"),
        (lambda raw: raw[:8] + struct.pack(">II", 56, 14) + raw[16:], r"expected \(30, 28, 28\)"),
        (lambda raw: raw[:-1], "cut short"),
        (lambda raw: raw + b"\0", "goes on after"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
        (lambda raw: gzip.compress(raw)[:-8] + bytes(8), "cannot be read: CRC"),
        (lambda raw: gzip.compress(raw)[:12] + bytes(99), "cannot be read"),
        (lambda raw: gzip.compress(raw + bytes(50_000_000), 9), "goes on after"),
        (lambda raw: gzip.compress(bytes(50_000_000), 9), "not an IDX file"),
    ],
)
def test_damaged_files_are_named_and_not_read_on(
    damage: Callable[[bytes], bytes], message: str, folder: Path
) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    tracemalloc.start()
    with pytest.raises(DataError, match=message) as error:
        load_features(at(folder), "test", range(784))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert peak < 5e6


def test_labels_past_nine_are_refused(folder: Path, small: dict[str, np.ndarray]) -> None:
    labels = small["t10k-labels-idx1-ubyte"].copy()
    labels[3] = 10
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match="go up to 10, past 9"):
        load_labels(at(folder), "test")


def test_ensure_available_looks_at_headers(folder: Path) -> None:
    assert mnist.ensure_available(DataSpec()) is None
    there = at(folder)
    assert mnist.ensure_available(there) == folder
    (folder / "train-labels-idx1-ubyte").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="train-labels-idx1-ubyte is not an IDX file"):
        mnist.ensure_available(there)


@pytest.mark.skipif(not REAL, reason="$HDNN_DATA names no MNIST folder")
def test_the_real_files() -> None:
    real = at(REAL)
    mnist.ensure_available(real)
    x, y = load_features(real, "train", range(0, 784, 9)), load_labels(real, "train")
    assert x.shape == (60000, 88)
    assert abs(x.mean()) < 0.1
    np.testing.assert_array_equal(
        np.bincount(y), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    )
    assert load_labels(real, "test")[:5].tolist() == [7, 2, 1, 0, 4]


# --- download ------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(
    small: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A mirror on this machine that serves `small`; its folder is tmp_path / "mirror"."""
    write(tmp_path / "mirror", {f"{stem}.gz": array for stem, array in small.items()})
    checked = {
        key: (stem, hashlib.md5(idx(small[stem])).hexdigest())
        for key, (stem, _) in mnist.FILES.items()
    }
    monkeypatch.setattr(mnist, "FILES", checked)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(mnist, "TIMEOUT", 0.5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "mirror"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


DEAD = "http://127.0.0.1:9/"


def cached() -> list[str]:
    return sorted(os.listdir(mnist.cache_folder()))


@pytest.mark.parametrize("progress", [False, True])
def test_download_from_the_first_mirror_that_answers(
    progress: bool, mirror: str, small: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (DEAD, mirror))
    assert mnist.ensure_available(MNIST, progress) == mnist.cache_folder()
    assert cached() == sorted(f"{stem}.gz" for stem in small)
    np.testing.assert_array_equal(load_labels(MNIST, "test"), small["t10k-labels-idx1-ubyte"])
    monkeypatch.setattr(mnist, "MIRRORS", ())
    mnist.ensure_available(MNIST)


def test_only_what_is_missing_is_downloaded(
    mirror: str, small: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (mirror,))
    mnist.ensure_available(MNIST)
    (mnist.cache_folder() / "train-images-idx3-ubyte.gz").unlink()
    for stem in small:
        if stem != "train-images-idx3-ubyte":
            (tmp_path / "mirror" / f"{stem}.gz").unlink()
    mnist.ensure_available(MNIST)
    assert cached() == sorted(f"{stem}.gz" for stem in small)


def other_content(raw: bytes) -> bytes:
    return gzip.compress(gzip.decompress(raw)[:-1] + b"\xff")


@pytest.mark.parametrize(
    "damage",
    [
        other_content,
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"<html>not found</html>",
        lambda raw: gzip.compress(gzip.decompress(raw) + bytes(20_000_000), 9),
        lambda raw: bytes(3_000_000),
    ],
)
def test_a_corrupt_download_is_thrown_away(
    damage: Callable[[bytes], bytes], mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (mirror,))
    path = tmp_path / "mirror" / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"cannot download train-images-idx3-ubyte\.gz.*place "):
        mnist.ensure_available(MNIST)
    assert cached() == []


def test_an_endless_download_is_cut_off(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(mnist, "MIRRORS", (mirror,))
    monkeypatch.setattr(mnist, "_md5", lambda path, _: sizes.append(path.stat().st_size))
    for stem, _ in mnist.FILES.values():
        (tmp_path / "mirror" / f"{stem}.gz").write_bytes(bytes(4_000_000))
    with pytest.raises(DataError, match="the content is not that"):
        mnist.ensure_available(MNIST)
    assert 1_960_000 < sizes[0] < 2_100_000  # 2500 images


def test_a_bomb_is_unpacked_one_byte_past_its_length(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(5_000_000)))
    assert mnist._md5(tmp_path / "bomb.gz", 100_000) == hashlib.md5(bytes(100_001)).hexdigest()


def test_offline_says_how_to_place_the_files(mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (DEAD, f"{mirror}missing/"))
    with pytest.raises(DataError) as error:
        mnist.ensure_available(MNIST)
    for hint in (DEAD, "404", "t10k-labels-idx1-ubyte", "--data-dir", "$HDNN_DATA"):
        assert hint in str(error.value)
    assert cached() == []


def test_a_mirror_that_falls_silent_is_left(
    mirror: str, small: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dumb = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(mnist, "MIRRORS", (dumb, mirror))
        monkeypatch.setattr(mnist, "TIMEOUT", 0.1)
        mnist.ensure_available(MNIST)
    assert len(cached()) == 4


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a folder should be")
    with pytest.raises(DataError, match="cannot write the cache"):
        mnist.ensure_available(MNIST)
