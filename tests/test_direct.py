"""Messages from device to device. Without GPUs the CPU is one, and gloo takes NCCL's place."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from hdnn_dist.direct import Direct
from hdnn_dist.errors import AgreementError, TransportError
from hdnn_dist.job import Job
from hdnn_dist.transport import Mail
from hdnn_dist.worker import Worker, agreement_of
from tests.strategies import in_process

HOST = (0, 1, 2, 0, 1, 2)  # of each agent, so that neighbours on the ring are apart
SETTINGS = [
    *("topology.agents=6", "topology.edges.args.n=6", "topology.d=2", "model.layers=2"),
    *("training.dtype=float64", "training.batch_size=16", "training.clip_norm=0.5"),
]


def a_job() -> Job:
    return Job.load(None, SETTINGS)


def direct(job: Job, name: str | None = None) -> Direct:
    agreed = agreement_of(job)
    return Direct(replace(agreed, job=name or agreed.job), HOST, torch.device("cpu"))


def member(rank: int, folder: Path, action: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "meeting"), 3)
    limit = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=limit)
    torch.save(ACTIONS[action](rank), folder / f"said {rank}")


def train(rank: int) -> object:
    job = a_job()
    agents = [i for i, host in enumerate(HOST) if host == rank]
    worker = Worker(job, agents, direct(job))
    results = worker.train(3)
    states = {agent.name: agent.state() for agent in worker.agents.values()}
    losses = [(result.loss, result.grad_norm) for result in results]
    return losses, states, dict(worker.transport.sent)


def mix_up(rank: int) -> object:
    """One process is of another job, and then another is gone."""
    job = a_job()
    phase, said = job.plan.forward[0], []
    for name in (f"job {rank // 2}", "one job"):
        transport = direct(job, name)
        mail: Mail = {
            (m.source, m.target): torch.ones(m.rows, 4, dtype=job.dtype)
            for m in phase.messages
            if HOST[m.source] == rank
        }
        if name == "one job" and rank == 2:
            break
        try:
            transport.exchange(phase, mail, 4)
        except (AgreementError, TransportError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


ACTIONS: dict[str, Callable[[int], object]] = {"train": train, "mix up": mix_up}


def said(folder: Path, action: str) -> list[object]:
    spawn(member, (folder, action), nprocs=3)
    return [torch.load(folder / f"said {rank}", weights_only=False) for rank in range(3)]


def test_steps_are_those_of_one_process(tmp_path: Path) -> None:
    job = a_job()
    one = Worker(job, range(6), in_process(job))
    expected = [(result.loss, result.grad_norm) for result in one.train(3)]
    sent: dict[tuple[int, int], int] = {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for rank, (losses, own, counted) in enumerate(said(tmp_path, "train")):  # type: ignore[misc]
        assert losses == (expected if HOST[job.root] == rank else [])
        states |= own
        sent |= counted
    assert sent == one.transport.sent
    for agent in one.agents.values():
        for key, value in agent.state().items():
            assert torch.equal(states[agent.name][key], value), f"{agent.name}: {key}"


def test_who_sends_something_else_or_is_gone_is_named(tmp_path: Path) -> None:
    first, second, third = said(tmp_path, "mix up")
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert isinstance(third, list)
    of_another = "the process of agent(s) {} sent 'job {} 1 states"
    assert of_another.format("a3, a6", 1) in first[0]
    assert of_another.format("a3, a6", 1) in second[0]
    assert of_another.format("a1, a4", 0) in third[0]
    gone = "TransportError: round states: a process of agent(s) {} did not answer"
    assert first[1].startswith(gone.format("a2, a3, a5, a6"))
    assert second[1].startswith(gone.format("a1, a3, a4, a6"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed")
def test_nccl_carries_what_gloo_does(tmp_path: Path) -> None:
    spawn(on_gpus, (tmp_path,), nprocs=2)
    on_gpu, local = torch.load(tmp_path / "losses"), a_job()
    worker = Worker(local, range(6), in_process(local))
    assert on_gpu == pytest.approx([result.loss for result in worker.train(3)], abs=1e-9)


def on_gpus(rank: int, folder: Path) -> None:
    """With one GPU, NCCL is told that each process is a machine of its own, and then shares it."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if (gpus := torch.cuda.device_count()) < 2:
        os.environ["NCCL_HOSTID"] = f"machine {rank}"
    store, limit = dist.FileStore(str(folder / "meeting"), 2), datetime.timedelta(seconds=60)
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
    dist.all_reduce(torch.zeros(1, device=device))
    job, host = a_job(), tuple(k % 2 for k in range(6))
    transport = Direct(agreement_of(job), host, device)
    agents = [i for i in range(6) if host[i] == rank]
    results = Worker(job, agents, transport, device=device).train(3)
    if results:
        torch.save([result.loss for result in results], folder / "losses")
