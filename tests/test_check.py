from __future__ import annotations

import io
import json
import re
from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hdnn_dist.agent import Agent
from hdnn_dist.check import Crossing, Phase, Report, Stragglers, examine
from hdnn_dist.check_tables import render
from hdnn_dist.cost import Calibration
from hdnn_dist.errors import SpecError
from hdnn_dist.job import Job
from hdnn_dist.placement import Node
from hdnn_dist.reader import spec_from_dict

HERE = Node("here", {"CPU": 4.0}, {})


def report(*nodes: Node, **sections: Any) -> Report:
    return examine(Job.of(spec_from_dict(sections)), nodes or (HERE,))


def line(names: str, **agent: Any) -> dict[str, Any]:
    agents = [{"name": name, **agent} for name in names]
    return {
        "name": "line",
        "agents": agents,
        "d": 2,
        "edges": [list(pair) for pair in pairwise(names)],
    }


def shown(found: Report) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("topology", "model", "reason"),
    [
        ({"directed": True}, {"name": "MS2"}, "'a' does not use that of 'b'"),
        ({}, {"name": "H1", "J": "J2"}, "the topology has no link from 'c' to 'a'"),
        ({}, {"name": "MS1", "graph": "J"}, "the graph can enter K alone"),
        ({}, {"name": "H2", "J": "J1"}, "that of H2 is fixed"),
    ],
)
def test_a_model_that_the_graph_cannot_have_is_refused(
    topology: dict[str, Any], model: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SpecError, match=reason):
        report(topology=line("abc") | topology, model=model)


def test_whole_training_images_that_a_distortion_reads_are_warned_of() -> None:
    bent, plain = (
        report(topology=line("ab"), training={"distort": distort}) for distort in ({}, None)
    )
    assert any("reads all their pixels" in warning for warning in bent.warnings)
    assert not any("pixels" in warning for warning in plain.warnings)


def test_recomputing_is_told_in_rounds_and_bytes() -> None:
    stored, again = (
        report(topology=line("abc"), training={"activations": way})
        for way in ("store", "recompute")
    )
    [forward, *_, _], [*_, backward, _] = stored.step, again.step
    assert (backward.rounds, backward.bytes) == (2 * forward.rounds, 2 * forward.bytes)
    assert "backward: twice that, states recomputed" in shown(again)
    assert "backward: the same" in shown(stored)
    moved = [sum(link.bytes for link in found.traffic) for found in (stored, again)]
    assert moved[1] - moved[0] == forward.bytes


@pytest.mark.parametrize("name", ["H1", "H2", "MS1", "MS2", "MS3"])
def test_every_member_runs_on_an_undirected_graph(name: str) -> None:
    found = report(topology=line("abc"), model={"name": name})
    assert f"line learns digits by {name}" in shown(found)
    assert found.layers[0].rounds > 0
    assert found.parameters < found.dense_parameters


def test_a_line_of_three_worked_out_by_hand() -> None:
    found = report(
        topology=line("abc"),
        model={"layers": 2},
        training={"batch_size": 32},
        cluster={"agents_per_actor": 2},
    )
    assert (found.edges, found.links, found.diameter) == (2, 2, 2)
    assert found.spectral_gap == pytest.approx(1)  # of a path of three: eigenvalues 0, 1, 2
    # 64 features in three runs of 22, 21, 21.
    assert [agent.features for agent in found.agents] == [22, 21, 21]
    # Kp, Kq and biases: 2 layers · 2 · d(D + 1), D = 4, 6, 4; encoder 2d(F + 1); readout 2dC;
    # and the ten biases of the readout at b.
    assert [agent.parameters for agent in found.agents] == [
        40 + 92 + 40,
        56 + 88 + 40 + 10,
        40 + 88 + 40,
    ]
    # n = 6: 2 · 2 · n(n + 1), the readout 2n · 10 + 10, the encoder 2n(64 + 1).
    assert (found.parameters, found.dense_parameters) == (534, 168 + 130 + 780)
    rows = {pattern.symbol: pattern.rows for pattern in found.patterns}
    assert rows["T"] == ((0, 1), (0, 1, 2), (1, 2))
    assert rows["TᵀT"] == rows["RᵀTᵀT"] == ((0, 1, 2),) * 3
    assert rows["R"] == ((0,), (1,), (2,))
    assert not found.single_exchange
    assert found.missing == (("a", "c"), ("c", "a"))
    # A message: 2 rows · 32 samples · 4 bytes = 256; four of them a round; a half step is two
    # rounds, a layer four. Scores: two messages of 10 · 32 · 4 to b.
    assert found.layers == (Phase("layers 0, 1", 4, 4096),)
    assert found.step == (
        Phase("layers forward", 8, 8192),
        Phase("scores to the root", 1, 2560),
        Phase("their cotangent back", 1, 2560),
        Phase("layers backward", 8, 8192),
        Phase("norm of the gradient", 0, 0),
    )
    assert {(l.source, l.target, l.bytes) for l in found.traffic} == {
        (*pair, 5376) for pair in ("ab", "ba", "bc", "cb")
    }
    assert (found.root, found.tree_depth, found.layers_to_cross) == ("b", 1, 1)
    assert [actor.agents for actor in found.actors] == [("a",), ("b", "c")]
    assert (found.crossing_links, found.crossing_bytes) == (2, 10752)
    assert found.warnings == ()


