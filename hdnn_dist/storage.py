"""Where files of a run are: a local path, or a URL of any file system that fsspec knows.

Object stores rename nothing and know no folders, so no more is asked of a place than that a file is
written whole or not at all. Of local paths that holds by a rename; of object stores by themselves;
of what is left (`sftp://`, say) it need not hold, and a file that is half there must be seen to be.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeAlias, cast

import fsspec
from fsspec.registry import known_implementations
from upath import UPath

from hdnn_dist.errors import HdnnError, StorageError, did_you_mean

Place: TypeAlias = Path | UPath
Where: TypeAlias = str | os.PathLike[str] | UPath

MAX_TEXT = 128 << 20  # bytes: a resolved spec writes out all edges, and a J from a file
_URL = re.compile(r"([A-Za-z][\w+.-]*)://")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def place(where: Where) -> Place:
    """A place by its path or URL; one on this machine (`file://`) is a path.

    Raises:
        StorageError: nobody knows such URLs, a package for them is missing, or they lead nowhere.
    """
    if isinstance(where, os.PathLike):
        return Path(where)
    if not (url := _URL.match(text := str(where))):
        return Path(text)
    protocol = url[1].lower()
    try:
        found = UPath(text.rstrip("/")) if text != url[0] else UPath(text)
        local = "file" in _protocols(found)
    except ValueError:
        raise StorageError(
            f"{text}: there are no URLs of the kind {url[0]}",
            did_you_mean(protocol, fsspec.available_protocols(), "give a path, or one like s3://…"),
        ) from None
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        raise StorageError(
            f"{text}: a package for such URLs is missing ({error})",
            "install what it names" if package == "fsspec" else f"pip install {package}",
        ) from None
    except Exception as error:
        raise _told(found, "reached", error) from None
    return Path(found.path) if local else found


def in_this_process_alone(place: Place) -> bool:
    """Whether nobody but this process finds what is there."""
    return not isinstance(place, Path) and "memory" in _protocols(place)


def kind(place: Place) -> str | None:
    """What is there: "file", "directory", or None.

    Raises:
        StorageError: the place cannot be reached.
    """
    with _telling(place, "reached"):
        if isinstance(place, Path):  # fsspec says of a link that it is one
            return "directory" if place.is_dir() else "file" if place.exists() else None
        place.fs.invalidate_cache()  # others write there too
        try:
            found: str = place.fs.info(place.path)["type"]
        except FileNotFoundError:
            return None
        return found


def names(folder: Place) -> list[str]:
    """What is in a folder; nothing if it is not there.

    Raises:
        StorageError: it cannot be read.
    """
    with _telling(folder, "read"):
        UPath(folder).fs.invalidate_cache()
        try:
            return sorted(path.name for path in folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def read(file: Place, most: int) -> bytes:
    """The content of a file.

    Args:
        file: where.
        most: bytes that it may have; of a larger one, no more are read.

    Raises:
        OSError: it is not there, is larger, or is local and cannot be read.
        StorageError: the place of a URL cannot be reached: what is there may be good.
    """
    with _opened(file) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most / 2**20:.3g} MiB", str(file))
    return content


def lines(file: Place, most: int) -> Iterator[bytes]:
    """The lines of a file with their ends, one at a time, up to one of more bytes than `most`.

    Raises:
        OSError, StorageError: as `read`.
    """
    with _opened(file) as stream:
        while 0 < len(line := stream.readline(most + 1)) <= most:
            yield line


def check_regular(file: Path) -> None:
    """What is there, if anything, can be opened without waiting for it, and has an end.

    Raises:
        OSError: it is a pipe, a device or the like.
    """
    if not (file.is_file() or file.is_dir()) and file.exists():
        raise OSError(errno.EINVAL, "not a regular file", str(file))


@contextlib.contextmanager
def _opened(file: Place) -> Iterator[IO[bytes]]:
    if isinstance(file, Path):
        check_regular(file)
    try:
        with (
            _telling(file, "read", but=OSError if isinstance(file, Path) else FileNotFoundError),
            file.open("rb") as stream,
        ):
            yield io.BufferedReader(cast(io.RawIOBase, stream))  # fsspec's own know no longest line
    except ValueError as error:  # NUL, or half a surrogate pair
        if isinstance(error, HdnnError):
            raise
        raise OSError(errno.EINVAL, "no file has such a name", str(file)) from None


def read_text(file: Place, most: int = MAX_TEXT) -> str:
    """A file of UTF-8 text, without a byte order mark.

    Raises:
        OSError, StorageError: as `read`.
        UnicodeDecodeError: it is no UTF-8.
    """
    text = read(file, most).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write(file: Place, content: bytes) -> None:
    """Write a file, whole or not at all, and the folders that it is in.

    Raises:
        StorageError: it cannot be written.
    """
    with _telling(file, "written"):
        if not isinstance(file, Path):
            file.fs.makedirs(file.parent.path, exist_ok=True)
            file.fs.pipe_file(file.path, content)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        try:
            with partial.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
        except OSError:
            with contextlib.suppress(OSError):  # a full disk needs the room
                partial.unlink()
            raise


def remove(place: Place) -> None:
    """Remove a file, or a folder and all in it.

    Raises:
        StorageError: it cannot be removed.
    """
    with _telling(place, "removed"):
        there = UPath(place)
        there.fs.invalidate_cache()
        there.fs.rm(there.path, recursive=True)


def move(folder: Place, to: Place) -> None:
    """Rename a folder; where nothing can be renamed, copy and remove it.

    Raises:
        StorageError: it cannot be moved.
    """
    with _telling(folder, "renamed"):
        there = UPath(folder)
        there.fs.invalidate_cache()
        there.fs.mv(there.path, UPath(to).path, recursive=True)


class Log:
    """A text file that grows.

    A local one has each text at once. Object stores cannot append: there the whole file is written
    anew by `commit` and `close`.

    Args:
        file: where.
        text: its first content, in place of what is there.

    Raises:
        StorageError: it cannot be written; so too the methods.
    """

    def __init__(self, file: Place, text: str) -> None:
        self.file = file
        self._texts = [text]
        write(file, text.encode())
        self._stream = None
        if isinstance(file, Path):
            with _telling(file, "written"):
                self._stream = file.open("ab", buffering=0)

    def append(self, text: str) -> None:
        """Add to it."""
        if self._stream is None:
            self._texts.append(text)
            return
        with _telling(self.file, "written"):
            rest = memoryview(text.encode())
            while rest:
                rest = rest[self._stream.write(rest) :]

    def commit(self) -> None:
        """Have all of it where it belongs."""
        if self._stream is None and len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
            write(self.file, self._texts[0].encode())

    def close(self) -> None:
        """Commit, and let go of the file."""
        self.commit()
        if self._stream is not None:
            self._stream.close()


def _protocols(path: UPath) -> tuple[str, ...]:
    protocol = path.fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


@contextlib.contextmanager
def _telling(place: Place, what: str, but: type[Exception] = HdnnError) -> Iterator[None]:
    """Say of a failure, but one kind, where it was; each file system has errors of its own."""
    failures = OSError if isinstance(place, Path) else Exception
    try:
        yield
    except but:
        raise
    except failures as error:
        raise _told(place, what, error) from error


def _told(place: Place, what: str, error: Exception) -> StorageError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        mend = "make room there"
    elif isinstance(place, Path):
        mend = "see to the disk and to who may write there"
    else:
        mend = "see to the URL, the network, and the credentials that fsspec finds for it"
    return StorageError(
        f"{place}: cannot be {what} ({reason or type(error).__name__})",
        mend,
    )
