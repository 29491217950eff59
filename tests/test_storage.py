from __future__ import annotations

import errno
import pickle
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

import hdnn_dist
from hdnn_dist.checkpoint import checkpoints, set_aside
from hdnn_dist.errors import CheckpointError, StorageError
from hdnn_dist.job import Job
from hdnn_dist.metrics import read_metrics
from hdnn_dist.run import create, reopen
from hdnn_dist.storage import Log, Place, kind, lines, names, place, read, read_text, remove, write
from hdnn_dist.trainer import LocalRunner
from tests.commands import hdnn

TINY = ["data.train_samples=128", "model.layers=1", "training.epochs=2"]


@pytest.fixture(params=["path", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path / "root" if request.param == "path" else place(f"memory:/{tmp_path}")


@pytest.fixture(autouse=True)
def _empty_memory() -> None:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_what_is_on_this_machine_is_a_path(tmp_path: Path) -> None:
    for where in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}/"):
        assert place(where) == tmp_path
        assert isinstance(place(where), Path)
    assert place("runs/a") == Path("runs/a")
    memory = place("memory://a/b/")
    assert isinstance(memory, UPath)
    assert str(memory / "c") == "memory://a/b/c"
    assert place(memory) == pickle.loads(pickle.dumps(memory)) == memory


def test_files_are_written_read_and_removed(root: Place) -> None:
    assert (kind(root), names(root)) == (None, [])
    for content in (b"old", b"new"):
        write(root / "a" / "b", content)
        assert read(root / "a" / "b", 99) == content
    assert (kind(root / "a"), kind(root / "a" / "b")) == ("directory", "file")
    assert names(root / "a") == ["b"]
    remove(root / "a")
    with pytest.raises(FileNotFoundError):
        read(root / "a" / "b", 99)
    assert kind(root / "a") is None


def test_a_log_grows_and_starts_anew(root: Place) -> None:
    write(root / "log", b"old")
    log = Log(root / "log", "1\n")
    log.append("2\n")
    log.append("3\n")
    assert read(root / "log", 99) == (b"1\n2\n3\n" if isinstance(root, Path) else b"1\n")
    log.commit()
    assert read(root / "log", 99) == b"1\n2\n3\n"
    log.append("4\n")
    log.close()
    assert read(root / "log", 99) == b"1\n2\n3\n4\n"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memry://run", "there are no URLs of the kind memry://; did you mean 'memory'"),
        ("nothing://run", "there are no URLs of the kind nothing://"),
    ],
)
def test_urls_that_nobody_knows(
    url: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments in (("train", "--local", "--run", url), ("eval", url), ("analyze", url)):
        assert hdnn(*arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {url}: {says}")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        StorageError, match=r"s3://b/run: a package .* missing .*; pip install s3fs$"
    ):
        place("s3://b/run")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Access Denied"), "Access Denied"),
        (RuntimeError("Unable to locate credentials"), "Unable to locate credentials"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_place_that_cannot_be_reached_is_not_taken_for_an_empty_one(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hdnn_dist.train(overrides=TINY, run="memory://unreachable", local=True).run
    before = names(place(run) / "checkpoints")

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    methods = ("info", "ls", "_open")
    for k in range(3):  # the first call fails, or a later one
        with monkeypatch.context() as patch:
            for method in methods[k:]:
                patch.setattr(MemoryFileSystem, method, fail)
            with pytest.raises(StorageError, match=f"memory://unreachable.*{says}.*credentials"):
                hdnn_dist.load(run)
            if k < 2:
                with pytest.raises(StorageError, match=says):
                    create(Job.load(None, TINY), run)
    # A checkpoint that could not be read for a while is not taken for a damaged one.
    assert hdnn_dist.load(run)
    assert names(place(run) / "checkpoints") == before


def test_a_run_at_a_url_is_as_one_at_a_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, resumed, evaluated, predicted and analysed, by calls and by commands."""
    url = "memory://equal/run"
    path = tmp_path / "run"
    few = [argument for o in TINY for argument in ("--set", o)]
    assert hdnn("train", "--local", "--run", url, *few) == 0
    assert f"run: {url}" in capsys.readouterr().out
    assert caplog.text.count("TensorBoard events go to local run directories alone") == 1
    assert hdnn("train", "--local", "--run", url) == 2
    assert "is not empty" in capsys.readouterr().err
    assert hdnn("train", "--local", "--resume", url, "--set", "training.epochs=3") == 0
    whole = hdnn_dist.train(overrides=[*TINY, "training.epochs=3"], run=path.as_uri(), local=True)
    assert whole.run == str(path)
    remote = place(url)
    ours, theirs = checkpoints(remote)[-1], checkpoints(path)[-1]
    assert names(ours) == names(theirs)
    assert names(remote) == [name for name in names(path) if name != "tensorboard"]
    model = hdnn_dist.load(url).state_dict()
    assert model.keys() == hdnn_dist.load(path).state_dict().keys()
    kinds = [(r["kind"], r["step"]) for r in read_metrics(path)]
    assert [(r["kind"], r["step"]) for r in read_metrics(remote)] == kinds
    capsys.readouterr()
    assert hdnn("eval", url, "--local") == 0
    assert f"step {whole.steps}" in capsys.readouterr().out
    assert hdnn("predict", url, "--local", "--out", tmp_path / "p.csv") == 0
    assert hdnn("analyze", url, "--local", "--samples", 1, "--baselines", "none") == 0
    assert "memory://equal/run/analysis/defect.png" in capsys.readouterr().out
    assert {"analysis.json", "sensitivity.png"} <= set(names(remote / "analysis"))


def test_a_damaged_checkpoint_at_a_url_is_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    run = place("memory://damage/run")
    whole = hdnn_dist.train(overrides=TINY, run=run, local=True)
    last = checkpoints(run)[-1]
    write(last / "a3.safetensors", b"")
    remove(run / "summary.json")
    again = hdnn_dist.fit(LocalRunner(reopen(run)), run, tensorboard=False)
    assert "a3.safetensors: its SHA-256" in caplog.text
    assert again.test_loss == whole.test_loss
    assert f"set-aside-{last.name}" in names(run / "checkpoints")
    set_aside(run, 0)
    assert checkpoints(run) == []


def test_memory_is_refused_where_actors_would_write(capsys: pytest.CaptureFixture[str]) -> None:
    hdnn_dist.train(overrides=TINY, run="memory://shared/run", local=True)
    for arguments in (
        ("train", "--run", "memory://new/run"),
        ("train", "--resume", "memory://shared/run"),
        ("eval", "memory://shared/run"),
    ):
        assert hdnn(*arguments) == 2
        assert "in the memory of this process, where no Ray actor" in capsys.readouterr().err

    class Elsewhere:
        job: Any = None

    with pytest.raises(CheckpointError, match="no Ray actor can write"):
        hdnn_dist.fit(Elsewhere(), "memory://new/run")  # type: ignore[arg-type]


@pytest.mark.parametrize("url", [False, True])
def test_lines_are_read_up_to_one_that_is_too_long(url: bool, tmp_path: Path) -> None:
    file = place("memory://lines/x") if url else tmp_path / "x"
    write(file, b"12\n\n1234\n12345\n1\n")
    assert list(lines(file, 5)) == [b"12\n", b"\n", b"1234\n"]
    assert list(lines(file, 6))[3:] == [b"12345\n", b"1\n"]


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"12345")
    assert read(file, 5) == b"12345"
    with pytest.raises(OSError, match=r"larger than 3\.81e-06 MiB") as caught:
        read(file, 4)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "y", 5)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_has_is_an_os_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no file has such a name"):
        read(tmp_path / name, 5)


def test_text_has_no_byte_order_mark_and_lines_end_alike(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes("\ufeffé\r\nb\rc\n".encode())
    assert read_text(file, 99) == "é\nb\nc\n"
    file.write_bytes(b"\xe9")
    with pytest.raises(UnicodeDecodeError):
        read_text(file, 99)