def test_clipping_adds_the_norm_up_and_down_the_tree() -> None:
    found = report(topology=line("abc"), training={"clip_norm": 1.0})
    assert found.step[-1] == Phase("norm of the gradient", 2, 16)  # four floats


def test_copies_are_counted_and_placed() -> None:
    cluster = {"replicas": 2, "agents_per_actor": "auto"}
    training = {"clip_norm": 1.0, "batch_size": 31}
    found = report(topology=line("abc"), model={"layers": 2}, training=training, cluster=cluster)
    one = report(topology=line("abc"), model={"layers": 2}, training=training)
    assert found.shares == (15, 16)
    # Two of the four cores for each copy.
    placed = [(actor.copy, *actor.agents) for actor in found.actors]
    assert placed == [(0, "a"), (0, "b", "c"), (1, "a"), (1, "b", "c")]
    # 534 numbers, the loss and the right answers, once there and once back.
    *before, sums, norm = found.step
    assert sums == Phase("sums over the copies", 2, 2 * 536 * 4)
    assert norm == Phase("norm of the gradient", 2, 32)  # of each copy
    assert tuple(before) == one.step[:-1]  # all samples together are as many
    assert sum(link.bytes for link in found.traffic) == sum(p.bytes for p in (*before, norm))
    text = shown(found)
    assert "2 copies of all agents, 15 or 16 samples a step each" in text
    assert "sums over the copies" in text
    assert "cop" not in shown(one)


@pytest.mark.parametrize("model", [{"name": "MS2"}, {"layer_graphs": ["none", "topology"]}])
def test_numbers_that_copies_sum_are_those_that_are_stored(model: dict[str, Any]) -> None:
    sections = {"topology": line("abc"), "model": {"layers": 2} | model}
    found = report(**sections, cluster={"replicas": 3})
    job = Job.of(spec_from_dict(sections))
    stored = sum(s.numel() for i in range(3) for s in Agent(job, i).summands)
    assert stored > job.parameters + 2
    [sums] = [phase for phase in found.step if phase.name == "sums over the copies"]
    assert sums == Phase("sums over the copies", 4, 4 * 4 * stored)


def test_the_graph_in_J_needs_one_exchange() -> None:
    found = report(topology=line("abc"), model={"graph": "J", "layers": 1})
    assert found.single_exchange
    assert found.missing == ()
    assert found.layers[0].rounds == 2
    assert "≤ S holds" in shown(found)


def test_each_layer_graph_is_told() -> None:
    found = report(topology=line("abc"), model={"layers": 3, "layer_graphs": ["topology", "none"]})
    assert [(phase.name, phase.rounds) for phase in found.layers] == [
        ("layers 0, 2", 4),
        ("layer 1", 0),
    ]
    assert "T in layers 1" in [pattern.symbol for pattern in found.patterns]


