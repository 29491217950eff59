"""Hosts with addresses of their own on this machine: network namespaces, and a raylet in each."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from tests.processes import tree

NETWORK, OTHER = "10.203.0", "10.204.0"  # the cluster's, and one that nothing is to use
HEAD = f"{NETWORK}.1:6390"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def islands(count: int) -> Iterator[None]:
    """Namespaces hdnn2, hdnn3, …: eth0 has 10.203.0.2, …, eth1 10.204.0.2, …; .1 is here.

    One test at a time has them; what one that was killed has left is removed.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((Path(tempfile.gettempdir()) / "hdnn-islands.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sink()
        stack.callback(_sink)
        for cable, network in enumerate((NETWORK, OTHER)):
            ip("link", "add", f"hdnn-{cable}", "type", "bridge")
            ip("addr", "add", f"{network}.1/24", "dev", f"hdnn-{cable}")
            ip("link", "set", f"hdnn-{cable}", "up")
        for k in range(2, 2 + count):
            space = f"hdnn{k}"
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            for cable, network in enumerate((NETWORK, OTHER)):
                here, there = f"{space}-{cable}", f"eth{cable}"
                ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", space)
                ip("link", "set", here, "master", f"hdnn-{cable}", "up")
                ip("-n", space, "addr", "add", f"{network}.{k}/24", "dev", there)
                ip("-n", space, "link", "set", there, "up")
        yield


def _sink() -> None:
    """Remove all islands and bridges that are there."""
    for name in psutil.net_if_addrs():
        if re.fullmatch(r"hdnn\d*-[01]", name):
            ip("link", "del", name)
    for space in Path("/run/netns").glob("hdnn*"):
        ip("netns", "del", space.name)


def skip_where_there_are_none() -> None:
    """Skip a test where namespaces cannot be made: for who is not root, without `ip`."""
    try:
        with islands(1):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", b"")
        pytest.skip(f"network namespaces cannot be made here: {error} {why!r}")


class Hosts:
    """A raylet of one core on each island, labelled host=2, …; Ray's head, with none, is here."""

    def __init__(self) -> None:
        self._daemons: dict[int, subprocess.Popen[bytes]] = {}

    def start_head(self) -> None:
        """Ray's head, which this process joins."""
        here = ["--head", "--port=6390", f"--node-ip-address={NETWORK}.1", "--num-cpus=0"]
        self._start(1, [], [*here, "--include-dashboard=false"])
        wait_for(_listens)
        ray.init(
            address=HEAD,
            _node_ip_address=f"{NETWORK}.1",
            log_to_driver=False,
            logging_level="ERROR",
        )

    def start(self, k: int) -> None:
        """A raylet on an island; return when Ray knows of it."""
        node = [f"--address={HEAD}", f"--node-ip-address={NETWORK}.{k}", "--num-cpus=1"]
        self._start(k, ["ip", "netns", "exec", f"hdnn{k}"], [*node, f"--labels=host={k}"])
        wait_for(lambda: self.is_there(k))

    def is_there(self, k: int) -> bool:
        """Whether Ray takes a host for alive."""
        hosts = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        return f"{NETWORK}.{k}" in hosts

    def cut(self, k: int) -> None:
        """Pull a host's cables."""
        for cable in 0, 1:
            ip("link", "set", f"hdnn{k}-{cable}", "down")

    def mend(self, k: int) -> None:
        """Plug them in again, where all other cores are taken; return when the host's is free.

        That may take Ray as long as the host was cut off. A raylet that it had given up by then is
        started anew.
        """
        for cable in 0, 1:
            ip("link", "set", f"hdnn{k}-{cable}", "up")

        def free() -> bool:
            return bool(ray.available_resources().get("CPU", 0) >= 1)

        wait_for(lambda: free() or not self.is_there(k))
        if not self.is_there(k):
            self._kill(k)
            self.start(k)
            wait_for(free)

    def close(self) -> None:
        """Leave Ray and end it."""
        ray.shutdown()
        for k in self._daemons:
            self._kill(k)

    def _start(self, k: int, where: list[str], options: list[str]) -> None:
        program = shutil.which("ray", path=str(Path(sys.executable).parent))
        assert program is not None
        command = [*where, program, "start", "--block", *options]
        quiet = subprocess.DEVNULL
        self._daemons[k] = subprocess.Popen(command, stdout=quiet, stderr=quiet)

    def _kill(self, k: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in tree(self._daemons[k].pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._daemons[k].wait()


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """So many hosts, and none in the end."""
    with islands(count):
        there = Hosts()
        try:
            there.start_head()
            for k in range(2, 2 + count):  # one by one: they choose names in the one folder of all
                there.start(k)
            yield there
        finally:
            there.close()


def _listens() -> bool:
    address, _, port = HEAD.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((address, int(port))) == 0


def wait_for(what: Callable[..., object], *of: object) -> None:
    deadline = time.monotonic() + 120
    while not what(*of):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
