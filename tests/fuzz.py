"""Feed what hdnn_dist reads with damaged, random and hostile input.

    python -m tests.fuzz --examples 3000 --seed 0

Each target runs in a process of its own, whose memory is limited, and gives a line of JSON: the
inputs tried, how many were accepted or refused by which error, the longest computing time of one
and the peak of memory. An exception that is none of ours, a message that is no short line, or an
input that takes too long ends it with that input.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
import pyarrow as arrow
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pyarrow import parquet

import hdnn_dist
from hdnn_dist import data, mnist
from hdnn_dist.check import examine, this_machine
from hdnn_dist.check_tables import render
from hdnn_dist.checkpoint import checksum, seal
from hdnn_dist.cli import main as command_line
from hdnn_dist.data import (
    DataInfo,
    describe,
    ensure_available,
    load_features,
    load_labels,
    load_rows,
)
from hdnn_dist.errors import LONGEST, HdnnError
from hdnn_dist.job import Job
from hdnn_dist.metrics import read_metrics
from hdnn_dist.reader import read_spec, spec_from_dict
from hdnn_dist.run import finished, reopen
from hdnn_dist.spec import DataSpec
from hdnn_dist.tables import write_table
from hdnn_dist.topology import Topology, read_matrix
from hdnn_dist.trainer import LocalRunner, restore
from tests.mnist_files import idx
from tests.strategies import NASTY, changed, damaged, values

MEMORY = 6 << 30  # bytes that a target's process may take, torch's own with them
SECONDS = 30.0  # of computing that an input may take
SHIPPED = sorted((Path(__file__).parent.parent / "topologies").glob("*.yaml"))
TINY = {
    "topology": {"agents": ["a", "b"], "d": 2, "edges": [["a", "b"]]},
    "model": {"layers": 2},
    "data": {"name": "digits", "train_samples": 32, "test_samples": 16},
    "training": {"epochs": 1, "batch_size": 16},
}
Try: TypeAlias = Callable[[Any], None]
"""Reads one input; raises what the library raises."""


class Tally:
    """What became of the inputs of a target."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.seconds = 0.0

    def take(self, attempt: Try, given: Any) -> None:
        """Try an input, and hold it to the contract."""
        start = _computing()
        try:
            attempt(given)
            outcome = "accepted"
        except HdnnError as error:
            said = str(error)
            assert len(said) <= 4 * LONGEST, f"{len(said)} characters are no message"
            assert said.isprintable(), said
            outcome = type(error).__name__
        took = _computing() - start
        assert took < SECONDS, f"{took:.0f} s for one input"
        self.outcomes[outcome] += 1
        self.seconds = max(self.seconds, took)

    def report(self) -> dict[str, Any]:
        """The line of JSON."""
        kib = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, _CHILDREN)]
        return {
            "tried": self.outcomes.total(),
            "outcomes": dict(self.outcomes.most_common()),
            "longest computing, s": round(self.seconds, 2),
            "peak memory, MiB": kib[0] >> 10,
            "peak memory of a child, MiB": kib[1] >> 10,
        }


_CHILDREN = resource.RUSAGE_CHILDREN


def _computing() -> float:
    """Seconds that this process and those it has waited for have computed."""
    return sum(os.times()[:4])


# --- the targets: inputs, and what reads them ----------------------------------------------------


