"""A run as a dense model for elsewhere: a torch.export program, ONNX, and a plain state dict."""

from __future__ import annotations

import io
import logging
import warnings
from operator import attrgetter
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from hdnn_dist.api import load
from hdnn_dist.checkpoint import latest_checkpoint, write_json
from hdnn_dist.data import PIXELS, classes_of, moments, target_moments
from hdnn_dist.errors import UserError
from hdnn_dist.job import Job
from hdnn_dist.model import HDNN
from hdnn_dist.run import check_can_be_made, reopen
from hdnn_dist.storage import Place, Where, place, write


class Dense(HDNN):
    """An `HDNN` without masks: entries of the weights that no agent owns are zero already."""

    def __init__(self, model: HDNN) -> None:
        super().__init__(model.architecture, next(model.parameters()).dtype)
        self.load_state_dict(model.state_dict())
        for name, _ in list(self.named_buffers()):
            if name.endswith("_mask"):
                owner, _, leaf = name.rpartition(".")
                delattr(self.get_submodule(owner), leaf)

    def weight(self, name: str) -> Tensor:
        """A weight by its name."""
        return cast(Tensor, attrgetter(name)(self))


def export(run: Where, out: Where | None = None, *, onnx: bool = False) -> list[Place]:
    """Write the dense model of a run's latest checkpoint, as programs and as weights.

    ::

        model.pt2           torch.export.load(…).module()(x): scores (B, C) of features (B, F);
                            of targets these are standardised
        model.safetensors   the dense weights by name (see `hdnn_dist.architecture`)
        model.onnx          the program as ONNX, if asked for
        model.json          sizes, how raw values become features, what the outputs are

    This gathers all agents' weights in one place, as `load` does.

    Args:
        run: the run directory.
        out: the folder; default: `export` in the run directory.
        onnx: whether to write ONNX, which takes the packages onnx and onnxscript.

    Returns:
        The files.

    Raises:
        CheckpointError: the run or its checkpoint cannot be used.
        UserError: the folder cannot be made, or a package is missing.
    """
    run = place(run)
    folder = run / "export" if out is None else place(out)
    check_can_be_made(folder, "--out")
    if onnx:
        _check_onnx()
    job = reopen(run)
    model = Dense(load(run)).requires_grad_(False).eval()
    program = _program(model)
    made = {"model.pt2": _saved(program), "model.safetensors": save(model.state_dict())}
    if onnx:
        made["model.onnx"] = _onnx(program)
    for name, content in made.items():
        write(folder / name, content)
    description = _description(job, latest_checkpoint(run)[1].step)
    write_json(folder / "model.json", description)
    return [folder / name for name in (*made, "model.json")]


def _program(model: Dense) -> torch.export.ExportedProgram:
    x = torch.zeros(2, model.architecture.features, dtype=next(model.parameters()).dtype)
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=False)


def _saved(program: torch.export.ExportedProgram) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the package {error.name} is missing, which ONNX is written with",
            "pip install onnx onnxscript, or leave --onnx out",
        ) from None


def _onnx(program: torch.export.ExportedProgram) -> bytes:
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)  # it tells of its progress
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, dynamo=True, verbose=False)
    finally:
        log.setLevel(before)
    assert made is not None
    content: bytes = made.model_proto.SerializeToString()
    return content


def _description(job: Job, step: int) -> dict[str, Any]:
    white: float
    mean: Any
    std: Any
    data = job.spec.data
    if data.name == "table":
        columns = moments(data, range(job.data.features))
        white, (mean, std) = 1.0, (column.tolist() for column in columns)
    else:
        white, mean, std = PIXELS.get(data.name, (1.0, 0.0, 1.0))
    return {
        "data": data.name,
        "step": step,
        "input": {
            "shape": ["batch", job.data.features],
            "dtype": job.spec.training.dtype,
            "image": job.data.image,
            "features": "(raw / white - mean) / std, images in raster order",
            "white": white,
            "mean": mean,
            "std": std,
        },
        "output": {"shape": ["batch", job.data.outputs], **_output(job)},
        "absent": list(job.absent),
    }


def _output(job: Job) -> dict[str, Any]:
    names = job.data.targets
    if not names:
        classes = classes_of(job.spec.data)
        return {"is": "scores; softmax: probabilities", "classes": list(classes)}
    mean, std = (column.tolist() for column in target_moments(job.spec.data, names))
    told = "standardised targets: in their units std * output + mean"
    return {"is": told, "targets": list(names), "mean": mean, "std": std}
