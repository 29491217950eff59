from __future__ import annotations

import re
from pathlib import Path

import pytest

import hdnn_dist
from hdnn_dist.checkpoint import checkpoints, latest_checkpoint
from hdnn_dist.errors import CheckpointError, UserError
from hdnn_dist.job import Job
from hdnn_dist.run import create, differences, has_checkpoint, incompatible, reopen, vacant
from hdnn_dist.storage import place
from hdnn_dist.trainer import LocalRunner, restore
from tests.strategies import PAIR, tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return create(tiny(), tmp_path / "run")


def test_a_run_comes_back_as_the_same_job(run: Path) -> None:
    assert reopen(run).digest == tiny().digest
    assert not has_checkpoint(run)


def test_a_new_run_gets_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    job = tiny()
    assert [create(job), create(job)] == [
        Path("runs/a-pair-of-digits-now"),
        Path("runs/a-pair-of-digits-now-2"),
    ]
    (tmp_path / "empty").mkdir()
    assert vacant(job, tmp_path / "empty") == tmp_path / "empty"


def test_a_place_that_is_taken_is_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not empty.*--resume"):
        create(tiny(), run)
    with pytest.raises(CheckpointError, match="is a file"):
        vacant(tiny(), run / "spec.yaml")


def test_a_place_that_cannot_be_made_is_found_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"spec\.yaml is a file"):
        vacant(tiny(), run / "spec.yaml" / "deep" / "run")
    assert vacant(tiny(), tmp_path / "a" / "b") == tmp_path / "a" / "b"
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    monkeypatch.chdir(tmp_path)
    for path in (None, Path("run2"), tmp_path / "a" / "b"):
        with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be written to"):
            vacant(tiny(), path)


def test_what_a_run_that_goes_on_may_change(run: Path) -> None:
    job = reopen(
        run,
        [
            "training.epochs=40",
            "training.schedule={name: cosine}",
            "training.optimizer.lr=0.5",
            "training.clip_norm=1",
            "cluster.agents_per_actor=auto",
            "topology.agents.0.resources={camera: 1}",
        ],
    )
    assert job.spec.training.epochs == 40
    assert job.topology.agents[0].resources == {"camera": 1}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.layers=3", "model.layers: 1 -> 3;"),
        ("topology.agents.1.d=5", "topology.agents.b.d: 2 -> 5;"),
        ("topology.agents=[a, b, c]", 'topology.agents.c: absent -> {"d": 2'),
        ("data.train_samples=32", "data.train_samples: 64 -> 32;"),
        ("training.batch_size=8", "training.batch_size: 64 -> 8;"),
        ("training.seed=3", "training.seed: 0 -> 3;"),
        ("training.dtype=float64", 'training.dtype: "float32" -> "float64";'),
        ("training.optimizer.name=sgd", 'training.optimizer.name: "adam" -> "sgd";'),
    ],
)
def test_what_it_may_not(run: Path, override: str, says: str) -> None:
    extra = ["model.readout={agents: [a]}"] if "[a, b, c]" in override else []
    with pytest.raises(CheckpointError) as error:
        reopen(run, [override, *extra])
    assert says in str(error.value)


