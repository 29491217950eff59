"""Reading whole files, none larger than it may be."""

from __future__ import annotations

import errno
from pathlib import Path


def read_bytes(path: Path, most: int) -> bytes:
    """What a file holds.

    Args:
        path: the file.
        most: bytes that it may have; of a larger one, no more are read.

    Raises:
        OSError: it cannot be read, is larger, or no file can have such a name.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except ValueError as error:  # NUL, or half a surrogate pair
        raise OSError(errno.EINVAL, f"no file has such a name ({error})", str(path)) from None
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB", str(path))
    return content


def read_text(path: Path, most: int) -> str:
    """What a file of UTF-8 text holds, as `read_bytes`, without a byte order mark.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
