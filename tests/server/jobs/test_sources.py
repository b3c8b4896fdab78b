"""Arrays of every format are what was written, and broken ones are errors."""

import io
import json
import os
import pickle
import resource
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import fsspec
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
import zarr.codecs.numcodecs
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from jacserve.vocabulary import DTYPES
from jacserve_server.errors import ServiceError
from jacserve_server.jobs.source_checks import parsing
from jacserve_server.jobs.sources import Source, open_source
from jacserve_server.jobs.storage import Location, locate

NAMES = sorted(set(DTYPES) - {"bfloat16"})
REAL = [name for name in NAMES if not name.startswith("complex")]
lawful = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Write = Callable[[Path, np.ndarray], None]


class Opens(Protocol):
    """Writes a file by some function, and opens it as a source."""

    def __call__(
        self, path: str, write: Callable[[Path], object], array: str = ""
    ) -> Source: ...


def at(root: object, path: str) -> Location:
    return locate(f"data/{path}", {"data": str(root)}, field="")


def copy_to_memory(folder: Path) -> str:
    """Returns the URL of a copy in fsspec's memory."""
    url = f"memory:/{folder}"
    system, base = fsspec.url_to_fs(url)
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"{base}/{file.relative_to(folder)}", file.read_bytes())
    return url


@pytest.fixture(params=["local", "memory"])
def opens(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opens]:
    opened: list[Source] = []

    def write_and_open(
        path: str, write: Callable[[Path], object], array: str = ""
    ) -> Source:
        write(tmp_path / path)
        is_local = request.param == "local"
        root = str(tmp_path) if is_local else copy_to_memory(tmp_path)
        opened.append(open_source(at(root, path), array))
        return opened[-1]

    yield write_and_open
    for source in opened:
        source.close()


def write_npy(path: Path, x: np.ndarray) -> None:
    np.save(path, x)


def write_npz(path: Path, x: np.ndarray) -> None:
    np.savez(path, x=x)


def write_small_npz(path: Path, x: np.ndarray) -> None:
    np.savez_compressed(path, x=x)


def chunks(x: np.ndarray) -> tuple[int, ...]:
    return tuple(min(max(size, 1), 3) for size in x.shape)


def write_zarr2(path: Path, x: np.ndarray) -> None:
    zarr.create_array(path, data=x, chunks=chunks(x), zarr_format=2, overwrite=True)


def write_zarr3(path: Path, x: np.ndarray) -> None:
    zarr.create_array(path, data=x, chunks=chunks(x), overwrite=True)


def write_shards(path: Path, x: np.ndarray) -> None:
    zarr.create_array(
        path,
        data=x,
        chunks=chunks(x),
        shards=tuple(2 * size for size in chunks(x)),
        overwrite=True,
    )


