"""Distributed training of Hamiltonian deep networks on a graph of agents.

The calls in `hdnn_dist.api` are what most programs need; `Job`, `Topology`, `HDNN`, `Trainer` and
the runners are what they are made of. `Layers` are those of the family, for any other network.
torch and ray are imported with the first of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hdnn_dist.api import fit, launch, load, open_run, train
    from hdnn_dist.cluster import RayRunner
    from hdnn_dist.dense import export
    from hdnn_dist.hamiltonian import Activation
    from hdnn_dist.job import Job
    from hdnn_dist.model import HDNN, Layers
    from hdnn_dist.page import write_page
    from hdnn_dist.report import analyze, analyze_layers
    from hdnn_dist.run import regroup
    from hdnn_dist.tables import write_table
    from hdnn_dist.topology import Topology
    from hdnn_dist.tracking import MLflow, TensorBoard, WandB
    from hdnn_dist.trainer import Listener, LocalRunner, Summary, Trainer

_HOME = {
    "Activation": "hamiltonian",
    "HDNN": "model",
    "Job": "job",
    "Layers": "model",
    "Listener": "trainer",
    "LocalRunner": "trainer",
    "MLflow": "tracking",
    "RayRunner": "cluster",
    "Summary": "trainer",
    "TensorBoard": "tracking",
    "Topology": "topology",
    "Trainer": "trainer",
    "WandB": "tracking",
    "analyze": "report",
    "analyze_layers": "report",
    "export": "dense",
    "fit": "api",
    "launch": "api",
    "load": "api",
    "open_run": "api",
    "regroup": "run",
    "train": "api",
    "write_page": "page",
    "write_table": "tables",
}

__all__ = [
    "HDNN",
    "Activation",
    "Job",
    "Layers",
    "Listener",
    "LocalRunner",
    "MLflow",
    "RayRunner",
    "Summary",
    "TensorBoard",
    "Topology",
    "Trainer",
    "WandB",
    "__version__",
    "analyze",
    "analyze_layers",
    "export",
    "fit",
    "launch",
    "load",
    "open_run",
    "regroup",
    "train",
    "write_page",
    "write_table",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
