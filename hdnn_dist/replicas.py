"""Sums over the copies of the agents of a process, by torch.distributed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hdnn_dist.errors import TransportError


class Replicas:
    """The processes that host the same agents, each in a copy of the whole graph.

    Args:
        copy: which of the copies this process is in, from 0.
        copies: how many there are.
        group: of their processes; one alone needs none.
        device: where the group adds.
    """

    def __init__(
        self,
        copy: int = 0,
        copies: int = 1,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.copy, self.copies, self.group = copy, copies, group
        self.device = torch.device("cpu") if device is None else device
        self.waited = 0.0  # seconds so far, for sums

    def add(self, summands: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their sums over the copies, bit by bit the same in all.

        Raises:
            TransportError: another copy is gone or did not answer within the group's timeout.
        """
        if self.copies == 1 or not summands:
            return
        total = torch.cat([tensor.flatten() for tensor in summands]).to(self.device)
        started = time.perf_counter()
        try:
            dist.all_reduce(total, group=self.group)
        except RuntimeError as error:
            raise TransportError(
                f"the sum over {self.copies} copies: another copy of the agents here did not "
                f"answer: {str(error).splitlines()[0]}"
            ) from error
        self.waited += time.perf_counter() - started
        parts = total.split([tensor.numel() for tensor in summands])
        for tensor, part in zip(summands, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
