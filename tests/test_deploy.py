"""The files for clusters, as far as they can be looked at without one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from hdnn_dist.gauges import METRICS, TAGS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
WIREGUARD = DEPLOY / "wireguard"
SITES = "abc"
CLUSTERS = ["on-premise", "aws", "gcp"]
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)


def sections(site: str) -> list[tuple[str, dict[str, str]]]:
    text = (WIREGUARD / f"site-{site}.conf").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found: list[tuple[str, dict[str, str]]] = []
    for line in lines:
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            found.append((heading[1], {}))
        else:
            key, value = line.split(" = ")
            found[-1][1][key] = value
    return found


@pytest.mark.parametrize("site", SITES)
def test_each_site_lets_in_the_others_and_each_at_its_own_address(site: str) -> None:
    (kind, own), *peers = sections(site)
    assert kind == "Interface"
    assert own["PrivateKey"] == f"PRIVATE_KEY_OF_{site.upper()}"
    others = [other for other in SITES if other != site]
    assert [kind for kind, _ in peers] == ["Peer"] * len(others)
    for (_, peer), other in zip(peers, others, strict=True):
        _, theirs = sections(other)[0]
        assert peer["PublicKey"] == f"PUBLIC_KEY_OF_{other.upper()}"
        assert peer["Endpoint"] == f"ADDRESS_OF_{other.upper()}:{theirs['ListenPort']}"
        assert peer["AllowedIPs"] == theirs["Address"].replace("/24", "/32")


def launched(name: str) -> dict[str, Any]:
    """A cluster file as `ray up` sees it, after Ray's own validation."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
    config = prepare_config(config)
    validate_config(config)
    return config


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_each_cluster_file(name: str) -> None:
    config = launched(name)
    workers = sum(kind["min_workers"] for kind in config["available_node_types"].values())
    assert workers == 3
    assert "~/.ray/auth_token" in config["file_mounts"]
    for who, where in ("head", "--head --port=6379"), ("worker", "--address=$RAY_HEAD_IP:6379"):
        stop, start = config[f"{who}_start_ray_commands"]
        assert stop.endswith("ray stop")
        assert f"RAY_AUTH_MODE=token; ulimit -n 65536; ray start {where}" in start
    assert (
        "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][1]
    )


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_commands_of_a_cluster_file_are_shell_and_pinned(name: str) -> None:
    config = launched(name)
    commands = [
        command for key, value in config.items() if key.endswith("_commands") for command in value
    ]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    installs = [c for c in config["head_setup_commands"] if "hdnn/bin/pip install" in c]
    begin = "cd ~/hdnn_dist && ~/hdnn/bin/pip install -q -c constraints.txt "
    first, *more = [shlex.split(c.removeprefix(begin), comments=True) for c in installs]
    assert all(command.startswith(begin) for command in installs)
    [extras] = [re.fullmatch(r"\.\[(.*)\]", package) for package in first]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras is not None
    assert "submit" in (asked := set(extras[1].split(",")))
    assert asked <= project["optional-dependencies"].keys()
    pins = (ROOT / "constraints.txt").read_text()
    for [package] in more:
        assert ">=" in package or f"\n{package}==" in pins
    for there, here in config["file_mounts"].items():
        assert there == f"~/hdnn_dist/{here}" or there == here == "~/.ray/auth_token"
        assert here.startswith("~") or (ROOT / here).exists()


@pytest.mark.parametrize(("name", "device"), [("aws", "g5.xlarge"), ("gcp", "nvidia-tesla-t4")])
def test_clouds_have_machines_with_a_gpu_for_who_asks(name: str, device: str) -> None:
    kinds = launched(name)["available_node_types"]
    assert (kinds["gpu"]["min_workers"], kinds["gpu"]["max_workers"]) == (0, 2)
    assert device in str(kinds["gpu"]["node_config"])
    assert kinds["head"]["resources"] == {"CPU": 0}


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text()))


def kuberay(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A RayCluster or RayJob, and the spec of its cluster."""
    [found] = objects(name)
    assert found["apiVersion"] == "ray.io/v1"
    spec: dict[str, Any] = found["spec"].get("rayClusterSpec", found["spec"])
    return found, spec


def templates(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pods of a cluster."""
    workers = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **workers}


KUBERAY = ["raycluster", "rayjob"]