def lists(x: np.ndarray, *, fixed: bool = True) -> pa.Array:
    if x.ndim == 1:
        return pa.array(x)
    if not fixed:
        return pa.array(x.tolist(), nested_list(pa.from_numpy_dtype(x.dtype), x.ndim))
    values = pa.array(x.reshape(-1))
    for size in reversed(x.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


def nested_list(kind: pa.DataType, rank: int) -> pa.DataType:
    return pa.list_(nested_list(kind, rank - 1)) if rank > 1 else kind


def write_parquet(path: Path, x: np.ndarray) -> None:
    pq.write_table(pa.table({"x": lists(x)}), path, row_group_size=4)


def write_lists(path: Path, x: np.ndarray) -> None:
    pq.write_table(pa.table({"x": lists(x, fixed=False)}), path, row_group_size=4)


FORMATS: list[tuple[str, Write, list[str]]] = [
    ("x.npy", write_npy, NAMES),
    ("x.npz", write_npz, NAMES),
    ("small.npz", write_small_npz, NAMES),
    ("x.zarr", write_zarr3, NAMES),
    ("x.zarr", write_zarr2, NAMES),
    ("x.zarr", write_shards, ["float32", "int64"]),
    ("x.parquet", write_parquet, REAL),
    ("x.parquet", write_lists, ["float32", "int64"]),
]
of_every_format = pytest.mark.parametrize(
    ("path", "write", "dtypes"), FORMATS, ids=[w.__name__ for _, w, _ in FORMATS]
)


@of_every_format
@pytest.mark.parametrize(
    "scale", [pytest.param(1), pytest.param(20, marks=pytest.mark.slow)]
)
def test_rows_are_those_that_were_written(
    tmp_path: Path, path: str, write: Write, dtypes: list[str], scale: int
) -> None:
    count = iter(range(10**6))
    # Neither format keeps lists of none: of Parquet's, they have no values.
    min_side = 1 if path == "x.parquet" else 0

    @settings(lawful, max_examples=12 * scale)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=7))
        shape = (data.draw(st.integers(min_side, 12)), *shape[1:])
        dtype = np.dtype(data.draw(st.sampled_from(dtypes)))
        x = data.draw(hnp.arrays(dtype, shape))
        folder = tmp_path / str(next(count))
        folder.mkdir()
        write(folder / path, x)
        is_local = data.draw(st.booleans())
        root = str(folder) if is_local else copy_to_memory(folder)
        # What is drawn may end an example early.
        with closing(open_source(at(root, path))) as source:
            assert (source.shape, source.dtype) == (x.shape, x.dtype)
            for _ in range(4):
                start = data.draw(st.integers(0, len(x)))
                stop = data.draw(st.integers(start, len(x)))
                assert_same(source.read(start, stop), x[start:stop])
            assert_same(source.read_all(), x)

    check()


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.dtype.isnative
    assert actual.flags.c_contiguous
    assert actual.flags.writeable
    np.testing.assert_array_equal(actual, expected)


@of_every_format
def test_what_is_read_is_new_memory(
    opens: Opens, path: str, write: Write, dtypes: list[str]
) -> None:
    x = np.arange(24).reshape(8, 3).astype(dtypes[0])
    source = opens(path, lambda p: write(p, x))
    source.read(0, 8)[:] = 0
    source.read_all()[:] = 0
    assert_same(source.read(0, 8), x)


@of_every_format
def test_rows_that_are_not_there_are_a_fault_of_the_caller(
    opens: Opens, path: str, write: Write, dtypes: list[str]
) -> None:
    source = opens(path, lambda p: write(p, np.ones((8, 3), dtypes[0])))
    for start, stop in ((0, 9), (-1, 3), (5, 4)):
        with pytest.raises(ValueError, match="no rows"):
            source.read(start, stop)


@pytest.mark.parametrize(
    ("path", "write"),
    [(p, w) for p, w, _ in FORMATS if p != "x.parquet" and w != write_shards],
)
def test_an_array_may_have_no_rows(opens: Opens, path: str, write: Write) -> None:
    source = opens(path, lambda p: write(p, np.array(2.5)))
    assert source.shape == ()
    assert_same(source.read_all(), np.array(2.5))
    with pytest.raises(ValueError, match="no rows"):
        source.read(0, 1)


@pytest.mark.parametrize(
    ("path", "write"),
    [("x.npy", write_npy), ("x.npz", write_npz), ("x.zarr", write_zarr2)],
)
def test_big_endian_numbers_are_turned(opens: Opens, path: str, write: Write) -> None:
    x = np.arange(12.0).reshape(4, 3)
    source = opens(path, lambda p: write(p, x.astype(">f8")))
    assert_same(source.read(1, 3), x[1:3])


def fails(
    opens: Opens, path: str, write: Callable[[Path], object], text: str, array: str = ""
) -> None:
    """Expects an error that says so, when the source is opened or read."""
    with pytest.raises(ServiceError, match=text) as error:
        opens(path, write, array).read_all()
    assert error.value.reason == "SOURCE_UNREADABLE"
    assert error.value.field == ""
    assert path in error.value.message
    assert "pytest" not in error.value.message


@pytest.mark.parametrize("name", ["x.csv", "x", "x.npy.gz", "zarr"])
def test_other_formats(opens: Opens, name: str) -> None:
    fails(opens, name, Path.touch, r"\.npy, \.npz, \.zarr, \.parquet")


@pytest.mark.parametrize(
    "x",
    [
        np.array([None, 1]),
        np.array(["a", "b"]),
        np.array([b"a", b"b"]),
        np.zeros(3, "M8[s]"),
        np.zeros(3, [("a", "f8"), ("b", "i4")]),
        np.zeros(3, np.longdouble),
        np.zeros(3, ml_dtypes.bfloat16),  # Of which .npy keeps the size alone.
    ],
)
@pytest.mark.parametrize(
    ("path", "write"), [("x.npy", write_npy), ("x.npz", write_npz)]
)
def test_dtypes_of_no_numbers(
    opens: Opens, path: str, write: Write, x: np.ndarray
) -> None:
    fails(opens, path, lambda p: write(p, x), "has dtype .*Save it as one of bool")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["str", "M8[s]", "S4"])
def test_dtypes_of_no_numbers_in_zarr(opens: Opens, version: Any, dtype: str) -> None:
    def write(path: Path) -> None:
        with warnings.catch_warnings(action="ignore"):
            zarr.create_array(path, shape=3, dtype=dtype, zarr_format=version)

    with warnings.catch_warnings(action="ignore"):
        fails(opens, "x.zarr", write, "has dtype")


def test_fortran_order(opens: Opens) -> None:
    x = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    fails(opens, "x.npy", lambda p: np.save(p, x), "ascontiguousarray")
    row = np.lib.format.header_data_from_array_1_0(x[0])
    assert row["fortran_order"] is False
    source = opens("row.npy", lambda p: np.save(p, np.asfortranarray(np.arange(3))))
    assert_same(source.read(1, 3), np.arange(1, 3))


@pytest.mark.parametrize(
    ("path", "array", "text"),
    [
        ("x.npy", "x", "one array"),
        ("two.npz", "", "'x', 'y'"),
        ("two.npz", "z", "'z' of data/two.npz is none of its arrays: 'x', 'y'"),
        ("x.zarr", "x", "one array"),
        ("two.zarr", "", "'x', 'y'"),
        ("two.zarr", "z", "'x', 'y'"),
        ("two.zarr", "../x.zarr", "no path"),
        ("two.zarr", "/x", "no path"),
        ("two.zarr", "x/y", "'x', 'y'"),
        ("two.zarr", "inner", "'inner/a', 'inner/b'"),
        ("two.parquet", "z", "'x', 'y', 'a,b'"),
        ("two.parquet", "x,z", "'x', 'y', 'a,b'"),
        ("two.parquet", "x,x", "asked for 2 times"),
        ("two.parquet", "x,", "'x', 'y', 'a,b'"),
        ("two.parquet", ",", "'x', 'y', 'a,b'"),
        ("two.parquet", "x,a,b", "'x', 'y', 'a,b'"),
    ],
)
def test_names_of_arrays_that_are_not_there(
    opens: Opens, path: str, array: str, text: str
) -> None:
    fails(opens, path, lambda p: two(p.parent), text, array)


def two(folder: Path) -> None:
    """Writes files of an array, and of several."""
    x = np.arange(12.0).reshape(4, 3)
    write_npy(folder / "x.npy", x)
    write_zarr3(folder / "x.zarr", x)
    np.savez(folder / "two.npz", x=x, y=-x)
    group = zarr.open_group(folder / "two.zarr", mode="w")
    group.create_array("x", data=x)
    group.create_array("y", data=-x)
    for name in ("inner/a", "inner/b", "only/one/c"):
        group.create_array(name, data=2 * x)
    table = {"x": x[:, 0], "y": -x[:, 0], "a,b": x[:, 1]}
    pq.write_table(pa.table(table), folder / "two.parquet", row_group_size=3)


