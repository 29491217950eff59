"""Data sets, and which agent sees what of them.

A sample is a row of F features; an image is flattened in raster order. An agent's *view* is the
columns it sees, and `load_features` gives it those alone: raw input stays with its agent, and the
labels with the root. Who trains on distorted images reads whole ones, by `load_images`. Sample
order and augmentation come from the shared seed by counter, so agents agree on them without a
message.

Sets: scikit-learn's handwritten digits (bundled, 8x8), MNIST (IDX files, 28x28), and the 2-D sets
of Galimberti, Furieri, Xu, Ferrari-Trecate (arXiv 2105.13205), whose zero-augmented state is
the encoder's affair; and a user's own tables (`hdnn_dist.tables`), each feature less its mean
and over its deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hdnn_dist.errors import DataError, SpecError, did_you_mean
from hdnn_dist.mnist import IMAGE, SAMPLES, Array, Part, ensure_available, locate_mnist, read_mnist
from hdnn_dist.spec import (
    AutoSplit,
    ColumnSplit,
    DataName,
    DataSpec,
    IndexSplit,
    PatchSplit,
    StripeSplit,
)
from hdnn_dist.storage import check_regular
from hdnn_dist.tables import (
    class_names,
    describe_table,
    read_classes,
    read_columns,
    read_targets,
    target_names,
)

__all__ = [
    "DataInfo",
    "Part",
    "View",
    "background",
    "classes_of",
    "describe",
    "ensure_available",
    "epoch_order",
    "generator",
    "load_features",
    "load_images",
    "load_labels",
    "load_rows",
    "load_targets",
    "locate_mnist",
    "moments",
    "scaled",
    "share",
    "shift_images",
    "shifts",
    "split_features",
    "split_targets",
    "target_moments",
]

MAX_VALUES = 10**8  # of a file of new samples: what is made of them is in memory

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataInfo:
    """What is known of a data set without loading it; ``image`` is (height, width).

    A table is called as its folder is. A set has classes, or ``targets``, which are numbers.
    """

    name: str
    features: int
    classes: int
    image: tuple[int, int] | None
    train: int
    test: int
    targets: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """How many numbers are to be told of a sample."""
        return len(self.targets) or self.classes

    def samples(self, part: Part) -> int:
        """How many samples a part has."""
        return self.train if part == "train" else self.test


@dataclass(frozen=True)
class View:
    """What one agent sees: feature indices in order; (height, width) where they are a rectangle."""

    columns: tuple[int, ...] = ()
    image: tuple[int, int] | None = None


SETS = {
    info.name: info
    for info in (
        DataInfo("digits", 64, 10, (8, 8), 1437, 360),
        DataInfo("mnist", math.prod(IMAGE), 10, IMAGE, SAMPLES["train"], SAMPLES["test"]),
        DataInfo("swiss_roll", 2, 2, None, 4000, 4000),
        DataInfo("double_circles", 2, 2, None, 4000, 4000),
        DataInfo("double_moons", 2, 2, None, 4000, 4000),
    )
}


# White, then mean and standard deviation of pixel / white over the training set.
PIXELS: dict[DataName, tuple[float, float, float]] = {
    "digits": (16.0, 0.3054, 0.3761),
    "mnist": (255.0, 0.1307, 0.3081),
}


def describe(spec: DataSpec) -> DataInfo:
    """The set's sizes, cut to the spec's ``train_samples`` and ``test_samples``.

    Raises:
        SpecError: more samples are asked for than there are, or a folder for a set without files.
    """
    _check_targets(spec)
    if spec.name == "table":
        table, classes = describe_table(spec), class_names(spec) or ()
        size = table.train, table.test
        name = Path(spec.dir or "").absolute().name or "table"  # what its owner calls it
        info = DataInfo(
            name, len(table.names), len(classes), None, *size, targets=target_names(spec)
        )
    else:
        info = SETS[spec.name]
    if spec.dir is not None and spec.name not in ("mnist", "table"):
        raise SpecError(
            ("data", "dir"),
            f"{spec.name} is built in and reads no folder, but {spec.dir} is given",
            "leave it out, or set data.name to mnist or table",
        )
    train, test = spec.train_samples or info.train, spec.test_samples or info.test
    for part, samples, there in (("train", train, info.train), ("test", test, info.test)):
        if samples > there:
            raise SpecError(
                ("data", f"{part}_samples"),
                f"{samples} samples asked for, but {spec.name} has {there} in its {part} set",
                f"give at most {there}, or leave it out to use all",
            )
    return replace(info, train=train, test=test)


def classes_of(spec: DataSpec) -> tuple[str, ...]:
    """What the classes are called, in order: as a table's owner names them, else by number."""
    return class_names(spec) or tuple(map(str, range(describe(spec).classes)))


def _check_targets(spec: DataSpec) -> None:
    loc = ("data", "targets")
    if spec.targets is None:
        return
    if spec.name != "table":
        raise SpecError(loc, f"{spec.name} has classes, not targets", "leave targets out")
    if spec.classes is not None:
        raise SpecError(loc, "both targets and classes are given", "leave one of them out")
    names = target_names(spec)
    for k, name in enumerate(names):
        if name in names[:k]:
            raise SpecError(loc, f"the target {name!r} is named twice", "name it once")


# --- who sees what -------------------------------------------------------------------------------


def split_features(spec: DataSpec, info: DataInfo, names: Sequence[str]) -> tuple[View, ...]:
    """One view per agent, in the order of ``names``; empty for agents that see nothing.

    In ``auto``, ``patches`` and ``stripes`` every feature is seen exactly once, and the parts are
    dealt in the order of ``split.agents`` (default: ``names``). ``indices`` may leave features
    out or show them to several agents.

    Raises:
        SpecError: the split names unknown agents or does not fit the data set.
    """
    split = spec.split
    if isinstance(split, ColumnSplit):
        views = _explicit(_by_index(spec, split, names), info, names)
    elif isinstance(split, IndexSplit):
        views = _explicit(split, info, names)
    else:
        seers = names if split.agents is None else split.agents
        if not seers:
            raise SpecError(
                ("data", "split", "agents"), "no agent sees any input", "name at least one agent"
            )
        _check_names(("data", "split", "agents"), seers, names)
        views = dict(zip(seers, _parts(split, info, len(seers)), strict=True))
    return tuple(views.get(name, View()) for name in names)


def _check_names(
    loc: tuple[str, ...], given: Sequence[str] | Mapping[str, object], names: Sequence[str]
) -> None:
    seen: set[str] = set()
    known = set(names)
    for k, name in enumerate(given):
        place = (*loc, name if isinstance(given, Mapping) else k)
        if name not in known:
            raise SpecError(place, f"there is no agent {name!r}", did_you_mean(name, names))
        if name in seen:
            raise SpecError(place, f"agent {name!r} is named twice", "name it once")
        seen.add(name)


def split_targets(
    spec: DataSpec, info: DataInfo, names: Sequence[str]
) -> tuple[tuple[int, ...], ...] | None:
    """Per agent, the numbers of its own targets; None if all are the root's.

    Raises:
        SpecError: one is given to an agent that there is not.
    """
    if not isinstance(spec.targets, dict):
        return None
    _check_names(("data", "targets"), spec.targets, names)
    place = {name: k for k, name in enumerate(info.targets)}
    return tuple(tuple(place[t] for t in spec.targets.get(name, ())) for name in names)


def _by_index(spec: DataSpec, split: ColumnSplit, agents: Sequence[str]) -> IndexSplit:
    """The split with columns by their numbers; what is wrong with it is told of the names."""
    loc = ("data", "split", "columns")
    if spec.name != "table":
        raise SpecError(loc, f"{spec.name} has no names of columns", "use a split of kind indices")
    _check_names(loc, split.columns, agents)
    if not any(split.columns.values()):
        raise SpecError(loc, "no agent sees any input", "give at least one agent a column")
    place = {name: k for k, name in enumerate(describe_table(spec).names)}
    for agent, names in split.columns.items():
        for k, name in enumerate(names):
            if name not in place:
                problem = f"the table has no feature {name!r}"
                raise SpecError((*loc, agent, k), problem, did_you_mean(name, place))
            if name in names[:k]:
                raise SpecError((*loc, agent, k), f"{name!r} comes twice", "list it once")
    return IndexSplit(
        kind="indices",
        indices={agent: [place[name] for name in names] for agent, names in split.columns.items()},
    )