@pytest.mark.parametrize("name", ["storage", "network-policy"])
def test_kubernetes_takes_its_own_kinds(name: str) -> None:
    for found in objects(name):
        kubernetes_validate.validate(found, "1.32", strict=True)


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_takes_the_pods(name: str) -> None:
    _, spec = kuberay(name)
    for template in templates(spec).values():
        metadata = {"name": "pod", **template["metadata"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.32", strict=True)


def test_a_pod_that_is_wrong_would_be_seen() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": {"container": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.32", strict=True)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_finds_what_it_goes_by(name: str) -> None:
    _, spec = kuberay(name)
    assert set(spec) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert RAY is not None
    assert spec["rayVersion"] == RAY[1]
    assert spec["authOptions"] == {"mode": "token"}
    assert set(spec["headGroupSpec"]) == {"rayStartParams", "template"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}  # strings: it is a flag
    for group in spec["workerGroupSpecs"]:
        assert set(group) == {
            *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template")
        }
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert spec["workerGroupSpecs"][0]["replicas"] == 3


def test_a_job_takes_its_cluster_down() -> None:
    job, spec = kuberay("rayjob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["backoffLimit"] == 0
    head = templates(spec)["head"]["spec"]
    mounts = {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    words = job["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "hdnn_dist", "train"]
    assert {str(Path(words[4]).parent), str(Path(words[-1]).parent)} == mounts


@pytest.mark.parametrize("name", KUBERAY)
def test_each_pod_is_bounded_watched_and_without_root(name: str) -> None:
    _, spec = kuberay(name)
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    assert user is not None
    for kind, template in templates(spec).items():
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert (security["runAsUser"], security["fsGroup"]) == (int(user[1]), int(user[2]))
        [container] = template["spec"]["containers"]
        assert container["image"] == f"REGISTRY/hdnn-dist:{'cuda' if kind == 'gpu' else 'cpu'}"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests) == set(limits)
        assert ("nvidia.com/gpu" in limits) == (kind == "gpu")
        for probe in "startupProbe", "readinessProbe", "livenessProbe":
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]
        assert {"secretRef": {"name": "hdnn-store", "optional": True}} in container["envFrom"]
        [claim] = objects("storage")
        runs = {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        assert {"name": "runs", **runs} in template["spec"]["volumes"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
        assert template["metadata"]["annotations"]["prometheus.io/port"] == "8080"


def test_ray_pods_hear_one_another_on_all_ports_and_others_on_two() -> None:
    members, job_server = objects("network-policy")
    for policy in members, job_server:
        assert policy["spec"]["policyTypes"] == ["Ingress"]
    own = {"matchLabels": {"hdnn": "member"}}
    assert members["spec"]["podSelector"] == own
    among_themselves, metrics = members["spec"]["ingress"]
    assert among_themselves == {"from": [{"podSelector": own}]}  # no ports: all of them
    assert metrics["ports"] == [{"protocol": "TCP", "port": 8080}]
    [told] = job_server["spec"]["ingress"]
    assert told["ports"] == [{"protocol": "TCP", "port": 8265}]
    for rule in metrics, told:
        for source in rule["from"]:
            assert source.get("podSelector") or source["namespaceSelector"]["matchLabels"]
    for name in KUBERAY:
        for template in templates(kuberay(name)[1]).values():
            assert own["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_prometheus_is_told_of_all_pods() -> None:
    [monitor] = objects("monitoring")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert monitor["spec"]["selector"] == {"matchLabels": {"hdnn": "member"}}
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


def test_one_version_of_kuberay_is_asked_for_the_one_that_labels_who_hands_over_a_job() -> None:
    files = [DEPLOY / "README.md", *(DEPLOY / "kubernetes" / f"{name}.yaml" for name in KUBERAY)]
    asked = [re.findall(r"KubeRay (?:operator, )?(\d\.\d) or newer", f.read_text()) for f in files]
    assert asked == [["1.7"]] * 3
    _, job_server = objects("network-policy")
    _, submitter = job_server["spec"]["ingress"][0]["from"]
    assert submitter["podSelector"]["matchLabels"] == {  # of KubeRay's getSubmitterTemplate
        "ray.io/originated-from-crd": "RayJob",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }


def test_the_readme_leads_to_every_file() -> None:
    readme = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*.yaml"):
        assert f"deploy/{path.relative_to(DEPLOY)}" in readme, path


def test_the_dashboard_shows_every_figure_by_tags_that_it_has() -> None:
    """Each query names a figure that the code records, and no tag that it does not have."""
    board = json.loads((DEPLOY / "grafana" / "hdnn_dist.json").read_text())
    tags = {f"ray_{m.name}" + "_total" * m.counter: {*TAGS, *m.tags} for m in METRICS}
    shown = set[str]()
    for panel in board["panels"]:
        for target in panel["targets"]:
            query, legend = target["expr"], target["legendFormat"]
            [figure] = re.findall(r"ray_\w+(?=\{)", query)
            by = re.findall(r" by \(([^)]*)\)", query)
            told = {tag for group in by for tag in group.split(", ")}
            used = set(re.findall(r"(\w+)=~", query))
            named = set(re.findall(r"\{\{(\w+)\}\}", legend))
            assert told | used | named <= tags[figure], panel["title"]
            assert named <= (told or tags[figure]), panel["title"]
            assert ("rate(" in query) == figure.endswith("_total"), panel["title"]
            shown.add(figure)
    assert shown == tags.keys()
    source, job = board["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    [figure, tag] = re.fullmatch(r"label_values\((\w+), (\w+)\)", job["query"]["query"]).groups()  # type: ignore[union-attr]
    assert tag in tags[figure]
    assert f"${job['name']}" in board["panels"][0]["targets"][0]["expr"]
    corners = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(corners)) == len(board["panels"])