@pytest.mark.parametrize(
    ("path", "array", "expected"),
    [
        ("two.npz", "y", -np.arange(12.0).reshape(4, 3)),
        ("two.zarr", "y", -np.arange(12.0).reshape(4, 3)),
        ("two.zarr", "inner/b", 2 * np.arange(12.0).reshape(4, 3)),
        ("two.zarr", "only/one", 2 * np.arange(12.0).reshape(4, 3)),
        ("two.parquet", "x", np.array([0.0, 3, 6, 9])),
        ("two.parquet", "a,b", np.array([1.0, 4, 7, 10])),
        ("two.parquet", "y,x", np.array([[0.0, 0], [-3, 3], [-6, 6], [-9, 9]])),
        ("two.parquet", "", np.array([[r, -r, r + 1] for r in (0.0, 3, 6, 9)])),
    ],
)
def test_names_of_arrays(
    opens: Opens, path: str, array: str, expected: np.ndarray
) -> None:
    source = opens(path, lambda p: two(p.parent), array)
    assert_same(source.read_all(), expected)
    assert_same(source.read(1, 4), expected[1:4])


def test_a_cut_off_file_says_both_sizes(opens: Opens) -> None:
    def write(path: Path) -> None:
        np.save(path, np.arange(1000.0))
        path.write_bytes(path.read_bytes()[:-10])

    fails(opens, "x.npy", write, "8,000 bytes, and there are 7,990")


@pytest.mark.parametrize(
    ("path", "write"),
    [("x.npy", write_npy), ("x.npz", write_npz), ("x.npz", write_small_npz)],
)
def test_a_file_that_is_cut_off_after_opening(
    tmp_path: Path, path: str, write: Write
) -> None:
    x = np.random.default_rng(0).normal(size=100_000)
    write(tmp_path / path, x)
    source = open_source(at(tmp_path, path))
    assert_same(source.read(0, 5), x[:5])
    with (tmp_path / path).open("r+b") as file:
        file.truncate(400_000)
    assert_same(source.read(5, 40_000), x[5:40_000])
    with pytest.raises(ServiceError) as error:
        source.read(40_000, 100_000)
    assert error.value.reason == "SOURCE_UNREADABLE"
    source.close()


def test_reading_on_in_a_compressed_file_begins_where_it_stopped(
    tmp_path: Path,
) -> None:
    """And goes back if it has to."""
    x = np.random.default_rng(0).normal(size=(200_000, 2))
    np.savez_compressed(tmp_path / "x.npz", x=x)
    source = open_source(at(tmp_path, "x.npz"))
    size = (tmp_path / "x.npz").stat().st_size
    before = read_bytes()
    for start in range(0, 200_000, 1000):
        assert_same(source.read(start, start + 1000), x[start : start + 1000])
    assert read_bytes() - before < 1.5 * size
    assert_same(source.read(7, 9), x[7:9])
    source.close()


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.parametrize("claimed", [13, 2**20, 2**40])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_that_is_less_than_it_says(
    opens: Opens, claimed: int, method: int
) -> None:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", header((claimed,)) + bytes(100))

    fails(opens, "x.npz", write, f"takes {8 * claimed:,} bytes, and there are 100")


def header(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def test_a_bomb_is_not_let_off(tmp_path: Path) -> None:
    """A file of 128 KiB that holds 128 MiB: only what the header says is unpacked."""
    with zipfile.ZipFile(
        tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9
    ) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as member:
            member.write(header((4,)))
            for _ in range(128):
                member.write(bytes(2**20))
    before = peak_bytes()
    source = open_source(at(tmp_path, "x.npz"))
    assert_same(source.read_all(), np.zeros(4))
    source.close()
    assert peak_bytes() - before < 32 * 2**20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "shape", [(2**62,), (2**40, 2**40), (0, 2**63), (-1,), (2**64,), (1,) * 40]
)
def test_absurd_shapes(opens: Opens, shape: tuple[int, ...]) -> None:
    fails(opens, "x.npy", lambda p: p.write_bytes(header(shape)), "which no array has")