def _explicit(split: IndexSplit, info: DataInfo, names: Sequence[str]) -> dict[str, View]:
    loc = ("data", "split", "indices")
    _check_names(loc, split.indices, names)
    _check_names(("data", "split", "enter"), split.enter, list(split.indices))
    if not any(split.indices.values()):
        raise SpecError(loc, "no agent sees any input", "give at least one agent an index")
    for name, columns in split.indices.items():
        for k, column in enumerate(columns):
            if column >= info.features:
                raise SpecError(
                    (*loc, name, k),
                    f"there is no feature {column} in {info.name}",
                    f"features are numbered 0 to {info.features - 1}",
                )
            if column in columns[:k]:
                raise SpecError((*loc, name, k), f"feature {column} comes twice", "list it once")
    return {name: View(tuple(columns)) for name, columns in split.indices.items()}


def _parts(split: AutoSplit | PatchSplit | StripeSplit, info: DataInfo, seers: int) -> list[View]:
    kind = ("data", "split", "kind")
    if isinstance(split, AutoSplit):
        if seers > info.features:
            raise SpecError(
                kind,
                f"{seers} agents cannot each see one of the {info.features} features",
                f"name at most {info.features} of them in split.agents",
            )
        return [View(tuple(run.tolist())) for run in np.array_split(range(info.features), seers)]
    if info.image is None:
        raise SpecError(
            kind,
            f"{info.name} is not a set of images",
            "use a split of kind auto or indices, or of a table columns",
        )
    raster = np.arange(info.features).reshape(info.image)
    if isinstance(split, StripeSplit):
        axis = 0 if split.axis == "rows" else 1
        if seers > info.image[axis]:
            raise SpecError(
                kind,
                f"{seers} agents cannot each see one of the {info.image[axis]} {split.axis}",
                f"name at most {info.image[axis]} of them in split.agents, or use kind patches",
            )
        return [_rectangle(stripe) for stripe in np.array_split(raster, seers, axis=axis)]
    (down, across), (height, width) = split.grid, info.image
    loc = ("data", "split", "grid")
    if height % down or width % across:
        raise SpecError(
            loc,
            f"a {down}x{across} grid does not divide {height}x{width} images",
            f"give divisors of {height} and {width}",
        )
    if down * across != seers:
        raise SpecError(
            loc,
            f"a {down}x{across} grid has {down * across} patches, but {seers} agents see input",
            "make them as many: change the grid, or name the agents in split.agents",
        )
    return [_rectangle(c) for r in np.split(raster, down) for c in np.split(r, across, axis=1)]


def _rectangle(part_HW: Array) -> View:
    return View(tuple(part_HW.ravel().tolist()), (part_HW.shape[0], part_HW.shape[1]))


# --- loading -------------------------------------------------------------------------------------


def load_features(spec: DataSpec, part: Part, columns: Sequence[int]) -> Floats:
    """The scaled features ``columns`` of every sample, (n, len(columns)); nothing else is kept.

    MNIST is streamed in small chunks, whose form is checked but not their content, and
    ``train_samples`` reads no further than it must. No columns: no file is opened.

    Raises:
        DataError: the MNIST files are missing or damaged.
    """
    x_BF = np.empty((describe(spec).samples(part), len(columns)), np.float32)
    if not len(columns):
        return x_BF
    if spec.name == "table":
        raw = read_columns(spec, part, columns)[: len(x_BF)]
        x_BF[:] = _standardised(spec, raw, columns)
        return x_BF
    start, index = 0, np.asarray(columns, np.intp)
    for block in _raw(spec, part):
        x_BF[start : start + len(block)] = scaled(spec.name, block[:, index])
        start += len(block)
    return x_BF


def load_images(spec: DataSpec, part: Part) -> Bytes:
    """The raw pixels of whole images, (n, F), from 0 to white; one copy in a process.

    Raises:
        DataError: the MNIST files are missing or damaged.
    """
    place = {"dir": str(locate_mnist(spec))} if spec.name == "mnist" else {}
    return _images(spec.model_copy(update={"split": AutoSplit(), **place}), part)


@lru_cache(maxsize=1)
def _images(spec: DataSpec, part: Part) -> Bytes:
    info, start = describe(spec), 0
    images = np.empty((info.samples(part), info.features), np.uint8)
    for block in _raw(spec, part):
        images[start : start + len(block)] = block
        start += len(block)
    return images


