"""A Ray cluster from outside: joining it, with its token or none; its machines, and who answers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import RayError

from hdnn_dist.errors import PlacementError
from hdnn_dist.placement import Node

CONNECT_TIMEOUT = 5.0  # seconds until a cluster that does not answer is taken to be away
KNOCK = 0.5  # seconds until a node that does not answer a knock is passed over
TLS = "GLOO_DEVICE_TRANSPORT"  # the start of the names of gloo's own settings

log = logging.getLogger("hdnn_dist")


def _channel(address: str) -> grpc.Channel:
    """To one of Ray's servers, past any proxy."""
    return grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])


def knock(addresses: Iterable[str]) -> dict[str, bool | None]:
    """Whether a raylet answers at each address; False if nobody is there, None if it is silent."""
    with contextlib.ExitStack() as stack:
        calls = {}
        for address in set(addresses):
            ask = stack.enter_context(_channel(address)).unary_unary("/grpc.health.v1.Health/Check")
            calls[address] = ask.future(b"", timeout=KNOCK)
        return {address: _is_there(address, call.code()) for address, call in calls.items()}


def _is_there(address: str, answer: grpc.StatusCode) -> bool | None:
    if answer is grpc.StatusCode.DEADLINE_EXCEEDED:
        return None
    if answer is grpc.StatusCode.UNAVAILABLE:  # gone, or it speaks TLS
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=KNOCK).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            return None
    return True  # be it a refusal


def cluster_nodes(address: str) -> list[Node]:
    """The machines of a running cluster, which is joined to ask and left again.

    Raises:
        PlacementError: no cluster answers.
    """
    joined = ray.is_initialized()
    if not joined:
        start(address)
    try:
        return [as_node(node) for node in ray.nodes() if node["Alive"]]
    finally:
        if not joined:
            ray.shutdown()


def as_node(node: dict[str, Any]) -> Node:
    """A machine as Ray tells of it."""
    # Ray also lists its own marks, such as node:10.0.0.1, as resources.
    resources = {k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU") or _custom(k)}
    name = f"{node['NodeName']} ({node['NodeID'][:8]})"  # several may be of one name
    return Node(name, resources, node["Labels"])


def _custom(resource: str) -> bool:
    """Whether a resource is one that the cluster's owner declared."""
    return resource not in ("memory", "object_store_memory") and ":" not in resource


def start(address: str | None) -> None:
    """Join a Ray cluster, or start one on this machine.

    Raises:
        PlacementError: there is none to join, or it wants another token.
    """
    # A cluster's workers do not see the driver's environment.
    folder = os.environ.get("HDNN_DATA")
    variables = {"HDNN_DATA": os.path.abspath(os.path.expanduser(folder))} if folder else {}
    variables |= {name: value for name, value in os.environ.items() if name.startswith(TLS)}
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": variables} if variables else None,
    }
    if address is None:
        with _interrupt_held():
            ray.init(address="local", include_dashboard=False, **quiet)
        return
    if address.startswith(("http://", "https://")):
        raise PlacementError(
            f"{address!r} is the address of a job server, and no cluster can be joined there",
            "hand the job to it with `hdnn-dist submit`; or, on one of the cluster's machines, "
            "name its head, such as HEAD:6379",
        )
    try:
        host, _, port = address.partition(":")
        if port.isdecimal():  # ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
            _authenticate(address)
        with _interrupt_held():
            ray.init(address=address, **quiet)
    except PlacementError:
        raise
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise PlacementError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]})",
            "start one with `ray start --head`; see deploy/README.md if it asks for a token; or "
            "leave --address out to run on this machine",
        ) from None


def _authenticate(address: str) -> None:
    """Have Ray show its token to a cluster that asks for one, and to no other.

    Ray itself does so only for a cluster that it finds or starts on this machine; given the address
    of one, a wrong guess ends in half a minute of retries, or in actors that die unseen.

    Raises:
        PlacementError: the cluster asks for a token and does not get its own, or for none and
            would get one.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled") or (open_to_all := admits(address)) is None:
        return
    if open_to_all:
        if mode == "token":
            raise PlacementError(
                f"the Ray cluster at {address!r} asks for no token, but RAY_AUTH_MODE is token",
                "set RAY_AUTH_MODE=disabled to join it, or have it ask for one (deploy/README.md)",
            )
        log.warning(
            "the Ray cluster at %s asks for no token: who can reach it can run code there; "
            "see deploy/README.md",
            address,
        )
        return
    asks = f"the Ray cluster at {address!r} asks for a token"
    if mode == "disabled":
        raise PlacementError(f"{asks}, but RAY_AUTH_MODE is disabled", "leave RAY_AUTH_MODE unset")
    place, shown = token()
    if not shown:
        raise PlacementError(
            f"{asks}, and there is none in {place}",
            "put there what `ray get-auth-token` prints on the cluster's head",
        )
    if not admits(address, shown):
        raise PlacementError(
            f"{asks}, and refuses that of {place}",
            "put there what `ray get-auth-token` prints on the cluster's head",
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    raylet: Any = ray._raylet
    raylet.Config.initialize("")  # Ray read its environment when it was imported


def token() -> tuple[str, str]:
    """Where Ray looks for its token on this machine, and what is there."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return "$RAY_AUTH_TOKEN", given.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return str(file), file.read_text().strip() if file.is_file() else ""


def admits(address: str, token: str | None = None) -> bool | None:
    """Whether a Ray cluster lets in who shows this token, or none; None if it cannot be told."""
    with _channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        shown = [("authorization", f"Bearer {token}")] if token else None
        try:
            ask(b"", timeout=CONNECT_TIMEOUT, metadata=shown)
        except grpc.RpcError as error:
            return False if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return True


@contextlib.contextmanager
def _interrupt_held() -> Iterator[None]:
    """Ctrl-C is obeyed after the block: amid the start of Ray it would crash the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt
