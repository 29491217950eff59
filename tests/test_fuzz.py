"""Hostile input: some that is random (see `tests.fuzz`), and what an attacker would write."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

import hdnn_dist
from hdnn_dist import reader, topology
from hdnn_dist.check import examine, this_machine
from hdnn_dist.checkpoint import checksum, latest_checkpoint, seal
from hdnn_dist.data import load_features, load_rows
from hdnn_dist.errors import LONGEST, CheckpointError, DamagedError, DataError, SpecError, UserError
from hdnn_dist.job import Job
from hdnn_dist.metrics import read_metrics
from hdnn_dist.reader import dump_spec, read_spec, spec_from_dict
from hdnn_dist.run import finished, reopen
from hdnn_dist.spec import DataSpec
from hdnn_dist.topology import Topology, read_matrix
from hdnn_dist.trainer import LocalRunner, restore
from tests.commands import hdnn
from tests.fuzz import TARGETS, TINY


@pytest.mark.slow
def test_random_input_is_accepted_or_refused_in_a_line() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--examples", "25", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["target"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == TARGETS.keys()
    assert all(line["tried"] >= 25 for line in found.values())
    assert all(line["outcomes"].keys() - {"accepted"} for line in found.values()), found


def limited(code: str, *arguments: object) -> str:
    """What a process that can take half a GiB says on its last line."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29))\n"
    command = [sys.executable, "-c", limit + code, *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    return (done.stdout + done.stderr).splitlines()[-1]


# --- specs ---------------------------------------------------------------------------------------

READ = """
from pathlib import Path
from hdnn_dist.errors import SpecError
from hdnn_dist.reader import read_spec
try:
    read_spec(Path(sys.argv[1]))
except SpecError as error:
    print(error)
"""
LAUGHS = "".join(f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 10)}]\n" for k in range(12))
MERGES = "".join(f"a{k + 1}: &a{k + 1} {{<<: [{', '.join([f'*a{k}'] * 10)}]}}\n" for k in range(12))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a0: &a0 [x]\n" + LAUGHS, "too many values come from aliases"),
        ("a0: &a0 {x: 1}\n" + MERGES, "too many values come from aliases"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: " + "{a: " * 100_000, "nested too deeply"),
        ("topology: {agents: !!int [8]}", "not YAML"),
        ('topology: {agents: !!float ""}', "not YAML"),
        ("topology: {agents: 0x" + "f" * 100_000 + "}", "a number of 100002 digits"),
        ("topology: {agents: " + "9" * 5000 + "}", "a number of 5000 digits"),
        ("topology: {agents: " + "9" * 300 + "}", "topology.agents: 9"),
        ("topology: {agents: 2}\nmodel: {h: 1e400}", "model.h: Infinity given"),
        ("topology: {agents: 1000000000}", "1000000000 agents given; use at most 100000"),
        ('topology: "a\\0b"', "no file has such a name"),
        ('topology: "\\ud800"', "no file has such a name"),
        ('topology: {name: "\\ud800", agents: 2}', "unexpected end of hex escape"),
        ('topology: {edges: {file: "\\0.json"}}', "no file has such a name"),
        (f"topology: {{? {'k' * 10**6} : 1}}", "unknown key"),
        (f'? "a\\e[31m\\n{"k" * 10**6}"\n: 1', r"a\x1b[31m\n"),
        ("topology: " + "[" * 250 + "]" * 250, "recursion limit exceeded"),
        (f"topology: {{agents: [{'a' * 10**6}]}}", "cannot name an agent"),
        (f"topology: {{edges: {{generator: {'a' * 10**6}}}}}", "no networkx graph generator"),
        ("topology: {agents: [a/b]}", "cannot name an agent"),
        ('topology: {agents: ["a\\nb"]}', "cannot name an agent"),
        ('topology: {agents: ["a\\0b"]}', "cannot name an agent"),
        ('topology: {agents: [".."]}', "cannot name an agent"),
        ('topology: {agents: ["a\\n"]}', "cannot name an agent"),
        (f"topology: {{agents: [{'a' * 65}]}}", "cannot name an agent"),
    ],
    ids=range(26),
)
def test_a_hostile_spec_is_refused_in_a_short_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        Job.load(tmp_path / "job.yaml")
    message = str(caught.value)
    assert says in message
    assert message.isprintable()
    assert len(message) < 4 * LONGEST