def test_long_headers(opens: Opens) -> None:
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}"
    padded = text + b" " * 20_000 + b"\n"
    raw = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(padded)) + padded + bytes(8)
    fails(opens, "x.npy", lambda p: p.write_bytes(raw), "can't be read")
    raw = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + text
    fails(opens, "x.npy", lambda p: p.write_bytes(raw), "can't be read")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions(opens: Opens, method: int) -> None:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", header((1,)) + bytes(8))

    fails(opens, "x.npz", write, "savez")


def test_zarr_chunks_that_are_too_large(opens: Opens) -> None:
    def write(path: Path) -> None:
        zarr.create_array(path, shape=2**40, chunks=(2**40,), dtype="f8")

    fails(opens, "x.zarr", write, "chunks of 8,796,093,022,208 bytes")


def test_zarr_shards_of_too_many_chunks(opens: Opens) -> None:
    def write(path: Path) -> None:
        zarr.create_array(path, shape=2**40, chunks=(1,), shards=(2**40,), dtype="f8")

    fails(opens, "x.zarr", write, "shards of more than")


class Command:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def write_encoded(path: Path, codec: str, place: str) -> None:
    """Writes an array of version 2 that says so of its chunks."""
    zarr.create_array(path, shape=4, dtype="f8", zarr_format=2)
    metadata = json.loads((path / ".zarray").read_text())
    metadata |= {"compressor": None, "filters": None}
    metadata[place] = {"id": codec} if place == "compressor" else [{"id": codec}]
    (path / ".zarray").write_text(json.dumps(metadata))


@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_codecs_that_are_not_for_numbers(
    opens: Opens, tmp_path: Path, place: str
) -> None:
    """Pickles run what they hold, but for Zarr's refusal or ours."""
    text = "is encoded by 'base64'"
    fails(opens, "x.zarr", lambda p: write_encoded(p, "base64", place), text)

    def write(path: Path) -> None:
        write_encoded(path, "pickle", place)
        (path / "0").write_bytes(pickle.dumps(Command(tmp_path / "ran")))

    fails(opens, "y.zarr", write, "'pickle'")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "codec",
    [
        ("BZ2", {}),
        ("LZ4", {}),
        ("LZMA", {}),
        ("Zlib", {}),
        ("Shuffle", {"elementsize": 8}),
        ("Delta", {"dtype": "<i8"}),
        ("CRC32", {}),
    ],
)
def test_codecs_of_version_2_in_version_3(opens: Opens, codec: Any) -> None:
    x = np.arange(12).reshape(4, 3)
    name, options = codec
    place = "filters" if name == "Delta" else "compressors"

    def write(path: Path) -> None:
        kind = getattr(zarr.codecs.numcodecs, name)
        places: Any = {place: [kind(**options)]}
        zarr.create_array(path, data=x, chunks=(3, 3), **places)

    with warnings.catch_warnings(action="ignore"):
        source = opens("x.zarr", write)
        assert_same(source.read(1, 4), x[1:4])


def test_a_store_that_changes_is_noticed(tmp_path: Path) -> None:
    """Chunks that are gone would pass for chunks of zeros."""
    x = np.arange(1.0, 13.0).reshape(4, 3)
    write_zarr3(tmp_path / "x.zarr", x)
    source = open_source(at(tmp_path, "x.zarr"))
    assert_same(source.read(0, 1), x[:1])
    (tmp_path / "x.zarr").rename(tmp_path / "y.zarr")
    with pytest.raises(ServiceError, match="is not there"):
        source.read(0, 1)
    write_zarr3(tmp_path / "x.zarr", x)
    with pytest.raises(ServiceError, match="has changed"):
        source.read(0, 1)


