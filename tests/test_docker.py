"""The images' files, and what the Dockerfile's steps make, without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


@dataclass
class Step:
    """An instruction of a Dockerfile, in the stage that it is in."""

    stage: str
    name: str
    rest: str


def steps() -> list[Step]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    found: list[Step] = []
    stage = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        name, rest = line.split(maxsplit=1)
        stage = rest.rpartition(" AS ")[2] if name == "FROM" else stage
        found.append(Step(stage, name, rest))
    return found


def the(name: str, stage: str = "node") -> str:
    [rest] = [step.rest for step in steps() if (step.name, step.stage) == (name, stage)]
    return rest


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_images_are_pinned_without_root_and_watched() -> None:
    assert [step.rest for step in steps() if step.name == "FROM"] == [
        "${BASE} AS build",
        "${BASE} AS node",
        "node AS cuda",
        "node AS cpu",  # the last is what is built by default
    ]
    base = next(step.rest for step in steps() if step.name == "ARG")
    assert re.fullmatch(r"BASE=python:3\.\d+\.\d+-slim-\w+", base)
    install = [step.rest for step in steps() if "pip install" in step.rest]
    assert len(install) == 1
    assert " -c constraints.txt " in install[0]
    user, _, group = the("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert "/api/healthz" in the("HEALTHCHECK")


def test_what_is_copied_is_let_through_and_nothing_else() -> None:
    ignored, *others = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored == "*"
    let_through = {line[1:] for line in others if line.startswith("!")}
    copied = {
        source
        for step in steps()
        if step.name == "COPY" and not step.rest.startswith("--from")
        for source in step.rest.split()[:-1]
    }
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)


def test_compose_brings_up_a_head_and_three_workers_and_then_the_job() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"head", "worker", "job"}
    assert services["worker"]["deploy"]["replicas"] == 3
    assert services["worker"]["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert services["job"]["depends_on"] == {"worker": {"condition": "service_healthy"}}
    assert services["job"]["command"].startswith("hdnn-dist submit --address http://head:8265 ")
    for service in services.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")  # or fails
    for name in "head", "worker":
        assert services[name]["shm_size"] == "1gb"
        assert services[name]["volumes"] == ["runs:/runs"]
    assert services["head"]["ports"] == ["127.0.0.1:8265:8265"]  # to this machine alone


SETUP = r"""
set -eu
mount -t tmpfs -o size=90% tmpfs {scratch}
mkdir {scratch}/upper {scratch}/work {root}
mount -t overlay -o lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work overlay {root}
mount --rbind /dev {root}/dev
mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm
mount -t tmpfs -o mode=1777 tmpfs {root}/tmp
mount -t proc proc {root}/proc
rm -f {root}/usr/local/bin/python
printf '#!/bin/sh\nexec {python} "$@"\n' > {root}/usr/local/bin/python
chmod +x {root}/usr/local/bin/python
for folder in {parents}; do chmod o+rx {root}$folder; done
"""


def build(root: Path) -> str:
    """The steps of the target cpu as a script; both stages in one root."""
    script = ""
    folder, environment = (
        "/",
        {"HOME": "/root", "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    for step in steps():
        if step.name == "WORKDIR":
            folder = step.rest
            script += f"mkdir -p {root}{folder}\n"
        elif step.name == "COPY" and step.rest.startswith("--from"):
            _, source, target = step.rest.split()
            assert source == target
        elif step.name == "COPY":
            *sources, _ = step.rest.split()
            script += f"cp -r {' '.join(str(ROOT / s) for s in sources)} {root}{folder}\n"
        elif step.name == "RUN":
            within = f"cd {folder} && PACKAGES= && {step.rest}"
            variables = " ".join(f"{name}={value}" for name, value in environment.items())
            script += f"chroot {root} env -i {variables} sh -euc {shlex.quote(within)}\n"
        else:
            known = {"FROM", "ARG", "ENV", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "CMD"}
            assert step.name in known
    return script


# What the containers run, all of it on one machine, whose loopback is no one else's.
TRY = """
ip link set lo up
run() {{ chroot --userspec={user} {root} env -i HOME=/home/hdnn PATH=/opt/hdnn/bin:/usr/bin:/bin \
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN=token-of-the-test-of-the-image "$@"; }}
test "$(run id -u)" = 10001
run hdnn-dist --version
run {head} --num-cpus=3 > {scratch}/head 2>&1 &
for _ in $(seq 120); do run {health} 2> /dev/null && break || sleep 1; done
run {health}
run {job} --set training.epochs=1
run ls /runs/first/checkpoints
"""


@pytest.mark.image
@pytest.mark.timeout(1800)
def test_the_steps_make_nodes_that_train(tmp_path: Path) -> None:
    """On a copy-on-write view of this machine, in namespaces of its own.

    This machine's Python stands in for the base image.
    """
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    root = tmp_path / "root"
    python = Path(sys.base_prefix, "bin", "python3").resolve()
    health = json.loads(the("HEALTHCHECK").partition("CMD ")[2])
    services = COMPOSE["services"]
    given = {
        "scratch": tmp_path,
        "root": root,
        "python": python,
        "parents": " ".join(map(str, python.parents)),
        "user": the("USER"),
        "health": shlex.join(health),
        "head": services["head"]["command"].replace(" --num-cpus=0", ""),
        "job": services["job"]["command"]
        .replace("http://head:", "http://127.0.0.1:")
        .replace("${RUN:-first}", "first"),
    }
    trial = f"unshare --net bash -euc {shlex.quote(TRY.format(**given))}"
    script = SETUP.format(**given) + build(root) + trial
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    done = subprocess.run([*namespaces, "bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "test accuracy" in done.stdout
    assert "step-" in done.stdout.splitlines()[-1]
