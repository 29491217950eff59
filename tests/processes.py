"""Processes of this machine, and those that stand for a machine of its own."""

from __future__ import annotations

from typing import Any

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


def machine(node: Any) -> list[psutil.Process]:
    """The raylet of a node of a `ray.cluster_utils.Cluster`, and all below it: its machine."""
    [raylet] = node.all_processes["raylet"]
    return tree(raylet.process.pid)