def _dumped(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


def spec(folder: Path) -> tuple[st.SearchStrategy[bytes], Try]:
    """Spec files: the shipped ones with a part changed, their bytes damaged, and any bytes."""
    texts = [path.read_bytes() for path in SHIPPED]
    file = folder / "job.yaml"

    def attempt(content: bytes) -> None:
        file.write_bytes(content)
        written, source = read_spec(file)
        render(examine(Job.of(written, folder, source), [this_machine()]))

    return st.one_of(
        st.sampled_from([yaml.safe_load(text) for text in texts]).flatmap(changed).map(_dumped),
        st.sampled_from(texts).flatmap(damaged),
        st.binary(max_size=200),
        values.map(_dumped),
    ), attempt


def graph(folder: Path) -> tuple[st.SearchStrategy[tuple[str, bytes]], Try]:
    """Graph files: GraphML, node-link JSON and edge lists, damaged; JSON also by its parts."""
    small = nx.relabel_nodes(nx.karate_club_graph().subgraph(range(6)), str)
    nx.set_node_attributes(small, 3, "d")
    linked = nx.node_link_data(small, edges="edges")
    files = {
        ".graphml": "\n".join(nx.generate_graphml(small)).encode(),
        ".json": json.dumps(linked).encode(),
        ".edgelist": "\n".join(nx.generate_edgelist(small)).encode(),
    }

    def attempt(named: tuple[str, bytes]) -> None:
        suffix, content = named
        file = folder / f"graph{suffix}"
        file.write_bytes(content)
        for directed in (False, True):
            edges = {"file": str(file)}
            written = spec_from_dict({"topology": {"edges": edges, "directed": directed}})
            with contextlib.suppress(HdnnError) if directed else contextlib.nullcontext():
                Topology.from_spec(written.topology)

    kinds = st.sampled_from([*files.items()])
    parts = changed(linked).map(lambda value: (".json", json.dumps(value).encode()))
    any_bytes = st.tuples(st.sampled_from([*files]), st.binary(max_size=200))
    broken = kinds.flatmap(lambda kind: st.tuples(st.just(kind[0]), damaged(kind[1])))
    return st.one_of(broken, parts, any_bytes), attempt


def images(folder: Path) -> tuple[st.SearchStrategy[tuple[str, bytes]], Try]:
    """IDX files, plain and gzipped, and .npy files of samples and matrices."""
    counts: dict[data.Part, int] = {"train": 40, "test": 10}
    mnist.SAMPLES = counts
    data.SETS["mnist"] = DataInfo("mnist", 784, 10, (28, 28), 40, 10)
    rng, good = np.random.default_rng(0), {}
    for (part, content), (stem, _) in mnist.FILES.items():
        shape, top = ((counts[part], 28, 28), 256) if content == "images" else ((counts[part],), 10)
        good[stem] = idx(rng.integers(0, top, shape, np.uint8))
    read = DataSpec(name="mnist", dir=str(folder))
    arrays = [np.eye(4), rng.random((3, 784)), rng.random((3, 28, 28)), np.array([{}, None])]
    saved = []
    for array in arrays:
        np.save(buffer := io.BytesIO(), array, allow_pickle=True)
        saved.append(buffer.getvalue())

    def attempt(named: tuple[str, bytes]) -> None:
        name, content = named
        for stem, raw in good.items():
            (folder / stem).write_bytes(raw)
        (folder / name).write_bytes(content)
        if name == "x.npy":
            with contextlib.suppress(HdnnError):
                load_rows(read, folder / name, range(784))
            read_matrix(folder / name, ("model", "J"))
            return
        ensure_available(read)
        for part in counts:
            load_features(read, part, range(784))
            load_labels(read, part)

    plain = st.sampled_from([*good.items()])
    broken = plain.flatmap(lambda f: st.tuples(st.just(f[0]), damaged(f[1])))
    packed = plain.flatmap(lambda f: st.tuples(st.just(f[0]), damaged(gzip.compress(f[1]))))
    repacked = broken.map(lambda f: (f[0], gzip.compress(f[1], 1)))
    rows = st.sampled_from(saved).flatmap(damaged).map(lambda content: ("x.npy", content))
    return st.one_of(broken, packed, repacked, rows), attempt


def tables(folder: Path) -> tuple[st.SearchStrategy[tuple[str, bytes]], Try]:
    """A user's tables: training files of each kind damaged, in their parts changed, any bytes."""
    x, y = np.arange(24.0).reshape(8, 3), np.arange(8) % 2
    write_table(folder, (x, y), (x, y), ["a", "b, c", "d"])
    header = 'a,"b, c",d,t\n'
    text = header + "".join(f"{a},{b},{c},{k}\n" for (a, b, c), k in zip(x, y, strict=True))
    columns = dict(zip(("a", "b, c", "d", "t"), (*x.T, y), strict=True))
    parquet.write_table(arrow.table(columns), folder / "train.parquet")
    whole = {
        ".csv": text.encode(),
        ".parquet": (folder / "train.parquet").read_bytes(),
        ".safetensors": (folder / "train.safetensors").read_bytes(),
    }
    length = int.from_bytes(whole[".safetensors"][:8], "little")
    parts = json.loads(whole[".safetensors"][8 : 8 + length])
    spec = DataSpec.model_validate(
        {"name": "table", "dir": str(folder), "target": "t", "classes": 2}
    )

    def attempt(named: tuple[str, bytes]) -> None:
        suffix, content = named
        for part, written in (("train", content), ("test", whole[suffix])):
            for kind in whole:
                (folder / f"{part}{kind}").unlink(missing_ok=True)
            (folder / f"{part}{suffix}").write_bytes(written)
        columns = range(describe(spec).features)
        for part in ("train", "test"):
            assert np.isfinite(load_features(spec, part, columns)).all()
            load_labels(spec, part)

    rest = whole[".safetensors"][8 + length :]
    return st.one_of(
        st.sampled_from(sorted(whole.items())).flatmap(
            lambda item: st.tuples(st.just(item[0]), damaged(item[1]))
        ),
        changed(parts).map(lambda value: (".safetensors", _tensors(value, rest))),
        st.tuples(st.sampled_from(sorted(whole)), st.binary(max_size=200)),
    ), attempt


def checkpoint(folder: Path) -> tuple[st.SearchStrategy[tuple[str, bytes, bool]], Try]:
    """Run directories with one file damaged, or changed in its parts; also with its new SHA-256."""
    logging.disable()  # it warns of each damaged checkpoint
    whole, run = folder / "whole", folder / "run"
    hdnn_dist.train(TINY, run=whole, local=True)
    files = {
        str(path.relative_to(whole)): path.read_bytes()
        for path in whole.rglob("*")
        if path.suffix in (".json", ".jsonl", ".safetensors", ".yaml")
    }
    latest = max(name for name in files if name.endswith("manifest.json"))

    def attempt(damage: tuple[str, bytes, bool]) -> None:
        name, content, signed = damage
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        (run / name).write_bytes(content)
        if signed and name.endswith(".safetensors"):
            manifest = json.loads(files[latest])["manifest"]
            manifest["files"][Path(name).stem] = checksum(content)
            (run / latest).write_bytes(seal(json.dumps(manifest).encode()))
        elif signed and name == latest:
            (run / latest).write_bytes(seal(content))
        read_metrics(run)
        job = reopen(run)
        runner = LocalRunner(job)
        errors = []
        for use in (hdnn_dist.load, partial(finished, job), partial(restore, runner)):
            try:
                use(run)
            except HdnnError as error:
                errors.append(error)
        if errors:
            raise errors[-1]
        runner.train(1)
        runner.evaluate()

    def parts(name: str) -> st.SearchStrategy[bytes]:
        if name.endswith(".safetensors"):  # 8 bytes of length, a header in JSON, numbers
            length = int.from_bytes(files[name][:8], "little")
            header, rest = files[name][8 : 8 + length], files[name][8 + length :]
            return changed(json.loads(header)).map(lambda value: _tensors(value, rest))
        if name.endswith(".yaml"):
            return changed(yaml.safe_load(files[name])).map(_dumped)
        if name.endswith(".jsonl"):
            lines = [json.loads(line) for line in files[name].splitlines()]
            return changed(lines).map(lambda value: "\n".join(map(json.dumps, value)).encode())
        content = json.loads(files[name])
        content = content.get("manifest", content)
        return changed(content).map(lambda value: json.dumps(value).encode())

    newest = [name for name in files if "step-" not in name or Path(latest).parent.name in name]
    return st.sampled_from(sorted(newest)).flatmap(
        lambda name: st.tuples(st.just(name), damaged(files[name]) | parts(name), st.booleans())
    ), attempt


def _tensors(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def cli(folder: Path) -> tuple[st.SearchStrategy[list[str]], Try]:
    """Command lines: commands with overrides, options and paths, good ones and any text."""
    run, job = folder / "run", folder / "job.yaml"
    hdnn_dist.train(TINY, run=run, local=True)
    job.write_bytes(_dumped(TINY))
    os.chdir(folder)

    def attempt(arguments: list[str]) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                command_line(arguments)
            except SystemExit as end:
                code = end.code
        said = out.getvalue()
        assert code in (0, 1, 2), code
        assert "Traceback" not in said, said
        assert len(said) < 100_000 + 3 * len("".join(arguments)), len(said)
        if code == 2:
            raise RefusedError
        if code == 1:
            raise FailedError

    places = st.sampled_from([str(run), str(job)]) | st.sampled_from(["/dev/null", *NASTY])
    sections = spec_from_dict(TINY).model_dump(mode="json")
    keys = st.sampled_from([*_paths(sections)]) | st.text(max_size=12)
    worth = values.map(lambda value: json.dumps(value)) | st.text(max_size=12)
    good = st.sampled_from(["training.epochs=3", "cluster.timeout=5", "training.keep_last=2"])
    override = st.one_of(good, st.tuples(keys, worth).map("=".join), st.text(max_size=20))
    anything = st.lists(st.text(max_size=12) | st.sampled_from(NASTY), max_size=4)
    free = st.lists(override.map(lambda text: ["--set", text]), max_size=3).map(_flat)
    # No valid override where it would be trained: for a billion epochs, as is asked.
    loose = st.lists(st.text(max_size=12).map(lambda t: ["--set", t]), max_size=2).map(_flat)
    return st.one_of(
        anything,
        st.tuples(st.just(["check", str(job)]), free).map(_flat),
        st.tuples(st.just(["check"]), places.map(lambda p: [p]), loose).map(_flat),
        st.tuples(
            st.sampled_from([["eval", "--local"], ["eval", "--local", "--json"]]),
            places.map(lambda p: [p]),
            free,
        ).map(_flat),
        st.tuples(
            st.just(["predict", str(run), "--local"]), places.map(lambda p: ["--input", p])
        ).map(_flat),
        st.tuples(
            st.just(["train", "--local", "--no-tensorboard", "--resume", str(run)]), loose, anything
        ).map(_flat),
    ), attempt


class RefusedError(HdnnError):
    """The command line has exited with 2, and said why."""


class FailedError(HdnnError):
    """The command line has exited with 1."""


def _flat(lists: Any) -> list[str]:
    return [item for some in lists for item in some]


def _paths(value: Any, at: str = "") -> Iterator[str]:
    if at:
        yield at
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _paths(inner, f"{at}.{key}" if at else str(key))


TARGETS = {target.__name__: target for target in (spec, graph, images, tables, checkpoint, cli)}


# --- running them --------------------------------------------------------------------------------


def fuzz(target: str, examples: int, start: int) -> dict[str, Any]:
    """Try so many inputs on a target in this process."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        inputs, attempt = TARGETS[target](Path(folder))

        @seed(start)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def run(given: Any) -> None:
            tally.take(attempt, given)

        try:
            run()
        finally:
            os.chdir("/")
    return {"target": target, **tally.report()}


def main() -> None:
    """Fuzz all targets, each in a process of its own."""
    parser = argparse.ArgumentParser(description="damaged, random and hostile input")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", choices=[*TARGETS], default=[*TARGETS])
    parser.add_argument("--here", action="store_true", help="one target, in this process")
    o = parser.parse_args()
    if o.here:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        print(json.dumps(fuzz(o.targets[0], o.examples, o.seed)))
        return
    failed = []
    for target in o.targets:
        command = [sys.executable, "-m", "tests.fuzz", "--here", "--targets", target]
        command += ["--examples", str(o.examples), "--seed", str(o.seed)]
        start = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(target)
        else:
            line = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({**line, "seconds": round(time.monotonic() - start)}), flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