def test_too_few_layers_are_warned_of() -> None:
    # A layer takes information two hops by p and another two by q: seven hops need two layers.
    found = report(topology=line("abcdefgh"), model={"layers": 1})
    assert found.layers_to_cross == 2
    assert [w for w in found.warnings if "needs 2 layers" in w and "there are 1" in w]
    deep = report(topology=line("abcdefgh"), model={"layers": 2})
    assert not [w for w in deep.warnings if "layers" in w]


def test_a_graph_that_is_never_crossed_and_input_that_is_never_read() -> None:
    topology = {"agents": ["a", "b", "c"], "edges": [["a", "b"]]}
    readout = {"agents": ["a"]}
    found = report(topology=topology, model={"readout": readout})
    assert found.diameter is None
    assert found.layers_to_cross is None
    assert any("never crosses" in warning for warning in found.warnings)
    assert any("the input of c:" in warning for warning in found.warnings)


def test_placement_on_nodes() -> None:
    camera = Node("camera", {"CPU": 1.0, "camera": 1.0}, {"site": "north"})
    topology = line("ab", cpu=1.0, resources={"camera": 1.0}, labels={"site": "north"})
    found = report(camera, HERE, topology=topology)
    assert [actor.node for actor in found.actors] == ["camera", None]
    [warning] = found.warnings
    assert "1 of 2 actors find no place; the first, of b, asks for" in warning
    assert "1 CPU, 1 camera, the label site=north; camera: 0 CPU of 1 left" in warning
    assert "here: no label site, no camera" in warning
    assert "all of it on one node" not in shown(found)


def test_edges_that_cross_machines_are_told() -> None:
    """Three agents on a line, the last on another machine; b and c talk from one to the other."""
    topology = line("ab", labels={"site": "north"})
    topology["agents"].append({"name": "c", "labels": {"site": "south"}})
    topology["edges"].append(["b", "c"])
    nodes = [Node(site, {"CPU": 2.0}, {"site": site}) for site in ("north", "south")]
    found = report(*nodes, topology=topology, model={"layers": 2}, training={"batch_size": 32})
    assert [actor.node for actor in found.actors] == ["north", "north", "south"]
    # As many bytes as in the example above.
    assert found.crossings == (
        Crossing("north", "south", (("b", "c"),), 5376),
        Crossing("south", "north", (("c", "b"),), 5376),
    )
    text = shown(found)
    assert re.search(r"south +north +1 +c → b +5.38 kB", text)
    together = report(topology=line("abc"))
    assert together.crossings == ()
    assert "all of it on one node" in shown(together)


def test_copies_cross_machines_with_their_own_share() -> None:
    """Each copy of a and b has one machine to itself, or both are torn apart."""
    nodes = [Node("x", {"CPU": 2.0}, {}), Node("y", {"CPU": 2.0}, {})]
    sections = {"topology": line("ab"), "training": {"batch_size": 31}}
    packed = report(*nodes, **sections, cluster={"replicas": 2})
    assert packed.crossings == ()
    spread = report(*nodes, **sections, cluster={"replicas": 2, "placement": "spread"})
    assert {(c.source, c.target) for c in spread.crossings} == {("x", "y"), ("y", "x")}
    assert sum(c.bytes for c in spread.crossings) == sum(link.bytes for link in spread.traffic)


def test_actors_that_will_have_no_gpu_are_warned_of() -> None:
    topology = line("ab")
    topology["agents"][0]["gpu"] = 0.5
    node = Node("here", {"CPU": 4.0, "GPU": 1.0}, {})
    found = report(node, topology=topology, cluster={"device": "cuda"})
    [warning] = [warning for warning in found.warnings if "cuda" in warning]
    assert "1 of 2 actors ask for no GPU; the first, of b: give its agents gpu" in warning
    assert not any("cuda" in warning for warning in report(node, topology=topology).warnings)


def test_more_actors_than_cores_are_warned_of() -> None:
    found = report(topology=line("abcdef"))
    assert any("6 actors share 4 cores" in warning for warning in found.warnings)
    packed = report(topology=line("abcdef"), cluster={"agents_per_actor": "auto"})
    assert len(packed.actors) == 3
    assert packed.warnings == ()


def test_more_parameters_than_memory_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2000))
    found = report(topology=line("abc"), model={"layers": 2})  # 534 · 4 bytes
    assert any("take 2.14 kB, but this machine has 2 kB" in warning for warning in found.warnings)
    single = report(topology=line("a"), model={"layers": 1})
    assert not any("memory" in warning for warning in single.warnings)