def test_a_bomb_of_aliases_takes_no_memory(tmp_path: Path) -> None:
    for first, text in (("[x]", LAUGHS), ("{x: 1}", MERGES)):
        (tmp_path / "job.yaml").write_text(f"a0: &a0 {first}\n{text}")
        assert "too many values come from aliases" in limited(READ, tmp_path / "job.yaml")


def test_merged_keys_have_their_place(tmp_path: Path) -> None:
    text = "topology: {agents: 2}\ntraining:\n  <<: &a\n    seed: x\n  epochs: 1\n"
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"job.yaml:4: training.seed"):
        read_spec(tmp_path / "job.yaml")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    huge = tmp_path / "huge.yaml"
    huge.write_text("topology: {agents: 2}\n#")
    os.truncate(huge, 100 << 30)
    assert "larger than 128 MiB" in limited(READ, huge)
    assert "not a regular file" in limited(READ, "/dev/zero")


def test_values_are_counted_as_they_are_read_and_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_VALUES", 200)
    (tmp_path / "job.yaml").write_text(f"topology: {{agents: [{'a,' * 200}]}}")
    with pytest.raises(SpecError, match="more than 200 values"):
        read_spec(tmp_path / "job.yaml")
    spec = spec_from_dict({"topology": {"agents": [f"a{k}" for k in range(200)]}})
    with pytest.raises(SpecError, match=r"the spec has \d+ values, more than 200"):
        dump_spec(spec)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (f"{'a.' * 50_000}a=1", "no override"),
        (f"topology.agents.{'9' * 5000}=1", "no item"),
        ("data.dir=~nobody-there/x", "built in and reads no folder"),
        (f"topology.name={'[' * 10_000}", "nested too deeply"),
    ],
)
def test_hostile_overrides(override: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("topology: {agents: [a, b], edges: [[a, b]]}")
    with pytest.raises(SpecError, match=says):
        Job.load(tmp_path / "job.yaml", [override])


def test_plain_data_nested_without_end_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"topology": deep}
    with pytest.raises(SpecError, match="not plain data"):
        spec_from_dict(deep)


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generator", "args"),
    [("hypercube_graph", {"n": 40}), ("kneser_graph", {"n": 1000, "k": 5})],
)
def test_a_generator_that_grows_without_end_is_stopped(
    generator: str, args: dict[str, int]
) -> None:
    edges = {"generator": generator, "args": args}
    with pytest.raises(SpecError, match=r"takes more than 2 GiB of memory or 10 s of computing"):
        Topology.from_spec(spec_from_dict({"topology": {"edges": edges}}).topology)


def test_the_graphs_of_all_layers_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "MAX_EDGES", 150)
    edges = {"generator": "complete_graph", "args": {"n": 8}}
    spec = {"topology": {"edges": edges}, "model": {"layer_graphs": [{"edges": edges}] * 10_000}}
    with pytest.raises(SpecError, match=r"layer_graphs.5: the graphs up to this one have"):
        Job.load(spec)


