"""Files that are read whole."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from hdnn_dist.files import read_bytes, read_text


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 0 MiB") as caught:
        read_bytes(file, 4)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "y", 5)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_has_is_an_os_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no file has such a name"):
        read_bytes(tmp_path / name, 5)


def test_text_has_no_byte_order_mark_and_lines_end_alike(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes("\ufeffé\r\nb\rc\n".encode())
    assert read_text(file, 99) == "é\nb\nc\n"
    file.write_bytes(b"\xe9")
    with pytest.raises(UnicodeDecodeError):
        read_text(file, 99)
