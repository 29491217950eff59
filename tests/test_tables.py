from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_iris
from torch.utils.data import TensorDataset

import hdnn_dist
from hdnn_dist.data import load_features, load_labels, load_rows, load_targets
from hdnn_dist.errors import DataError, SpecError, UserError
from hdnn_dist.job import Job
from hdnn_dist.spec import DataSpec
from hdnn_dist.tables import read_columns, read_targets, write_table
from tests.commands import hdnn

NAMES = ["sepal length", "sepal width", "petal length", "petal, width"]
CLASSES = ["setosa", "versicolor", "virginica"]
ROWS = np.random.default_rng(0).permutation(150)
Writer = Callable[[Path], None]


def iris() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_iris(return_X_y=True)
    return x[ROWS], y[ROWS]


def write_csv(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    for part, rows in (("train", slice(0, 100)), ("test", slice(100, 150))):
        with (folder / f"{part}.csv").open("w", newline="") as stream:
            lines = csv.writer(stream)
            lines.writerow([*NAMES[:2], "species", *NAMES[2:]])
            for values, k in zip(x[rows].tolist(), y[rows].tolist(), strict=True):
                lines.writerow([*values[:2], CLASSES[k], *values[2:]])


def write_parquet(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part, rows in (("train", slice(0, 100)), ("test", slice(100, 150))):
        columns = {name: x[rows, k] for k, name in enumerate(NAMES)}
        columns["species"] = [CLASSES[k] for k in y[rows]]
        parquet.write_table(arrow.table(columns), folder / f"{part}.parquet")


def write_arrays(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    write_table(folder, (x[:100], y[:100]), (x[100:], y[100:]), NAMES)


def spec(folder: Path, **more: object) -> dict[str, object]:
    views = {"a": NAMES[:1], "b": NAMES[1:3], "c": NAMES[3:]}
    data = {"name": "table", "dir": str(folder), "target": "species", "classes": CLASSES}
    return {
        "topology": {"agents": ["a", "b", "c"], "edges": [["a", "b"], ["b", "c"]], "d": 4},
        "model": {"layers": 4},
        "data": {**data, "split": {"kind": "columns", "columns": views}, **more},
        "training": {"epochs": 40, "batch_size": 20, "optimizer": {"name": "adam", "lr": 0.02}},
    }


@pytest.fixture(params=[write_csv, write_parquet, write_arrays], ids=lambda f: f.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    request.param(tmp_path, *iris())
    return tmp_path


def test_agents_learn_a_table_column_by_column(folder: Path, tmp_path: Path) -> None:
    job = Job.load(spec(folder))
    assert [view.columns for view in job.views] == [(0,), (1, 2), (3,)]
    assert (job.data.features, job.data.classes) == (4, 3)
    assert (job.data.train, job.data.test) == (100, 50)
    summary = hdnn_dist.train(job, run=tmp_path / "run", local=True)
    assert summary.test_accuracy > 0.9


def test_features_are_those_of_the_file_scaled_by_the_training_set(folder: Path) -> None:
    x, y = iris()
    data = Job.load(spec(folder)).spec.data
    expected = (x - x[:100].mean(0)) / x[:100].std(0)
    for part, rows in (("train", slice(0, 100)), ("test", slice(100, 150))):
        found = load_features(data, part, [3, 0])  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected[rows][:, [3, 0]], atol=1e-5)
        np.testing.assert_array_equal(load_labels(data, part), y[rows])  # type: ignore[arg-type]
    assert load_features(data, "test", ()).shape == (50, 0)
    few = data.model_copy(update={"train_samples": 10})
    own = (x[:10] - x[:10].mean(0)) / x[:10].std(0)
    np.testing.assert_allclose(load_features(few, "train", range(4)), own, atol=1e-5)
    np.save(folder / "new.npy", x[:5])
    np.testing.assert_allclose(
        load_rows(data, folder / "new.npy", [1]), expected[:5, 1:2], atol=1e-5
    )


def test_a_table_is_trained_evaluated_predicted_shown_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path, *iris())
    x, y = iris()
    np.save(tmp_path / "new.npy", x[100:])
    job = tmp_path / "job.yaml"
    content = spec(Path("."))
    job.write_text(json.dumps(content))  # JSON is YAML; the folder is the spec's own
    run = str(tmp_path / "run")
    for command in (
        ["train", str(job), "--local", "--run", run, "--no-tensorboard"],
        ["eval", run, "--local"],
        ["report", run, "--local", "--no-bsm"],
        ["export", run],
        ["predict", run, "--local", "--input", str(tmp_path / "new.npy")],
    ):
        assert hdnn(*command) == 0, command
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()[-50:]]
    assert np.mean([int(row[1]) for row in rows] == y[100:]) > 0.9
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert re.search(r"Most frequent mistakes: (virginica|versicolor|setosa) taken for [vs]", page)
    assert re.search(r"^(virginica|versicolor), taken for (virginica|versicolor) \(", page, re.M)
    exported = json.loads((tmp_path / "run" / "export" / "model.json").read_text())
    assert exported["output"]["classes"] == CLASSES
    told = exported["input"]
    features = torch.from_numpy((x[100:] - told["mean"]) / told["std"]).float()
    program = torch.export.load(tmp_path / "run" / "export" / "model.pt2").module()
    assert program(features).argmax(1).tolist() == [int(row[1]) for row in rows]


def test_arrays_tensors_and_data_sets_make_the_same_table(tmp_path: Path) -> None:
    x, y = iris()
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    for name, given in (("arrays", (x, y)), ("tensors", tensors), ("set", TensorDataset(*tensors))):
        section = write_table(tmp_path / name, given, given)
        assert section == {"name": "table", "dir": str(tmp_path / name), "classes": 3}
        job = Job.load({"topology": {"agents": 2, "edges": [["a1", "a2"]]}, "data": section})
        found = read_columns(job.spec.data, "test", range(4))
        np.testing.assert_allclose(found, x, atol=1e-6)
    images = np.zeros((2, 3, 3)), np.array([0, 1])
    assert write_table(tmp_path / "images", images, images)["classes"] == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((np.zeros((3, 2)), np.zeros(2, int)), "features .3, 2. and classes .2,."),
        ((np.zeros((3, 2)), np.array([0, 1, -1])), "from 0"),
        ((np.zeros(3), np.zeros(3, int)), "no samples"),
        (([[1], [1, 2]], [0, 1]), "no samples"),
        (7, "no samples"),
    ],
)
def test_what_is_no_data_set_is_refused(given: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        write_table(tmp_path, given, given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="3 names for 2 features"):
        write_table(tmp_path, (np.eye(2), np.arange(2)), (np.eye(2), np.arange(2)), list("abc"))


def section(folder: Path, **more: object) -> DataSpec:
    return DataSpec.model_validate(
        {"name": "table", "dir": str(folder), "target": "t", "classes": ["0", "1"], **more}
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line of names"),
        ("\n1,2\n", "line of names"),
        ("a,b\n1,2\n", "has no column 't'"),
        ("t\n1\n", "1 samples of 0 features"),
        ("a,t\n", "0 samples"),
        ("a,a,t\n1,2,0\n", "two columns of one name"),
        ("a,t,t\n1,0,1\n", "two columns of one name"),
        ("a,t\nx,0\n", "could not convert string 'x'"),
        ("a,b,t\n1,2\n", "column"),
        ("a,t\nnan,0\n", "sample 1 has nan in column 'a'"),
        ("a,t\n1,2\n", "of class '2'"),
        ('a,t\n"1,0\n', "could not convert"),
        ('a,t\n1,"0\n1"\n2,0\n', "class '0\\\\n1'"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "test.csv").write_text(text)

    def read() -> object:
        data = section(tmp_path)
        return load_features(data, "train", [0]), load_labels(data, "train")

    with pytest.raises(UserError, match=says):
        read()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    damaged = {".safetensors": b"damaged", ".parquet": b"PAR1", ".csv": b"a,t\n\xff\xfe,0\n"}
    for suffix, content in damaged.items():
        for part in ("train", "test"):
            (tmp_path / f"{part}{suffix}").write_bytes(content)
        with pytest.raises(DataError, match=f"train{suffix}"):
            load_features(section(tmp_path), "train", [0])
        for part in ("train", "test"):
            (tmp_path / f"{part}{suffix}").unlink()
    for bad in (
        {"x": torch.zeros(3, 2)},
        {"x": torch.zeros(3), "y": torch.zeros(3)},
        {"x": torch.zeros(3, 2), "y": torch.zeros(4, dtype=torch.long)},
        {"x": torch.zeros(3, 2), "y": torch.zeros(3)},
        {"x": torch.zeros(3, 2), "y": torch.zeros(3, 2, 2, dtype=torch.long)},
    ):
        for file in tmp_path.iterdir():
            file.unlink()
        for part in ("train", "test"):
            save_file(bad, tmp_path / f"{part}.safetensors")
        with pytest.raises(DataError, match="write_table"):
            load_features(section(tmp_path), "train", [0])


def test_no_file_is_passed_over_for_another_of_the_same_part(tmp_path: Path) -> None:
    write_csv(tmp_path, *iris())
    write_arrays(tmp_path, *iris())
    with pytest.raises(DataError, match=r"several tables of the train set: .*csv, .*safetensors"):
        Job.load(spec(tmp_path))


def test_a_table_that_does_not_fit_the_job_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path, *iris())
    views = {"a": ["petal length"], "b": ["petal lenght"]}
    for more, says in (
        ({"split": {"kind": "columns", "columns": views}}, "did you mean 'petal length'"),
        ({"split": {"kind": "columns", "columns": {"d": NAMES}}}, "columns.d: there is no agent"),
        ({"split": {"kind": "columns", "columns": {"a": []}}}, "columns: no agent sees"),
        ({"split": {"kind": "columns", "columns": {"a": NAMES[:1] * 2}}}, "a.1: .* comes twice"),
        ({"target": "specie"}, "did you mean 'species'"),
        ({"classes": [*CLASSES, CLASSES[0]]}, "the class 'setosa' is named twice"),
        ({"classes": None}, "classes of a table are not given"),
        ({"dir": None}, "read from a folder"),
        ({"train_samples": 101}, "101 samples asked for"),
    ):
        with pytest.raises(SpecError, match=says):
            Job.load(spec(tmp_path, **more))
    with pytest.raises(SpecError, match="no names of columns"):
        Job.load(spec(tmp_path, name="digits", dir=None))
    (tmp_path / "test.csv").write_text("sepal length,species\n1,setosa\n")
    with pytest.raises(DataError, match="only one of the files train and test"):
        Job.load(spec(tmp_path))
    (tmp_path / "test.csv").unlink()
    with pytest.raises(DataError, match="no table of the test set"):
        Job.load(spec(tmp_path))


# --- targets that are numbers --------------------------------------------------------------------

TARGETS = ["sum, of two", "difference"]
OWN = {"a": TARGETS[:1], "c": TARGETS[1:]}


def pair() -> tuple[np.ndarray, np.ndarray]:
    """Features, and targets of other units that two agents can tell if they talk."""
    x = np.random.default_rng(1).standard_normal((400, 4))
    return x, np.stack([1000 + 50 * (x[:, 0] + x[:, 1]), 1e-3 * (x[:, 3] - x[:, 2])], 1)


def regression(folder: Path, targets: object, **more: object) -> dict[str, object]:
    made = spec(folder)
    data = {"name": "table", "dir": str(folder), "targets": targets}
    views = {"a": NAMES[:1], "b": NAMES[1:3], "c": NAMES[3:]}
    return made | {"data": data | {"split": {"kind": "columns", "columns": views}} | more}


def numbers_as_csv(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    for part, rows in (("train", slice(0, 300)), ("test", slice(300, 400))):
        with (folder / f"{part}.csv").open("w", newline="") as stream:
            lines = csv.writer(stream)
            lines.writerow([TARGETS[1], *NAMES, TARGETS[0]])
            lines.writerows(np.column_stack([y[rows, 1:], x[rows], y[rows, :1]]).tolist())


def numbers_as_parquet(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part, rows in (("train", slice(0, 300)), ("test", slice(300, 400))):
        columns = {name: x[rows, k] for k, name in enumerate(NAMES)}
        columns |= {name: y[rows, k] for k, name in enumerate(TARGETS)}
        parquet.write_table(arrow.table(columns), folder / f"{part}.parquet")


def numbers_as_arrays(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    section = write_table(folder, (x[:300], y[:300]), (x[300:], y[300:]), NAMES, TARGETS)
    assert section == {"name": "table", "dir": str(folder), "targets": TARGETS}


@pytest.mark.parametrize("write", [numbers_as_csv, numbers_as_parquet, numbers_as_arrays])
def test_targets_are_those_of_the_file_over_their_deviation(write: Writer, tmp_path: Path) -> None:
    x, y = pair()
    write(tmp_path, x, y)
    job = Job.load(regression(tmp_path, OWN))
    assert (job.data.targets, job.data.outputs, job.data.features) == (tuple(TARGETS), 2, 4)
    expected = (y - y[:300].mean(0)) / y[:300].std(0)
    found = load_targets(job.spec.data, "test", TARGETS[::-1])
    np.testing.assert_allclose(found, expected[300:, ::-1], atol=1e-5)
    own = (x - x[:300].mean(0)) / x[:300].std(0)
    found = load_features(job.spec.data, "test", range(4))
    np.testing.assert_allclose(found, own[300:], atol=1e-5)


@pytest.mark.parametrize("targets", [TARGETS, OWN], ids=["at the root", "by agents"])
def test_a_regression_is_trained_evaluated_predicted_shown_and_exported(
    targets: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = pair()
    numbers_as_csv(tmp_path, x, y)
    np.save(tmp_path / "new.npy", x[300:])
    job, run = tmp_path / "job.yaml", tmp_path / "run"
    job.write_text(json.dumps(regression(Path("."), targets)))
    for command in (
        ["check", str(job)],
        ["train", str(job), "--local", "--run", str(run), "--no-tensorboard"],
        ["eval", str(run), "--local"],
        ["report", str(run), "--local", "--no-bsm"],
        ["analyze", str(run), "--local", "--samples", "1"],
        ["export", str(run)],
        ["predict", str(run), "--local", "--input", str(tmp_path / "new.npy")],
    ):
        assert hdnn(*command) == 0, command
    said = capsys.readouterr().out
    rows = list(csv.reader(said.splitlines()[-101:]))
    assert rows[0] == ["index", *TARGETS]
    found = np.array(rows[1:], float)[:, 1:]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_r2"] > 0.9
    assert np.sqrt(np.mean((found - y[300:]) ** 2)) == pytest.approx(summary["test_rmse"], rel=1e-3)
    assert f"test RMSE {summary['test_rmse']:.4g}, R² {summary['test_r2']:.4f}" in said
    hops = "2 agents read out their own" if targets is OWN else "hops to the root"
    assert hops in " ".join(said.split())
    page = (run / "report" / "report.html").read_text()
    assert f"<td>{summary['test_r2']:.4f}</td>" in page
    assert "Predicted and true" in page
    assert f"<h1>topology learns {tmp_path.name}</h1>" in page
    assert {"fit", "errors", "rmse"} <= {file.stem for file in (run / "report").glob("*.png")}
    told = json.loads((run / "export" / "model.json").read_text())
    features = torch.from_numpy((x[300:] - told["input"]["mean"]) / told["input"]["std"]).float()
    program = torch.export.load(run / "export" / "model.pt2").module()
    output = told["output"]
    again = program(features).numpy() * output["std"] + output["mean"]
    assert output["targets"] == TARGETS
    np.testing.assert_allclose(again, found, rtol=1e-4, atol=1e-6)


def test_data_sets_with_numbers_make_the_same_table(tmp_path: Path) -> None:
    x, y = pair()
    one = torch.from_numpy(x), torch.from_numpy(y[:, 0])
    for name, given in (("tensors", one), ("set", TensorDataset(*one)), ("arrays", (x, y[:, :1]))):
        section = write_table(tmp_path / name, given, given)
        assert section["targets"] == ["y0"]
        data = DataSpec.model_validate(section)
        np.testing.assert_array_equal(read_targets(data, "test", ["y0"]), y[:, :1])
    whole = x, np.arange(len(x))
    section = write_table(tmp_path / "whole", whole, whole, targets=["age"])
    assert read_targets(DataSpec.model_validate(section), "train", ["age"])[7, 0] == 7


def test_agents_take_their_targets_with_them(tmp_path: Path) -> None:
    numbers_as_csv(tmp_path, *pair())
    job = Job.load(regression(tmp_path, OWN))
    without = job.without({"a"})  # be it the centre or not
    assert (without.data.targets, without.architecture.own) == (("difference",), ((), (0,)))
    assert job.without({"b"}).data.targets == tuple(TARGETS)
    with pytest.raises(UserError, match="no agent is left"):
        job.without({"a", "c"})


def test_targets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    x, y = pair()
    numbers_as_csv(tmp_path, x, y)
    for targets, more, says in (
        (TARGETS, {"classes": 2}, "both targets and classes"),
        (TARGETS, {"name": "digits", "dir": None}, "digits has classes, not targets"),
        (["differenze"], {}, "did you mean 'difference'"),
        ({"d": TARGETS}, {}, "there is no agent 'd'"),
        ({"a": TARGETS, "b": TARGETS[:1]}, {}, "'sum, of two' is named twice"),
        ([], {}, "at least 1"),
        ({"a": []}, {}, "at least 1"),
        ("difference", {}, "a list of columns, or one per agent"),
    ):
        with pytest.raises(SpecError, match=says):
            Job.load(regression(tmp_path, targets, **more))
    for readout, says in (({"root": "a"}, "leave root out"), ({"agents": ["a"]}, "leave agents")):
        model = {"layers": 4, "readout": readout}
        with pytest.raises(SpecError, match=says):
            Job.load(regression(tmp_path, OWN) | {"model": model})
    write_table(tmp_path / "classes", (x, np.arange(400) % 2), (x, np.arange(400) % 2), NAMES)
    with pytest.raises(SpecError, match=r"holds classes; give data\.classes"):
        Job.load(regression(tmp_path / "classes", ["y0"]))
    write_table(tmp_path / "numbers", (x, y), (x, y), NAMES)
    with pytest.raises(SpecError, match=r"holds targets; name data\.targets"):
        Job.load(spec(tmp_path / "numbers"))
    with pytest.raises(UserError, match="1 names for 2 targets"):
        write_table(tmp_path, (x, y), (x, y), targets=["y"])
    with pytest.raises(UserError, match="alike in both sets"):
        write_table(tmp_path, (x, y), (x, y[:, 0]))
    (tmp_path / "train.csv").write_text("sepal length,difference\n1,x\n")
    with pytest.raises(DataError, match="could not convert string 'x'"):
        read_targets(
            section(tmp_path, targets=["difference"], classes=None), "train", ["difference"]
        )


def test_damaged_names_of_targets_are_told(tmp_path: Path) -> None:
    for told in ("{", "7", '["y"]', '{"y": 1, "z": 2}'):
        save_file(
            {"x": torch.zeros(3, 2), "y": torch.zeros(3, 2)},
            tmp_path / "train.safetensors",
            {"targets": told},
        )
        with pytest.raises(DataError, match=r"train.safetensors holds y .3, 2. without a name"):
            read_targets(section(tmp_path, targets=["y"], classes=None), "train", ["y"])