ENTITIES = '<!DOCTYPE g [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><graphml>&b;</graphml>'
EXTERNAL = '<!DOCTYPE g [<!ENTITY a SYSTEM "file:///etc/passwd">]><graphml>&a;</graphml>'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("g.graphml", ENTITIES, "document types and entities are not read"),
        ("g.graphml", EXTERNAL, "document types and entities are not read"),
        ("g.graphml", "<a>" * 100_000, "no .graphml graph"),
        ("g.json", "[" * 100_000, "no .json graph"),
        ("g.json", '{"nodes": [{"id": ' + "9" * 5000 + '}], "edges": []}', "no .json graph"),
        ("g.json", json.dumps({"nodes": [{"id": "a/b"}], "edges": []}), "cannot name an agent"),
        ("g.json", json.dumps({"nodes": [{"id": "a\n"}], "edges": []}), "cannot name an agent"),
        ("g.json", json.dumps({"nodes": [{"id": "a\0"}], "edges": []}), "cannot name an agent"),
        ("g.edgelist", "a " + "b" * 10**6, "cannot name an agent"),
        ("g.edgelist", "a " + ".." * 3, "cannot name an agent"),
    ],
    ids=range(10),
)
def test_a_hostile_graph_file_is_refused(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    edges = {"file": str(tmp_path / name)}
    with pytest.raises(SpecError, match=says) as caught:
        Topology.from_spec(spec_from_dict({"topology": {"edges": edges}}).topology)
    assert len(str(caught.value)) < 4 * LONGEST


GRAPH = """
from hdnn_dist.errors import SpecError
from hdnn_dist.reader import spec_from_dict
from hdnn_dist.topology import Topology
try:
    Topology.from_spec(spec_from_dict({"topology": {"edges": {"file": sys.argv[1]}}}).topology)
except SpecError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", ["graphml", "json", "edgelist"])
def test_a_graph_file_that_is_too_large_is_not_read(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"g.{suffix}"
    file.touch()
    os.truncate(file, 100 << 30)
    assert "larger than 32 MiB" in limited(GRAPH, file)


# --- jobs of any size ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"layers": 10_000}, "model.layers: 10000 layers on this graph have 29980000 blocks of K"),
        ({"name": "H1", "layers": 1}, r"topology.d: y = \[p; q\] has 2 Σ d = 16000 entries"),
    ],
)
def test_a_job_that_fills_the_memory_is_refused(model: dict[str, Any], says: str) -> None:
    edges = {"generator": "path_graph", "args": {"n": 1000}}
    split = {"kind": "auto", "agents": ["a1"]}
    with pytest.raises(SpecError, match=says):
        Job.load({"topology": {"edges": edges}, "model": model, "data": {"split": split}})


def test_wide_and_deep_layers_are_counted_not_made() -> None:
    edges = {"generator": "path_graph", "args": {"n": 300}}
    split = {"kind": "auto", "agents": ["a1"]}
    job = Job.load(
        {
            "topology": {"edges": edges, "d": 10_000},
            "model": {"layers": 1000},
            "data": {"split": split},
        }
    )
    assert job.parameters > 2 * 1000 * 898 * 10_000**2
    with pytest.raises(UserError, match=r"to train \d+ numbers takes"):
        hdnn_dist.launch(job, local=True)


def test_a_hub_is_told_without_all_its_pairs() -> None:
    edges = {"generator": "star_graph", "args": {"n": 3000}}
    split = {"kind": "auto", "agents": ["a1"]}
    job = Job.load(
        {"topology": {"edges": edges, "d": 1}, "model": {"layers": 1}, "data": {"split": split}}
    )
    report = examine(job, [this_machine()])
    assert (report.examined, report.single_exchange, report.missing) == (False, None, ())
    assert [pattern.symbol for pattern in report.patterns] == ["T", "R"]
    assert "too large to tell" in " ".join(report.warnings)


# --- data ----------------------------------------------------------------------------------------


def test_idx_files_cut_at_every_byte_of_their_header(folder: Path) -> None:
    file = folder / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for length in range(17):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"is not an IDX file|is cut short"):
            load_features(DataSpec(name="mnist", dir=str(folder)), "train", [0])


def test_an_idx_file_larger_than_it_can_be_is_not_read(folder: Path) -> None:
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(b"\x1f\x8b\x08\x08" + bytes(6) + b"a")  # gzip, with a name without end
    os.truncate(file, 100 << 30)
    with pytest.raises(DataError, match="is larger than a file of images can be"):
        load_features(DataSpec(name="mnist", dir=str(folder)), "train", [0])


def npy(shape: str, kind: str = "<f8") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


PICKLE = io.BytesIO()
np.save(PICKLE, np.array([[{}]]), allow_pickle=True)


@pytest.mark.parametrize(
    "content",
    [
        PICKLE.getvalue(),
        npy("(1000000000, 64)"),
        npy("(10**9, 64)"),
        npy("(99999999999999999999999999, 64)"),
        npy("(-1, 64)"),
        npy("(" * 5000),
        npy("(1, 64)", "|O"),
        npy("(1, 64)", "|V999999999"),
    ],
    ids=range(8),
)
def test_hostile_npy_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"x.npy"):
        load_rows(DataSpec(), tmp_path / "x.npy", [0])
    with pytest.raises(SpecError, match=r"x.npy"):
        read_matrix(tmp_path / "x.npy", ("model", "J"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(DataError, match="not a regular file"):
        load_rows(DataSpec(), tmp_path / "x.npy", [0])
    with pytest.raises(SpecError, match="not a regular file"):
        read_matrix(tmp_path / "x.npy", ("model", "J"))


def test_more_samples_than_memory_is_meant_for_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    np.lib.format.open_memmap(file, "w+", np.uint8, (1_562_501, 64))
    with pytest.raises(
        DataError, match="holds 1562501 samples, but of digits no more than 1562500"
    ):
        load_rows(DataSpec(), file, range(64))


# --- run directories -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("fuzz") / "run"
    hdnn_dist.train(TINY, run=run, local=True)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@contextmanager
def changed_manifest(run: Path) -> Iterator[dict[str, Any]]:
    """The newest checkpoint's manifest, to be changed; with a SHA-256 of its own again."""
    file = latest_checkpoint(run)[0] / "manifest.json"
    manifest = json.loads(file.read_text())["manifest"]
    yield manifest
    file.write_bytes(seal(json.dumps(manifest).encode()))


def refused(run: Path, says: str, error: type[CheckpointError] = DamagedError) -> None:
    """Loading, resuming and evaluating alike refuse the run."""
    job = Job.load(run / "spec.yaml")
    for use in (
        lambda: hdnn_dist.load(run),
        lambda: restore(LocalRunner(job), run),
        lambda: hdnn_dist.open_run(run, local=True).__enter__(),
    ):
        with pytest.raises(error, match=says) as caught:
            use()
        assert len(str(caught.value)) < 4 * LONGEST


@pytest.mark.parametrize(
    "name", ["../b", "/etc/passwd", "b/../b", "b\0", "b\n", "..", "", "x" * 65], ids=range(8)
)
def test_a_manifest_that_names_other_files_is_refused(name: str, run: Path) -> None:
    with changed_manifest(run) as manifest:
        manifest["files"][name] = manifest["files"].pop("b")
    refused(run, "manifest.json: missing or damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 1},
        {"step": 10**400},
        {"format": "1"},
        {"files": ["a", "b"]},
        {"files": {"a": "1"}},
        {"totals": {"seconds": -1.0}},
        {"totals": {"bytes_sent": 10**400}},
        {"more": 1},
    ],
)
def test_a_manifest_of_impossible_values_is_refused(change: dict[str, Any], run: Path) -> None:
    with changed_manifest(run) as manifest:
        manifest |= change
    refused(run, "manifest.json: missing or damaged")


