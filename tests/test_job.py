"""Jobs: how they are loaded, what follows from them, who may be missing, and what does not fit."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdnn_dist.agent import Agent
from hdnn_dist.data import share
from hdnn_dist.errors import SpecError, UserError
from hdnn_dist.job import MAX_BLOCKS, Job
from hdnn_dist.reader import dump_spec, spec_from_dict
from hdnn_dist.tables import write_table
from hdnn_dist.testing import assert_within
from hdnn_dist.topology import Topology
from tests.strategies import jobs, numbers, specs

PATH = {"agents": ["a", "b", "c"], "d": 2, "edges": [["a", "b"], ["b", "c"]]}


def made(**sections: Any) -> Job:
    """The path a - b - c, whose centre b is the root, with two layers; sections add to that."""
    topology, model = PATH | sections.pop("topology", {}), {"layers": 2} | sections.pop("model", {})
    return Job.of(spec_from_dict({"topology": topology, "model": model, **sections}))


# --- loading -------------------------------------------------------------------------------------


def test_without_a_spec_eight_agents_learn_digits() -> None:
    job = Job.load()
    assert (job.topology.name, job.data.name) == ("ring8", "digits")
    assert job.names == job.topology.names == tuple(f"a{i}" for i in range(1, 9))
    assert [len(view.columns) for view in job.views] == [8] * 8
    assert Job.load(overrides=["model.layers=2"]).plan.depth == 2


def test_a_file_and_what_it_holds_are_the_same_job(tmp_path: Path) -> None:
    sections = {"topology": PATH, "model": {"layers": 2}, "training": {"epochs": 3}}
    (tmp_path / "job.yaml").write_text(dump_spec(spec_from_dict(sections)))
    job = Job.load(tmp_path / "job.yaml")
    assert job.spec == Job.load(sections).spec
    assert Job.load(str(tmp_path / "job.yaml"), ["training.epochs=4"]).steps * 3 == job.steps * 4


@given(jobs())
def test_a_spec_that_is_resolved_is_written_and_read_as_the_same_job(job: Job) -> None:
    again = Job.of(job.spec).without(job.absent)
    assert again.spec == job.spec
    assert again.digest == job.digest


def test_a_written_spec_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text("a b\nb c\n")
    (tmp_path / "job.yaml").write_text("topology: {edges: {file: g.txt}, d: 2}")
    job = Job.load(tmp_path / "job.yaml")
    assert job.topology.edges == made().topology.edges
    (tmp_path / "g.txt").unlink()
    (tmp_path / "alone.yaml").write_text(dump_spec(job.spec))
    assert Job.load(tmp_path / "alone.yaml").digest == job.digest


@given(st.data())
def test_a_graph_of_ones_own_is_written_out_whole(data: st.DataObject) -> None:
    directed = data.draw(st.booleans())
    M = data.draw(st.integers(1, 9))
    graph = nx.empty_graph(M, create_using=nx.DiGraph if directed else nx.Graph)
    node = st.integers(0, M - 1)
    graph.add_edges_from(data.draw(st.lists(st.tuples(node, node), max_size=20)))
    nx.set_node_attributes(graph, {i: data.draw(st.integers(1, 4)) for i in graph}, "d")
    two_way = data.draw(st.booleans())
    if not two_way and directed:  # every way back is then an edge itself
        graph.add_edges_from([(v, u) for u, v in graph.edges])
    topology = Topology.from_graph(graph, name="own", two_way=two_way)
    model = {"layers": 1, "readout": {"agents": ["0"]}}
    assert Job.load({"topology": topology, "model": model}).topology == topology
    job = Job.load({"topology": graph, "model": model})
    assert (job.topology.edges, job.topology.sizes) == (topology.edges, topology.sizes)


@pytest.mark.parametrize(
    ("spec", "overrides"), [(None, "model.layers=2"), ({"topology": PATH}, ["model.layers=2"])]
)
def test_overrides_are_a_list_and_for_a_file(spec: Any, overrides: Any) -> None:
    with pytest.raises(UserError, match=r"given; give a list of .*, and a spec file to change"):
        Job.load(spec, overrides)


def test_an_error_of_fitting_tells_its_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("topology: {agents: 1}\nmodel:\n  activation: tan\n")
    with pytest.raises(SpecError, match=r"job\.yaml:3: model\.activation: no activation is named"):
        Job.load(tmp_path / "job.yaml")
    with pytest.raises(SpecError, match=r"--set.*: model\.activation: no activation is named"):
        Job.load(overrides=["model.activation=tan"])


def test_a_folder_of_data_is_found_from_the_specs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(given: str, spec: Path | None) -> str | None:
        sections = (
            f"topology: {{agents: 2, edges: [[a1, a2]]}}\ndata: {{name: mnist, dir: {given}}}"
        )
        if spec is None:
            return Job.load(
                {"topology": {"agents": 2, "edges": [["a1", "a2"]]}}
                | {"data": {"name": "mnist", "dir": given}}
            ).spec.data.dir
        spec.write_text(sections)
        return Job.load(spec).spec.data.dir

    (tmp_path / "specs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert folder("idx", tmp_path / "specs" / "job.yaml") == str(tmp_path / "specs" / "idx")
    assert folder("idx", Path("specs/job.yaml")) == str(tmp_path / "specs" / "idx")
    assert folder("idx", None) == str(tmp_path / "idx")
    assert folder("~/idx", tmp_path / "specs" / "job.yaml") == "/home/of/mine/idx"
    assert folder("/data/idx", None) == "/data/idx"


# --- what follows from a spec --------------------------------------------------------------------


def test_jobs_are_told_apart_by_what_actors_must_agree_on(tmp_path: Path) -> None:
    job = made()
    machines = [{"name": n, "cpu": 2, "labels": {"site": n}} for n in "abc"]
    same = [
        made(cluster={"replicas": 2, "agents_per_actor": "auto"}),
        made(topology={"agents": machines}),
        made(topology={"name": "another"}),
        pickle.loads(pickle.dumps(job)),
    ]
    assert {other.digest for other in same} == {job.digest}
    others = [
        made(topology={"d": 3}),
        made(topology={"edges": [["a", "b"], ["c", "b"]], "directed": True}),
        made(topology={"agents": ["a", "b", "d"], "edges": [["a", "b"], ["b", "d"]]}),
        made(model={"h": 0.5}),
        made(model={"layers": 3}),
        made(data={"train_samples": 100}),
        made(data={"split": {"kind": "auto", "agents": ["a", "c"]}}),
        made(training={"seed": 1}),
        made(training={"messages": "bf16"}),
        job.without(["c"]),
    ]
    assert len({other.digest for other in [job, *others]}) == 1 + len(others)


def test_a_digest_is_that_of_every_process() -> None:
    code = "from hdnn_dist.job import Job; print(Job.load().digest)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [Job.load().digest]


def test_data_may_lie_elsewhere_on_every_machine_but_not_in_another_order(tmp_path: Path) -> None:
    here, there = (made(data={"name": "mnist", "dir": folder}) for folder in ("/a", "/b"))
    assert here.digest == there.digest
    split = {"kind": "columns", "columns": {"a": ["u"], "c": ["v"]}}
    rows = np.zeros((4, 2)), np.zeros(4)
    tables = [write_table(tmp_path / names, rows, rows, [*names]) for names in ("uv", "vu")]
    one, other = (made(data=table | {"split": split}) for table in tables)
    assert (one.views[0].columns, other.views[0].columns) == ((0,), (1,))
    assert one.digest != other.digest


@given(samples=st.integers(1, 1437), batch=st.integers(1, 2000), epochs=st.integers(1, 50))
def test_an_epoch_is_of_the_full_batches(samples: int, batch: int, epochs: int) -> None:
    job = made(data={"train_samples": samples}, training={"batch_size": batch, "epochs": epochs})
    assert job.batch == min(batch, samples)
    assert 0 <= samples - job.steps_per_epoch * job.batch < job.batch
    assert job.steps == epochs * job.steps_per_epoch


@pytest.mark.parametrize(
    ("dtype", "messages", "numbers", "travel"),
    [
        ("float32", "full", torch.float32, torch.float32),
        ("float64", "full", torch.float64, torch.float64),
        ("float64", "bf16", torch.float64, torch.bfloat16),
        ("float32", "fp16", torch.float32, torch.float16),
    ],
)
def test_types_of_numbers(
    dtype: str, messages: str, numbers: torch.dtype, travel: torch.dtype
) -> None:
    job = made(training={"dtype": dtype, "messages": messages})
    assert (job.dtype, job.message_dtype) == (numbers, travel)


def in_copies(job: Job, copies: int) -> Job:
    cluster = job.spec.cluster.model_copy(update={"replicas": copies})
    return Job.of(job.spec.model_copy(update={"cluster": cluster})).without(job.absent)


@given(jobs(), st.data())
def test_the_bytes_of_a_step_are_those_of_all_copies(job: Job, data: st.DataObject) -> None:
    copies = data.draw(st.integers(1, job.batch))
    several, step = in_copies(job, copies), job.plan.training_step
    parts = [share(job.batch, copy, copies) for copy in range(copies)]
    own = [several.traffic_of(step, part.stop - part.start) for part in parts]
    assert several.bytes_per_step == sum(sum(sent.values()) for sent in own)
    assert_within(several.traffic(step), job.architecture.patterns.S)
    assert job.traffic(step) == job.traffic_of(step, job.batch)
    assert job.bytes_per_step == sum(
        job.traffic_of(step[k : k + 1], job.batch)[link]
        for k in range(len(step))
        for link in job.traffic_of(step[k : k + 1], job.batch)
    )


@given(jobs(max_agents=3).filter(lambda job: job.batch > 1), st.data())
def test_copies_send_what_they_sum_round_their_rings(job: Job, data: st.DataObject) -> None:
    assert job.bytes_of_sums == 0
    copies = data.draw(st.integers(2, job.batch))
    several = in_copies(job, copies)
    agents = [Agent(job, i) for i in range(len(job.topology.agents))]
    summed = sum(tensor.nbytes for agent in agents for tensor in agent.summands)
    assert several.bytes_of_sums == 2 * (copies - 1) * summed
    assert job.parameters <= summed / job.dtype.itemsize


# --- who takes no part ---------------------------------------------------------------------------


def can_go_on(job: Job, left: set[int]) -> bool:
    """Whether some agents of a job can: some see, some read out, and who is asked is reached."""
    architecture, training = job.architecture, job.spec.training
    readers = left & {*architecture.readers}
    own = architecture.own is not None
    if not readers or not any(job.views[i].columns for i in left):
        return False
    if not own and job.root not in left:
        return False
    pieces = list(nx.connected_components(job.topology.links.subgraph(left)))
    normed = training.clip_norm is not None or training.on_nonfinite == "skip"
    together = (left if normed else set()) | (set() if own else readers | {job.root})
    return any(together <= piece for piece in pieces)


@given(specs(), st.data())
def test_a_job_without_some_agents_is_that_of_the_others(spec: Any, data: st.DataObject) -> None:
    whole = Job.of(spec)
    absent = data.draw(st.sets(st.sampled_from(whole.names)))
    left = [name for name in whole.names if name not in absent]
    if absent and not can_go_on(whole, {whole.topology.index(name) for name in left}):
        with pytest.raises(UserError, match=r"; keep "):
            whole.without(absent)
        return
    job = whole.without(absent)
    assert job.spec == whole.spec
    assert job.names == whole.names
    assert list(job.topology.names) == list(job.architecture.names) == left
    assert list(job.absent) == [name for name in whole.names if name in absent]
    assert job.among(left).digest == job.without(absent).digest == job.digest
    assert job.without([]).digest == whole.digest
    if job.architecture.own is None:
        assert left[job.root] == whole.names[whole.root]
        assert job.data == whole.data
    else:
        own = whole.architecture.own
        kept = sorted(k for i, name in enumerate(whole.names) if name in left for k in own[i])
        assert job.data.targets == tuple(whole.data.targets[k] for k in kept)
    for k, name in enumerate(left):
        i = whole.topology.index(name)
        assert job.views[k] == whole.views[i]
        assert job.topology.agents[k] == whole.topology.agents[i]
        assert job.architecture.count(k) <= whole.architecture.count(i)
    edges = {(whole.names[l], whole.names[i]) for l, i in whole.topology.edges}
    assert {(left[l], left[i]) for l, i in job.topology.edges} == {
        edge for edge in edges if not absent & {*edge}
    }


@pytest.mark.parametrize(
    ("sections", "absent", "says"),
    [
        ({}, ["d"], r"no agent 'd'; use one of a, b, c"),
        ({}, ["b"], r"'b' is the root .* alone holds the labels; keep it, or train a new run"),
        (
            {"model": {"readout": {"root": "a"}}},
            ["b"],
            r"without b: the readout at a has no path of two-way links from c; keep one that",
        ),
        (
            {"data": {"split": {"kind": "auto", "agents": ["a"]}}},
            ["a"],
            "without a no agent is left that sees any input; keep one that does",
        ),
        (
            {"model": {"readout": {"agents": ["c"], "root": "b"}}},
            ["a", "c"],
            "without a, c no agent is left that contributes to the scores",
        ),
        (
            {"model": {"readout": {"agents": ["a"]}}, "training": {"clip_norm": 1.0}},
            ["b"],
            r"without b: the norm is summed over all agents, but .*no path.* from c; keep one",
        ),
    ],
)
def test_who_is_needed_is_told(sections: dict[str, Any], absent: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        made(**sections).without(absent)


def test_agents_that_read_out_for_themselves_do_without_a_root_and_without_paths() -> None:
    own = {"a": ["y0"], "b": ["y1", "y2"], "c": ["y3"]}
    job = made(data=numbers() | {"targets": own}).without(["b"])
    assert job.data.targets == ("y0", "y3")
    assert job.architecture.own == ((0,), (1,))
    assert not job.plan.training_step  # a and c have no link
    with pytest.raises(UserError, match="contributes to the scores"):
        job.without(["a", "b", "c"])


# --- what does not fit ---------------------------------------------------------------------------

PLANE = {"name": "swiss_roll", "split": {"kind": "auto", "agents": ["a", "c"]}}
APART = {"edges": [["a", "b"]]}  # from c
ALONE = {"readout": {"agents": ["a"]}}
ENTER = {"kind": "indices", "indices": {"a": [1]}, "enter": {"a": "q"}}


@pytest.mark.parametrize(
    ("sections", "loc", "fragments"),
    [
        (
            {"topology": {"agents": 1001, "edges": []}, "model": {"layers": 10_000}},
            "model.layers",
            ["10000 layers on this graph have 10010000 blocks", f"within {MAX_BLOCKS}"],
        ),
        (
            {"training": {"batch_size": 8}, "cluster": {"replicas": 9}},
            "cluster.replicas",
            ["9 copies cannot share a batch of 8", "at most 8"],
        ),
        (
            {"data": {"train_samples": 5}, "cluster": {"replicas": 6}},
            "cluster.replicas",
            ["a batch of 5 samples"],
        ),
        ({"model": {"readout": {"agents": []}}}, "model.readout.agents", ["no agent", "say all"]),
        (
            {"model": {"readout": {"agents": ["a", "x"]}}},
            "model.readout.agents.1",
            ["no agent called 'x'", "use one of a, b, c"],
        ),
        (
            {"model": {"readout": {"agents": ["a", "c", "a"]}}},
            "model.readout.agents.2",
            ["'a' is named twice", "name it once"],
        ),
        ({"model": {"readout": {"root": "x"}}}, "model.readout.root", ["no agent called 'x'"]),
        ({"topology": APART}, "model.readout", ["from c", "connect them"]),
        (
            {"topology": APART, "model": ALONE, "training": {"clip_norm": 1.0}},
            "training.clip_norm",
            ["the norm is summed over all agents", "from c", "or leave clip_norm out"],
        ),
        (
            {"topology": APART, "model": ALONE, "training": {"on_nonfinite": "skip"}},
            "training.on_nonfinite",
            ["from c", "or leave on_nonfinite out"],
        ),
        (
            {"data": {"targets": {"a": ["y0"]}}, "model": {"readout": {"root": "a"}}},
            "model.readout.root",
            ["each reads out its own", "leave root out"],
        ),
        (
            {"data": {"targets": {"a": ["y0"]}}, "model": ALONE},
            "model.readout.agents",
            ["each reads out its own", "leave agents out"],
        ),
        ({"model": {"activation": "tan"}}, "model.activation", ["'tan'", "use tanh, relu"]),
        (
            {"model": {"activation": "no.module:NAME"}},
            "model.activation",
            ["cannot be imported", "every machine"],
        ),
        (
            {"model": {"name": "MS3", "train_J": True}},
            "model.train_J",
            ["trains the X of H2, which MS3 does not have", "set model.name to H2"],
        ),
        ({"data": {"split": ENTER}}, "data.split.enter", ["the encoder pad", "leave enter out"]),
        (
            {"model": {"encoder": "pad"}},
            "model.encoder",
            ["pad copies the 22 features of agent 'a' into a state of size d = 2", "d >= 22"],
        ),
        (
            {"data": PLANE, "training": {"shift": 1}},
            "training.shift",
            ["what agent 'a' sees is not a rectangle", "set shift to 0"],
        ),
        (
            {"data": PLANE, "training": {"distort": {}}},
            "training.distort",
            ["swiss_roll is not a set of images", "leave distort out"],
        ),
        (
            {"training": {"distort": {}, "shift": 1}},
            "training.shift",
            ["each agent's part by itself", "use training.distort.shift"],
        ),
        (
            {"model": {"name": "H1"}, "training": {"activations": "recompute"}},
            "training.activations",
            ["H1 has no closed inverse", "set activations to store"],
        ),
        (
            {"model": {"name": "MS2"}, "training": {"activations": "recompute"}},
            "training.activations",
            ["MS2 has no closed inverse"],
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_where_they_stand(
    sections: dict[str, Any], loc: str, fragments: list[str]
) -> None:
    if "targets" in sections.get("data", {}):
        sections = sections | {"data": numbers() | sections["data"]}
    with pytest.raises(SpecError) as caught:
        made(**sections)
    assert ".".join(map(str, caught.value.loc)) == loc
    assert [f for f in fragments if f not in str(caught.value)] == [], str(caught.value)


def test_what_stands_beside_a_refusal_is_taken() -> None:
    """The same values, in jobs that can have them."""
    made(training={"batch_size": 8}, cluster={"replicas": 8})
    made(topology=APART, model=ALONE)  # nobody asks for a norm over all agents
    made(data={"split": ENTER}, model={"encoder": "pad"})
    made(training={"distort": {}})
    assert made(model=ALONE).root == 0  # where the only one that reads out is
    assert made(model={"readout": {"agents": ["c", "a"]}}).root == 2
    assert made().root == 1  # the centre