@pytest.mark.parametrize(
    ("table", "array", "text"),
    [
        ({"x": pa.array(["a"])}, "", "string"),
        ({"x": pa.array([1], pa.timestamp("s"))}, "", "timestamp"),
        ({"x": pa.array([{"a": 1}])}, "", "struct"),
        ({"x": pa.array([["a"]])}, "", "list"),
        ({"x": pa.array([1.0]), "y": pa.array([1])}, "", "'x' of double, 'y' of int64"),
        ({"x": pa.array([1.0]), "y": pa.array([[1.0]])}, "x,y", "'y' of list"),
        ({"x": pa.array([1.0, None])}, "", "null.*row 1"),
        ({"x": pa.array([[1.0], [None]])}, "", "null.*row 1"),
        ({"x": pa.array([[[1.0, 2.0]], [[3.0, None]]])}, "", "null.*row 1"),
        ({"x": pa.array([[1.0, 2], None], pa.list_(pa.float64(), 2))}, "", "row 1"),
        ({"x": pa.array([[1.0, 2.0], None])}, "", "several lengths"),
        ({"x": pa.array([[1.0], [1.0, 2.0]])}, "", "several lengths.*rows 0 to 1"),
        ({"x": pa.array([[1.0, 2], [1], [1, 2, 3]])}, "", "length 1 in row 1, .* 2"),
        ({"x": pa.array([[[1.0, 2]] * 2, [[1, 2, 3], [4]]])}, "", "length 3 in row 1"),
        ({"x": pa.array([], pa.list_(pa.float64()))}, "", "no rows"),
        ({}, "", "no columns"),
    ],
)
def test_tables_that_are_no_array(
    opens: Opens, table: dict[str, pa.Array], array: str, text: str
) -> None:
    fails(opens, "x.parquet", lambda p: pq.write_table(pa.table(table), p), text, array)


def test_a_wrong_length_in_a_later_row_group(opens: Opens) -> None:
    rows = [[1.0, 2.0]] * 8 + [[1.0]] + [[1.0, 2.0, 3.0]] + [[1.0, 2.0]] * 5

    def write(path: Path) -> None:
        pq.write_table(pa.table({"x": rows}), path, row_group_size=5)

    source = opens("x.parquet", write)
    assert_same(source.read(0, 5), np.array(rows[:5]))
    assert_same(source.read(10, 15), np.array(rows[10:]))
    with pytest.raises(ServiceError, match="length 1 in row 8") as error:
        source.read(0, 15)
    assert error.value.metadata["row"] == "8"


def test_columns_of_a_table_with_others(opens: Opens) -> None:
    """Structs before a list count for all of their fields."""
    table = pa.table(
        {
            "s": [{"a": 1, "b": [{"c": 1.0, "d": "x"}]}] * 3,
            "x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
            "t": ["a", None, "c"],
        }
    )
    source = opens("x.parquet", lambda p: pq.write_table(table, p), "x")
    assert_same(source.read_all(), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))


def test_tensors_in_tables(opens: Opens) -> None:
    x = np.arange(24.0).reshape(4, 2, 3)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(x)
    table = pa.table({"x": tensors})
    source = opens("x.parquet", lambda p: pq.write_table(table, p, row_group_size=3))
    assert_same(source.read_all(), x)
    turned = pa.fixed_shape_tensor(pa.float64(), (3, 2), permutation=[1, 0])
    table = pa.table({"x": pa.ExtensionArray.from_storage(turned, tensors.storage)})
    fails(opens, "y.parquet", lambda p: pq.write_table(table, p), "C order")


