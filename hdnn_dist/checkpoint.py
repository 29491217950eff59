"""The run directory and its checkpoints.

::

    RUN/
      spec.yaml                 the resolved spec
      metrics.jsonl             one record a line: training steps and evaluations
      summary.json              figures of the whole run
      absent.json               agents of the spec that are not to take part, if any
      tensorboard/              the same metrics as TensorBoard events
      tracking.json             what MLflow or W&B call the run, if they were told of it
      checkpoints/
        step-00000230/
          manifest.json         step, digest of the job, SHA-256 of all files, cost so far
          <agent>.safetensors   one agent's weights and optimiser state

RUN is a local path or a URL (see `hdnn_dist.storage`). A checkpoint's manifest is written last, and
removed first: a folder without one is no checkpoint, and the next to be written removes it. So a
crash at any moment leaves the ones before as they were, wherever they are. No pickle is written or
read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hdnn_dist.errors import CheckpointError, DamagedError
from hdnn_dist.spec import AgentName
from hdnn_dist.storage import MAX_TEXT, Place, kind, move, names, read, remove, write

FORMAT = 2
MANIFEST = "manifest.json"
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_NAMES = TypeAdapter(list[AgentName])
Whole = Annotated[int, Field(ge=0, lt=2**63)]
log = logging.getLogger("hdnn_dist")


class Totals(BaseModel):
    """What a run has come to by a checkpoint, over all processes that took it there.

    Attributes:
        seconds: wall time of `fit`.
        training_seconds: of it, in training steps.
        bytes_sent: between agents.
        best_test_accuracy: of all evaluations; None of targets.
        best_test_r2: of targets, of all evaluations so far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    seconds: Amount = 0.0
    training_seconds: Amount = 0.0
    bytes_sent: Whole = 0
    best_test_accuracy: Amount | None = 0.0
    best_test_r2: float | None = None

    @property
    def best(self) -> float:
        """The better of these, the larger."""
        known = [n for n in (self.best_test_accuracy, self.best_test_r2) if n is not None]
        return max(known, default=-math.inf)


class Manifest(BaseModel):
    """What a checkpoint says of itself.

    Attributes:
        format: version of the layout.
        step: optimiser steps taken.
        state: `hdnn_dist.trainer.state_digest` of the job that wrote it.
        spec: of that job, resolved, to say what has changed since; None if it was not given.
        files: bytes and SHA-256 by agent.
        totals: of the run so far.
        accuracy: on the test set after these steps, R² of targets; None if it was not looked at.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = FORMAT
    step: Whole
    state: str
    files: dict[AgentName, Annotated[str, Field(pattern=r"^[0-9]{1,18} [0-9a-f]{64}$")]]
    totals: Totals
    accuracy: float | None = None
    spec: dict[str, Any] | None = None


def checkpoint_folder(run: Place, step: int) -> Place:
    """Where a run has its checkpoint after so many steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def agent_file(folder: Place, name: str) -> Place:
    """The file of one agent in a checkpoint."""
    return folder / f"{name}.safetensors"