@pytest.mark.parametrize("name", ["manifest.json", "a.safetensors"])
@pytest.mark.parametrize(
    "place",
    [lambda file: os.mkfifo(file), lambda file: file.symlink_to("/dev/zero"), lambda f: f.mkdir()],
    ids=["pipe", "device", "folder"],
)
def test_what_is_no_file_is_not_read(name: str, place: Callable[[Path], None], run: Path) -> None:
    file = latest_checkpoint(run)[0] / name
    file.unlink()
    place(file)
    refused(run, f"{name}: (missing or damaged|cannot be read)")


def test_files_without_end_are_not_read_to_it(run: Path) -> None:
    records = read_metrics(run)
    assert records
    os.truncate(run / "metrics.jsonl", 100 << 30)
    assert read_metrics(run) == records
    os.truncate(latest_checkpoint(run)[0] / "a.safetensors", 100 << 30)
    refused(run, "a.safetensors: cannot be read .larger than")


def test_a_link_out_of_the_run_directory_needs_the_checksum(run: Path, tmp_path: Path) -> None:
    file = latest_checkpoint(run)[0] / "a.safetensors"
    (tmp_path / "secret").write_text("secret")
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    refused(run, "its SHA-256 is not the manifest's")


def sign(run: Path, content: bytes) -> None:
    """Make `content` agent a's file, with its checksum in the manifest."""
    folder = latest_checkpoint(run)[0]
    (folder / "a.safetensors").write_bytes(content)
    with changed_manifest(run) as manifest:
        manifest["files"]["a"] = checksum(content)


