"""Specs: what is read, what is refused and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hdnn_dist.errors import SpecError
from hdnn_dist.reader import dump_spec, json_schema, read_spec, spec_from_dict
from hdnn_dist.spec import SGD, AgentSpec, AutoSplit, Cosine, GeneratedEdges, PatchSplit, Spec

SHIPPED = sorted((Path(__file__).parent.parent / "topologies").glob("*.yaml"))


def read(tmp_path: Path, text: str, *overrides: str) -> Spec:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return read_spec(path, overrides)[0]


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        read(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


# --- good specs ----------------------------------------------------------------------------------


def test_agents_alone_are_a_job(tmp_path: Path) -> None:
    spec = read(tmp_path, "topology: {agents: 4}")
    assert spec.topology.agents == 4
    assert spec.data.split == AutoSplit()
    assert spec.training.optimizer.name == "adam"


def test_all_sections(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        """
        topology:
          agents: [a, {name: b, d: 3, cpu: 0.5, resources: {lidar: 1}, labels: {zone: x}}]
          edges: [[a, b]]
        model: {graph: both, layer_graphs: [topology, none, {edges: [[a, b]]}]}
        data: {split: {kind: patches, grid: [1, 2]}}
        training: {optimizer: {name: sgd, lr: 1e-3}, schedule: {name: cosine}, clip_norm: 1}
        cluster: {agents_per_actor: auto}
        """,
    )
    assert spec.topology.agents == [
        "a",
        AgentSpec(name="b", d=3, cpu=0.5, resources={"lidar": 1}, labels={"zone": "x"}),
    ]
    assert spec.topology.edges == [("a", "b")]
    assert spec.data.split == PatchSplit(kind="patches", grid=(1, 2))
    assert spec.training.optimizer == SGD(name="sgd", lr=0.001)
    assert spec.training.schedule == Cosine(name="cosine")


def test_the_kind_of_a_section_has_a_default(tmp_path: Path) -> None:
    spec = read(tmp_path, "topology: {agents: 4}", "training.optimizer.lr=5e-2")
    assert (spec.training.optimizer.name, spec.training.optimizer.lr) == ("adam", 0.05)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", ".1e-2", "1.e-3", "0.001", "10e-4"])
def test_floats_are_yaml_1_2(tmp_path: Path, number: str) -> None:
    text = f"topology: {{agents: 2}}\ntraining: {{optimizer: {{lr: {number}}}}}"
    assert read(tmp_path, text).training.optimizer.lr == pytest.approx(1e-3)
    by_override = read(tmp_path, "topology: {agents: 2}", f"training.optimizer.lr={number}")
    assert by_override.training.optimizer.lr == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("number", "value"), [("010", 10), ("+7", 7), ("0x1F", 31), ("0o17", 15), ("9", 9)]
)
def test_whole_numbers_are_yaml_1_2(tmp_path: Path, number: str, value: int) -> None:
    assert read(tmp_path, f"topology: {{agents: 2, d: {number}}}").topology.d == value


def test_default_spec() -> None:
    spec, source = read_spec(None, ["training.epochs=1"])
    assert spec.training.epochs == 1
    assert spec.topology.agents == 8
    assert source.locate(("training", "epochs")) == "--set training.epochs=1"
    assert str(source.locate(("topology", "d"))).startswith("default.yaml:")


def test_topology_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    bare = "agents: 2\nedges: {file: ring.edgelist}\n"
    (tmp_path / "graphs" / "bare.yaml").write_text(bare)
    section = "data: {name: mnist}\ntopology:\n  agents: 2\n  d: 3\n"
    (tmp_path / "graphs" / "job.yaml").write_text(section)

    spec = read(tmp_path, "topology: graphs/bare.yaml")
    assert spec.topology.edges.file == str(tmp_path / "graphs" / "ring.edgelist")  # type: ignore[union-attr]

    (tmp_path / "job.yaml").write_text("topology: graphs/job.yaml")
    spec, source = read_spec(tmp_path / "job.yaml", ["topology.agents=5"])
    assert (spec.topology.agents, spec.topology.d, spec.data.name) == (5, 3, "digits")
    assert source.locate(("topology", "d")) == f"{tmp_path}/graphs/job.yaml:4"

    (tmp_path / "graphs" / "job.yaml").write_text("topology:\n  agents: 2\n  d: x\n")
    assert "graphs/job.yaml:3: topology.d:" in refused(tmp_path, "topology: graphs/job.yaml")
    (tmp_path / "graphs" / "job.yaml").write_text("topology: bare.yaml")
    assert "names yet another file" in refused(tmp_path, "topology: graphs/job.yaml")


def test_graph_files_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    text = """
    topology: {agents: 2, edges: &e {file: g.graphml}}
    model: {layer_graphs: [{edges: *e}, {edges: {file: /g.json}}]}
    """
    spec = read(tmp_path, text, "training.epochs=1")
    here = str(tmp_path / "g.graphml")
    assert spec.topology.edges.file == here  # type: ignore[union-attr]
    layers = spec.model.layer_graphs or []
    assert [layer.edges.file for layer in layers] == [here, "/g.json"]  # type: ignore[union-attr]


def test_source_falls_back_on_what_encloses(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("topology:\n  agents:\n    - a\n    - {name: b}\n  edges:\n    - [a, b]\n")
    _, source = read_spec(path)
    assert source.locate(("topology", "agents", 1, "d")) == f"{path}:4"
    assert source.locate(("topology", "edges", 0)) == f"{path}:6"
    assert source.locate(("model", "h")) == f"{path}:1"


# --- bad specs -----------------------------------------------------------------------------------

A4 = "topology: {agents: 4}\n"
BOMB = "".join(f"a{k + 1}: &a{k + 1} [*a{k}, *a{k}]\n" for k in range(20))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["job.yaml: the file is empty", "start with `topology:`"]),
        ("- a", ["the file holds [", "not sections"]),
        ("topolgy: {}", ["job.yaml:1: topolgy: unknown key", "'topology'", "(and 1 more)"]),
        ("model: {}", ["job.yaml:1: topology: missing; add it"]),
        (A4 + "model:\n  leyers: 3", [":3: model.leyers: unknown key; did you mean 'layers'?"]),
        (A4 + "model:\n  zzz: 3", [":3: model.zzz: unknown key; the keys here are name, graph"]),
        (A4 + "model:\n\n  h: -1", [":4: model.h: -1 given; write a number above 0"]),
        (A4 + "model: {h: .inf}", ["model.h: Infinity given; write a number"]),
        (A4 + "model: {graph: Q}", ['model.graph: "Q" given; write K, J or both']),
        (A4 + 'model: {layers: "3"}', ['"3" given; write a whole number, without quotes']),
        (A4 + "model: {layers: 3.5}", ["3.5 given; write a whole number"]),
        (A4 + "model: {train_J: 1}", ["1 given; write true or false"]),
        (A4 + "model: {readout: {agents: some}}", ['"some" given; write all, or a list of names']),
        (A4 + "model: {readout: {agents: 3}}", ["3 given; write all, or a list of names"]),
        (A4 + "model: {layer_graphs: [topolgy]}", ["graphs.0:", "write topology, none, or {edges"]),
        (A4 + "model: {layer_graphs: [{edge: []}]}", ["graphs.0.edge: unknown key", "'edges'"]),
        (A4 + "model: {layer_graphs: []}", ["model.layer_graphs: [] given; write at least 1"]),
        (A4 + "model:", ["model: null given; write a section with name, graph"]),
        ("topology: 3", ["topology: 3 given; write a section with name, agents"]),
        ("topology: {agents: -1}", ["topology.agents: -1 given; write a number above 0"]),
        ("topology: {agents: eight}", ['"eight" given; write a list of agents, or how many']),
        ("topology: {agents: [a, yes]}", ["topology.agents.1: true given", "only in quotes"]),
        ("topology:\n  agents:\n  - 7", [":3: topology.agents.0: 7 given", "only in quotes"]),
        ("topology: {agents: [a b]}", ['"a b" cannot name an agent; use up to 64 letters']),
        ("topology: {agents: [../x]}", ['"../x" cannot name an agent']),
        ("topology: {agents: [{d: 3}]}", ["topology.agents.0.name: missing"]),
        ("topology: {agents: [{name: a, d: 0}]}", ["agents.0.d: 0 given; write a number above 0"]),
        ("topology: {agents: 2, d: 99999999999999999999}", ["topology.d: 9", "up to 10000"]),
        ("topology: {agents: 2, d: 1000000}", ["topology.d: 1000000 given", "up to 10000"]),
        ("topology: {agents: [{name: a, d: 10001}]}", ["agents.0.d: 10001 given", "up to 10000"]),
        (A4 + "model: {h: 1e300}", ["model.h: 1e+300 given; write a number up to 1000000"]),
        (A4 + "model: {layers: 10001}", ["model.layers: 10001 given; write a number up to 10000"]),
        (A4 + "model: {layers: 1:30}", ['model.layers: "1:30" given; write a whole number']),
        (A4 + "model: {layers: 1_0}", ['model.layers: "1_0" given; write a whole number']),
        (A4 + "cluster: {threads: 1000000}", ["cluster.threads: 1000000 given", "up to 1024"]),
        (A4 + "training: {epochs: 1e10}", ["epochs: 10000000000.0 given; write a whole number"]),
        (A4 + "training: {epochs: 10000000000}", ["training.epochs: 1", "up to 1000000000"]),
        (A4 + "training: {batch_size: 10000000000}", ["batch_size: 1", "up to 1000000000"]),
        (A4 + "training: {optimizer: {lr: 1e7}}", ["lr: 10000000.0 given", "up to 1000000"]),
        (A4 + "training: {shift: 100000000000000000000}", ["training.shift: 1", "up to 1024"]),
        (A4 + "training: {distort: {scale: 1}}", ["distort.scale: 1", "below 1"]),
        (A4 + "training: {distort: {sigma: 0}}", ["distort.sigma: 0", "from 1 up"]),
        (A4 + "training: {schedule: {name: one-cycle, end: .inf}}", ["end: Infinity given"]),
        ("topology: {agents: [{name: a, gpus: 1}]}", ["agents.0.gpus: unknown key", "'gpu'"]),
        ("topology: {agents: 2, edges: [[a1]]}", ["topology.edges.0.1: missing"]),
        ("topology: {agents: 2, edges: [[a1, a2, a3]]}", ["edges.0:", "write at most 2 values"]),
        ("topology: {edges: ring.graphml}", ['"ring.graphml" given', "{file: PATH}"]),
        ("topology: {edges: {generater: x}}", ["edges.generater: unknown key", "'generator'"]),
        ("topology: {edges: {generator: x, args: {n: null}}}", ["edges.args.n: null given"]),
        ("topology: {edges: {generator: x, args: {n: [1, x]}}}", ['edges.args.n.1: "x" given']),
        (A4 + "training: {optimizer: {name: sdg}}", ['r.name: unknown name "sdg"', "'sgd'"]),
        (A4 + "training: {optimizer: {name: [a]}}", ["r.name: unknown name", "adam, sgd, adamw"]),
        (A4 + "training: {optimizer: sgd}", ['"sgd" given; write a section with name, lr']),
        (A4 + "training: {optimizer: {momentum: 1}}", ["optimizer.momentum: unknown key"]),
        (A4 + "training: {schedule: {name: step}}", ["training.schedule.every: missing"]),
        (A4 + "data: {split: {kind: tiles}}", ['split.kind: unknown kind "tiles"', "'stripes'"]),
        (A4 + "data: {split: {kind: patches, grid: [4]}}", ["data.split.grid.1: missing"]),
        (
            A4 + "data: {split: {kind: indices, indices: {on: [1]}}}",
            ["data.split.indices: the key on reads as bool; put it in quotes"],
        ),
        (A4 + "cluster: {agents_per_actor: lots}", ['"lots" given; write a whole number or auto']),
        ("topology:\n  agents: 4\n  agents: 3", [":3: topology.agents: this key is here twice"]),
        ("topology:\n  agents: [a, b", [":2: not YAML:"]),
        ("topology:\n\tagents: 4", [":2: not YAML:"]),
        ("topology: {agents: 4}\n--- \na: 1", ["not YAML:"]),
        ("topology: {agents: !!int four}", ["not YAML:"]),
        ("topology: !!python/object/apply:os.system [ls]", ["topology: the tag", "os.system"]),
        ("topology: {? [a] : 1}", ["the key reads as seq; put it in quotes"]),
        ("a: &a [*a]", ["nested too deeply"]),
        ("a: " + "[" * 5000, ["nested too deeply"]),
        ("a0: &a0 [x, x]\n" + BOMB, ["too many values come from aliases"]),
        ("a: \x00", ["not YAML:"]),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, text: str, fragments: list[str]) -> None:
    message = refused(tmp_path, text)
    assert [f for f in fragments if f not in message] == [], message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read .*none.yaml: No such file"):
        read_spec(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match=r"cannot read .*: Is a directory"):
        read_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("# \xe9".encode("latin-1"))
    with pytest.raises(SpecError, match="not UTF-8 text"):
        read_spec(tmp_path / "latin.yaml")
    assert "job.yaml:2: topology: cannot read" in refused(tmp_path, "\ntopology: none.yaml")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufefftopology: {agents: 2}").topology.agents == 2


# --- overrides -----------------------------------------------------------------------------------

JOB = """
topology: {agents: [a, {name: b, d: 2}], edges: {generator: path_graph, args: {n: 2}}}
data: {split: {kind: indices, indices: {a: [0]}, enter: {a: q}}}
training: {optimizer: {name: adam, lr: 0.5, betas: [0.8, 0.9]}}
"""


def test_overrides(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        JOB,
        "topology.agents.0.d=4",
        "topology.agents.1.d=3",
        "model.readout.agents=[a]",
        "training.clip_norm=1e1",
        "training.clip_norm=null",
        "topology.name=my net = 1",
    )
    assert spec.topology.agents == [AgentSpec(name="a", d=4), AgentSpec(name="b", d=3)]
    assert spec.model.readout.agents == ["a"]
    assert spec.training.clip_norm is None
    assert spec.topology.name == "my net = 1"


def test_another_kind_drops_the_files_keys_of_the_old_one(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        JOB,
        "training.optimizer.momentum=0.5",
        "training.optimizer.name=sgd",
        "data.split.kind=patches",
        "data.split.grid=[1, 2]",
        "topology.edges.file=g.json",
    )
    assert spec.training.optimizer == SGD(name="sgd", lr=0.5, momentum=0.5)
    assert spec.data.split == PatchSplit(kind="patches", grid=(1, 2))
    assert spec.topology.edges.file == "g.json"  # type: ignore[union-attr]
    spec = read(tmp_path, JOB, "topology.edges.generator=cycle_graph")
    assert spec.topology.edges == GeneratedEdges(generator="cycle_graph", args={"n": 2})


def test_the_same_kind_keeps_the_files_keys(tmp_path: Path) -> None:
    spec = read(tmp_path, JOB, "training.optimizer.name=adam")
    assert spec.training.optimizer.betas == (0.8, 0.9)  # type: ignore[union-attr]


def test_keys_that_the_user_set_are_never_dropped(tmp_path: Path) -> None:
    overrides = ("training.optimizer.betas=[0.1, 0.2]", "training.optimizer.name=sgd")
    message = refused(tmp_path, JOB, *overrides)
    assert message.startswith("--set training.optimizer.betas=[0.1, 0.2]: ")
    assert "unknown key" in message


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("training.epochs", ["--set training.epochs: this is no override; write section.key="]),
        ("training.epochs=", ["this is no override", "null for no value"]),
        ("=3", ["this is no override"]),
        ("training..epochs=3", ["this is no override"]),
        ("training.epochs=[", ["--set training.epochs=[: not YAML:"]),
        ("training.epochs=many", ['--set training.epochs=many: training.epochs: "many" given']),
        (
            "training.optimizer.name=sdg",
            ["--set training.optimizer.name=sdg: training.optimizer.name: unknown", "'sgd'"],
        ),
        ("data.split.kind=tiles", ["--set data.split.kind=tiles: data.split.kind: unknown"]),
        ("training.epoch=3", ["training.epoch: unknown key; did you mean 'epochs'?"]),
        ("topology.agents.2.d=4", ["topology.agents: no item '2' in a list of 2"]),
        ("topology.agents.b.d=4", ["no item 'b' in a list of 2; count from 0"]),
        ("topology.agents.1.d.x=4", ["topology.agents.1.d: 2 is no section"]),
        ("topology=none.yaml", ["--set topology=none.yaml: topology: cannot read none.yaml"]),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, fragments: list[str]) -> None:
    message = refused(tmp_path, JOB, override)
    assert [f for f in fragments if f not in message] == [], message


# --- Python, writing, schema ---------------------------------------------------------------------


def test_spec_from_dict() -> None:
    data: dict[str, Any] = {"topology": {"agents": ["a", "b"], "edges": [("a", "b")]}}
    assert spec_from_dict(data).topology.edges == [("a", "b")]
    with pytest.raises(SpecError, match=r"^topology\.d: 0 given; write a number above 0$"):
        spec_from_dict({"topology": {"agents": 2, "d": 0}})
    with pytest.raises(SpecError, match="not plain data"):
        spec_from_dict({"topology": {"agents": print}})


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True) | st.sampled_from(
    ["on", "no", "null", "1e3", "1E-3", "0x1F", "010", "1_0", "2020-01-01", "yes", "true", "0b_"]
)


@given(
    names=st.lists(NAMES, unique=True, min_size=2, max_size=5),
    lr=st.floats(min_value=1e-300, max_value=1e6),
    title=st.text(),
)
@example(names=["a", "b"], lr=0.1, title="a\x85b")
def test_what_is_dumped_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], lr: float, title: str
) -> None:
    spec = Spec.model_validate(
        {
            "topology": {"name": title, "agents": names, "edges": [(names[0], names[1])]},
            "data": {"split": {"kind": "indices", "indices": {names[0]: [0, 1]}}},
            "training": {"optimizer": {"name": "sgd", "lr": lr}},
        }
    )
    assert read(tmp_path_factory.getbasetemp(), dump_spec(spec)) == spec


def test_schema_describes_every_key() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["required"] == ["topology"]
    assert set(schema["properties"]) == {"topology", "model", "data", "training", "cluster"}
    assert {"type": "string"}.items() <= schema["properties"]["topology"]["anyOf"][1].items()
    training = schema["$defs"]["TrainingSpec"]["properties"]
    kinds = {option["$ref"].rpartition("/")[2] for option in training["optimizer"]["oneOf"]}
    assert kinds == {"Adam", "SGD", "AdamW"}
    assert "alpha" in training


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_read_and_round_trip(path: Path, tmp_path: Path) -> None:
    spec, _ = read_spec(path)
    assert read(tmp_path, dump_spec(spec)) == spec
