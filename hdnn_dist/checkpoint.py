"""The run directory and its checkpoints.

::

    RUN/
      spec.yaml                 the resolved spec
      metrics.jsonl             one record a line: training steps and evaluations
      summary.json              figures of the whole run
      tensorboard/              the same metrics as TensorBoard events
      checkpoints/
        step-00000230/
          manifest.json         step, digest of the topology, SHA-256 of each file
          <agent>.safetensors   one agent's weights and optimiser state

A checkpoint is written into a hidden folder and renamed when it is whole, so a crash at any moment
leaves the ones before it as they were. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hdnn_dist.errors import CheckpointError

FORMAT = 1
KEEP = 3  # checkpoints of a run that are kept


class Manifest(BaseModel):
    """What a checkpoint says of itself.

    Attributes:
        format: version of the layout.
        step: optimiser steps taken.
        topology: `Topology.digest` of the job that wrote it.
        files: SHA-256 by agent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = FORMAT
    step: int
    topology: str
    files: dict[str, str]


def agent_file(folder: Path, name: str) -> Path:
    """The file of one agent in a checkpoint."""
    return folder / f"{name}.safetensors"


def save_agent(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write one agent's tensors and return the SHA-256 of the file."""
    content = save({key: value.contiguous() for key, value in tensors.items()})
    _write(agent_file(folder, name), content)
    return hashlib.sha256(content).hexdigest()


def load_agent(folder: Path, name: str, manifest: Manifest) -> dict[str, Tensor]:
    """Read one agent's tensors.

    Raises:
        CheckpointError: the file is missing or not what the manifest says.
    """
    file = agent_file(folder, name)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror})", "restore it or use an older checkpoint"
        ) from None
    if hashlib.sha256(content).hexdigest() != manifest.files.get(name):
        raise CheckpointError(
            f"{file}: its SHA-256 is not the manifest's: the file is damaged",
            "restore it or remove this checkpoint's folder to use the one before",
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: not a safetensors file ({error})", "use an older checkpoint"
        ) from None


def write_checkpoint(
    run: Path, step: int, topology: str, save_agents: Callable[[Path], dict[str, str]]
) -> Path:
    """Write a checkpoint, whole or not at all, and drop the oldest beyond the last few.

    Args:
        run: the run directory.
        step: optimiser steps taken.
        topology: its digest.
        save_agents: writes every agent's file into a folder and returns the checksums by agent.
    """
    folder = run / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = Manifest(step=step, topology=topology, files=save_agents(partial))
    _write(partial / "manifest.json", manifest.model_dump_json(indent=2).encode())
    if final.exists():  # a resumed run that comes past the same step again
        shutil.rmtree(final)
    os.replace(partial, final)
    for old in _checkpoints(run)[:-KEEP]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(run: Path) -> tuple[Path, Manifest]:
    """The newest checkpoint of a run.

    Raises:
        CheckpointError: there is none, or its manifest is damaged.
    """
    found = _checkpoints(run)
    if not found:
        raise CheckpointError(
            f"{run}: no checkpoint in it", "name a run directory that a training run has written"
        )
    file = found[-1] / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        raise CheckpointError(
            f"{file}: missing or damaged", "remove this checkpoint's folder to use the one before"
        ) from None
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{file}: format {manifest.format}, but this version reads {FORMAT}",
            "use the version of hdnn-dist that wrote it",
        )
    return found[-1], manifest


def write_json(path: Path, content: object) -> None:
    """Write JSON, whole or not at all."""
    _write_over(path, json.dumps(content, indent=2).encode())


def write_text(path: Path, content: str) -> None:
    """Write text, whole or not at all."""
    _write_over(path, content.encode())


def _write_over(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    _write(partial, content)
    os.replace(partial, path)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))