HUGE = json.dumps({"weights/b": {"dtype": "F32", "shape": [2**40, 2**30], "data_offsets": [0, 8]}})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (2**63).to_bytes(8, "little"),
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        len(HUGE).to_bytes(8, "little") + HUGE.encode() + bytes(8),
        (10_000).to_bytes(8, "little") + b"[" * 10_000,
    ],
    ids=range(6),
)
def test_hostile_safetensors_are_refused(content: bytes, run: Path) -> None:
    sign(run, content)
    refused(run, "not a safetensors file")


@pytest.mark.parametrize(
    "key", ["weights/encoder.bias", "weights/Kp", "optimizer/Kp/exp_avg", "optimizer/Kp/step"]
)
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: None,
        lambda tensor: torch.zeros(1, 1, 1, 1),
        lambda tensor: torch.zeros(tensor.shape, dtype=torch.int32),
    ],
    ids=["gone", "shape", "type"],
)
def test_tensors_that_are_not_the_agents_are_refused(
    key: str, change: Callable[[torch.Tensor], torch.Tensor | None], run: Path
) -> None:
    tensors = load((latest_checkpoint(run)[0] / "a.safetensors").read_bytes())
    changed = change(tensors.pop(key))
    sign(run, save(tensors | ({} if changed is None else {key: changed})))
    with pytest.raises(CheckpointError, match="agent 'a'"):
        restore(LocalRunner(reopen(run)), run)
    if key.startswith("weights"):
        with pytest.raises(CheckpointError, match="agent 'a'"):
            hdnn_dist.load(run)


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b"\xff\xfe", b"{}", b'{"step": ' + b"9" * 5000 + b"}", b"null", b"[1]"],
    ids=range(7),
)
def test_garbage_beside_the_checkpoints_is_passed_over(content: bytes, run: Path) -> None:
    for name in ("summary.json", "metrics.jsonl"):
        (run / name).write_bytes(content)
    assert read_metrics(run) == []
    job = Job.load(run / "spec.yaml")
    assert finished(job, run) is None
    (run / "spec.yaml").write_bytes(content)
    with pytest.raises(SpecError):
        reopen(run)


@pytest.mark.parametrize(
    "change", [{"seconds": "x"}, {"seconds": None}, {"bytes_sent": 10**400}, {"epochs": [1]}]
)
def test_a_summary_that_cannot_be_printed_is_passed_over(change: dict[str, Any], run: Path) -> None:
    file = run / "summary.json"
    assert finished(reopen(run), run) is not None
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert finished(reopen(run), run) is None


@pytest.mark.parametrize("norms", ["x", [1.0, "x"], {}])
def test_gradients_that_cannot_be_drawn_are_passed_over(norms: object, run: Path) -> None:
    record = {"kind": "gradients", "step": 1, "epoch": 1, "norms": norms}
    (run / "metrics.jsonl").write_text(json.dumps(record))
    assert read_metrics(run) == []


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "x" * 5000],
        ["eval", "x" * 5000, "--local"],
        ["train", "--resume", "x" * 5000, "--local"],
        ["train", "--run", "x" * 5000, "--local"],
        ["check", "--set", "a" * 100_000],
        ["check", "--set", f"model.{'a' * 50_000}={'b' * 50_000}"],
        ["check", "--set", "model.name=a\x1b[31m\nb"],
    ],
    ids=range(7),
)
def test_the_command_line_says_it_in_a_short_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert hdnn(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.endswith("\n")
    assert said[:-1].isprintable()
    assert len(said) < 4 * LONGEST
