"""A user's own samples: numbers in columns, and a column of classes or columns of targets.

::

    DIR/train.csv       or .parquet, or .safetensors
    DIR/test.csv        likewise, with the same columns

`DIR` is the spec's `data.dir`. CSV has a line of names, then a sample a line; Parquet takes the
package pyarrow. Their features are all columns but the `data.target` (or the `data.targets`, which
are numbers to predict), in the order of the training file. A safetensors file holds `x (n, F)` and
the classes `y (n,)` by number or the targets `y (n, C)`, which is what `write_table` makes of
arrays, tensors and torch data sets.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from hdnn_dist.errors import DataError, SpecError, UserError, did_you_mean
from hdnn_dist.spec import DataSpec
from hdnn_dist.storage import write

Part = Literal["train", "test"]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Samples = tuple[Any, Any] | Dataset[Any]
KINDS = (".csv", ".parquet", ".safetensors")
MAX_NUMBERS = 1 << 31  # in a file
LARGEST = 1e30  # of a feature, whose square float64 still holds


@dataclass(frozen=True)
class Table:
    """What is known of a table without its numbers.

    Attributes:
        names: of the features, in order.
        train, test: how many samples.
    """

    names: tuple[str, ...]
    train: int
    test: int


def describe_table(spec: DataSpec) -> Table:
    """The features and sizes of a table.

    Raises:
        SpecError: no folder or no classes are given.
        DataError: a file is missing or is no table, or the two have other columns.
    """
    if spec.dir is None:
        raise SpecError(
            ("data", "dir"), "a table is read from a folder", "name it, with train.csv and test.csv"
        )
    if spec.classes is None and spec.targets is None:
        raise SpecError(
            ("data", "classes"),
            "the classes of a table are not given",
            "list them, or say how many whole numbers from 0 there are; or name data.targets, "
            "columns of numbers to predict",
        )
    if len(names := class_names(spec) or ()) > len(set(names)):
        [(name, _)] = Counter(names).most_common(1)
        raise SpecError(("data", "classes"), f"the class {name!r} is named twice", "name it once")
    (names, train), (others, test) = (_look(spec, part) for part in ("train", "test"))
    if set(names) != set(others):
        odd = sorted(set(names) ^ set(others))[0]
        raise DataError(
            f"only one of the files train and test in {spec.dir} has the column {odd!r}",
            "give both the same columns",
        )
    return Table(names, train, test)


def class_names(spec: DataSpec) -> tuple[str, ...] | None:
    """The classes of a table in order; None if the spec has none."""
    if isinstance(spec.classes, int):
        return tuple(map(str, range(spec.classes)))
    return None if spec.classes is None else tuple(spec.classes)


def target_names(spec: DataSpec) -> tuple[str, ...]:
    """The targets of a table in order; none if it has classes."""
    if isinstance(spec.targets, dict):
        return tuple(name for own in spec.targets.values() for name in own)
    return tuple(spec.targets or ())


def read_columns(spec: DataSpec, part: Part, columns: Sequence[int]) -> Floats:
    """Features of every sample as they are in the file, `(n, len(columns))`; others are not kept.

    Raises:
        DataError: the file cannot be read, or one of them is no finite number.
    """
    names = _look(spec, "train")[0]
    return _read(spec, part, "x", [names[k] for k in columns])


def read_targets(spec: DataSpec, part: Part, names: Sequence[str]) -> Floats:
    """Targets of every sample as they are in the file, `(n, len(names))`; others are not kept.

    Raises:
        DataError: the file cannot be read, or one of them is no finite number.
    """
    return _read(spec, part, "y", names)


def _read(spec: DataSpec, part: Part, kind: Literal["x", "y"], wanted: Sequence[str]) -> Floats:
    n = _look(spec, part)[1]
    x_BF = np.empty((n, len(wanted)))
    if not wanted:
        return x_BF
    file = _file(spec, part)
    if file.suffix == ".safetensors":
        with _opened(file) as tensors:
            there = _look(spec, part)[0] if kind == "x" else _targets_of(file, tensors)
            place = {name: k for k, name in enumerate(there)}
            own = [place[name] for name in wanted]
            x_BF[:] = tensors.get_tensor(kind)[:, own].double().numpy()
    elif file.suffix == ".csv":
        x_BF[:] = _from_csv(file, wanted, float, n)
    else:
        columns_read = _from_parquet(file, wanted)
        try:
            for k, column in enumerate(columns_read):
                x_BF[:, k] = column.to_numpy()
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: {error}", "give numbers in all these columns") from None
    bad = np.argwhere(~(np.abs(x_BF) < LARGEST))  # so is what is no number
    if len(bad):
        row, k = bad[0]
        raise DataError(
            f"{file}: sample {row + 1} has {x_BF[row, k]:g} in column {wanted[k]!r}",
            f"give numbers below {LARGEST:g}, or leave the sample out",
        )
    return x_BF


def read_classes(spec: DataSpec, part: Part) -> Ints:
    """The class of every sample as its place in `data.classes`, `(n,)`.

    Raises:
        DataError: one of them is not among those.
    """
    file, classes, n = _file(spec, part), class_names(spec), _look(spec, part)[1]
    assert classes is not None
    found: Sequence[object]
    if file.suffix == ".safetensors":
        with _opened(file) as tensors:
            numbers = tensors.get_tensor("y").tolist()
        found = [classes[k] if k in range(len(classes)) else k for k in numbers]
    elif file.suffix == ".csv":
        found = [str(v).strip() for v in _from_csv(file, [spec.target], str, n)[:, 0]]
    else:
        found = _from_parquet(file, [spec.target])[0].to_pylist()
    place = {name: k for k, name in enumerate(classes)}
    try:
        return np.array([place[str(value)] for value in found], np.int64)
    except KeyError as error:
        raise DataError(
            f"{file}: there is a sample of class {error.args[0]!r}",
            did_you_mean(error.args[0], classes),
        ) from None


def write_table(
    folder: str | Path,
    train: Samples,
    test: Samples,
    names: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write samples as the files of a table.

    Args:
        folder: where; made if it is not there.
        train: features `(n, …)` and classes `(n,)` from 0, or targets `(n,)` or `(n, C)`, as arrays
            or tensors; or a torch data set of such pairs, one a sample. Features are flattened.
            Whole numbers `(n,)` are classes, unless `targets` are named.
        test: likewise.
        names: of the features; default: "0", "1", ….
        targets: names of the targets; default: "y0", "y1", ….

    Returns:
        What the `data` section of a spec needs, but for who sees what.

    Raises:
        UserError: these are no samples and classes, or targets.
    """
    folder = Path(folder).absolute()
    parts = {"train": _tensors(train), "test": _tensors(test)}
    numbers = targets is not None or any(
        y.is_floating_point() or y.dim() == 2 for _, y in parts.values()
    )
    section: dict[str, Any] = {"name": "table", "dir": str(folder)}
    widths, classes = {(x.shape[1], y[0].numel()) for x, y in parts.values() if len(y)}, 0
    for part, (x, y) in parts.items():
        if numbers:
            y = y.double()[:, None] if y.dim() == 1 else y.double()
        whole = y.dim() == 1 and len(y) > 0 and int(y.min()) >= 0
        if len(x) != len(y) or not len(x) or len(widths) > 1 or not (numbers or whole):
            what = "targets" if numbers else "classes"
            raise UserError(
                f"features {tuple(x.shape)} and {what} {tuple(y.shape)} of the {part} set",
                "give as many of both, alike in both sets; classes as whole numbers from 0",
            )
        told = {"names": _named(names, x.shape[1], "features", "")}
        if numbers:
            told["targets"] = _named(targets, y.shape[1], "targets", "y")
            section["targets"] = json.loads(told["targets"])
        else:
            classes = max(classes, int(y.max()) + 1)
            section["classes"] = classes
        write(folder / f"{part}.safetensors", save({"x": x, "y": y}, told))
    return section