def test_only_the_row_groups_that_are_needed_are_read(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=100_000)
    pq.write_table(pa.table({"x": x, "y": x}), tmp_path / "x.parquet",
                   row_group_size=10_000)  # fmt: skip
    source = open_source(at(tmp_path, "x.parquet"), "x")
    before = read_bytes()
    for start in range(50_000, 60_000, 1000):
        assert_same(source.read(start, start + 1000), x[start : start + 1000])
    assert read_bytes() - before < 150_000
    assert_same(source.read(9_990, 30_010), x[9_990:30_010])
    source.close()


def test_two_readings_of_one_table_are_apart(opens: Opens) -> None:
    x = np.arange(8.0)
    source = opens("x.parquet", lambda p: write_parquet(p, x))
    first = source.read(0, 2)
    first[:] = -1.0
    assert_same(source.read(0, 2), x[:2])


def test_pages_that_are_damaged(opens: Opens) -> None:
    def write(path: Path) -> None:
        pq.write_table(
            pa.table({"x": np.random.default_rng(0).normal(size=1000)}),
            path,
            write_page_checksum=True,
            compression="none",
            use_dictionary=False,
        )
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    fails(opens, "x.parquet", write, "can't be read")


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cuts off, overwrites, inserts or removes some bytes, or takes other ones."""
    kind = draw(st.sampled_from(["cut", "set", "set", "set", "put", "drop", "new"]))
    places = draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))
    new = draw(st.binary(min_size=1, max_size=9))

    def damage(raw: bytes) -> bytes:
        for place in places:
            # Most of what can go wrong stands at the beginning or the end.
            at = int(place**2 * len(raw)) if new[0] % 2 else int(place * len(raw))
            match kind:
                case "cut":
                    raw = raw[:at]
                case "set":
                    raw = raw[:at] + new + raw[at + len(new) :]
                case "put":
                    raw = raw[:at] + new + raw[at:]
                case "drop":
                    raw = raw[:at] + raw[at + len(new) :]
                case _:
                    raw = new * 3
        return raw

    return damage


@of_every_format
@pytest.mark.parametrize(
    "scale", [pytest.param(1), pytest.param(40, marks=pytest.mark.slow)]
)
def test_damaged_files(
    tmp_path: Path, path: str, write: Write, dtypes: list[str], scale: int
) -> None:
    """An error that says so, or an array; and no memory for what is not there."""
    x = np.arange(60).reshape(20, 3).astype(dtypes[-1])
    write(tmp_path / path, x)
    target = tmp_path / path
    files = sorted(p for p in [target, *target.rglob("*")] if p.is_file())
    whole = {file: file.read_bytes() for file in files}
    errors: list[ServiceError] = []

    @settings(lawful, max_examples=50 * scale)
    @given(st.sampled_from(files), damages())
    def check(file: Path, damage: Callable[[bytes], bytes]) -> None:
        file.write_bytes(damage(whole[file]))
        try:
            with warnings.catch_warnings(action="ignore"):
                read_a_little(open_source(at(tmp_path, path)))
        except ServiceError as error:
            errors.append(error)
        finally:
            file.write_bytes(whole[file])

    before = peak_bytes()
    check()
    assert peak_bytes() - before < 2**28
    assert {error.reason for error in errors} == {"SOURCE_UNREADABLE"}
    assert not any(str(tmp_path) in error.message for error in errors)
    assert_same(open_source(at(tmp_path, path)).read_all(), x)


def read_a_little(source: Source) -> None:
    try:
        row_bytes = np.prod(source.shape[1:], dtype=float) * source.dtype.itemsize
        rows = int(
            min(source.shape[0] if source.shape else 0, 2**20 // (row_bytes + 1))
        )
        if source.shape:
            array = source.read(0, rows)
            assert array.shape == (rows, *source.shape[1:])
            assert array.dtype == source.dtype
    finally:
        source.close()


@pytest.mark.parametrize("path", ["x.npy", "x.npz", "x.parquet"])
@settings(lawful, max_examples=30)
@given(raw=st.binary(max_size=300))
def test_garbage(tmp_path: Path, path: str, raw: bytes) -> None:
    (tmp_path / path).write_bytes(raw)
    with pytest.raises(ServiceError) as error:
        open_source(at(tmp_path, path))
    assert error.value.reason == "SOURCE_UNREADABLE"


def test_a_root_that_vanishes(tmp_path: Path) -> None:
    (tmp_path / "srv").mkdir()
    for path, write, dtypes in FORMATS:
        write(tmp_path / "srv" / path, np.arange(6).reshape(2, 3).astype(dtypes[0]))
    source = open_source(at(tmp_path / "srv", "x.zarr"))
    (tmp_path / "srv").rename(tmp_path / "moved")
    with pytest.raises(ServiceError) as error:
        source.read(0, 2)
    assert error.value.reason == "STORAGE_UNAVAILABLE"
    for path, _, _ in FORMATS:
        with pytest.raises(ServiceError) as error:
            open_source(at(tmp_path / "srv", path))
        assert error.value.reason == "STORAGE_UNAVAILABLE"


class Flaky(MemoryFileSystem):
    """A storage that can be reached until it can't."""

    protocol = "flaky"
    fault: BaseException | None = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("flaky:", "memory:"))

    def _reach(self) -> None:
        if Flaky.fault:
            raise Flaky.fault

    def _open(self, *args: Any, **kwargs: Any) -> Any:
        self._reach()
        return FlakyFile(super()._open(*args, **kwargs))

    def cat_file(self, *args: Any, **kwargs: Any) -> bytes:
        self._reach()
        return super().cat_file(*args, **kwargs)


