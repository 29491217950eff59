"""Data sets: sizes, splits, the built-in ones, order and augmentation, new samples."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdnn_dist import data
from hdnn_dist.data import DataInfo, View, describe, load_features, load_labels, split_features
from hdnn_dist.errors import DataError, SpecError
from hdnn_dist.spec import DataSpec

PLANE = ("swiss_roll", "double_circles", "double_moons")
NAMES = ["a1", "a2", "a3", "a4"]


def spec(**values: object) -> DataSpec:
    return DataSpec.model_validate(values, strict=False)


def agents(n: int) -> list[str]:
    return [f"a{i}" for i in range(n)]


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", *PLANE])
def test_describe_tells_what_loading_gives(name: str) -> None:
    info = describe(spec(name=name))
    for part in ("train", "test"):
        x = load_features(spec(name=name), part, range(info.features))
        y = load_labels(spec(name=name), part)
        assert x.shape == (info.samples(part), info.features)
        assert x.dtype == np.float32
        assert y.shape == (info.samples(part),)
        assert y.dtype == np.int64
        assert set(y) == set(range(info.classes))


def test_describe_mnist_opens_no_file() -> None:
    info = describe(spec(name="mnist", dir="/nowhere"))
    assert info == DataInfo("mnist", 784, 10, (28, 28), 60000, 10000)


@pytest.mark.parametrize("name", ["digits", *PLANE])
def test_fewer_samples_are_the_first(name: str) -> None:
    few = spec(name=name, train_samples=100, test_samples=7)
    for part, n in (("train", 100), ("test", 7)):
        assert describe(few).samples(part) == n
        np.testing.assert_array_equal(
            load_features(few, part, [1]), load_features(spec(name=name), part, [1])[:n]
        )
        np.testing.assert_array_equal(
            load_labels(few, part), load_labels(spec(name=name), part)[:n]
        )


@pytest.mark.parametrize("part", ["train", "test"])
def test_more_samples_than_there_are(part: str) -> None:
    with pytest.raises(SpecError, match=r"4001.*4000") as error:
        describe(spec(name="swiss_roll", **{f"{part}_samples": 4001}))
    assert error.value.loc == ("data", f"{part}_samples")


def test_a_folder_for_a_built_in_set_is_refused() -> None:
    with pytest.raises(SpecError, match="reads no folder") as error:
        describe(spec(name="digits", dir="/somewhere"))
    assert error.value.loc == ("data", "dir")


# --- splits --------------------------------------------------------------------------------------


@st.composite
def fitting_splits(draw: st.DrawFn) -> tuple[DataInfo, dict[str, object], int]:
    cells = st.integers(1, 5)
    down, across = draw(cells), draw(cells)
    height, width = down * draw(cells), across * draw(cells)
    info = DataInfo("mnist", height * width, 10, (height, width), 1, 1)
    kind = draw(st.sampled_from(["auto", "patches", "rows", "columns"]))
    if kind == "auto":
        return info, {"kind": kind}, draw(st.integers(1, height * width))
    if kind == "patches":
        return info, {"kind": kind, "grid": (down, across)}, down * across
    limit = height if kind == "rows" else width
    return info, {"kind": "stripes", "axis": kind}, draw(st.integers(1, limit))


@given(fitting_splits(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_every_feature_is_seen_once(
    fitting: tuple[DataInfo, dict[str, object], int], idle: int, rng: random.Random
) -> None:
    info, split, n = fitting
    names = agents(n + idle)
    seers = names[:]
    rng.shuffle(seers)
    split = {**split, "agents": seers[:n]}
    views = split_features(spec(name="mnist", split=split), info, names)
    seen = [column for view in views for column in view.columns]
    assert sorted(seen) == list(range(info.features))
    assert all(
        (view != View()) == (name in seers[:n]) for name, view in zip(names, views, strict=True)
    )
    sizes = [len(view.columns) for view in views if view.columns]
    if split["kind"] == "auto":
        assert max(sizes) - min(sizes) <= 1
        assert all(view.image is None for view in views)
        return
    raster = np.arange(info.features).reshape(info.image)
    for view in views:
        if view.columns:
            assert view.image is not None
            height, width = view.image
            r, c = divmod(view.columns[0], raster.shape[1])
            np.testing.assert_array_equal(
                np.reshape(view.columns, view.image), raster[r : r + height, c : c + width]
            )


def test_patches_go_row_by_row_in_the_order_of_the_agents() -> None:
    digits = spec(split={"kind": "patches", "grid": (2, 2), "agents": ["a2", "a1", "a3", "a4"]})
    views = split_features(digits, describe(digits), NAMES)
    assert [view.columns[0] for view in views] == [4, 0, 32, 36]
    assert views[0].columns[:5] == (4, 5, 6, 7, 12)
    assert {view.image for view in views} == {(4, 4)}


def test_indices_may_overlap_and_leave_out() -> None:
    indices = {"a3": [1, 0], "a1": [1]}
    roll = spec(name="swiss_roll", split={"kind": "indices", "indices": indices})
    views = split_features(roll, describe(roll), NAMES)
    assert views == (View((1,)), View(), View((1, 0)), View())


@pytest.mark.parametrize(
    ("name", "split", "loc", "message"),
    [
        ("swiss_roll", {"kind": "auto"}, "kind", "4 agents cannot each see one of the 2"),
        ("swiss_roll", {"kind": "patches", "grid": (1, 4)}, "kind", "not a set of images"),
        ("swiss_roll", {"kind": "stripes"}, "kind", "not a set of images"),
        ("digits", {"kind": "auto", "agents": []}, "agents", "no agent sees"),
        ("digits", {"kind": "auto", "agents": ["a1", "b"]}, "agents.1", "no agent 'b'"),
        ("digits", {"kind": "auto", "agents": ["a1", "A2"]}, "agents.1", "did you mean 'a2'"),
        ("digits", {"kind": "stripes", "agents": ["a1", "a1"]}, "agents.1", "named twice"),
        ("digits", {"kind": "patches", "grid": (3, 2)}, "grid", "does not divide 8x8"),
        ("digits", {"kind": "patches", "grid": (4, 2)}, "grid", "8 patches, but 4 agents"),
        ("digits", {"kind": "indices", "indices": {}}, "indices", "no agent sees"),
        ("digits", {"kind": "indices", "indices": {"a1": []}}, "indices", "no agent sees"),
        ("digits", {"kind": "indices", "indices": {"b": [1]}}, "indices.b", "no agent 'b'"),
        ("digits", {"kind": "indices", "indices": {"a1": [0, 64]}}, "indices.a1.1", "0 to 63"),
        ("digits", {"kind": "indices", "indices": {"a1": [3, 3]}}, "indices.a1.1", "comes twice"),
        (
            "digits",
            {"kind": "indices", "indices": {"a1": [3]}, "enter": {"a2": "q"}},
            "enter.a2",
            "no agent 'a2'",
        ),
    ],
)
def test_splits_that_do_not_fit(name: str, split: object, loc: str, message: str) -> None:
    wrong = spec(name=name, split=split)
    with pytest.raises(SpecError, match=message) as error:
        split_features(wrong, describe(wrong), NAMES)
    assert ".".join(map(str, error.value.loc)) == f"data.split.{loc}"


def test_more_stripes_than_rows() -> None:
    digits = spec(split={"kind": "stripes", "axis": "columns"})
    with pytest.raises(SpecError, match="9 agents cannot each see one of the 8 columns"):
        split_features(digits, describe(digits), agents(9))


# --- built-in sets -------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_scaled() -> None:
    x, y = load_features(spec(), "train", range(64)), load_labels(spec(), "train")
    share = np.bincount(y) / np.bincount(np.concatenate([y, load_labels(spec(), "test")]))
    np.testing.assert_allclose(share, 0.8, atol=0.01)
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3
    assert x.min() == np.float32(data.background("digits"))


def test_digits_are_cut_into_train_and_test_without_loss() -> None:
    from sklearn.datasets import load_digits

    parts = [
        np.c_[load_features(spec(), p, range(64)), load_labels(spec(), p)]
        for p in ("train", "test")
    ]
    white, mean, std = data.PIXELS["digits"]
    x, y = load_digits(return_X_y=True)
    whole = np.c_[((x / white - mean) / std).astype(np.float32), y]
    rows = [sorted(map(tuple, a)) for a in (np.concatenate(parts), whole)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", PLANE)
def test_2d_sets_are_the_same_each_time_and_train_is_not_test(name: str) -> None:
    train, test = (load_features(spec(name=name), part, (0, 1)) for part in ("train", "test"))
    np.testing.assert_array_equal(train, load_features(spec(name=name), "train", (0, 1)))
    assert not set(map(tuple, train)) & set(map(tuple, test))
    assert (np.bincount(load_labels(spec(name=name), "test")) == 2000).all()


def test_swiss_roll_lies_on_its_two_spirals() -> None:
    x, y = (
        load_features(spec(name="swiss_roll"), "train", (0, 1)),
        load_labels(spec(name="swiss_roll"), "train"),
    )
    r = np.hypot(*x.T.astype(float)) - 0.2 * (y == 0)
    assert r.min() > -1e-6
    assert r.max() < 1
    turn = 4 * np.pi * r
    on_spiral = (r + 0.2 * (y == 0)) * np.stack([np.cos(turn), np.sin(turn)])
    np.testing.assert_allclose(x.T, on_spiral, atol=1e-5)


def test_double_circles_lie_on_four_rings() -> None:
    circles = spec(name="double_circles")
    x, y = load_features(circles, "train", (0, 1)), load_labels(circles, "train")
    off = np.abs(np.hypot(*x.T)[:, None] - np.arange(1, 5))
    assert (off.min(axis=1) <= 0.3 * np.sqrt(2)).all()
    sure = off.min(axis=1) < 0.3
    np.testing.assert_array_equal(off.argmin(axis=1)[sure] % 2, y[sure])


def test_double_moons_lie_on_their_arcs() -> None:
    moons = spec(name="double_moons")
    x, y = load_features(moons, "train", (0, 1)), load_labels(moons, "train")
    centres = np.array([[[0, 0], [2, 0]], [[1, 0.5], [3, 0.5]]])[y]
    off = np.abs(np.linalg.norm(x[:, None] - centres, axis=2) - 1).min(axis=1)
    assert (off <= 0.15 * np.sqrt(2) + 1e-6).all()
    assert (np.where(y == 0, x[:, 1], 0.5 - x[:, 1]) > -0.15 - 1e-6).all()


@pytest.mark.parametrize("name", ["digits", *PLANE, "mnist"])
def test_no_columns_read_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_embedded", None)
    monkeypatch.setattr(data, "read_mnist", None)
    x = load_features(spec(name=name, train_samples=9), "train", ())
    assert x.shape == (9, 0)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 63), min_size=1, max_size=64))
def test_columns_come_in_the_order_given(columns: list[int]) -> None:
    few = spec(test_samples=5)
    whole = load_features(few, "test", range(64))
    np.testing.assert_array_equal(load_features(few, "test", columns), whole[:, columns])


@pytest.mark.parametrize("part", ["train", "test"])
def test_whole_images_are_what_the_features_are_scaled_from(part: str, folder: Path) -> None:
    for some in (spec(train_samples=9), spec(name="mnist", dir=str(folder), test_samples=7)):
        info = describe(some)
        images = data.load_images(some, part)
        assert images.dtype == np.uint8
        x = load_features(some, part, range(info.features))
        np.testing.assert_allclose(data.scaled(some.name, images), x, atol=1e-6)


def test_a_process_holds_one_copy_of_whole_images(folder: Path) -> None:
    some = {"name": "mnist", "dir": str(folder)}
    agents_share = data.load_images(spec(**some), "train")
    other_split = spec(**some, split={"kind": "patches", "grid": [4, 4]})
    assert data.load_images(other_split, "train") is agents_share


# --- order and augmentation ----------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(1, 300))
def test_order_is_a_permutation_and_repeats(seed: int, epoch: int, n: int) -> None:
    order = data.epoch_order(seed, epoch, n)
    assert sorted(order) == list(range(n))
    np.testing.assert_array_equal(order, data.epoch_order(seed, epoch, n))


def test_orders_and_shifts_differ_by_seed_and_count() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({tuple(data.epoch_order(*key, 50)) for key in keys}) == 4
    assert len({tuple(data.shifts(*key, 50, 2).ravel()) for key in keys}) == 4


@given(st.integers(0, 1000), st.integers(1, 20))
def test_shares_of_copies_are_all_samples_once_and_even(samples: int, copies: int) -> None:
    shares = [data.share(samples, copy, copies) for copy in range(copies)]
    assert [k for share in shares for k in range(samples)[share]] == list(range(samples))
    sizes = {share.stop - share.start for share in shares}
    assert max(sizes) - min(sizes) <= 1


def test_shifts_take_every_value_within_the_limit() -> None:
    moves = data.shifts(3, 7, 2000, 2)
    assert moves.shape == (2000, 2)
    counts = [np.bincount(column + 2, minlength=5) for column in moves.T]
    assert all(len(c) == 5 and c.min() > 300 for c in counts)
    assert abs(np.corrcoef(moves.T)[0, 1]) < 0.1
    assert not data.shifts(3, 7, 10, 0).any()


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.integers(0, 8), st.integers(0, 99)
)
def test_shift_against_a_loop(height: int, width: int, batch: int, limit: int, seed: int) -> None:
    x = np.random.default_rng(seed).random((batch, height * width), np.float32)
    moves = data.shifts(seed, 0, batch, limit)
    expected = np.full((batch, height, width), -1, np.float32)
    for b, (down, right) in enumerate(moves):
        for r in range(height):
            for c in range(width):
                if 0 <= r + down < height and 0 <= c + right < width:
                    expected[b, r + down, c + right] = x[b, r * width + c]
    moved = data.shift_images(x, (height, width), moves, -1.0)
    assert moved.dtype == x.dtype
    np.testing.assert_array_equal(moved, expected.reshape(x.shape))


# --- new samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 784), (6, 28, 28)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_are_scaled_like_the_set(
    shape: tuple[int, ...], dtype: type, order: str, tmp_path: Path
) -> None:
    raw = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    np.save(tmp_path / "x.npy", np.asarray(raw, order=order))
    columns = [5, 700, 0]
    x = data.load_rows(spec(name="mnist"), tmp_path / "x.npy", columns)
    expected = (raw.reshape(6, 784)[:, columns] / 255 - 0.1307) / 0.3081
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, expected, atol=1e-6)
    assert data.load_rows(spec(name="mnist"), tmp_path / "x.npy", ()).shape == (6, 0)


def test_rows_of_a_2d_set_are_not_scaled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[-1.5, 0.25]]))
    x = data.load_rows(spec(name="swiss_roll"), tmp_path / "x.npy", [1, 0])
    assert x.tolist() == [[0.25, -1.5]]
    assert data.background("swiss_roll") == 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 63)), r"shape \(3, 63\).*\(n, 64\) or \(n, 8, 8\)"),
        (np.zeros(64), "shape"),
        (np.zeros((0, 64)), "shape"),
        (np.zeros((2, 64), complex), "complex128"),
        (np.array([[object()] * 64]), "cannot be read"),
        (np.full((2, 64), np.nan), "not finite"),
        (np.full((2, 64), 17), "from 0 to 16"),
        (np.full((2, 64), -1), "from 0 to 16"),
    ],
)
def test_rows_that_do_not_fit(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        data.load_rows(spec(), tmp_path / "x.npy", [0, 1])


@settings(max_examples=60)
@given(st.integers(0, 200), st.binary(max_size=3))
def test_rows_of_a_damaged_file(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("rows") / "x.npy"
    np.save(path, np.zeros((1, 64), np.uint8))
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + junk)
    if at + len(junk) < len(raw):
        with pytest.raises(DataError):
            data.load_rows(spec(), path, [0])
    path.write_bytes(raw[:at] + junk + raw[at + len(junk) :])
    with contextlib.suppress(DataError):  # and nothing else
        assert data.load_rows(spec(), path, [0]).shape[1] == 1


def test_rows_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npy cannot be read"):
        data.load_rows(spec(), tmp_path / "nothing.npy", [0])