def test_the_report_is_plain_json_and_is_shown_whole() -> None:
    found = report(topology=line("abc"), model={"layers": 1})
    assert json.loads(json.dumps(asdict(found)))["missing"] == [["a", "c"], ["c", "a"]]
    text = shown(found)
    for part in ("■ ■ ·", "■ ■ ■", "(a, c), (c, a)", "diameter 2", "a → b", "node here: 4 CPU"):
        assert part in text


def test_a_large_graph_shows_densities_in_place_of_drawings() -> None:
    ring = {"generator": "cycle_graph", "args": {"n": 40}}
    found = report(topology={"d": 1, "edges": ring}, model={"layers": 1})
    text = shown(found)
    assert "■" not in text
    assert "7.50%" in text  # three of forty
    assert "… and 8 more agents" in text


@pytest.mark.cluster
def test_the_nodes_of_a_live_cluster(cluster: None) -> None:
    import ray

    from hdnn_dist.joining import cluster_nodes

    [node] = cluster_nodes("auto")
    assert node.resources == {"CPU": 2.0}
    assert ray.is_initialized()  # it was joined before, and stays so


def test_without_a_calibration_no_time_is_predicted() -> None:
    found = report(topology=line("abcd"))
    assert found.timings == ()
    assert "run hdnn-dist calibrate" in shown(found)


@pytest.mark.parametrize(("latency", "best"), [(1e-2, 1), (1e-7, 4)])
def test_a_packing_is_suggested_where_it_is_faster(latency: float, best: int) -> None:
    rest = {
        "step": 1e-3,
        "half_step": 1e-4,
        "message": 0.0,
        "number": 0.0,
        "keep": 0.0,
        "send": 0.0,
    }
    rates = {"small": 1e9, "large": 1e9, "bandwidth": 1e9}
    measured = Calibration("h", "d", "t", cores=4, latency=latency, **rest, **rates)
    cluster = {"agents_per_actor": 2}
    job = Job.of(spec_from_dict({"topology": line("abcd"), "cluster": cluster}))
    found = examine(job, (HERE,), measured)
    now, *others = found.timings
    assert (now.agents_per_actor, now.actors) == (2, 2)
    assert [t.actors for t in others] == sorted((1, 2, 4), reverse=best == 4)
    assert f"suggestion: --set cluster.agents_per_actor={4 // best}" in shown(found)


STEPS = Calibration(
    *("h", "d", "t", 4),
    **{"step": 1e-3, "half_step": 0.0, "message": 0.0, "number": 0.0, "keep": 0.0},
    **{"small": 1e300, "large": 1e300, "latency": 1e-3, "send": 0.0, "bandwidth": 1e300},
)


def test_the_actors_for_which_the_others_wait_are_named() -> None:
    topology = line("abcd")
    topology["agents"][1]["speed"] = topology["agents"][2]["speed"] = 0.25
    job = Job.of(spec_from_dict({"topology": topology}))
    found = examine(job, (Node("large", {"CPU": 8.0}, {}),), STEPS)
    assert found.stragglers == Stragglers((1, 2), ("b", "c"), 4e-3, 1e-3)
    assert "the others wait for actors 1, 2 (b, c): computing takes them 4 ms" in shown(found)
    alike = examine(Job.of(spec_from_dict({"topology": line("abcd")})), (HERE,), STEPS)
    assert alike.stragglers is None
    assert "the others wait" not in shown(alike)
    one_core = examine(job, (Node("small", {"CPU": 1.0}, {}),), STEPS)
    assert one_core.stragglers is None, "all wait for the core, whoever is slow"


def test_predictions_are_of_the_actors_of_all_copies() -> None:
    sections = {"topology": line("abcd"), "cluster": {"replicas": 2}}
    found = examine(Job.of(spec_from_dict(sections)), (Node("large", {"CPU": 8.0}, {}),), STEPS)
    assert found.timings[0].actors == len(found.actors) == 8
    assert found.timings[0].cost.arithmetic == 1e-3
    assert {timing.actors for timing in found.timings[1:]} == {2, 4, 8}