class FlakyFile(io.BytesIO):
    def __init__(self, file: Any) -> None:
        super().__init__(file.getvalue())

    def readinto(self, buffer: Any) -> int:
        if Flaky.fault:
            raise Flaky.fault
        return super().readinto(buffer)


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.fault = None
    yield Flaky
    Flaky.fault = None


@of_every_format
@pytest.mark.parametrize(
    "fault", [ConnectionResetError("key:secret@host"), RuntimeError("key:secret@host")]
)
def test_a_storage_that_can_not_be_reached_is_no_broken_file(
    tmp_path: Path,
    flaky: type[Flaky],
    path: str,
    write: Write,
    dtypes: list[str],
    fault: Exception,
) -> None:
    """The job waits for the one, and fails by the other."""
    x = np.random.default_rng(0).integers(0, 9, size=(50_000, 2)).astype(dtypes[-1])
    x = x[:400] if path == "x.zarr" else x[:2000] if path == "x.parquet" else x
    middle = len(x) // 2
    write(tmp_path / path, x)
    url = copy_to_memory(tmp_path).replace("memory:", "flaky:")
    source = open_source(at(url, path))
    assert_same(source.read(0, 3), x[:3])
    flaky.fault = fault
    uses = [lambda: source.read(middle, len(x)), lambda: open_source(at(url, path))]
    for use in uses:
        with pytest.raises(ServiceError) as error:
            use()
        assert error.value.reason == "STORAGE_UNAVAILABLE"
        assert "secret" not in error.value.message
    flaky.fault = None
    assert_same(source.read(middle, len(x)), x[middle:])
    source.close()


@of_every_format
def test_files_are_closed(
    tmp_path: Path, path: str, write: Write, dtypes: list[str]
) -> None:
    write(tmp_path / path, np.ones((8, 3), dtypes[0]))
    (tmp_path / f"broken.{path}").write_bytes(b"broken")
    source = open_source(at(tmp_path, path))
    source.read_all()
    source.close()
    with pytest.raises(ServiceError):
        open_source(at(tmp_path, f"broken.{path}"))
    with pytest.raises(ServiceError):
        open_source(at(tmp_path, path), "no such array")
    held = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    assert not [name for name in held if str(tmp_path) in name]


def test_a_lack_of_memory_is_not_said_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(MemoryError), parsing(at(tmp_path, "x.npy")):
        bytearray(2**62)