def test_every_changed_key_is_named(run: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        reopen(run, ["model.layers=3", "model.h=0.5", "training.epochs=2"])
    assert ": model.layers: 1 -> 3, model.h: 0.25 -> 0.5; leave" in str(error.value)


def test_agents_and_edges_that_changed_are_named_and_not_counted(run: Path) -> None:
    before = tiny().spec
    topology = {
        "name": "a pair/of",
        "agents": [{"name": "c", "d": 3}, {"name": "a", "cpu": 2}],
        "d": 2,
        "edges": [["a", "c"]],
    }
    data = {"name": "double_moons", "train_samples": 64, "test_samples": 10}
    after = tiny(topology=topology, data=data).spec
    assert incompatible(before, before) == []
    changes = {change.split(":")[0]: change for change in incompatible(before, after)}
    assert changes.keys() == {
        "topology.agents.b",
        "topology.agents.c",
        "topology.edges.a - b",
        "topology.edges.a - c",
        "data.name",
    }
    assert re.fullmatch(r'topology.agents.c: absent -> {"d": 3.*', changes["topology.agents.c"])
    assert changes["topology.edges.a - b"] == 'topology.edges.a - b: "an edge" -> absent'
    turned = tiny(topology={**PAIR, "agents": ["b", "a"]}).spec
    assert incompatible(before, turned) == ['order of topology.agents: ["a", "b"] -> ["b", "a"]']
    assert changes["data.name"] == 'data.name: "digits" -> "double_moons"'


def test_specs_side_by_side_differ_key_by_key() -> None:
    larger = {"topology.agents": 5, "topology.edges.args.n": 5}
    overrides = [[], ["model.layers=9"], [f"{key}={n}" for key, n in larger.items()]]
    specs = [Job.load(None, own).spec for own in overrides]
    assert differences(specs[:1]) == differences([specs[0]] * 2) == []
    rows = dict(differences(specs))
    assert rows["model.layers"] == ["4", "9", "4"]
    assert rows["topology.agents.a8.d"] == ["8", "8", "absent"]
    assert not any("epochs" in key for key in rows)


@pytest.mark.parametrize("url", [False, True])
def test_a_spec_that_was_edited_after_a_checkpoint_is_refused_key_by_key(
    tmp_path: Path, url: bool
) -> None:
    where = "memory://edited/run" if url else tmp_path / "run"
    hdnn_dist.train(tiny(training={"epochs": 1}), run=where, local=True)
    file = place(where) / "spec.yaml"
    good = file.read_text()
    file.write_text(good.replace("h: 0.25", "h: 0.5").replace("seed: 0", "seed: 1"))
    for call in (reopen, hdnn_dist.load):
        with pytest.raises(CheckpointError) as error:
            call(where)
        assert "step-00000001: of another job" in str(error.value)
        assert ": model.h: 0.25 -> 0.5, training.seed: 0 -> 1; leave" in str(error.value)
    other = tiny(training={"epochs": 2, "dtype": "float64"})  # a job that was never reopened
    with pytest.raises(CheckpointError, match=r'training\.dtype: "float32" -> "float64";'):
        hdnn_dist.fit(LocalRunner(other), where)
    file.write_text(good.replace("lr: 0.01", "lr: 0.5"))
    assert reopen(where).spec.training.optimizer.lr == 0.5


def test_no_run_and_no_checkpoint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no spec\.yaml"):
        reopen(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        restore(LocalRunner(tiny()), run)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    summary = hdnn_dist.train(
        overrides=["training.epochs=1", "data.train_samples=64", "model.layers=1"],
        run=tmp_path / "run",
        local=True,
    )
    [file] = (tmp_path / "run").glob("checkpoints/*/a3.safetensors")
    damage(file)
    with pytest.raises(CheckpointError, match=r"a3\.safetensors: its SHA-256"):
        hdnn_dist.load(summary.run)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"a3\.safetensors: cannot be read"):
        hdnn_dist.load(summary.run)


def test_the_checkpoint_before_a_damaged_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ["data.train_samples=128", "model.layers=1", "training.epochs=4"]
    whole = hdnn_dist.train(overrides=overrides, run=tmp_path / "whole", local=True)
    run = Path(hdnn_dist.train(overrides=overrides, run=tmp_path / "run", local=True).run)
    damage(run / "checkpoints" / "step-00000008" / "a3.safetensors")
    (run / "checkpoints" / "step-00000006" / "manifest.json").write_text("{")
    (run / "summary.json").unlink()
    with hdnn_dist.open_run(run, local=True) as (_, step):
        assert step == 4
    assert "a3.safetensors: its SHA-256 is not the manifest's" in caplog.text
    assert "step-00000006/manifest.json: missing or damaged" in caplog.text
    again = hdnn_dist.fit(LocalRunner(reopen(run)), run)
    assert again.test_loss == whole.test_loss
    for folder in (run / "checkpoints").iterdir():
        damage(folder / "a1.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000008/a1\.safetensors: its SHA-256"):
        hdnn_dist.load(run)


def test_no_bit_of_a_manifest_can_flip_unseen(tmp_path: Path) -> None:
    job = tiny(training={"batch_size": 32, "epochs": 2})
    run = create(job, tmp_path / "run")
    hdnn_dist.fit(LocalRunner(job), run, tensorboard=False)
    (run / "summary.json").unlink()
    file = checkpoints(run)[-1] / "manifest.json"
    good = file.read_bytes()
    for k in range(0, len(good), 7):
        content = bytearray(good)
        content[k] ^= 1 << k % 8
        file.write_bytes(content)
        assert latest_checkpoint(run)[1].step == 2, content
        if k % 50 == 0:
            assert restore(LocalRunner(reopen(run)), run) == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"leave": ["d"]}, "there is no agent 'd'"),
        ({"join": ["a"]}, "agent 'a' takes part already"),
        ({"leave": ["c", "b"]}, "'b' is the root"),
        ({"leave": ["a", "a"], "join": ["b"]}, "'b' takes part already"),
    ],
)
def test_agents_that_cannot_leave_or_join_are_refused(
    changes: dict[str, list[str]], error: str, tmp_path: Path
) -> None:
    line = {"agents": ["a", "b", "c"], "d": 2, "edges": [["a", "b"], ["b", "c"]]}
    run = create(tiny(topology=line), tmp_path / "run")
    with pytest.raises(UserError, match=error):
        hdnn_dist.regroup(run, **changes)
    assert reopen(run).absent == ()


def test_a_damaged_list_of_absent_agents_is_named(run: Path) -> None:
    (run / "absent.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match=r"absent\.json: damaged, or no list of names"):
        reopen(run)