def save_agent(folder: Place | None, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write one agent's tensors, if a folder is given, and return the file's `checksum`."""
    content = save({key: value.contiguous() for key, value in tensors.items()})
    if folder is not None:
        write(agent_file(folder, name), content)
    return checksum(content)


def checksum(content: bytes) -> str:
    """How many bytes there are, so that no more are read, and their SHA-256."""
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}"


def load_agent(folder: Place, name: str, manifest: Manifest) -> dict[str, Tensor]:
    """Read one agent's tensors.

    Raises:
        DamagedError: the file is missing or not what the manifest says.
    """
    content = _read_agent(folder, name, manifest)
    try:
        return load(content)
    except SafetensorError as error:
        raise DamagedError(
            f"{agent_file(folder, name)}: not a safetensors file ({error})",
            "use an older checkpoint",
        ) from None


def _read_agent(folder: Place, name: str, manifest: Manifest) -> bytes:
    file, expected = agent_file(folder, name), manifest.files[name]
    try:
        content = read(file, int(expected.partition(" ")[0]))
    except OSError as error:
        raise DamagedError(
            f"{file}: cannot be read ({error.strerror or 'it is not there'})",
            "restore it or use an older checkpoint",
        ) from None
    if checksum(content) != expected:
        raise DamagedError(
            f"{file}: its SHA-256 is not the manifest's: the file is damaged",
            "restore it or remove this checkpoint's folder to use the one before",
        )
    return content


def check_tensors(name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """The weights that a checkpoint holds for an agent are of the names, shapes and types expected.

    Raises:
        CheckpointError: they are not.
    """
    for key, weight in expected.items():
        value = found.get(f"weights/{key}")
        if value is None or value.shape != weight.shape or value.dtype != weight.dtype:
            got = "nothing" if value is None else f"{tuple(value.shape)} of {value.dtype}"
            raise CheckpointError(
                f"agent {name!r}: {key} is {tuple(weight.shape)} of {weight.dtype} in "
                f"the spec, but the checkpoint holds {got}",
                "resume with the spec of the run",
            )


def write_checkpoint(
    run: Place,
    step: int,
    state: str,
    totals: Totals,
    save_agents: Callable[[Place], dict[str, str]],
    *,
    accuracy: float | None = None,
    spec: dict[str, Any] | None = None,
    keep_last: int = 3,
    keep_best: bool = False,
) -> Place:
    """Write a checkpoint, whole or not at all, and drop those that need not be kept.

    One of the same step is dropped first.

    Args:
        run: the run directory.
        step: optimiser steps taken.
        state: digest of what the agents' states belong to.
        totals: of the run so far.
        save_agents: writes every agent's file into a folder and returns the checksums by agent.
        accuracy: on the test set after these steps, R² of targets, if it was looked at.
        spec: of the job, resolved.
        keep_last: how many of the newest are kept.
        keep_best: whether the one with the best of these is kept beside them.

    Raises:
        StorageError: something cannot be written or removed; the checkpoints before are whole.
    """
    folder = checkpoint_folder(run, step)
    for unfinished in _folders(run):
        if unfinished == folder or not _is_whole(unfinished):
            _drop(unfinished)
    manifest = Manifest(
        step=step,
        state=state,
        files=save_agents(folder),
        totals=totals,
        accuracy=accuracy,
        spec=spec,
    )
    write(folder / MANIFEST, seal(manifest.model_dump_json(indent=2).encode()))
    best = best_checkpoint(run) if keep_best else None
    for old in checkpoints(run)[:-keep_last]:
        if old != best:
            _drop(old)
    return folder


def _drop(folder: Place) -> None:
    """Remove a checkpoint, which is none from the first moment on."""
    if _is_whole(folder):
        remove(folder / MANIFEST)
    remove(folder)


def _is_whole(folder: Place) -> bool:
    return kind(folder / MANIFEST) is not None


def set_aside(run: Place, step: int) -> None:
    """Rename the checkpoints of later steps than the one that a run goes on from.

    They are damaged, or were when it was chosen, and of a past that is being written anew.
    """
    for folder in checkpoints(run):
        if folder > checkpoint_folder(run, step):
            name = f"set-aside-{folder.name}"
            free = (folder.with_name(f"{name}-{k}" if k else name) for k in count())
            move(folder, next(place for place in free if kind(place) is None))


def verify(folder: Place, manifest: Manifest) -> None:
    """Compare every agent's file with its checksum.

    Raises:
        DamagedError: one is missing or not as it was written.
    """
    for name in manifest.files:
        _read_agent(folder, name, manifest)


def best_checkpoint(run: Place) -> Place | None:
    """The newest of those that had the best accuracy, or R²; None if none was looked at."""
    accuracies = {}
    for folder in checkpoints(run):
        try:
            accuracies[folder] = read_manifest(folder).accuracy
        except CheckpointError:  # it cannot be the best
            continue
    known = {folder: a for folder, a in accuracies.items() if a is not None}
    return max(reversed(known), key=known.__getitem__, default=None)


Result = TypeVar("Result")


def from_latest(run: Place, use: Callable[[Place, Manifest], Result]) -> Result:
    """What `use` makes of a run's newest checkpoint, or where that is damaged, of one before it.

    A damaged one is left as it is, and named in a warning of the logger `hdnn_dist`.

    Args:
        run: the run directory.
        use: loads a checkpoint from its folder; raises `DamagedError` where files are not good.

    Raises:
        CheckpointError: there is none, none that is whole, or `use` refuses it.
    """
    damage: list[DamagedError] = []
    for folder in reversed(_folders(run)):
        if not _is_whole(folder):
            log.warning("%s: no %s: it was not finished; passed over", folder, MANIFEST)
            continue
        try:
            return use(folder, read_manifest(folder))
        except DamagedError as error:
            damage.append(error)
            log.warning("%s; trying the checkpoint before it", error.problem)
    if damage:
        raise damage[0]
    raise CheckpointError(
        f"{run}: no checkpoint in it", "name a run directory that a training run has written"
    )


def latest_checkpoint(run: Place) -> tuple[Place, Manifest]:
    """The newest checkpoint of a run whose manifest is whole.

    Raises:
        CheckpointError: there is none.
    """
    return from_latest(run, lambda folder, manifest: (folder, manifest))


def seal(manifest: bytes) -> bytes:
    """A manifest as it is written: JSON of it and of its SHA-256, which is the first line."""
    return b'{"sha256": "%s", "manifest":\n%s}\n' % (
        hashlib.sha256(manifest).hexdigest().encode(),
        manifest,
    )


def read_manifest(folder: Place) -> Manifest:
    """What a checkpoint says of itself.

    Raises:
        DamagedError: it says nothing that can be read, is not as it was written, or of another step
            than its folder.
        CheckpointError: it is of another version.
    """
    file = folder / MANIFEST
    try:
        written = read(file, MAX_TEXT)
        content = written.partition(b"\n")[2].removesuffix(b"}\n")
        if seal(content) != written:
            raise ValueError("not as it was written")
        manifest = Manifest.model_validate_json(content)
        if checkpoint_folder(folder, manifest.step).name != folder.name:
            raise ValueError("of another step than its folder")
    except (OSError, ValueError):
        raise DamagedError(
            f"{file}: missing or damaged", "remove this checkpoint's folder to use the one before"
        ) from None
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{file}: format {manifest.format}, but this version reads {FORMAT}",
            "use the version of hdnn-dist that wrote it",
        )
    return manifest


def read_absent(run: Place) -> tuple[str, ...]:
    """The agents of the spec that are not to take part in a run from its next checkpoint on.

    Raises:
        CheckpointError: the run has a file of them which is none.
    """
    file = run / "absent.json"
    try:
        return tuple(_NAMES.validate_json(read(file, MAX_TEXT)))
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError):
        raise CheckpointError(
            f"{file}: damaged, or no list of names", "remove it for all agents to take part"
        ) from None


def write_absent(run: Place, agents: Sequence[str]) -> None:
    """Say which agents of the spec are not to take part in a run."""
    write_json(run / "absent.json", list(agents))


def to_json(content: object, indent: int | None = None) -> str:
    """JSON, with null for a float that is not finite, as JSON has none of those."""
    return json.dumps(_plain(content), indent=indent, allow_nan=False)


def _plain(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    return [_plain(item) for item in content] if isinstance(content, list | tuple) else content


def write_json(path: Place, content: object) -> None:
    """Write JSON (see `to_json`), whole or not at all."""
    write_text(path, to_json(content, indent=2))


def write_text(path: Place, content: str) -> None:
    """Write text, whole or not at all."""
    write(path, content.encode())


def checkpoints(run: Place) -> list[Place]:
    """The folders of a run's checkpoints, oldest first."""
    return [folder for folder in _folders(run) if _is_whole(folder)]


def newest_step(run: Place) -> int:
    """The steps that the newest of a run's checkpoints has taken; 0 if there is none."""
    return max((int(folder.name.removeprefix("step-")) for folder in checkpoints(run)), default=0)


def _folders(run: Place) -> list[Place]:
    """The folders of a run's checkpoints, finished or not, oldest first."""
    there = run / "checkpoints"
    ours = [name for name in names(there) if re.fullmatch(r"step-\d+", name)]
    ours.sort(key=lambda name: int(name.removeprefix("step-")))
    return [there / name for name in ours if kind(there / name) == "directory"]