def _named(names: Sequence[str] | None, count: int, what: str, letter: str) -> str:
    if names is not None and len(names) != count:
        raise UserError(f"{len(names)} names for {count} {what}", "name each of them")
    return json.dumps(
        [f"{letter}{k}" for k in range(count)] if names is None else [*map(str, names)]
    )


def _tensors(given: Samples) -> tuple[Tensor, Tensor]:
    try:
        if not isinstance(given, tuple):
            size = len(given)  # type: ignore[arg-type]
            pairs = [given[k] for k in range(size)]
            xs, ys = ([torch.as_tensor(np.asarray(p[k])).flatten() for p in pairs] for k in (0, 1))
            y = torch.stack(ys)
            given = torch.stack(xs), y[:, 0] if y.shape[1] == 1 else y
        x, y = (torch.as_tensor(np.asarray(part)) for part in given)
        if y.dim() not in (1, 2):
            raise ValueError(f"what they are labelled with is of shape {tuple(y.shape)}")
        y = y if y.is_floating_point() else y.long()
        return x.flatten(1).float().contiguous(), y.contiguous()
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"these are no samples: {error}",
            "give (features, classes), (features, targets) or a torch data set of them",
        ) from None


# --- files ---------------------------------------------------------------------------------------


def _file(spec: DataSpec, part: Part) -> Path:
    folder = Path(spec.dir or "")
    found = [file for suffix in KINDS if (file := folder / f"{part}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{folder} has several tables of the {part} set: {', '.join(f.name for f in found)}",
            "leave the one that is meant there, and take the others away",
        )
    raise DataError(
        f"there is no table of the {part} set in {folder}",
        f"put it there as one of {', '.join(part + suffix for suffix in KINDS)}",
    )


def _look(spec: DataSpec, part: Part) -> tuple[tuple[str, ...], int]:
    """The features and the number of samples of a file, which is read for them once."""
    file, targets = _file(spec, part), target_names(spec)
    stat = file.stat()
    names, n = _header(file, stat.st_mtime_ns, stat.st_size)
    if len(set(names)) < len(names):
        raise DataError(f"{file} has two columns of one name", "give each a name of its own")
    if file.suffix != ".safetensors":
        key, ours = ("target", (spec.target,)) if spec.targets is None else ("targets", targets)
        _check_there(file, key, ours, names)
        names = tuple(name for name in names if name not in ours)
    else:
        with _opened(file) as tensors:
            there = _targets_of(file, tensors)
        if bool(there) != bool(targets):
            raise SpecError(
                ("data", "targets"),
                f"{file} holds {'targets' if there else 'classes'}",
                "name data.targets, not data.classes" if there else "give data.classes",
            )
        _check_there(file, "targets", targets, there)
    if not (0 < n * len(names) <= MAX_NUMBERS):
        raise DataError(
            f"{file} has {n} samples of {len(names)} features",
            f"give at least one of both, and at most {MAX_NUMBERS} numbers",
        )
    return names, n


def _check_there(file: Path, key: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            problem = f"{file} has no column {name!r}"
            raise SpecError(("data", key), problem, did_you_mean(name, names))


def _targets_of(file: Path, tensors: Any) -> tuple[str, ...]:
    """The names of the targets in a safetensors file; none if it holds classes."""
    shape = tensors.get_slice("y").get_shape()
    if len(shape) == 1:
        return ()
    told = (tensors.metadata() or {}).get("targets")
    names: Any = None
    if told is None and 0 < shape[0] * shape[1] <= MAX_NUMBERS:
        names = [f"y{k}" for k in range(shape[1])]
    elif told is not None:
        with contextlib.suppress(ValueError, RecursionError):  # told below
            names = json.loads(told)
    if isinstance(names, list) and len(names) == shape[1]:
        return tuple(map(str, names))
    raise DataError(
        f"{file} holds y {shape} without a name for each target",
        "write it with hdnn_dist.write_table",
    )


@lru_cache(maxsize=8)
def _header(file: Path, changed: int, length: int) -> tuple[tuple[str, ...], int]:
    """Names of the columns and number of samples of a file as of a time and length."""
    if file.suffix == ".csv":
        try:
            with file.open(newline="", encoding="utf-8-sig") as stream:
                lines = csv.reader(stream)
                names = tuple(name.strip() for name in next(lines, []))
                n = sum(1 for line in lines if line)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file}: {error}", "write it as CSV in UTF-8") from None
        if not names:
            raise DataError(
                f"{file} does not begin with a line of names", "write one, then a sample a line"
            )
        return names, n
    if file.suffix == ".parquet":
        meta = _parquet(file).metadata
        return tuple(meta.schema.to_arrow_schema().names), int(meta.num_rows)
    with _opened(file) as tensors:
        if not {"x", "y"} <= set(tensors.keys()):
            raise DataError(f"{file} holds no x and y", "write it with hdnn_dist.write_table")
        shape, labels = (tensors.get_slice(key).get_shape() for key in ("x", "y"))
        whole = tensors.get_slice("y").get_dtype()[0] in "IU" or len(labels) == 2
        told = (tensors.metadata() or {}).get("names")
    try:
        names = tuple(map(str, range(shape[1]) if told is None else json.loads(told)))
    except (ValueError, TypeError, IndexError):
        names = ()
    if (
        len(shape) != 2
        or len(names) != shape[1]
        or labels[:1] != shape[:1]
        or len(labels) > 2
        or not whole
    ):
        raise DataError(
            f"{file} holds {len(names)} names, x {shape} and y {labels}"
            + ("" if whole else " of no whole numbers"),
            "write it with hdnn_dist.write_table",
        )
    return names, shape[0]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file}: no safetensors file ({error})", "write it with hdnn_dist.write_table"
        ) from None


def _from_csv(file: Path, wanted: Sequence[str], kind: type, n: int) -> npt.NDArray[Any]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            names = [name.strip() for name in next(csv.reader(stream))]
            found: npt.NDArray[Any] = np.loadtxt(
                (line for line in stream if line.strip()),
                dtype=kind,
                delimiter=",",
                usecols=[names.index(name) for name in wanted],
                comments=None,
                quotechar='"',
                ndmin=2,
            )
    except (ValueError, IndexError) as error:
        raise DataError(f"{file}: {error}", "give a number in each of these columns") from None
    if len(found) != n:
        raise DataError(
            f"{file} has {n} samples, or {len(found)}, as one counts its lines",
            "write each on a line of its own",
        )
    return found


def _from_parquet(file: Path, wanted: Sequence[str]) -> list[Any]:
    """Columns of a Parquet file."""
    from pyarrow import ArrowException

    try:
        table = _parquet(file).read(columns=list(wanted))
        return [table.column(name) for name in wanted]
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error})", "write it anew") from None


def _parquet(file: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f"{file}: Parquet takes the package pyarrow, which is missing",
            "pip install pyarrow, or give a .csv file",
        ) from None
    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: no Parquet file ({error})", "write it anew") from None