def load_labels(spec: DataSpec, part: Part) -> Ints:
    """The class of every sample, (n,), in the order of `load_features`.

    Raises:
        DataError: the MNIST files are missing or damaged.
    """
    info = describe(spec)
    n = info.samples(part)
    if spec.name == "table":
        return read_classes(spec, part)[:n]
    if spec.name != "mnist":
        return _embedded(spec.name, part)[1][:n]
    folder = locate_mnist(spec)
    labels = np.concatenate(list(read_mnist(folder, part, "labels", n)))[:, 0].astype(np.int64)
    if labels.max() >= info.classes:
        raise DataError(
            f"the {part} labels in {folder} go up to {labels.max()}, past {info.classes - 1}",
            "replace the label file by one of an MNIST-shaped set of ten classes",
        )
    return labels


def load_targets(spec: DataSpec, part: Part, names: Sequence[str]) -> Floats:
    """The standardised targets ``names`` of every sample, (n, len(names)); no others are kept.

    Raises:
        DataError: the file cannot be read, or one of them is no finite number.
    """
    mean, std = target_moments(spec, names)
    raw = read_targets(spec, part, names)[: describe(spec).samples(part)]
    return ((raw - mean) / std).astype(np.float32)


def load_rows(spec: DataSpec, path: Path, columns: Sequence[int]) -> Floats:
    """New samples from an ``.npy`` file, scaled like the data set: (n, len(columns)).

    The file holds raw values (for images 0 to white: 16 in digits, 255 in mnist) of shape
    (n, features) or (n, height, width). It is mapped, and only ``columns`` are copied.

    Raises:
        DataError: the file is missing, damaged, of another shape, or holds impossible values.
    """
    info = describe(spec)
    shapes = [(info.features,)] + ([info.image] if info.image else [])
    wanted = " or ".join(str(("n", *shape)).replace("'", "") for shape in shapes)
    mend = f"write it with numpy.save as an array of numbers of shape {wanted}"
    try:
        check_regular(path)
        raw = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header can raise whatever Python's tokenizer does
        raise DataError(f"{path} cannot be read as an .npy file: {error}", mend) from error
    if raw.dtype.kind not in "uif" or raw.shape[1:] not in shapes or not len(raw):
        raise DataError(f"{path} holds {raw.dtype} of shape {raw.shape}", mend)
    pixels: Sequence[Any] = np.unravel_index(np.asarray(columns, np.intp), raw.shape[1:])
    if len(raw) > (most := MAX_VALUES // info.features):
        raise DataError(
            f"{path} holds {len(raw)} samples, but of {spec.name} no more than {most} are taken",
            "split it into files of fewer rows, one after the other",
        )
    x_BF: Array = raw[(..., *pixels)]
    white = PIXELS.get(spec.name, (math.inf,))[0]
    low = 0.0 if info.image else -math.inf
    if not (np.isfinite(x_BF) & (x_BF >= low) & (x_BF <= white)).all():
        raise DataError(
            f"{path} holds values that are not finite or not raw values of {spec.name}",
            f"give pixels from 0 to {white:g}" if info.image else "give finite coordinates",
        )
    if spec.name == "table":
        return _standardised(spec, x_BF, columns)
    return scaled(spec.name, x_BF)


def moments(spec: DataSpec, columns: Sequence[int]) -> tuple[Array, Array]:
    """Mean and deviation of a table's features over the training set.

    A feature that never changes has the deviation 1.
    """
    return _moments(read_columns(spec, "train", columns)[: describe(spec).train])


def target_moments(spec: DataSpec, names: Sequence[str]) -> tuple[Array, Array]:
    """Mean and deviation of targets over the training set, as ``moments``."""
    return _moments(read_targets(spec, "train", names)[: describe(spec).train])


def _moments(x_BF: Array) -> tuple[Array, Array]:
    std = x_BF.std(0)
    return x_BF.mean(0), np.where(std > 0, std, 1.0)


def _standardised(spec: DataSpec, raw: Array, columns: Sequence[int]) -> Floats:
    mean, std = moments(spec, columns)
    return ((raw - mean) / std).astype(np.float32)


def background(name: DataName) -> float:
    """The scaled value of a black pixel (of a zero, in the 2-D sets)."""
    return float(scaled(name, np.zeros(1))[0])


def scaled(name: DataName, raw: Array) -> Floats:
    """Raw values less the mean of a set of images, over its deviation; 2-D sets as they are."""
    white, mean, std = PIXELS.get(name, (1.0, 0.0, 1.0))
    return ((raw / white - mean) / std).astype(np.float32)


def _raw(spec: DataSpec, part: Part) -> Iterator[Array]:
    """All features of all samples as they are stored, some samples at a time."""
    n = describe(spec).samples(part)
    if spec.name == "mnist":
        return read_mnist(locate_mnist(spec), part, "images", n)
    return iter([_embedded(spec.name, part)[0][:n]])


def _embedded(name: DataName, part: Part) -> tuple[Array, Ints]:
    return _digits(part) if name == "digits" else _plane(name, part)


def _digits(part: Part) -> tuple[Array, Ints]:
    """A fixed stratified split of scikit-learn's 1797 digits."""
    # Imported here: it takes a second, and agents without a view need it not.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x_BF, y_B = load_digits(return_X_y=True)
    rows = train_test_split(
        np.arange(len(y_B)), test_size=SETS["digits"].test, stratify=y_B, random_state=0
    )[part == "test"]
    return x_BF[rows], y_B[rows].astype(np.int64)


def _plane(name: DataName, part: Part) -> tuple[Array, Ints]:
    """The 2-D sets, four equal components ``k`` whose class is ``k mod 2``, ``t ~ U[0, 1)``.

    swiss roll      r = t (class 1), t + 0.2 (class 0);  θ = 4πt
    double circles  r = k + 1;  θ = 2πt;  noise U[-0.3, 0.3)²
    double moons    (cos θ, sin θ) (class 0), (1 - cos θ, 0.5 - sin θ) (class 1);  θ = πt;
                    the second pair 2 to the right;  noise U[-0.15, 0.15)²

    ``t`` is drawn, not a grid as in the authors' code, which makes train and test independent.
    """
    info = SETS[name]
    n = info.samples(part)
    rng = generator(list(SETS).index(name), part == "test", use=2)
    k = rng.permutation(np.arange(n) % 4)
    y_B, t, noise = k % 2, rng.random(n), rng.random((n, 2)) - 0.5
    turn = {"swiss_roll": 4.0, "double_circles": 2.0, "double_moons": 1.0}[name] * np.pi * t
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if name == "swiss_roll":
        return (t + 0.2 * (1 - y_B))[:, None] * ring, y_B
    if name == "double_circles":
        return (k + 1)[:, None] * ring + 0.6 * noise, y_B
    moon = np.where(y_B[:, None] == 0, ring, [1.0, 0.5] - ring)
    return moon + np.outer(k // 2, [2.0, 0.0]) + 0.3 * noise, y_B


# --- order and augmentation ----------------------------------------------------------------------


def generator(seed: int, count: int, use: int) -> np.random.Generator:
    """The random numbers of one use at one count: order 0, shifts 1, 2-D sets 2, distortions 3."""
    # The key is the state, so any draw can be made without those before it; the counter's top
    # word keeps the uses apart.
    return np.random.Generator(
        np.random.Philox(
            key=np.array([seed, count], np.uint64), counter=np.array([0, 0, 0, use], np.uint64)
        )
    )


def epoch_order(seed: int, epoch: int, n: int) -> Ints:
    """The order of the n samples in an epoch: a permutation, the same on every agent."""
    return generator(seed, epoch, use=0).permutation(n)


def share(samples: int, copy: int, copies: int) -> slice:
    """Which samples of a batch or a set one of several copies takes: runs as even as can be."""
    return slice(samples * copy // copies, samples * (copy + 1) // copies)


def shifts(seed: int, step: int, batch: int, limit: int) -> Ints:
    """How far each sample of a step moves (down, right): (batch, 2), uniform in [-limit, limit]."""
    return generator(seed, step, use=1).integers(-limit, limit, (batch, 2), endpoint=True)


def shift_images(x_BF: Array, image: tuple[int, int], shifts_B2: Ints, fill: float) -> Array:
    """Move each sample's (height, width) rectangle by its own shift and fill what comes free.

    ``y[b, r, c] = x[b, r - s[b, 0], c - s[b, 1]]`` inside the rectangle, else ``fill``: each
    agent moves its own part, and no pixel crosses between agents.
    """
    height, width = image
    m = min(int(np.abs(shifts_B2).max(initial=0)), max(image))
    framed = np.full((len(x_BF), height + 2 * m, width + 2 * m), fill, x_BF.dtype)
    framed[:, m : m + height, m : m + width] = x_BF.reshape(-1, height, width)
    windows = np.lib.stride_tricks.sliding_window_view(framed, image, axis=(1, 2))
    top, left = (m - np.clip(shifts_B2, -m, m)).T
    moved: Array = windows[np.arange(len(x_BF)), top, left]
    return moved.reshape(x_BF.shape)
