"""Failures at every operation of the file system while a checkpoint is written; what is kept."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor
from upath import UPath

from hdnn_dist.checkpoint import (
    Totals,
    agent_file,
    best_checkpoint,
    checkpoint_folder,
    checkpoints,
    from_latest,
    latest_checkpoint,
    load_agent,
    read_manifest,
    save_agent,
    to_json,
    write_checkpoint,
    write_json,
)
from hdnn_dist.errors import CheckpointError, StorageError
from hdnn_dist.storage import Place, place, write

NAMES = ("a", "b")


class Crash(BaseException):
    """The process is dead."""


class Faults:
    """Counts the operations that change files, and lets one go wrong.

    Args:
        at: which, from 1.
        how: "full" and "late" raise, before and after it took effect; "torn" writes half of what it
            should and is dead; "crash" is dead; "kill" kills the process in earnest.
    """

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.count = at, how, 0

    @property
    def happened(self) -> bool:
        return self.count >= self.at

    def before(self, *parts: Any, half: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        dead = self.how in ("crash", "torn")
        if self.count == self.at or (self.happened and dead):
            if self.how == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "torn" and self.count == self.at:
                half()
            if dead:
                raise Crash

    def after(self) -> None:
        if self.how == "late" and self.count == self.at:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.before()
            result = function(*arguments, **options)
            self.after()
            return result

        return wrapped

    def of_write(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same of one whose last argument is what is written."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            *others, content = arguments
            self.before(half=lambda: function(*others, content[: len(content) // 2], **options))
            result = function(*arguments, **options)
            self.after()
            return result

        return wrapped

    def of_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same of `open`, and of what is done to the file."""

        def wrapped(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if "w" not in mode:
                return function(file, mode, *arguments, **options)
            return _Stream(self.of(function)(file, mode, *arguments, **options), self)

        return wrapped


class _Stream:
    def __init__(self, stream: Any, faults: Faults) -> None:
        self.stream, self.fileno = stream, stream.fileno
        self.write = faults.of_write(stream.write)
        self.flush, self.close = faults.of(stream.flush), faults.of(stream.close)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self.stream.close()


def inject(patch: pytest.MonkeyPatch, faults: Faults, run: Place) -> None:
    if isinstance(run, Path):
        patch.setattr(io, "open", faults.of_open(io.open))
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir"):
            patch.setattr(os, name, faults.of(getattr(os, name)))
        return
    patch.setattr(MemoryFileSystem, "pipe_file", faults.of_write(MemoryFileSystem.pipe_file))
    for name in ("makedirs", "rm_file", "rmdir"):
        patch.setattr(MemoryFileSystem, name, faults.of(getattr(MemoryFileSystem, name)))


def states(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {name: {"w": torch.randn(3, 5, generator=generator)} for name in NAMES}


def save(run: Place, step: int, **options: Any) -> None:
    def agents(folder: Place) -> dict[str, str]:
        return {name: save_agent(folder, name, state) for name, state in states(step).items()}

    write_checkpoint(run, step, "", Totals(), agents, keep_last=2, **options)


def is_good(folder: Place) -> bool:
    manifest = read_manifest(folder)
    for name, state in states(manifest.step).items():
        assert torch.equal(load_agent(folder, name, manifest)["w"], state["w"])
    return True


def files(run: Place) -> set[str]:
    """All of a run's files and folders."""
    there = UPath(run)
    found = there.fs.find(there.path, withdirs=True)
    return {path.split("checkpoints/")[1] for path in found if "checkpoints/" in path}


def begin(run: Place) -> None:
    """Two checkpoints, and one that a crash left unfinished."""
    save(run, 1)
    save(run, 2)
    for name in NAMES:
        write(agent_file(checkpoint_folder(run, 7), name), b"half")


def check_after(run: Place, faults: Faults) -> None:
    """The checkpoint before is good, the next one can be written, and nothing else is left."""
    assert is_good(checkpoint_folder(run, 2))
    latest = from_latest(
        run, lambda folder, manifest: [load_agent(folder, n, manifest) for n in NAMES] and manifest
    )
    assert latest.step in (2, 3), (faults.at, faults.how)
    step = latest.step + 1
    save(run, step)
    expected = [checkpoint_folder(run, k) for k in (step - 1, step)]
    assert checkpoints(run) == expected
    assert all(map(is_good, expected))
    names = [f"{name}.safetensors" for name in NAMES] + ["manifest.json"]
    whole = {f"{folder.name}/{name}" for folder in expected for name in names}
    assert files(run) == whole | {folder.name for folder in expected}


def places(base: Place) -> Iterator[Place]:
    """One after the other, each empty."""
    for k in range(1, 1000):
        yield base / str(k)


@pytest.mark.parametrize("how", ["full", "late", "crash", "torn"])
@pytest.mark.parametrize("where", ["path", "memory"])
def test_a_failure_at_any_operation_leaves_the_checkpoint_before(
    where: str, how: str, tmp_path: Path
) -> None:
    base = tmp_path if where == "path" else place(f"memory://faults/{how}")
    for at, run in enumerate(places(base), 1):
        begin(run)
        faults = Faults(at, how)
        with pytest.MonkeyPatch.context() as patch:
            inject(patch, faults, run)
            told: BaseException | None = None
            try:
                save(run, 3)
            except (StorageError, Crash) as error:
                told = error
        if not faults.happened:
            break
        if told is None:  # of no account: a folder was made after all, say
            assert is_good(checkpoint_folder(run, 3)), at
        else:
            assert isinstance(told, Crash) == (how in ("crash", "torn"))
            assert isinstance(told, Crash) or str(run) in str(told)
        check_after(run, faults)
    # Two agents and a manifest, one unfinished and one old checkpoint.
    assert at > (25 if where == "path" else 12)


def kill_at_every_operation(base: Path) -> int:
    """Fork, be killed in the midst of writing, and look at what is left; how often."""
    for at, run in enumerate(places(base), 1):
        begin(run)
        faults = Faults(at, "kill")
        if (pid := os.fork()) == 0:
            with pytest.MonkeyPatch.context() as patch:
                inject(patch, faults, run)
                save(run, 3)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return at - 1
        check_after(run, faults)
    raise AssertionError("there is no end to it")


def test_a_kill_at_any_operation_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    # In a process of its own, which has no threads yet and may fork.
    code = (
        "import sys; from tests.test_checkpoint import *\n"
        "print(kill_at_every_operation(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, tmp_path]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 25


def test_a_folder_without_a_manifest_is_no_checkpoint_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    assert from_latest(tmp_path, lambda _, manifest: manifest.step) == 2
    assert "step-00000007: no manifest.json: it was not finished; passed over" in caplog.text
    lone = tmp_path / "lone"
    write(agent_file(checkpoint_folder(lone, 1), "a"), b"half")
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        from_latest(lone, lambda _, manifest: manifest)


def test_strays_among_the_checkpoints_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step-xyz").mkdir(parents=True)
    (folder / "step-99999999").touch()
    assert not checkpoints(tmp_path)
    for step in (1, 2, 123456789, 3, 4):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path)[1].step == 123456789
    names = ["step-00000004", "step-123456789", "step-99999999", "step-xyz"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, accuracy in enumerate([0.5, 0.9, None, 0.9, 0.8, 0.7, None], 1):
        save(tmp_path, step, accuracy=accuracy, keep_best=True)
    assert [folder.name[-1] for folder in checkpoints(tmp_path)] == ["4", "6", "7"]
    best = best_checkpoint(tmp_path)
    assert best is not None
    (best / "manifest.json").write_text("")
    save(tmp_path, 8, keep_best=True)
    assert [folder.name[-1] for folder in checkpoints(tmp_path)] == ["6", "7", "8"]
    assert best_checkpoint(tmp_path) == checkpoints(tmp_path)[0]


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": "NaN"}
    write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(to_json(content))
    assert to_json(content) == '{"a": null, "b": [1.5, [null, {"c": null}]], "d": "NaN"}'
